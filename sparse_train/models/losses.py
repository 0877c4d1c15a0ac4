"""The losses: next token, and distillation from a teacher's next-token distributions. All sum in float32, by chunks.

Shape suffixes: B batch, L sequence length, V vocabulary, T all tokens = B * L, N tokens that count, C tokens of one
chunk, K largest of the vocabulary, S sums.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

if TYPE_CHECKING:
    from torchmetrics import MeanMetric

IGNORED = -100
"""transformers' label of positions without a loss."""
_CHUNK_ELEMENTS = 2**22
"""Elements of a chunk of tokens in float32, 16 MiB: large enough to keep a GPU busy, small next to any logits."""


class TopK(NamedTuple):
    """The largest entries of next-token distributions, each with the probability of all others together."""

    ids_BLK: Tensor
    log_probs_BLK: Tensor
    log_rest_BL: Tensor


def next_token_loss(logits_BLV: Tensor, labels_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of each token given those before it.

    Args:
        logits_BLV: any float dtype; the loss is computed in float32 (in bfloat16 perplexity shifts by percents).
        labels_BL: the token ids (they are shifted here), -100 for positions without a loss.

    Returns:
        Mean loss (float32 scalar, nats per token) and the number of tokens in it (int64 scalar).
    """
    labels_T = _shifted(labels_BL)
    tokens = (labels_T != IGNORED).sum()
    (loss,) = _ChunkedSums.apply(_text, None, logits_BLV.flatten(0, 1), labels_T)  # type: ignore[no-untyped-call]
    return loss / tokens.clamp(min=1), tokens


def distillation_loss(
    student_BLV: Tensor,
    teacher_BLV: Tensor | TopK,
    labels_BL: Tensor,
    temperature: float = 1.0,
    hardness_ce: float = 1.0,
    hardness_kldiv: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """``hardness_ce * CE + hardness_kldiv * KL`` of each token given those before it, and the two terms.

    CE is cross-entropy on the labels, and KL is ``t**2 * KL(softmax(teacher / t) || softmax(student / t))`` with ``t``
    the temperature; ``t**2`` keeps its gradient comparable to cross-entropy's (Hinton et al., arXiv 1503.02531,
    section 2). What a ``TopK`` leaves open, the probabilities of all others, is taken to be divided as the student
    divides it: KL is then between distributions over the K ids and "another one", a lower bound of the whole one.

    Args:
        student_BLV: logits in any float dtype; these get the gradient.
        teacher_BLV: logits, or what ``top_k`` keeps of them, made at the same temperature.
        labels_BL: the token ids (they are shifted here), -100 for positions without either loss.
        temperature: ``t``, above 0; larger = more weight on tokens that the teacher finds unlikely.
        hardness_ce, hardness_kldiv: weights of the terms.

    Returns:
        The weighted sum, to train on, and the terms without their weights or gradients: means over the labelled tokens
        (float32 scalars, nats per token; 0 if no token is labelled).
    """
    labels_T = _shifted(labels_BL)
    tokens_N = (labels_T != IGNORED).nonzero().squeeze(1)
    parts = teacher_BLV if isinstance(teacher_BLV, TopK) else (teacher_BLV,)
    terms = partial(_distilled, temperature=temperature, hardness=(hardness_ce, hardness_kldiv))
    operands_T = student_BLV.flatten(0, 1), labels_T, *(part.flatten(0, 1) for part in parts)
    sums_S = _ChunkedSums.apply(terms, tokens_N, *operands_T)  # type: ignore[no-untyped-call]
    total, ce, kldiv = sums_S / max(1, len(tokens_N))
    return total, ce.detach(), kldiv.detach()


def top_k(logits_BLV: Tensor, k: int, temperature: float = 1.0) -> TopK:
    """The K = min(k, V) most likely tokens of each position, with log-probabilities in float32 at a temperature."""
    logits_TV, chunks = logits_BLV.flatten(0, 1), []
    for chunk in _chunks(None, logits_TV):
        log_p_CV = F.log_softmax(logits_TV[chunk].float() / temperature, dim=-1)
        log_p_CK, ids_CK = log_p_CV.topk(min(k, log_p_CV.shape[1]))
        chunks.append((ids_CK.int(), log_p_CK, log_p_CV.exp_().scatter_(1, ids_CK, 0).sum(1).log()))
    return TopK(*(torch.cat(part).unflatten(0, logits_BLV.shape[:2]) for part in zip(*chunks, strict=True)))


def mean_over_tokens(device: torch.device, *, sync: bool = True) -> "MeanMetric":
    """A metric for the mean of ``next_token_loss`` over batches, in float32, and over all processes if ``sync``."""
    from torchmetrics import MeanMetric  # takes 3 s, which prune and a mistyped option do not need

    # by default, a batch whose loss is NaN would be left out
    metric = MeanMetric(nan_strategy=float("nan"), sync_on_compute=sync).to(device)
    metric.set_dtype(torch.float32)
    return metric


def _shifted(labels_BL: Tensor) -> Tensor:
    """For each token, the label of the next one (T,); shifted logits, ``logits[:, :-1]``, would be a copy of them."""
    return F.pad(labels_BL[:, 1:], (0, 1), value=IGNORED).flatten()


# --- sums over the tokens of a chunk: the loss, then what is logged; and the gradient of the loss ---------------------


def _text(logits_CV: Tensor, labels_C: Tensor, *, wants_grad: bool) -> tuple[Tensor, Tensor | None]:
    log_q_CV = F.log_softmax(logits_CV, dim=-1)
    loss = F.nll_loss(log_q_CV, labels_C, ignore_index=IGNORED, reduction="sum")
    if not wants_grad:
        return loss[None], None
    # softmax(logits) - one_hot(label)
    ignored_C1 = (labels_C == IGNORED)[:, None]
    grad_CV = log_q_CV.exp_()
    grad_CV.scatter_add_(1, labels_C[:, None].masked_fill(ignored_C1, 0), -torch.ones_like(grad_CV[:, :1]))
    return loss[None], grad_CV.masked_fill_(ignored_C1, 0)


def _distilled(
    student_CV: Tensor,
    labels_C: Tensor,
    *teacher_C: Tensor,
    temperature: float,
    hardness: tuple[float, float],
    wants_grad: bool,
) -> tuple[Tensor, Tensor | None]:
    of_ce, of_kldiv = hardness
    log_q1_CV = F.log_softmax(student_CV, dim=-1)
    log_q_CV = log_q1_CV if temperature == 1 else F.log_softmax(student_CV / temperature, dim=-1)
    ce = F.nll_loss(log_q1_CV, labels_C, reduction="sum")
    log_p_CV = _log_probs(log_q_CV, temperature, *teacher_C)
    p_CV = log_p_CV.exp()
    # 0 * log(0) = 0: tokens that the teacher rules out
    kldiv = temperature**2 * (log_p_CV - log_q_CV).mul_(p_CV).masked_fill_(p_CV == 0, 0).sum()
    sums_S = torch.stack([of_kldiv * kldiv + (of_ce * ce if of_ce else 0), ce, kldiv])  # 0 * infinity is no loss
    if not wants_grad:
        return sums_S, None
    # of CE: softmax(student) - one_hot(label); of KL: t * (q - p), q and p at temperature t
    q1_CV = log_q1_CV.exp()
    q_CV = q1_CV if temperature == 1 else log_q_CV.exp()
    grad_CV = (q_CV - p_CV).mul_(temperature * of_kldiv).add_(q1_CV, alpha=of_ce)
    return sums_S, grad_CV.scatter_add_(1, labels_C[:, None], torch.full_like(grad_CV[:, :1], -of_ce))


def _log_probs(log_q_CV: Tensor, temperature: float, *teacher_C: Tensor) -> Tensor:
    """The teacher's log-probabilities: of logits, or of the parts of a ``TopK`` and the student's."""
    if len(teacher_C) == 1:
        return F.log_softmax(teacher_C[0].float() / temperature, dim=-1)
    ids_CK, log_p_CK, log_rest_C = teacher_C
    ids_CK = ids_CK.long()
    others_C = log_q_CV.exp().scatter_(1, ids_CK, 0).sum(1).clamp_min(torch.finfo(torch.float32).tiny)
    return (log_q_CV + (log_rest_C - others_C.log())[:, None]).scatter_(1, ids_CK, log_p_CK.float())


class _ChunkedSums(torch.autograd.Function):
    """The sums of ``terms`` (S,) over the rows ``tokens_N`` (None = all); the first of them can be trained on.

    Computes the gradient in forward, where softmax is at hand; it holds that, in the logits' dtype, and no operand.

    The gradient is held without the factor that backward brings (1 / tokens, a scale of the loss), so that it does not
    underflow in float16.
    """

    @staticmethod
    def forward(ctx: Any, terms: Callable[..., Any], tokens_N: Tensor | None, *operands_T: Tensor) -> Tensor:
        logits_TV, *others_T = operands_T
        wants_grad = ctx.needs_input_grad[2]
        grad_TV = torch.zeros_like(logits_TV) if wants_grad else None
        sums = []
        for chunk in _chunks(tokens_N, logits_TV):
            others_C = (each[chunk] for each in others_T)
            sums_S, grad_CV = terms(logits_TV[chunk].float(), *others_C, wants_grad=wants_grad)
            sums.append(sums_S)
            if grad_TV is not None:
                grad_TV[chunk] = grad_CV.to(grad_TV.dtype)
        ctx.save_for_backward(grad_TV)
        return torch.stack(sums).sum(0)

    @staticmethod
    def backward(ctx: Any, grad_S: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # a second derivative will be asked for
            raise RuntimeError(
                "The loss computes its gradient in forward, which has no second derivative (create_graph=True). Use "
                "torch.nn.functional.cross_entropy for a gradient penalty."
            )
        (grad_TV,) = ctx.saved_tensors
        return None, None, grad_TV * grad_S[0], *(None for _ in ctx.needs_input_grad[3:])


def _chunks(tokens_N: Tensor | None, logits_TV: Tensor) -> Iterator[Tensor | slice]:
    """Indices of rows; if all rows count, slices, which copy nothing."""
    size = max(1, _CHUNK_ELEMENTS // logits_TV.shape[-1])
    if tokens_N is not None:
        yield from tokens_N.split(size)
    else:
        yield from (slice(start, start + size) for start in range(0, max(1, len(logits_TV)), size))
