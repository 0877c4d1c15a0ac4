"""Plain references, written from the papers: slow, obvious, in float64 unless bits are compared."""

import torch
from torch import Tensor


def row_mask(scores_OI: Tensor, sparsity: float) -> Tensor:
    """Wanda, arXiv 2306.11695, algorithm 1: sort each row, prune the first int(I * s). Stable: lower index first."""
    keep = torch.ones_like(scores_OI, dtype=torch.bool)
    order = torch.sort(scores_OI, dim=1, stable=True).indices
    keep.scatter_(1, order[:, : int(scores_OI.shape[1] * sparsity)], False)
    return keep


def nm_mask(scores_OI: Tensor, kept: int, group: int) -> Tensor:
    """The reference's loop over groups of consecutive inputs, with a stable sort in place of its topk."""
    keep = torch.ones_like(scores_OI, dtype=torch.bool)
    for start in range(0, scores_OI.shape[1], group):
        order = torch.sort(scores_OI[:, start : start + group], dim=1, stable=True).indices
        keep.scatter_(1, start + order[:, : group - kept], False)
    return keep


def wanda_scores(weight_OI: Tensor, inputs_TI: Tensor) -> Tensor:
    """|W_ij| * ||X_j||_2, equation 1."""
    return weight_OI.double().abs() * inputs_TI.double().pow(2).sum(0).sqrt()
