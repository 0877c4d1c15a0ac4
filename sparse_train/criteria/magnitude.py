"""Magnitude. Shape suffixes: O out_features, I in_features."""

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from sparse_train.criteria.base import Criterion
from sparse_train.statistics.activations import ActivationNorm


@dataclass(frozen=True)
class Magnitude(Criterion):
    """``|W_ij|``: the classic score (Han et al., arXiv 1506.02626, section 3.1).

    The magnitude baseline of the Wanda paper compares within a layer: ``Unstructured(group="layer")``.
    """

    rowwise: ClassVar[bool] = True

    def scores(self, weight_OI: Tensor, stats: ActivationNorm | None = None) -> Tensor:
        return weight_OI.abs().float()
