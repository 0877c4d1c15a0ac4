"""What a weight is worth: ``Criterion.scores``. Larger = keep; only the order within a group matters.

Shape suffixes: O out_features, I in_features.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparse_train.activations import ActivationNorm


class Criterion(ABC):
    """Gives every weight of one layer a score.

    A new criterion is a subclass with this one method; recipes name it by its class, nothing is registered.
    """

    needs_activations: ClassVar[bool] = False
    """Whether ``scores`` reads ``stats``; if not, none are gathered."""

    @abstractmethod
    def scores(self, weight_OI: Tensor, stats: ActivationNorm | None) -> Tensor:
        """Score one layer.

        Args:
            weight_OI: the layer's weights, shadow values included, any float dtype.
            stats: norms of the layer's input over the tokens seen; None where ``needs_activations`` is False.

        Returns:
            float32 scores (O, I), larger = keep.
        """


@dataclass(frozen=True)
class Magnitude(Criterion):
    """``|W_ij|``: the classic score (Han et al., 2015)."""

    def scores(self, weight_OI: Tensor, stats: ActivationNorm | None = None) -> Tensor:
        return weight_OI.abs().float()


@dataclass(frozen=True)
class Wanda(Criterion):
    """``|W_ij| * ||X_j||_2``: weight magnitude times the norm of its input feature over all tokens.

    Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", arXiv 2306.11695,
    section 3, equation 1. The paper compares within an output row: use it with ``Unstructured(group="row")``,
    the default, or with N:M.
    """

    needs_activations: ClassVar[bool] = True

    def scores(self, weight_OI: Tensor, stats: ActivationNorm | None) -> Tensor:
        assert stats is not None, "Wanda needs activation statistics"
        return torch.mul(weight_OI.abs().float(), stats.norm_I)
