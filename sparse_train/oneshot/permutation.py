"""Channel permutation: with its channels in another order, a model computes the same, and N:M keeps more of it.

N:M keeps the N largest of M scores in a row. Which M channels are neighbours is an accident of the checkpoint: where
three large ones are, one is lost. So channels are dealt out by their sum of scores, and then exchanged by linear sum
assignment, one place of all groups at a time (Pool and Yu, NeurIPS 2021; Zhang et al., ICLR 2024, "Plug-and-Play").
Scores are Wanda's, as shares of their row. Free to move are the channels of the residual stream, in one order for the
whole model, of each MLP, and of each value head. Queries and keys are bound by their rotation.

Shape suffixes: R rows, C channels, G groups of M channels.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from sparse_train.architecture import unambiguous_blocks
from sparse_train.layers.masked_layer import MaskedLayer
from sparse_train.oneshot.forwards import Batch, ForwardContext, call, inference, one_sample, prepared, under_autocast
from sparse_train.patterns import NM, PRUNED, Pattern, parse_word
from sparse_train.terminal import with_bar

_ROUNDS = 6
"""At most. Each exchanges all places once."""
_ROWS = 6
"""One of so many rows that read the residual stream helps to decide its order."""
_AT_ONCE = int(3e7)
"""Elements of a temporary tensor."""
_LAYERS = (*(f"self_attn.{each}_proj" for each in "qkvo"), *(f"mlp.{each}_proj" for each in ("gate", "up", "down")))
_NORMS_OF_QUERIES = ("q_norm", "k_norm", "query_layernorm", "key_layernorm")
_WAY_OUT = "Prune it as it is."


class KeptShares(NamedTuple):
    """The share of a row's Wanda scores that N:M keeps, before and after: the mean of the rows that decided."""

    before: float
    after: float


class _Channels(NamedTuple):
    """Channels that are reordered together."""

    scores_RC: Tensor
    """Wanda's scores of weights that read them, as shares of their row."""
    places: list[tuple[Tensor, int]]
    """Tensors in which they stand, each with its dimension."""


@torch.no_grad()
def permute(
    model: Any,
    batches: Iterable[Batch],
    mask_structure: str | Pattern = "2:4",
    *,
    autocast: torch.dtype | None = None,
    progress: bool = False,
) -> KeptShares:
    """Reorder the channels of a dense model in place, before its first mask.

    The result is an ordinary checkpoint of the same architecture. A failure leaves the model unchanged.

    Args:
        model: of transformers, with the layers of a Llama: ``self_attn.{q,k,v,o}_proj``, ``mlp.{gate,up,down}_proj``.
        batches: calibration data, see ``prune``.
        mask_structure: "N:M", that of the mask to come.
        autocast: computes calibration forwards in this dtype.
        progress: show a progress bar.

    Raises:
        ValueError: another pattern or architecture, parameters that a Llama has not, zeros of an earlier pruning,
            or outputs that change.
    """
    pattern = parse_word(mask_structure, "row")
    if not isinstance(pattern, NM):
        raise ValueError(f"{pattern} compares the same weights in any order of channels. Permute for N:M.")
    decoder = _decoder(model, pattern)
    given = [prepared(batch, model, model.device) for batch in batches]
    if not given:
        raise ValueError("There is no calibration data: the iterable of batches is empty.")
    context = under_autocast(autocast, model.device)
    done: list[tuple[Tensor, int, Tensor]] = []
    kept_before = kept_after = total = 0.0
    with inference(model, use_cache=False):
        norms = _input_norms(model, given, context)
        expected = _logits(model, given[0])
        try:
            for channels in _all_channels(model, decoder, norms, pattern, progress):
                order_C = better_order(channels.scores_RC, pattern)
                kept_before += kept(channels.scores_RC, pattern)
                kept_after += kept(channels.scores_RC[:, order_C], pattern)
                total += float(channels.scores_RC.sum())
                for tensor, dim in channels.places:
                    tensor.copy_(tensor.index_select(dim, order_C))
                    done.append((tensor, dim, order_C))
            found = _logits(model, given[0])
            difference = (found.float() - expected.float()).norm() / expected.float().norm()
            # far above rounding, which is float32's in norms even of a float64 model, and below one tensor left out
            if not difference < max(torch.finfo(expected.dtype).eps, torch.finfo(torch.float32).eps) ** 0.5:
                raise ValueError(
                    f"With its channels permuted, the outputs of {type(model).__name__} change by "
                    f"{float(difference):.2g} of their norm, so it computes more than a Llama does. {_WAY_OUT}"
                )
        except BaseException:
            for tensor, dim, order_C in reversed(done):
                tensor.copy_(tensor.index_select(dim, order_C.argsort()))
            raise
        finally:
            torch.clear_autocast_cache()  # an autocast around this call has casts of the former weights
    return KeptShares(kept_before / total, kept_after / total)


def _logits(model: Any, batch: Batch) -> Tensor:
    """Those of one sample, in the model's own dtype."""
    with torch.autocast(model.device.type, enabled=False):
        logits: Tensor = call(model, one_sample(batch)).logits
    return logits


# --- one order --------------------------------------------------------------------------------------------------------


def kept(scores_RC: Tensor, pattern: NM) -> float:
    """Sum of the scores that N:M keeps."""
    groups_RGM = scores_RC.reshape(len(scores_RC), -1, pattern.m)
    return float(groups_RGM.topk(pattern.n, dim=-1).values.sum())


def better_order(scores_RC: Tensor, pattern: NM) -> Tensor:
    """An order of channels (C,) in which N:M keeps more; the present one if none is found."""
    from scipy.optimize import linear_sum_assignment  # type: ignore[import-untyped,unused-ignore]

    count, n, m = scores_RC.shape[1] // pattern.m, pattern.n, pattern.m
    order_GM = scores_RC.sum(0).argsort(descending=True).reshape(m, count).T.contiguous()
    best = kept(scores_RC[:, order_GM.reshape(-1)], pattern)
    for _ in range(_ROUNDS):
        for place in range(m):
            others = order_GM[:, [each for each in range(m) if each != place]].reshape(-1)
            others_RGM = scores_RC[:, others].reshape(len(scores_RC), count, m - 1).sort(-1, descending=True).values
            # of M, the N largest are the N - 1 largest of the others, and their next or the one at this place
            next_RG, largest_G = others_RGM[..., n - 1], others_RGM[..., :n].sum((0, 2))
            moved_RG = scores_RC[:, order_GM[:, place]]
            kept_GG = largest_G[:, None].repeat(1, count)  # in each group, with the channel of each
            rows = max(1, _AT_ONCE // count**2)
            for some_RG, some_next_RG in zip(moved_RG.split(rows), next_RG.split(rows), strict=True):
                kept_GG += (some_RG[:, None] - some_next_RG[:, :, None]).clamp_(min=0).sum(0)
            chosen = linear_sum_assignment(kept_GG.cpu().numpy(), maximize=True)[1]
            order_GM[:, place] = order_GM[:, place][torch.as_tensor(chosen, device=order_GM.device)]
        now = kept(scores_RC[:, order_GM.reshape(-1)], pattern)
        if now <= best * (1 + 1e-5):
            break
        best = now
    order_C = order_GM.reshape(-1)
    present = torch.arange(len(order_C), device=order_C.device)
    return order_C if kept(scores_RC[:, order_C], pattern) > kept(scores_RC, pattern) else present


# --- where channels stand ---------------------------------------------------------------------------------------------


def _decoder(model: Any, pattern: NM) -> Any:
    """The module that holds the blocks; ValueError if the model has a parameter that a Llama has not."""
    if getattr(model, "get_output_embeddings", lambda: None)() is None:
        raise ValueError(f"permute takes a causal language model of transformers, not a {type(model).__name__}.")
    name = unambiguous_blocks(model) or ""
    decoder = model.get_submodule(name.rpartition(".")[0])
    blocks = list(decoder.layers) if name.endswith("layers") else []
    layers = [(own, _at(block, own)) for block in blocks for own in _LAYERS]
    missing = next((own for own, each in layers if not _is_plain(each)), None if blocks else _LAYERS[0])
    if missing:
        raise ValueError(
            "Channels can be permuted in models with the plain linear layers of a Llama. The blocks of "
            f"{type(model).__name__} have no {missing} of that kind. {_WAY_OUT}"
        )
    queries = [_at(block, f"self_attn.{own}") for block in blocks for own in _NORMS_OF_QUERIES]
    modules = [*_tables(model), *(layer for _, layer in layers), *(each for each in queries if each is not None)]
    known = {id(each) for module in modules for each in module.parameters()} | set(map(id, _norms(decoder)))
    if unknown := next((name for name, each in model.named_parameters() if id(each) not in known), None):
        raise ValueError(f"{type(model).__name__} has {unknown}, and a Llama has nothing of the kind. {_WAY_OUT}")
    zeros = sum(int((layer.weight == 0).sum()) for _, layer in layers)
    if zeros > PRUNED * sum(layer.weight.numel() for _, layer in layers):
        raise ValueError("The model is pruned already, and its zeros would leave their groups. Permute before pruning.")
    for own, layer in layers:
        pattern.check_layer(own, layer.in_features)
    return decoder


def _tables(model: Any) -> tuple[nn.Module, nn.Module]:
    return model.get_input_embeddings(), model.get_output_embeddings()


def _norms(decoder: Any) -> list[nn.Parameter]:
    """Vectors over the residual stream."""
    children = [child for module in (decoder, *decoder.layers) for child in module.children()]
    width = decoder.layers[0].self_attn.q_proj.in_features
    return [each for child in children for each in child.parameters(recurse=False) if each.shape == (width,)]


def _is_plain(layer: Any) -> bool:
    return isinstance(layer, nn.Linear) and not isinstance(layer, MaskedLayer)


def _at(module: Any, name: str) -> Any:
    for part in name.split("."):
        module = getattr(module, part, None)
    return module


def _all_channels(
    model: Any, decoder: Any, norms: Mapping[nn.Module, Tensor], pattern: NM, progress: bool
) -> Iterator[_Channels]:
    """Those of each block, then those of the residual stream; one at a time, to hold one set of scores."""

    def shares(layer: nn.Linear) -> Tensor:
        scores_RC = layer.weight.abs() * norms[layer]
        return scores_RC / scores_RC.sum(1, keepdim=True).clamp(min=1e-12)

    for block in with_bar(decoder.layers, "permuting", shown=progress):
        attention, mlp = block.self_attn, block.mlp
        outputs = [*_outputs(mlp.gate_proj), *_outputs(mlp.up_proj)]
        yield _Channels(shares(mlp.down_proj), [(mlp.down_proj.weight, 1), *outputs])
        # a value head is read by several query heads, one after another in o_proj
        size, scores = attention.head_dim, shares(attention.o_proj).split(attention.head_dim, dim=1)
        read = attention.o_proj.weight.split(size, dim=1)
        repeats = len(read) // (attention.v_proj.out_features // size)
        for head, first in enumerate(range(0, len(read), repeats) if size % pattern.m == 0 else ()):
            queries = slice(first, first + repeats)
            values = [(each[head * size : (head + 1) * size], 0) for each, _ in _outputs(attention.v_proj)]
            yield _Channels(torch.cat(scores[queries]), [*((each, 1) for each in read[queries]), *values])

    sampled = torch.Generator().manual_seed(0)
    scores, places = [], []
    for block in decoder.layers:
        attention, mlp = block.self_attn, block.mlp
        for layer in (attention.q_proj, attention.k_proj, attention.v_proj, mlp.gate_proj, mlp.up_proj):
            rows = torch.randperm(len(layer.weight), generator=sampled)[: max(8, len(layer.weight) // _ROWS)]
            scores.append(shares(layer)[rows.to(layer.weight.device)])
            places.append((layer.weight, 1))
        places += [*_outputs(attention.o_proj), *_outputs(mlp.down_proj)]
    places += [(each, 0) for each in _norms(decoder)]
    tables = {id(each.weight): each.weight for each in _tables(model)}  # one if they are tied
    places += [(each, 1) for each in tables.values()]
    yield _Channels(torch.cat(scores), places)


def _outputs(layer: nn.Linear) -> list[tuple[Tensor, int]]:
    return [(each, 0) for each in (layer.weight, layer.bias) if each is not None]


def _input_norms(model: nn.Module, batches: Iterable[Batch], context: ForwardContext) -> dict[nn.Module, Tensor]:
    """The norm of each input channel (C,) of the linear layers, over the tokens of all batches."""
    squares: dict[nn.Module, Tensor] = {}
    counts: list[Tensor | None] = [None]

    def add(layer: nn.Module, inputs: tuple[Any, ...]) -> None:
        x, mask = inputs[0].float(), counts[0]
        tokens = x.flatten(0, -2) if mask is None or mask.shape != x.shape[:-1] else x[mask.bool()]
        squares[layer] = squares.get(layer, 0.0) + tokens.square().sum(0)

    hooks = [each.register_forward_pre_hook(add) for each in model.modules() if isinstance(each, nn.Linear)]
    try:
        for batch in batches:
            counts[0] = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            with context():
                call(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {layer: sums.sqrt() for layer, sums in squares.items()}
