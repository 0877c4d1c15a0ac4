"""Keeps more weights in blocks with more outliers.

Shape suffixes: O out_features, I in_features.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparse_train.allocation.base import Allocation, Outliers, Shapes, required


@dataclass(frozen=True)
class OWL(Allocation):
    """Blocks with more outliers are denser: densities are linear in ``outlier_share``.

    The shares are scaled to [0, 2 * owl_lmbda] and shifted so that the density over all weights is 1 - sparsity. If all
    blocks have the same size, this is the paper's formula; otherwise the paper's plain mean would miss the sparsity.
    Layers outside the blocks get the model-wide sparsity.
    Source: Yin et al., "Outlier Weighed Layerwise Sparsity", arXiv 2310.05175, section 3.2; code luuyin/OWL.

    Args:
        owl_m: scores above this multiple of their mean are outliers (the paper's M).
        owl_lmbda: half the distance between the densest and the sparsest block (the paper's lambda).
    """

    owl_m: float = 5.0
    owl_lmbda: float = 0.08
    needs_outliers: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 < self.owl_m < math.inf:
            raise ValueError(f"owl_m multiplies the mean score, so it must be above 0, got {self.owl_m}.")
        if not 0 <= self.owl_lmbda < 1:
            raise ValueError(f"owl_lmbda is a share of weights, at least 0 and below 1, got {self.owl_lmbda}.")

    def sparsities(self, shapes: Shapes, sparsity: float | None, outliers: Outliers) -> dict[str, float]:
        model_wide = required(self, sparsity)
        sizes: dict[int, int] = {}
        for shape in shapes.values():
            if shape.block is not None:
                sizes[shape.block] = sizes.get(shape.block, 0) + shape.size
        if not sizes:
            raise ValueError("OWL compares decoder blocks, but no targeted layer is in one. Use Uniform or Explicit.")
        assert sizes.keys() <= outliers.keys(), (sizes, outliers)
        blocks = self._blocks(sizes, model_wide, outliers)
        return {name: model_wide if s.block is None else blocks[s.block] for name, s in shapes.items()}

    def _blocks(self, sizes: Mapping[int, int], sparsity: float, outliers: Outliers) -> dict[int, float]:
        low, high = min(outliers[block] for block in sizes), max(outliers[block] for block in sizes)
        if low == high:
            return dict.fromkeys(sizes, sparsity)
        scaled = {block: 2 * (outliers[block] - low) / (high - low) for block in sizes}  # in units of owl_lmbda
        mean = sum(scaled[block] * size for block, size in sizes.items()) / sum(sizes.values())
        found = {block: sparsity - self.owl_lmbda * (scaled[block] - mean) for block in sizes}
        if min(found.values()) < -1e-12 or max(found.values()) >= 1:
            # the densest block may be fully dense, the sparsest must keep something
            bound = min(sparsity / (2 - mean), (1 - sparsity) / mean * (1 - 1e-6))
            raise ValueError(
                f"owl_lmbda={self.owl_lmbda:g} at a sparsity of {sparsity:g} would give blocks sparsities from "
                f"{min(found.values()):.4g} to {max(found.values()):.4g}; all must be at least 0 and below 1. Make "
                f"owl_lmbda at most {math.floor(bound * 1e4) / 1e4:g}."
            )
        return {block: max(0.0, value) for block, value in found.items()}


def outlier_share(scores: Iterable[Callable[[], Tensor]], owl_m: float) -> float:
    """The share of a block's scores above ``owl_m`` times their mean, over all weights of its layers together.

    Args:
        scores: for each targeted layer of the block, a function that returns its Wanda scores (O, I), float32. Each is
            called twice, so that only the scores of one layer are held at a time. Without layers the share is 0.
        owl_m: see ``OWL``.

    Raises:
        ValueError: scores that are infinite or NaN.
    """
    layers = list(scores)
    total, size = 0.0, 0
    for layer in layers:
        scores_OI = layer()
        total += float(scores_OI.sum(dtype=torch.float64))
        size += scores_OI.numel()
    if not math.isfinite(total):
        raise ValueError(f"The sum of a block's scores is {total}: its weights or its inputs are infinite or NaN.")
    threshold = owl_m * total / max(size, 1)
    return sum(int((layer() > threshold).sum()) for layer in layers) / max(size, 1)
