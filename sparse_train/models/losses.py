"""The losses: next token, and distillation from a teacher's logits and hidden states. All sum in float32, by chunks.

Shape suffixes: B batch, L sequence length, V vocabulary, H hidden width, T all tokens = B * L, N tokens that count,
C tokens of one chunk, K sums, X vocabulary or width.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from torchmetrics import MeanMetric

IGNORED = -100
"""transformers' label of positions without a loss."""
_CHUNK_ELEMENTS = 2**22
"""Elements of a chunk of tokens in float32, 16 MiB: large enough to keep a GPU busy, small next to any logits."""


def next_token_loss(logits_BLV: Tensor, labels_BL: Tensor) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of each token given those before it.

    Args:
        logits_BLV: any float dtype; the loss is computed in float32 (in bfloat16 perplexity shifts by percents).
        labels_BL: the token ids (they are shifted here), -100 for positions without a loss.

    Returns:
        Mean loss (float32 scalar, nats per token) and the number of tokens in it (int64 scalar).
    """
    labels_T = _shifted(labels_BL)
    (loss,) = _chunked_sums(_text_sums, _text_gradient, None, logits_BLV.flatten(0, 1), labels_T)
    tokens = (labels_T != IGNORED).sum()
    return loss / tokens.clamp(min=1), tokens


def logit_losses(
    student_BLV: Tensor, teacher_BLV: Tensor, labels_BL: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Cross-entropy on the labels and KL divergence from the teacher, of each token given those before it.

    The divergence is ``t**2 * KL(softmax(teacher / t) || softmax(student / t))`` with ``t`` the temperature; ``t**2``
    keeps its gradient comparable to cross-entropy's (Hinton et al., arXiv 1503.02531, section 2).

    Args:
        student_BLV, teacher_BLV: logits in any float dtype; only the student's get a gradient.
        labels_BL: the token ids (they are shifted here), -100 for positions without either loss.
        temperature: ``t``, above 0; larger = more weight on tokens that the teacher finds unlikely.

    Returns:
        Means over the labelled tokens (float32 scalars, nats per token; 0 if no token is labelled).
    """
    labels_T = _shifted(labels_BL)
    tokens_N = (labels_T != IGNORED).nonzero().squeeze(1)
    sums, gradient = (partial(each, temperature=temperature) for each in (_logit_sums, _logit_gradient))
    sums_K = _chunked_sums(sums, gradient, tokens_N, student_BLV.flatten(0, 1), teacher_BLV.flatten(0, 1), labels_T)
    ce, kldiv = sums_K / max(1, len(tokens_N))
    return ce, kldiv


def squarehead_loss(
    student_states: Sequence[Tensor], teacher_states: Sequence[Tensor], attention_mask_BL: Tensor
) -> Tensor:
    """SquareHead: squared distance of hidden states, normalised by the teacher's size, summed over layers.

    ``sum over layers of MSE(teacher, student) / MSE(teacher, 0)`` (Kurtic et al., arXiv 2310.06927, section 2): the
    normalisation gives each layer the same weight, though states grow by orders of magnitude with depth.

    Args:
        student_states, teacher_states: one per layer, (B, L, H) in any float dtype; only the student's get a gradient.
        attention_mask_BL: 0 = padding, which is left out.
    """
    tokens_N = attention_mask_BL.flatten().nonzero().squeeze(1)
    losses = []
    for student_BLH, teacher_BLH in zip(student_states, teacher_states, strict=True):
        operands_TH = student_BLH.flatten(0, 1), teacher_BLH.flatten(0, 1)
        # sums instead of means: the numbers of tokens and features cancel out
        distance, size = _chunked_sums(_squared_sums, _squared_gradient, tokens_N, *operands_TH)
        losses.append(distance / size.clamp(min=torch.finfo(size.dtype).tiny))
    return torch.stack(losses).sum()


def mean_over_tokens(device: torch.device, *, sync: bool = True) -> MeanMetric:
    """A metric for the mean of ``next_token_loss`` over batches, in float32, and over all processes if ``sync``."""
    # by default, a batch whose loss is NaN would be left out
    metric = MeanMetric(nan_strategy=float("nan"), sync_on_compute=sync).to(device)
    metric.set_dtype(torch.float32)
    return metric


def perplexity(mean_loss: Tensor) -> float:
    """exp of a mean loss in nats per token."""
    return float(torch.exp(mean_loss.double()))


def _shifted(labels_BL: Tensor) -> Tensor:
    """For each token, the label of the next one (T,); shifted logits, ``logits[:, :-1]``, would be a copy of them."""
    return F.pad(labels_BL[:, 1:], (0, 1), value=IGNORED).flatten()


# --- sums over the tokens of a chunk, and their gradients for the student's rows --------------------------------------
# Gradients by hand: 1.4 to 1.8 times as fast as autograd's, over a vocabulary of 49,152 on a CPU.


def _text_sums(logits_CV: Tensor, labels_C: Tensor) -> Tensor:
    return F.cross_entropy(logits_CV.float(), labels_C, ignore_index=IGNORED, reduction="sum")[None]


def _text_gradient(grad_K: Tensor, logits_CV: Tensor, labels_C: Tensor) -> Tensor:
    # softmax(logits) - one_hot(label)
    ignored_C = labels_C == IGNORED
    grad_CV = F.softmax(logits_CV.float(), dim=-1)
    grad_CV.scatter_add_(1, labels_C.masked_fill(ignored_C, 0)[:, None], -torch.ones_like(grad_CV[:, :1]))
    return grad_CV.mul_(grad_K).masked_fill_(ignored_C[:, None], 0)


def _logit_sums(student_CV: Tensor, teacher_CV: Tensor, labels_C: Tensor, temperature: float) -> Tensor:
    student_CV, teacher_CV = student_CV.float(), teacher_CV.float()
    ce = F.cross_entropy(student_CV, labels_C, reduction="sum")
    log_q_CV = F.log_softmax(student_CV / temperature, dim=-1)
    log_p_CV = F.log_softmax(teacher_CV / temperature, dim=-1)
    kldiv = F.kl_div(log_q_CV, log_p_CV, reduction="none", log_target=True)
    kldiv = kldiv.masked_fill_(log_p_CV == -torch.inf, 0).sum()  # 0 * log(0) = 0: tokens that the teacher rules out
    return torch.stack([ce, temperature**2 * kldiv])


def _logit_gradient(
    grad_K: Tensor, student_CV: Tensor, teacher_CV: Tensor, labels_C: Tensor, temperature: float
) -> Tensor:
    # cross-entropy: softmax(student) - one_hot(label); divergence: t * (q - p), p and q at temperature t
    ce, kldiv = grad_K
    student_CV, teacher_CV = student_CV.float(), teacher_CV.float()
    grad_CV = F.softmax(student_CV, dim=-1).mul_(ce)
    grad_CV.scatter_add_(1, labels_C[:, None], -ce.expand(len(labels_C), 1))
    q_CV = F.softmax(student_CV / temperature, dim=-1)
    p_CV = F.softmax(teacher_CV / temperature, dim=-1)
    return grad_CV.add_(q_CV.sub_(p_CV).mul_(temperature * kldiv))


def _squared_sums(student_CH: Tensor, teacher_CH: Tensor) -> Tensor:
    student_CH, teacher_CH = student_CH.float(), teacher_CH.float()
    return torch.stack([(student_CH - teacher_CH).square().sum(), teacher_CH.square().sum()])


def _squared_gradient(grad_K: Tensor, student_CH: Tensor, teacher_CH: Tensor) -> Tensor:
    return (student_CH.float() - teacher_CH.float()).mul_(2 * grad_K[0])


def _chunked_sums(
    sums: Callable[..., Tensor], gradient: Callable[..., Tensor], tokens_N: Tensor | None, *operands_T: Tensor
) -> Tensor:
    """``sums(*operands)`` (K,) over the rows ``tokens_N`` (None = all); the first operand gets ``gradient``."""
    found_K: Tensor = _ChunkedSums.apply(sums, gradient, tokens_N, *operands_T)  # type: ignore[no-untyped-call]
    return found_K


class _ChunkedSums(torch.autograd.Function):
    """Holds only the operands until backward, which computes each chunk again: one at a time exists in float32."""

    @staticmethod
    def forward(
        ctx: Any, sums: Callable[..., Tensor], gradient: Callable[..., Tensor], tokens_N: Tensor | None, *rows_T: Tensor
    ) -> Tensor:
        ctx.gradient = gradient
        ctx.save_for_backward(tokens_N, *rows_T)
        return torch.stack([sums(*(each[chunk] for each in rows_T)) for chunk in _chunks(tokens_N, rows_T[0])]).sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_K: Tensor) -> tuple[Tensor | None, ...]:
        tokens_N, student_TX, *constants_T = ctx.saved_tensors
        grad_TX = torch.zeros_like(student_TX)
        for chunk in _chunks(tokens_N, student_TX):
            grad_CX = ctx.gradient(grad_K, student_TX[chunk], *(each[chunk] for each in constants_T))
            grad_TX[chunk] = grad_CX.to(grad_TX.dtype)
        return None, None, None, grad_TX, *(None for _ in constants_T)


def _chunks(tokens_N: Tensor | None, student_TX: Tensor) -> Iterator[Tensor | slice]:
    """Indices of rows; if all rows count, slices, which copy nothing."""
    size = max(1, _CHUNK_ELEMENTS // student_TX.shape[-1])
    if tokens_N is not None:
        yield from tokens_N.split(size)
    else:
        yield from (slice(start, start + size) for start in range(0, max(1, len(student_TX)), size))
