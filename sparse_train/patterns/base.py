"""``Pattern.mask`` turns scores and a sparsity into a mask, with exact counts.

Shape suffixes: O out_features, I in_features.
"""

from abc import ABC, abstractmethod
from typing import ClassVar

from torch import Tensor


class Pattern(ABC):
    """Selects within groups of weights that are compared with each other."""

    model_wide: ClassVar[bool] = False
    """Whether the group is the whole model; ``mask`` then gets the scores of all layers as one row."""
    rowwise: ClassVar[bool] = False
    """Whether groups lie within rows, so that each process can select in the rows that it holds (FSDP2)."""

    @abstractmethod
    def mask(self, scores_OI: Tensor, sparsity: float) -> Tensor:
        """Bool mask (O, I), True = kept, from float32 scores that are finite (or -inf: pruned first).

        Every group keeps exactly its count; among equal scores the lower index is pruned first.
        """

    def check_layer(self, name: str, in_features: int) -> None:
        """Raise ValueError if a layer with this many inputs cannot have the pattern."""

    def check_target(self, sparsity: float) -> None:
        """Raise ValueError if this final sparsity contradicts the pattern."""
