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

    A new criterion is a subclass with this one method; recipes name it by its class, nothing is registered.
    """

    needs_activations: ClassVar[bool] = False
    """Whether ``scores`` reads ``stats``; if not, none are gathered."""
    rowwise: ClassVar[bool] = False
    """Whether the scores of a row need of other rows nothing but ``column_sums``, so that processes can score the rows
    that they hold (FSDP2)."""
    group: ClassVar[Group] = "row"
    """What the word "unstructured" compares under this criterion; ``Unstructured(group=...)`` says it in full."""

    @abstractmethod
    def scores(self, weight_OI: Tensor, stats: ActivationNorm | None) -> Tensor:
        """Score one layer.

        Args:
            weight_OI: the layer's weights, shadow values included, any float dtype.
            stats: norms of the layer's input over the tokens seen; None where ``needs_activations`` is False.

        Returns:
            float32 scores (O, I), larger = keep.
        """

    def column_sums(self, weight_RI: Tensor) -> Tensor | None:
        """What ``scores_of_rows`` needs of all rows, summed over these: float32 (I,); None = nothing."""
        return None

    def scores_of_rows(self, weight_RI: Tensor, stats: ActivationNorm | None, column_sums_I: Tensor | None) -> Tensor:
        """``scores`` of some rows, where ``rowwise``; ``column_sums_I`` are those of all rows."""
        return self.scores(weight_RI, stats)
