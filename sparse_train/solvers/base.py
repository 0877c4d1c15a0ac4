"""``Solver``: chooses a mask and new values for the kept weights. Shape suffixes: O out_features, I in_features."""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from sparse_train.patterns import Group, Pattern


class Solver(ABC):
    """Prunes one layer and updates the kept weights to compensate, from second moments of the layer's input."""

    group: ClassVar[Group] = "row"
    """The group in which "unstructured" compares weights under this solver; ``Unstructured(group=...)`` sets it."""

    def check_pattern(self, pattern: Pattern) -> None:
        """Raise ValueError if the solver cannot prune to this pattern."""

    @abstractmethod
    def solve(self, weight_OI: Tensor, gram_II: Tensor, pattern: Pattern, sparsity: float) -> tuple[Tensor, Tensor]:
        """Prune one layer.

        Args:
            weight_OI: the layer's weights, any float dtype; not changed.
            gram_II: float32 or better, the sum of x x^T over the layer's inputs x (I,).
            pattern: where zeros may be.
            sparsity: share of zeros over each of its groups.

        Returns:
            weight_OI: float32, kept weights updated; pruned ones have their former value, as shadow values.
            mask_OI: bool, True = kept.
        """
