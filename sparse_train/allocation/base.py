"""``Allocation``: one method, from the shapes of layers and a model-wide sparsity to one sparsity per layer."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from sparse_train.arguments import check_sparsity

_AGREEMENT = 1e-3  # allowed difference from the mean of the layers' sparsities, which are written with few digits


@dataclass(frozen=True)
class LayerShape:
    """Where a targeted layer is, and its size.

    Args:
        block: index of the decoder block it is in; None outside the blocks.
        rows: out_features.
        columns: in_features.
    """

    block: int | None
    rows: int
    columns: int

    @property
    def size(self) -> int:
        """Number of weights, ``rows * columns``."""
        return self.rows * self.columns


Shapes = Mapping[str, LayerShape]
"""The targeted layers by name."""
Outliers = Mapping[int, float]
"""``outlier_share`` of each decoder block that has a targeted layer, by the block's index."""


class Allocation(ABC):
    """Divides the sparsity of a model among its targeted layers."""

    needs_outliers: ClassVar[bool] = False
    """Whether ``sparsities`` reads ``outliers``, which need a dense pass over the calibration data before pruning."""

    @abstractmethod
    def sparsities(self, shapes: Shapes, sparsity: float | None, outliers: Outliers) -> dict[str, float]:
        """The sparsity of each layer. Over all weights it is ``sparsity``, before rounding to counts.

        Args:
            shapes: the targeted layers.
            sparsity: share of zeros over all of them; None if the allocation itself determines it.
            outliers: empty unless ``needs_outliers``.

        Raises:
            ValueError: a sparsity outside [0, 1), missing, or in conflict with the allocation.
        """


def required(allocation: Allocation, sparsity: float | None) -> float:
    """The sparsity, for allocations that need one."""
    if sparsity is None:
        raise ValueError(
            f"{type(allocation).__name__} divides a sparsity: give one, the share of weights that are zero, such as "
            "sparsity=0.5."
        )
    check_sparsity("sparsity", sparsity)
    return sparsity


def check_agreement(what: str, sparsity: float | None, mean: float) -> None:
    """Raise ValueError if a model-wide sparsity is given that does not match those of the layers."""
    if sparsity is None:
        return
    check_sparsity("sparsity", sparsity)
    if abs(sparsity - mean) > _AGREEMENT:
        raise ValueError(
            f"The sparsities of {what} give {mean:.4g} over all weights, in conflict with sparsity={sparsity:g}. Leave "
            "sparsity out, or change the others."
        )


def mean_sparsity(shapes: Shapes, sparsities: Mapping[str, float]) -> float:
    """The sparsity over all weights."""
    return sum(shapes[n].size * s for n, s in sparsities.items()) / sum(shape.size for shape in shapes.values())
