"""One sparsity for all layers."""

from dataclasses import dataclass

from sparse_train.allocation.base import Allocation, Outliers, Shapes, required


@dataclass(frozen=True)
class Uniform(Allocation):
    """The same sparsity in every layer."""

    def sparsities(self, shapes: Shapes, sparsity: float | None, outliers: Outliers) -> dict[str, float]:
        return dict.fromkeys(shapes, required(self, sparsity))
