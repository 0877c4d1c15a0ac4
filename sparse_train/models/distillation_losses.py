"""The losses of distillation, as pure functions: ``logit_losses`` and ``squarehead_loss``, in chunks of tokens.

Shape suffixes: B batch, L sequence length, V vocabulary, H hidden width, T all tokens = B * L, N those of them that
count, C those of one chunk, K sums, X vocabulary or width.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

_CHUNK_ELEMENTS = 2**22
"""Elements of a chunk of tokens in float32, 16 MiB: large enough to keep a GPU busy, small beside any logits."""


def logit_losses(
    student_BLV: Tensor, teacher_BLV: Tensor, labels_BL: Tensor, temperature: float = 1.0, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """Cross-entropy on the labels and KL divergence from the teacher, of each token given those before it.

    The divergence is ``t**2 * KL(softmax(teacher / t) || softmax(student / t))`` with ``t`` the temperature; ``t**2``
    keeps its gradient comparable to cross-entropy's (Hinton et al., arXiv 1503.02531, section 2).

    Args:
        student_BLV: logits in any float dtype; only they get a gradient.
        teacher_BLV: logits over the same vocabulary, in any float dtype.
        labels_BL: the token ids themselves (shifted here), ``ignore_index`` where there is no loss, of either kind.
        temperature: ``t``, above 0; larger = more weight on what the teacher holds for unlikely.
        ignore_index: label of positions without a loss.

    Returns:
        Mean cross-entropy and mean divergence over the labelled tokens (float32 scalars, nats a token; 0 where no
        token is labelled).
    """
    # The labels are shifted and not the logits: ``logits[:, :-1]`` would be copied whole.
    labels_T = F.pad(labels_BL[:, 1:], (0, 1), value=ignore_index).flatten()
    tokens_N = (labels_T != ignore_index).nonzero().squeeze(1)
    operands_T = student_BLV.flatten(0, 1), teacher_BLV.flatten(0, 1), labels_T
    sums, gradient = (partial(each, temperature=temperature) for each in (_logit_sums, _logit_gradient))
    sums_K = _chunked_sums(sums, gradient, tokens_N, *operands_T)
    ce, kldiv = sums_K / max(1, len(tokens_N))
    return ce, kldiv


def squarehead_loss(
    student_states: Sequence[Tensor], teacher_states: Sequence[Tensor], attention_mask_BL: Tensor
) -> Tensor:
    """SquareHead: squared distance of hidden states, normalised by the teacher's size, summed over layers.

    ``sum over layers of MSE(teacher, student) / MSE(teacher, 0)`` (Kurtic et al., arXiv 2310.06927, section 2): the
    normalisation gives each layer the same weight, though states grow by orders of magnitude with depth.

    Args:
        student_states: of each layer, (B, L, H) in any float dtype; only they get a gradient.
        teacher_states: the same of the teacher.
        attention_mask_BL: 0 = padding, which is left out.

    Returns:
        A float32 scalar, 0 where every token is padding.
    """
    tokens_N = attention_mask_BL.flatten().nonzero().squeeze(1)
    losses = []
    for student_BLH, teacher_BLH in zip(student_states, teacher_states, strict=True):
        operands_TH = student_BLH.flatten(0, 1), teacher_BLH.flatten(0, 1)
        # sums do for means: numbers of tokens and features cancel out
        distance, size = _chunked_sums(_squared_sums, _squared_gradient, tokens_N, *operands_TH)
        losses.append(distance / size.clamp(min=torch.finfo(size.dtype).tiny))
    return torch.stack(losses).sum()


def _logit_sums(student_CV: Tensor, teacher_CV: Tensor, labels_C: Tensor, temperature: float) -> Tensor:
    student_CV, teacher_CV = student_CV.float(), teacher_CV.float()
    ce = F.cross_entropy(student_CV, labels_C, reduction="sum")
    log_q_CV = F.log_softmax(student_CV / temperature, dim=-1)
    log_p_CV = F.log_softmax(teacher_CV / temperature, dim=-1)
    kldiv = F.kl_div(log_q_CV, log_p_CV, reduction="sum", log_target=True)
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


class _ChunkedSums(torch.autograd.Function):
    """Sums over tokens, chunk by chunk, holding the operands and nothing else until backward.

    Plain autograd would hold several float32 copies of all logits. Backward computes each chunk again, so that in both
    directions a chunk is all there is in float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        sums: Callable[..., Tensor],
        gradient: Callable[..., Tensor],
        tokens_N: Tensor,
        student_TX: Tensor,
        *constants_T: Tensor,
    ) -> Tensor:
        ctx.gradient = gradient
        ctx.save_for_backward(tokens_N, student_TX, *constants_T)
        chunks = tokens_N.split(_chunk_size(student_TX))
        operands_T = (student_TX, *constants_T)
        return torch.stack([sums(*(each[chunk_C] for each in operands_T)) for chunk_C in chunks]).sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_K: Tensor) -> tuple[Tensor | None, ...]:
        tokens_N, student_TX, *constants_T = ctx.saved_tensors
        grad_TX = torch.zeros_like(student_TX)
        for chunk_C in tokens_N.split(_chunk_size(student_TX)):
            grad_CX = ctx.gradient(grad_K, student_TX[chunk_C], *(each[chunk_C] for each in constants_T))
            grad_TX[chunk_C] = grad_CX.to(grad_TX.dtype)
        return None, None, None, grad_TX, *(None for _ in constants_T)


def _chunk_size(x_TX: Tensor) -> int:
    return max(1, _CHUNK_ELEMENTS // x_TX.shape[-1])


def _chunked_sums(
    sums: Callable[..., Tensor],
    gradient: Callable[..., Tensor],
    tokens_N: Tensor,
    student_TX: Tensor,
    *constants_T: Tensor,
) -> Tensor:
    """``sums(student, *constants)`` (K,) over the tokens ``tokens_N``; a gradient goes to the student alone.

    Args:
        sums: of rows of all operands, added up over them, float32 (K,).
        gradient: of ``grad_K`` and the same rows, for those of the student, float32.
        tokens_N: rows that count, int64.
        student_TX: a row a token.
        constants_T: whatever else has an entry a token.
    """
    found_K: Tensor = _ChunkedSums.apply(sums, gradient, tokens_N, student_TX, *constants_T)  # type: ignore[no-untyped-call]
    return found_K
