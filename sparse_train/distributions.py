"""How a model-wide sparsity is divided among layers: ``SparsityDistribution``; and whole counts that meet it.

Shape suffixes: O out_features, I in_features.
"""

import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from sparse_train.arguments import check_sparsity, did_you_mean, named
from sparse_train.patterns import NM, Pattern, Unstructured, sparsity_for

_AGREEMENT = 1e-3  # allowed difference from the mean of the layers' sparsities, which are written with few digits


@dataclass(frozen=True)
class LayerShape:
    block: int | None
    """Index of the decoder block it is in; None outside the blocks."""
    rows: int
    columns: int

    @property
    def size(self) -> int:
        return self.rows * self.columns


Shapes = Mapping[str, LayerShape]
"""The targeted layers by name."""
Outliers = Mapping[int, float]
"""``outlier_share`` of each decoder block that has a targeted layer, by the block's index."""
Sparsities = Mapping[str, float]
"""The sparsity of each layer."""


class SparsityDistribution(ABC):
    """Divides the sparsity of a model among its targeted layers."""

    outliers_above: float | None = None
    """Scores above this multiple of their mean are outliers; None if ``sparsities`` reads no ``outliers``. To measure
    them takes a dense pass over the calibration data before pruning."""

    @abstractmethod
    def sparsities(self, shapes: Shapes, sparsity: float, outliers: Outliers) -> dict[str, float]:
        """The sparsity of each layer. Over all weights it is ``sparsity``, before rounding to counts. ``outliers`` is
        empty unless ``outliers_above`` is set."""


def mean_sparsity(shapes: Shapes, sparsities: Sparsities) -> float:
    """Over all weights; layers without a sparsity keep everything."""
    return sum(shapes[n].size * s for n, s in sparsities.items()) / sum(shape.size for shape in shapes.values())


@dataclass(frozen=True)
class Uniform(SparsityDistribution):
    """The same sparsity in every layer."""

    def sparsities(self, shapes: Shapes, sparsity: float, outliers: Outliers) -> dict[str, float]:
        return dict.fromkeys(shapes, sparsity)


@dataclass(frozen=True)
class Explicit(SparsityDistribution):
    """Sparsities by name; layers that are not named share what is left of the model-wide sparsity.

    Args:
        layers: sparsity by target: a layer's name, a part of it between dots ("down_proj", "mlp.down_proj",
            "model.layers.0"), or "re:" and a regular expression matched from the start of the name. If several match,
            the last one counts.
    """

    layers: dict[str, float]

    def __post_init__(self) -> None:
        for target, value in self.layers.items():
            check_sparsity(f"The sparsity of {target!r}", value)

    def sparsities(self, shapes: Shapes, sparsity: float, outliers: Outliers) -> dict[str, float]:
        given: dict[str, float] = {}
        for target, value in self.layers.items():
            hits = named(target, shapes)
            if not hits:
                parts = sorted({part for name in shapes for part in (name, *name.split("."))})
                raise ValueError(f"{target!r} is not the name of a targeted layer." + did_you_mean(target, parts))
            given |= dict.fromkeys(hits, value)
        total = sum(shape.size for shape in shapes.values())
        share = mean_sparsity(shapes, given)
        unnamed = sum(shape.size for name, shape in shapes.items() if name not in given)
        rest = (sparsity - share) * total / max(1, unnamed)
        if not (-1e-12 <= rest < 1 if unnamed else abs(sparsity - share) <= _AGREEMENT):
            others = f"the others would need a sparsity of {rest:.4g}" if unnamed else "there are no others"
            raise ValueError(
                f"A sparsity of {sparsity:g} cannot be met: the named layers' zeros are {share:.4g} of all weights, "
                f"and {others}. Change the sparsity or those of the named layers."
            )
        return {name: given.get(name, max(0.0, rest)) for name in shapes}


@dataclass(frozen=True)
class OWL(SparsityDistribution):
    """Blocks with more outliers are denser: densities are linear in ``outlier_share``.

    The shares are scaled to [0, 2 * owl_lmbda] and shifted so that the density over all weights is 1 - sparsity: the
    paper's formula if all blocks have the same size. Layers outside the blocks get the model-wide sparsity.
    Source: Yin et al., "Outlier Weighed Layerwise Sparsity", arXiv 2310.05175, section 3.2; code luuyin/OWL.

    Args:
        owl_m: scores above this multiple of their mean are outliers (the paper's M).
        owl_lmbda: half the distance between the densest and the sparsest block (the paper's lambda).
    """

    owl_m: float = 5.0
    owl_lmbda: float = 0.08

    @property
    def outliers_above(self) -> float:  # type: ignore[override]
        return self.owl_m

    def __post_init__(self) -> None:
        if not 0 < self.owl_m < math.inf:
            raise ValueError(f"owl_m multiplies the mean score and must be above 0, got {self.owl_m}.")
        if not 0 <= self.owl_lmbda < 1:
            raise ValueError(f"owl_lmbda is a share of weights, at least 0 and below 1, got {self.owl_lmbda}.")

    def sparsities(self, shapes: Shapes, sparsity: float, outliers: Outliers) -> dict[str, float]:
        sizes: Counter[int] = Counter()
        for shape in shapes.values():
            if shape.block is not None:
                sizes[shape.block] += shape.size
        if not sizes:
            raise ValueError("OWL compares decoder blocks, but no targeted layer is in one. Use Uniform or Explicit.")
        assert sizes.keys() <= outliers.keys(), (sizes, outliers)
        low, high = min(outliers[block] for block in sizes), max(outliers[block] for block in sizes)
        if low == high:
            return dict.fromkeys(shapes, sparsity)
        scaled = {block: 2 * (outliers[block] - low) / (high - low) for block in sizes}  # in units of owl_lmbda
        mean = sum(scaled[block] * size for block, size in sizes.items()) / sum(sizes.values())
        by_block = {block: sparsity - self.owl_lmbda * (scaled[block] - mean) for block in sizes}
        if min(by_block.values()) < -1e-12 or max(by_block.values()) >= 1:
            raise ValueError(
                f"owl_lmbda={self.owl_lmbda:g} at a sparsity of {sparsity:g} would give blocks sparsities from "
                f"{min(by_block.values()):.4g} to {max(by_block.values()):.4g}, which must be at least 0 and below 1. "
                "Make owl_lmbda smaller."
            )
        return {n: sparsity if s.block is None else max(0.0, by_block[s.block]) for n, s in shapes.items()}


# --- whole counts ----------------------------------------------------------------------------------------------------

_WHOLE = 1e-6  # of a count: differences below this are float rounding


def check_pattern(distribution: SparsityDistribution, pattern: Pattern) -> None:
    """Raise ValueError if the pattern leaves a distribution nothing to divide."""
    if isinstance(distribution, Uniform) or not (pattern.model_wide or isinstance(pattern, NM)):
        return
    if isinstance(pattern, NM):
        reason = f"{pattern.n}:{pattern.m} has one sparsity, {pattern.sparsity:g}, in every layer"
    else:
        reason = f"{pattern} compares over the whole model, so it already divides the sparsity"
    raise ValueError(
        f"{reason}: {type(distribution).__name__} cannot change that. Use Unstructured(), or Uniform() to divide it."
    )


def round_up(shapes: Shapes, sparsities: Sparsities, pattern: Pattern) -> dict[str, float]:
    """Round sparsities up to whole counts: each group prunes at most one weight more, and keeps at least one.

    Returns:
        The ``sparsity_for`` each count; unchanged for a user-defined pattern, which rounds by its own rules.
    """
    if not isinstance(pattern, Unstructured):
        return dict(sparsities)
    rounded = {}
    for name, sparsity in sparsities.items():
        members = shapes[name].columns if pattern.group == "row" else shapes[name].size
        count = min(math.ceil(members * sparsity - _WHOLE), members - 1)  # something stays
        rounded[name] = sparsity_for(count, members)
    return rounded


# --- over a run ------------------------------------------------------------------------------------------------------

_NEAR = 5e-3  # by how much the zeros of a model that was pruned before may miss a sparsity


class Division:
    """The sparsity of each layer, at every sparsity of the model.

    With ``Uniform``, every layer has the model's sparsity, and a row prunes ``int(I * sparsity)`` weights, as in the
    Wanda reference. Others are rounded up (``round_up``). The distribution divides the final sparsity, once (OWL,
    whose range is fixed, might not be able to divide a lower one); on the way to it, layers have theirs in proportion,
    so none gets denser while the model does not. If it needs outliers, they are given, or measured when the first masks
    are made. A model that has masks already keeps the division that they have (``take_from_masks``), and a resumed run
    that of its checkpoint.
    """

    def __init__(
        self,
        distribution: SparsityDistribution,
        shapes: Shapes,
        pattern: Pattern,
        final: float,
        outliers: Outliers | None = None,
    ) -> None:
        self._distribution, self._shapes, self._pattern, self._final = distribution, shapes, pattern, final
        self.final_sparsities: dict[str, float] | None = None
        """The sparsity of each layer at the end; None if all are equal, or not known before the first masks."""
        self._uniform = isinstance(distribution, Uniform)
        # without blocks there will be no outliers: OWL is asked at once, and refuses
        in_blocks = any(shape.block is not None for shape in shapes.values())
        if not self._uniform and (outliers or distribution.outliers_above is None or not in_blocks):
            self.divide_by(outliers or {})

    @property
    def known(self) -> bool:
        """False if the division has to wait for outliers, or for masks."""
        return self._uniform or self.final_sparsities is not None

    def divide_by(self, outliers: Outliers) -> None:
        self.final_sparsities = self._distribution.sparsities(self._shapes, self._final, outliers)

    def at(self, sparsity: float) -> dict[str, float]:
        """The sparsity of each layer when that of the model is this."""
        if self._uniform or sparsity == 0:
            return dict.fromkeys(self._shapes, sparsity)
        assert self.final_sparsities is not None, "the division is not known yet"
        if sparsity > self._final:
            raise ValueError(
                f"The final sparsity, {self._final:g}, is what is divided: {sparsity:g} must not be above it."
            )
        # at the final sparsity, the factor is exactly 1
        sparsities = {name: value * (sparsity / self._final) for name, value in self.final_sparsities.items()}
        return round_up(self._shapes, sparsities, self._pattern)

    def take_from_masks(self, sparsities: Sparsities, sparsity: float) -> None:
        """Take over the division that masks have (``mask_sparsities``); the run must start at its final sparsity."""
        if not sparsity:
            return
        mean = mean_sparsity(self._shapes, sparsities)
        rounding = 1 / min(shape.columns for shape in self._shapes.values())  # rows prune whole counts
        if abs(mean - sparsity) > max(_NEAR, rounding) or sparsity != self._final:
            raise ValueError(
                f"The masks of the model are at a sparsity of {mean:.4g}, and this run starts at {sparsity:g} and ends "
                f"at {self._final:g}. Start at the final sparsity, which they must have; or give MaskUpdater the "
                "outliers (OneShotReport.outliers); or squash the model first, to begin with new masks."
            )
        self.final_sparsities = dict(sparsities)
