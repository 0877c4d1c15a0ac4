"""The losses of distillation, as pure functions: ``logit_losses`` and ``squarehead_loss``, in chunks of tokens.

Shape suffixes: B batch, L sequence length, V vocabulary, H hidden width, T all tokens = B * L, N tokens that count,
C tokens of one chunk, K sums, X vocabulary or width.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F

from sparse_train.models.chunked_sums import chunked_sums
from sparse_train.models.losses import shifted


def logit_losses(
    student_BLV: Tensor, teacher_BLV: Tensor, labels_BL: Tensor, temperature: float = 1.0, ignore_index: int = -100
) -> tuple[Tensor, Tensor]:
    """Cross-entropy on the labels and KL divergence from the teacher, of each token given those before it.

    The divergence is ``t**2 * KL(softmax(teacher / t) || softmax(student / t))`` with ``t`` the temperature; ``t**2``
    keeps its gradient comparable to cross-entropy's (Hinton et al., arXiv 1503.02531, section 2).

    Args:
        student_BLV: logits in any float dtype; only they get a gradient.
        teacher_BLV: logits over the same vocabulary, in any float dtype.
        labels_BL: the token ids (they are shifted here), ``ignore_index`` for positions without either loss.
        temperature: ``t``, above 0; larger = more weight on tokens that the teacher finds unlikely.
        ignore_index: label of positions without a loss.

    Returns:
        Mean cross-entropy and mean divergence over the labelled tokens (float32 scalars, nats per token; 0 if no token
        is labelled).
    """
    labels_T = shifted(labels_BL, ignore_index)
    tokens_N = (labels_T != ignore_index).nonzero().squeeze(1)
    operands_T = student_BLV.flatten(0, 1), teacher_BLV.flatten(0, 1), labels_T
    sums, gradient = (partial(each, temperature=temperature) for each in (_logit_sums, _logit_gradient))
    sums_K = chunked_sums(sums, gradient, tokens_N, *operands_T)
    ce, kldiv = sums_K / max(1, len(tokens_N))
    return ce, kldiv


def squarehead_loss(
    student_states: Sequence[Tensor], teacher_states: Sequence[Tensor], attention_mask_BL: Tensor
) -> Tensor:
    """SquareHead: squared distance of hidden states, normalised by the teacher's size, summed over layers.

    ``sum over layers of MSE(teacher, student) / MSE(teacher, 0)`` (Kurtic et al., arXiv 2310.06927, section 2): the
    normalisation gives each layer the same weight, though states grow by orders of magnitude with depth.

    Args:
        student_states: one per layer, (B, L, H) in any float dtype; only they get a gradient.
        teacher_states: the same for the teacher.
        attention_mask_BL: 0 = padding, which is left out.

    Returns:
        A float32 scalar, 0 if every token is padding.
    """
    tokens_N = attention_mask_BL.flatten().nonzero().squeeze(1)
    losses = []
    for student_BLH, teacher_BLH in zip(student_states, teacher_states, strict=True):
        operands_TH = student_BLH.flatten(0, 1), teacher_BLH.flatten(0, 1)
        # sums instead of means: the numbers of tokens and features cancel out
        distance, size = chunked_sums(_squared_sums, _squared_gradient, tokens_N, *operands_TH)
        losses.append(distance / size.clamp(min=torch.finfo(size.dtype).tiny))
    return torch.stack(losses).sum()


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
