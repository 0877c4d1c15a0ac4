"""Sparsities by decoder block."""

from dataclasses import dataclass

from sparse_train.allocation.base import Allocation, Outliers, Shapes, check_agreement, mean_sparsity
from sparse_train.arguments import check_sparsity


@dataclass(frozen=True)
class PerBlock(Allocation):
    """One sparsity per decoder block, in their order, like the list of llm-compressor.

    Args:
        blocks: sparsities of all blocks up to the last one with a targeted layer.
    """

    blocks: list[float]

    def __post_init__(self) -> None:
        for index, value in enumerate(self.blocks):
            check_sparsity(f"blocks[{index}]", value)

    def sparsities(self, shapes: Shapes, sparsity: float | None, outliers: Outliers) -> dict[str, float]:
        inside = {name: shape.block for name, shape in shapes.items() if shape.block is not None}
        outside = [name for name in shapes if name not in inside]
        if outside:
            raise ValueError(
                f"PerBlock has no sparsity for layers outside the decoder blocks: {', '.join(outside[:3])}"
                f"{', ...' if len(outside) > 3 else ''}. Leave them dense with ignore={outside[:3]!r}, or use Explicit."
            )
        count = max(inside.values(), default=-1) + 1
        if len(self.blocks) != count:
            raise ValueError(
                f"PerBlock has {len(self.blocks)} sparsities, but the targeted layers are in {count} decoder blocks. "
                "Give one for each block, in their order."
            )
        found = {name: self.blocks[block] for name, block in inside.items()}
        check_agreement("the blocks", sparsity, mean_sparsity(shapes, found))
        return found
