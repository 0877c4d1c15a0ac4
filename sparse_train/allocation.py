"""How a model-wide sparsity is divided among layers: ``Allocation.sparsities``, and ``divide``, which all callers use.

Shape suffixes: O out_features, I in_features.
"""

import math
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparse_train.patterns import NM, Pattern, Unstructured
from sparse_train.schedules import check_sparsity
from sparse_train.targets import did_you_mean

_AGREEMENT = 1e-3  # how far a model-wide sparsity may be from the layers' own: they are written with few digits
_ROUNDING = 1e-6  # of a count: what float arithmetic may add or take without meaning anything


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
        """Weights, ``rows * columns``."""
        return self.rows * self.columns


Shapes = Mapping[str, LayerShape]
"""The targeted layers by name."""
Outliers = Mapping[int, float]
"""``outlier_share`` of each decoder block that has a targeted layer, by the block's index."""


class Allocation(ABC):
    """Divides the sparsity of a model among its targeted layers."""

    needs_outliers: ClassVar[bool] = False
    """Whether ``sparsities`` reads ``outliers``; they take a dense pass over the calibration data before pruning."""

    @abstractmethod
    def sparsities(self, shapes: Shapes, sparsity: float | None, outliers: Outliers) -> dict[str, float]:
        """The sparsity of each layer, so that over all weights it is ``sparsity`` before rounding to counts.

        Args:
            shapes: the targeted layers.
            sparsity: share of zeros over all of them; None where the allocation itself says it.
            outliers: empty unless ``needs_outliers``.

        Raises:
            ValueError: a sparsity outside [0, 1), missing, or in conflict with the allocation.
        """


@dataclass(frozen=True)
class Uniform(Allocation):
    """The same sparsity in every layer."""

    def sparsities(self, shapes: Shapes, sparsity: float | None, outliers: Outliers) -> dict[str, float]:
        return dict.fromkeys(shapes, _required(self, sparsity))


@dataclass(frozen=True)
class OWL(Allocation):
    """Denser blocks where more weights are outliers: densities are linear in ``outlier_share``.

    The shares are scaled to [0, 2 * owl_lmbda] and shifted until the density over all weights is 1 - sparsity. For
    blocks of one size that is the paper's; with other sizes the paper's plain mean would miss the sparsity. Layers
    outside the blocks get the model-wide sparsity.
    Source: Yin et al., "Outlier Weighed Layerwise Sparsity", arXiv 2310.05175, section 3.2; code luuyin/OWL.

    Args:
        owl_m: outliers are the scores above this many times their mean (the paper's M).
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
        model_wide = _required(self, sparsity)
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
            # the densest block may be dense, the sparsest must keep something
            bound = min(sparsity / (2 - mean), (1 - sparsity) / mean * (1 - 1e-6))
            raise ValueError(
                f"owl_lmbda={self.owl_lmbda:g} at a sparsity of {sparsity:g} would give blocks sparsities from "
                f"{min(found.values()):.4g} to {max(found.values()):.4g}; all must be at least 0 and below 1. Make "
                f"owl_lmbda at most {math.floor(bound * 1e4) / 1e4:g}."
            )
        return {block: max(0.0, value) for block, value in found.items()}


@dataclass(frozen=True)
class Explicit(Allocation):
    """Sparsities by name; the layers that none is given for share what the model-wide sparsity leaves.

    Args:
        layers: sparsity by target: a layer's full name, the name of a module around it ("model.layers.0"), the last
            part or parts of its name ("down_proj", "mlp.down_proj"), or "re:" and a regular expression matched from
            the start of the name.
    """

    layers: dict[str, float]

    def __post_init__(self) -> None:
        for target, value in self.layers.items():
            check_sparsity(f"The sparsity of {target!r}", value)

    def sparsities(self, shapes: Shapes, sparsity: float | None, outliers: Outliers) -> dict[str, float]:
        named = self._named(shapes)
        unnamed = [name for name in shapes if name not in named]
        if not unnamed:
            _check_agreement("the layers", sparsity, _mean(shapes, named))
            return {name: named[name] for name in shapes}
        if sparsity is None:
            raise ValueError(
                f"{len(unnamed)} of {len(shapes)} layers have no sparsity of their own ({unnamed[0]} is the first), so "
                "the model-wide sparsity is needed: give it, or name every layer."
            )
        check_sparsity("sparsity", sparsity)
        total = sum(shape.size for shape in shapes.values())
        share = sum(shapes[name].size * value for name, value in named.items()) / total
        rest = (sparsity - share) * total / sum(shapes[name].size for name in unnamed)
        if not -1e-12 <= rest < 1:
            raise ValueError(
                f"A sparsity of {sparsity:g} cannot be met: the named layers' zeros are {share:.4g} of all weights, so "
                f"the other {len(unnamed)} layers would need a sparsity of {rest:.4g} (at least 0 and below 1). Change "
                "the sparsity or those of the named layers."
            )
        return {name: named.get(name, max(0.0, rest)) for name in shapes}

    def _named(self, shapes: Shapes) -> dict[str, float]:
        said_by: dict[str, str] = {}
        for target, value in self.layers.items():
            hits = [name for name in shapes if _names(target, name)]
            if not hits:
                parts = {tail for name in shapes for tail in _heads_and_tails(name)}
                raise ValueError(
                    f"{target!r} is not the name of a targeted layer." + did_you_mean(target, sorted(parts))
                )
            for name in hits:
                other = said_by.setdefault(name, target)
                if self.layers[other] != value:
                    raise ValueError(
                        f"{name} is given two sparsities: {self.layers[other]:g} by {other!r} and {value:g} by "
                        f"{target!r}. Narrow one of them, for example to the full name or with re:."
                    )
        return {name: self.layers[target] for name, target in said_by.items()}


@dataclass(frozen=True)
class PerBlock(Allocation):
    """One sparsity for each decoder block, in their order: llm-compressor's list.

    Args:
        blocks: as many as there are blocks up to the last one with a targeted layer.
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
        _check_agreement("the blocks", sparsity, _mean(shapes, found))
        return found


def divide(
    allocation: Allocation, pattern: Pattern, shapes: Shapes, sparsity: float | None, outliers: Outliers
) -> dict[str, float]:
    """The sparsity that ``pattern.mask`` is given for each layer; arguments and errors of ``Allocation.sparsities``.

    Uniform sparsities stay as they are: rows prune ``int(I * sparsity)``, as the Wanda reference does. Others are
    rounded so that over all weights the sparsity is met, see ``fit_counts``.
    """
    check_pattern(allocation, pattern)
    found = allocation.sparsities(shapes, sparsity, outliers)
    if isinstance(allocation, Uniform):
        return found
    return fit_counts(shapes, found, pattern, _mean(shapes, found) if sparsity is None else sparsity)


def check_pattern(allocation: Allocation, pattern: Pattern) -> None:
    """Raise ValueError where the pattern leaves an allocation nothing to divide."""
    if isinstance(allocation, Uniform) or not (pattern.model_wide or isinstance(pattern, NM)):
        return
    if isinstance(pattern, NM):
        reason = f"{pattern.n}:{pattern.m} has one sparsity, {pattern.sparsity:g}, in every layer"
    else:
        reason = f"{pattern} compares over the whole model and so divides by itself"
    raise ValueError(
        f"{reason}: {type(allocation).__name__} cannot change that. Use Unstructured() or "
        'Unstructured(group="layer"), or the allocation Uniform().'
    )


def fit_counts(shapes: Shapes, sparsities: Mapping[str, float], pattern: Pattern, sparsity: float) -> dict[str, float]:
    """Round sparsities to whole counts so that the zeros of all layers are as near to ``sparsity`` as counts allow.

    Rounding down in every group, as patterns do, would miss the model-wide sparsity by up to a weight a row. So each
    layer prunes either the count below its sparsity or the one above, in all its rows alike; those that lose most by
    rounding down go up first. A layer whose sparsity is a whole count keeps it, as does one at 0.

    Returns:
        ``(count + 0.5) / members``, of which ``int(members * that)`` is the count, whatever the rounding. A pattern of
        one's own rounds by rules not known here, and gets its sparsities as they are.
    """
    if not isinstance(pattern, Unstructured) or pattern.model_wide:
        return dict(sparsities)
    members: dict[str, int] = {}  # of a group
    steps: dict[str, int] = {}  # weights of the layer that one more in each group prunes
    counts: dict[str, int] = {}
    remainders: dict[str, float] = {}  # of those layers that can go up
    for name, shape in shapes.items():
        members[name], steps[name] = (shape.columns, shape.rows) if pattern.group == "row" else (shape.size, 1)
        exact = members[name] * sparsities[name]
        counts[name] = min(int(exact + _ROUNDING), members[name] - 1)
        if exact - counts[name] > _ROUNDING and counts[name] + 1 < members[name]:
            remainders[name] = exact - counts[name]
    missing = sparsity * sum(shape.size for shape in shapes.values())
    missing -= sum(counts[name] * steps[name] for name in shapes)

    raised: set[str] = set()
    order = sorted(remainders, key=lambda name: -remainders[name])
    for name in order:
        if abs(missing - steps[name]) < abs(missing):
            raised.add(name)
            missing -= steps[name]
    while order:  # until no layer's change alone comes nearer
        change, name = min(
            ((-steps[n] if n in raised else steps[n], n) for n in order), key=lambda c: abs(missing - c[0])
        )
        if abs(missing - change) >= abs(missing):
            break
        raised ^= {name}
        missing -= change
    counts |= {name: counts[name] + 1 for name in raised}
    return {name: (count + 0.5) / members[name] if count else 0.0 for name, count in counts.items()}


def outlier_share(scores: Iterable[Callable[[], Tensor]], owl_m: float) -> float:
    """The share of a block's scores above ``owl_m`` times their mean, over all weights of its layers together.

    Args:
        scores: for each targeted layer of the block, what gives its Wanda scores (O, I), float32. Each is called
            twice, so that the scores of one layer are held at a time. Without layers there are no outliers: 0.
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


def _required(allocation: Allocation, sparsity: float | None) -> float:
    if sparsity is None:
        raise ValueError(
            f"{type(allocation).__name__} divides a sparsity: give one, the share of weights that are zero, such as "
            "sparsity=0.5."
        )
    check_sparsity("sparsity", sparsity)
    return sparsity


def _check_agreement(what: str, sparsity: float | None, mean: float) -> None:
    if sparsity is None:
        return
    check_sparsity("sparsity", sparsity)
    if abs(sparsity - mean) > _AGREEMENT:
        raise ValueError(
            f"The sparsities of {what} make {mean:.4g} over all weights, in conflict with sparsity={sparsity:g}. Leave "
            "sparsity out, or change theirs."
        )


def _mean(shapes: Shapes, sparsities: Mapping[str, float]) -> float:
    """The sparsity over all weights."""
    return sum(shapes[n].size * s for n, s in sparsities.items()) / sum(shape.size for shape in shapes.values())


def _names(target: str, name: str) -> bool:
    if target.startswith("re:"):
        try:
            return re.match(target[3:], name) is not None
        except re.error as error:
            raise ValueError(f"{target!r} is not a regular expression: {error}.") from error
    return target in _heads_and_tails(name)


def _heads_and_tails(name: str) -> list[str]:
    """What a layer can be called: its name, and where that is cut at a dot the part before and the part behind."""
    parts = name.partition("[")[0].split(".")  # the number of a fused expert is not part of its layer's name
    cuts = range(1, len(parts))
    return [name, ".".join(parts), *(".".join(parts[:i]) for i in cuts), *(".".join(parts[i:]) for i in cuts)]
