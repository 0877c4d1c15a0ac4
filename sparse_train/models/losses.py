"""The next-token loss, in float32.

Shape suffixes: B batch, L sequence length, V vocabulary, T all tokens = B * L, C tokens of one chunk, K sums.
"""

from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torchmetrics import MeanMetric

from sparse_train.models.chunked_sums import chunked_sums

IGNORED = -100
"""transformers' label of positions without a loss."""


def next_token_loss(logits_BLV: Tensor, labels_BL: Tensor, ignore_index: int = -100) -> tuple[Tensor, Tensor]:
    """Mean cross-entropy of each token given those before it.

    Args:
        logits_BLV: any float dtype; the loss is computed in float32 (in bfloat16 perplexity shifts by percents).
        labels_BL: the token ids (they are shifted here), ``ignore_index`` for positions without a loss.

    Returns:
        Mean loss (float32 scalar, nats per token) and the number of tokens in it (int64 scalar).
    """
    labels_T = shifted(labels_BL, ignore_index)
    sums, gradient = (partial(each, ignore_index=ignore_index) for each in (_sums, _gradient))
    (loss,) = chunked_sums(sums, gradient, None, logits_BLV.flatten(0, 1), labels_T)
    tokens = (labels_T != ignore_index).sum()
    return loss / tokens.clamp(min=1), tokens


def mean_over_tokens(device: torch.device, *, sync: bool = True) -> MeanMetric:
    """A metric for the mean of ``next_token_loss`` over batches, in float32; NaN if one of them is.

    Args:
        sync: compute the mean over all processes, which must then all call.
    """
    # by default, a batch whose loss is NaN would be left out
    metric = MeanMetric(nan_strategy=float("nan"), sync_on_compute=sync).to(device)
    metric.set_dtype(torch.float32)
    return metric


def shifted(labels_BL: Tensor, ignore_index: int) -> Tensor:
    """For each token, the label of the next one (T,).

    Labels are shifted and not logits, because ``logits[:, :-1]`` would copy all of them.
    """
    return F.pad(labels_BL[:, 1:], (0, 1), value=ignore_index).flatten()


def _sums(logits_CV: Tensor, labels_C: Tensor, ignore_index: int) -> Tensor:
    return F.cross_entropy(logits_CV.float(), labels_C, ignore_index=ignore_index, reduction="sum")[None]


def _gradient(grad_K: Tensor, logits_CV: Tensor, labels_C: Tensor, ignore_index: int) -> Tensor:
    # softmax(logits) - one_hot(label)
    ignored_C = labels_C == ignore_index
    grad_CV = F.softmax(logits_CV.float(), dim=-1)
    grad_CV.scatter_add_(1, labels_C.masked_fill(ignored_C, 0)[:, None], -torch.ones_like(grad_CV[:, :1]))
    return grad_CV.mul_(grad_K).masked_fill_(ignored_C[:, None], 0)


def perplexity(mean_loss: Tensor) -> float:
    """exp of a mean loss in nats per token."""
    return float(torch.exp(mean_loss.double()))
