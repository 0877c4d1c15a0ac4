"""Channels of a Llama in another order, in which N:M pruning keeps more of Wanda's scores. The function stays the same.

N:M keeps the N largest of M scores in a row. Which M channels are neighbours is an accident of the checkpoint: where
three large ones are, one is lost. So channels are dealt out by their sum of scores, and then exchanged by linear sum
assignment, one place of all groups at a time, with Wanda's scores as shares of their row (Pool and Yu, NeurIPS 2021;
Zhang et al., ICLR 2024, "Plug-and-Play"). Free to move are the channels of the residual stream, one order for the
whole model, of each MLP, and of each value head. Queries and keys are bound by their rotation.

Sums are rounded differently with other numbers of threads, and assignments follow: orders differ, and keep about as
much (one-shot IHT at 2:4 on validation articles: 38.02 and 38.06). The order behind the row of
``static_iht_permuted_distill`` is such a one, of two threads and an earlier form of this script.

The result is a plain checkpoint. It is an arm of ``quality.py``, not a part of the package.

Shape suffixes: R rows, C channels, G groups.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor, nn

M, N = 4, 2
ROUNDS = 6
ROWS = 256
"""Of each 1536 rows that read the residual stream, those that decide its order."""


def kept(scores_RC: Tensor, order_C: Tensor) -> float:
    """Sum of the scores that N:M keeps."""
    groups_RGM = scores_RC[:, order_C].reshape(len(scores_RC), -1, M)
    return float(groups_RGM.topk(N, dim=-1).values.sum())


def better_order(scores_RC: Tensor) -> Tensor:
    """An order of channels in which 2:4 keeps more."""
    count = scores_RC.shape[1] // M
    order_GM = scores_RC.sum(0).argsort(descending=True).reshape(M, count).T.contiguous()
    best = kept(scores_RC, order_GM.reshape(-1))
    for _ in range(ROUNDS):
        for place in range(M):
            others = order_GM[:, [each for each in range(M) if each != place]].reshape(-1)
            largest_RGM = scores_RC[:, others].reshape(len(scores_RC), count, M - 1).sort(-1, descending=True).values
            # of the two largest of four, one is the largest of the three, the other their second or the fourth
            second_RG, two_G = largest_RGM[..., 1], largest_RGM[..., :2].sum((0, 2))
            moved_RG = scores_RC[:, order_GM[:, place]]
            gain_GG = two_G[:, None].repeat(1, count)
            rows = max(1, int(3e7) // count**2)
            for moved, second in zip(moved_RG.split(rows), second_RG.split(rows), strict=True):
                gain_GG += (moved[:, None] - second[:, :, None]).clamp_(min=0).sum(0)
            chosen = linear_sum_assignment(gain_GG.numpy(), maximize=True)[1]
            order_GM[:, place] = order_GM[:, place][torch.as_tensor(chosen)]
        now = kept(scores_RC, order_GM.reshape(-1))
        if now <= best * (1 + 1e-5):
            break
        best = now
    return order_GM.reshape(-1)


def input_norms(model: nn.Module, batches: Iterable[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """The norm of each input channel of the linear layers, on some batches."""
    squares: dict[str, Tensor] = {}

    def add(name: str, x: Tensor) -> None:
        squares[name] = squares.get(name, torch.zeros(())) + x.float().flatten(0, -2).square().sum(0)

    linears = {name: each for name, each in model.named_modules() if isinstance(each, nn.Linear)}
    hooks = [
        each.register_forward_pre_hook(lambda _, inputs, name=name: add(name, inputs[0]))  # type: ignore[misc]
        for name, each in linears.items()
    ]
    with torch.no_grad():
        for batch in batches:
            model(input_ids=batch["input_ids"])
    for hook in hooks:
        hook.remove()
    return {name: sums.sqrt() for name, sums in squares.items()}


@torch.no_grad()
def permute(model: Any, norms: Mapping[str, Tensor]) -> None:
    """Reorder the channels of a Llama with tied or free embeddings in place.

    Args:
        model: with ``config`` and parameters as ``LlamaForCausalLM`` has them.
        norms: see ``input_norms``; by name of the layer.
    """
    names = {each: name for name, each in model.named_modules()}

    def shares(layer: nn.Linear) -> Tensor:
        scores_RC = layer.weight.abs() * norms[names[layer]]
        return scores_RC / scores_RC.sum(1, keepdim=True).clamp(min=1e-12)

    def reorder(parameter: Tensor, order_C: Tensor, dim: int) -> None:
        parameter.copy_(parameter.index_select(dim, order_C))

    size, heads = model.config.head_dim, model.config.num_key_value_heads
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        inner_C = better_order(shares(mlp.down_proj))
        reorder(mlp.down_proj.weight, inner_C, 1)
        reorder(mlp.gate_proj.weight, inner_C, 0)
        reorder(mlp.up_proj.weight, inner_C, 0)
        # a value head is read by several query heads, one after another in o_proj
        of_heads = shares(attention.o_proj).split(size, dim=1)
        repeats = len(of_heads) // heads
        orders = [better_order(torch.cat(of_heads[each * repeats : (each + 1) * repeats])) for each in range(heads)]
        values = [order_C + each * size for each, order_C in enumerate(orders)]
        outputs = [orders[each // repeats] + each * size for each in range(len(of_heads))]
        reorder(attention.v_proj.weight, torch.cat(values), 0)
        reorder(attention.o_proj.weight, torch.cat(outputs), 1)

    readers, writers, vectors = _of_stream(model)
    sampled = torch.Generator().manual_seed(0)
    parts = []
    for layer in readers:
        rows = max(8, ROWS * len(layer.weight) // 1536)
        parts.append(shares(layer)[torch.randperm(len(layer.weight), generator=sampled)[:rows]])
    stream_C = better_order(torch.cat(parts))
    for layer in readers:
        reorder(layer.weight, stream_C, 1)
    for each in (*writers, *vectors):
        reorder(each.weight, stream_C, 0)
    reorder(model.model.embed_tokens.weight, stream_C, 1)
    if model.lm_head.weight is not model.model.embed_tokens.weight:
        reorder(model.lm_head.weight, stream_C, 1)


def _of_stream(model: Any) -> tuple[list[nn.Linear], list[nn.Linear], list[nn.Module]]:
    """The layers that read the residual stream, those that write it, and the norms over its channels."""
    readers: list[nn.Linear] = []
    writers: list[nn.Linear] = []
    norms = [model.model.norm]
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        readers += [attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj]
        writers += [attention.o_proj, mlp.down_proj]
        norms += [block.input_layernorm, block.post_attention_layernorm]
    return readers, writers, norms
