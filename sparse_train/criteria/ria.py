"""Relative importance and activations. Shape suffixes: O out_features, R some of these rows, I in_features."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparse_train.criteria.base import Criterion
from sparse_train.statistics.activations import ActivationNorm


@dataclass(frozen=True)
class RIA(Criterion):
    """``(|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) * ||X_j||_2 ** a``.

    A weight counts by its share of its row and of its column, so that no row or column is emptied.
    Source: Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models",
    ICLR 2024, section 3 (its channel permutation is not part of this). Its code compares within a layer unless told
    otherwise: ``Unstructured(group="layer")``.

    Args:
        a: exponent of the activation norm.
    """

    a: float = 0.5
    needs_activations: ClassVar[bool] = True
    rowwise: ClassVar[bool] = True

    def scores(self, weight_OI: Tensor, stats: ActivationNorm | None) -> Tensor:
        return self.scores_of_rows(weight_OI, stats, self.column_sums(weight_OI))

    def column_sums(self, weight_RI: Tensor) -> Tensor:
        return weight_RI.abs().float().sum(0)

    def scores_of_rows(self, weight_RI: Tensor, stats: ActivationNorm | None, column_sums_I: Tensor | None) -> Tensor:
        assert stats is not None and column_sums_I is not None, "RIA needs activation statistics and column sums"
        size_RI = weight_RI.abs().float()
        tiny = torch.finfo(torch.float32).tiny  # an empty row or column gives a share of 0, not 0 / 0
        share_RI = size_RI / column_sums_I.clamp_min(tiny)
        share_RI += size_RI / size_RI.sum(1, keepdim=True).clamp_min(tiny)
        return share_RI.mul_(stats.norm_I**self.a)
