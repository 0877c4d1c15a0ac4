"""``Criterion``: gives every weight of one layer a score.

Shape suffixes: O out_features, I in_features.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from sparse_train.patterns import Group
from sparse_train.statistics.activations import ActivationNorm


class Criterion(ABC):
    """Gives every weight of one layer a score.

    A new criterion is a subclass with this one method. Recipes name it by its class; there is no registry.
    """

    needs_activations: ClassVar[bool] = False
    """Whether ``scores`` reads ``stats``; if not, none are gathered."""
    rowwise: ClassVar[bool] = False
    """Whether the scores of a row need nothing from other rows except ``column_sums``. Each process can then score the
    rows that it holds (FSDP2)."""
    group: ClassVar[Group] = "row"
    """The group in which "unstructured" compares weights under this criterion; ``Unstructured(group=...)`` sets it."""

    @abstractmethod
    def scores(self, weight_OI: Tensor, stats: ActivationNorm | None) -> Tensor:
        """Score one layer.

        Args:
            weight_OI: the layer's weights, shadow values included, any float dtype.
            stats: norms of the layer's input over the tokens seen; None if ``needs_activations`` is False.

        Returns:
            float32 scores (O, I), larger = keep.
        """

    def column_sums(self, weight_RI: Tensor) -> Tensor | None:
        """What ``scores_of_rows`` needs from all rows, summed over the rows given: float32 (I,); None = nothing."""
        return None

    def scores_of_rows(self, weight_RI: Tensor, stats: ActivationNorm | None, column_sums_I: Tensor | None) -> Tensor:
        """``scores`` of some rows, if ``rowwise``; ``column_sums_I`` are those of all rows."""
        return self.scores(weight_RI, stats)
