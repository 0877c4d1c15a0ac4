"""``Solver``: chooses a mask and new values for the kept weights. Shape suffixes: O out_features, I in_features."""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor

from sparse_train.patterns import Group, Pattern


class Solver(ABC):
    """Prunes one layer and makes up for it with the weights that stay, from second moments of the layer's input."""

    group: ClassVar[Group] = "row"
    """What the word "unstructured" compares under this solver; ``Unstructured(group=...)`` says it in full."""

    def check_pattern(self, pattern: Pattern) -> None:
        """Raise ValueError where the solver cannot prune to this pattern."""

    @abstractmethod
    def solve(self, weight_OI: Tensor, gram_II: Tensor, pattern: Pattern, sparsity: float) -> tuple[Tensor, Tensor]:
        """Prune one layer.

        Args:
            weight_OI: the layer's weights, any float dtype; not changed.
            gram_II: float32 or better, the sum of x x^T over the layer's inputs x (I,).
            pattern: where zeros may stand.
            sparsity: share of zeros over each of its groups.

        Returns:
            weight_OI: float32, kept weights updated; pruned ones have their former value, the shadow.
            mask_OI: bool, True = kept.
        """
