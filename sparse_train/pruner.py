"""One pass of the pipeline, scores -> masks -> policy, over sparsified layers: ``update_masks``.

One-shot pruning, the Lightning callback and plain loops all go through here.

Shape suffixes: O out_features, I in_features, J packed mask bytes.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from sparse_train import masks, sharding
from sparse_train.activations import ActivationNorm
from sparse_train.criteria import Criterion, Magnitude
from sparse_train.distributed import gather_bytes, rank, sum_over_ranks
from sparse_train.margins import NO_MARGIN, Margin
from sparse_train.matrices import MaskedMatrix
from sparse_train.patterns import Pattern
from sparse_train.policies import MaskPolicy, StraightThrough
from sparse_train.recording import check_reached
from sparse_train.regrow import Growth, regrow

T = TypeVar("T")


@dataclass(frozen=True)
class LayerUpdate:
    """What an update did to one layer; counts of weights."""

    size: int
    zeros: int
    """Counted on the masked weights, so kept weights that happen to be zero are in it."""
    flips: int
    """Mask entries that changed."""


@dataclass(frozen=True)
class UpdateReport:
    """What an update did."""

    step: int
    target_sparsity: float
    layers: Mapping[str, LayerUpdate]
    initial_flip_rate: float
    """Share of mask entries that differ from the first mask, measured on every 128th row, four of a layer at least."""
    seconds: float

    @property
    def sparsity(self) -> float:
        """Share of zeros among the targeted weights, counted on the weights."""
        return sum(layer.zeros for layer in self.layers.values()) / self._size

    @property
    def flip_rate(self) -> float:
        """Share of mask entries that this update changed; of the first mask, the share it prunes."""
        return sum(layer.flips for layer in self.layers.values()) / self._size

    @property
    def _size(self) -> int:
        return sum(layer.size for layer in self.layers.values())


@torch.no_grad()
def update_masks(
    layers: Mapping[str, MaskedMatrix],
    *,
    criterion: Criterion,
    pattern: Pattern,
    sparsity: float | Mapping[str, float],
    policy: MaskPolicy,
    shadow_factor: float = 1.0,
    margin: Margin = NO_MARGIN,
    growth: Growth | None = None,
) -> dict[str, LayerUpdate]:
    """Score every layer and replace its mask.

    Args:
        layers: masked layers by name; with ``statistics`` where the criterion needs them.
        criterion: gives the scores, from the shadow values, in float32.
        pattern: selects, over one layer at a time or over all of them.
        sparsity: target over each group; by layer, where layers differ.
        policy: may keep pruned weights out.
        shadow_factor: multiplies the values of pruned weights before they are scored.
        margin: by how much kept weights are ahead.
        growth: gradients by which weights come back.

    Raises:
        ValueError: a layer without activations, or with non-finite activations or weights.
    """
    check_reached(layers, criterion)
    # All new masks first, then all changes: an error leaves every mask and weight as it was, on every rank.
    rules = _Rules(criterion, pattern, sparsity, policy, shadow_factor, margin, growth)
    chosen = (_select_model_wide if pattern.model_wide else _select_by_layer)(layers, rules)
    for name, choice in chosen.items():
        if not choice.finite:
            raise ValueError(
                f"{name}: scores are not finite, because a weight is infinite or NaN, or too large for its "
                "activations; masks were not changed. Lower the learning rate, or look for where the weight got its "
                "value."
            )
    updates = {}
    for name, layer in layers.items():
        if shadow_factor != 1:
            sharding.decay_shadow(layer, shadow_factor)
        updates[name] = replace_mask(layer, chosen[name].keep_OJ, chosen[name].nonzero)
    return updates


@dataclass(frozen=True)
class _Rules:
    """What decides the masks of one update, as ``update_masks`` is told it."""

    criterion: Criterion
    pattern: Pattern
    sparsity: float | Mapping[str, float]
    policy: MaskPolicy
    shadow_factor: float
    margin: Margin
    growth: Growth | None

    def mask(self, scores_OI: Tensor, sparsity: float, names: Iterable[str]) -> Tensor:
        """The mask of admitted scores: of one named layer, or of several as one row."""
        gradients = self.growth.scores(names) if self.growth is not None else None
        if self.growth is None or gradients is None:
            return self.pattern.mask(scores_OI, sparsity)
        return regrow(scores_OI, gradients.view_as(scores_OI), self.pattern, sparsity, self.growth.fraction)


@dataclass
class _Choice:
    """Rows of a new mask, before anything is changed."""

    keep_OJ: Tensor
    nonzero: int
    """Kept weights that are not zero."""
    finite: bool = True


def _select_by_layer(layers: Mapping[str, MaskedMatrix], rules: _Rules) -> dict[str, _Choice]:
    by_rows = rules.criterion.rowwise and rules.pattern.rowwise
    chosen = {}
    for name, layer in layers.items():
        own = rules.sparsity[name] if isinstance(rules.sparsity, Mapping) else rules.sparsity
        with sharding.weights(layer, by_rows) as (weight_OI, rows):
            scores_OI, nonzero_OJ, finite = _admitted(layer, weight_OI, rows, rules)
        keep_OJ = masks.pack(rules.mask(scores_OI, own, [name])) if finite else nonzero_OJ
        chosen[name] = _Choice(keep_OJ, masks.count(keep_OJ & nonzero_OJ), finite)
    if by_rows:
        _complete(chosen, {name: layer for name, layer in layers.items() if sharding.is_dtensor(layer.weight_OI)})
    return chosen


def _select_model_wide(layers: Mapping[str, MaskedMatrix], rules: _Rules) -> dict[str, _Choice]:
    assert isinstance(rules.sparsity, float), "one group has one sparsity"
    chosen, scores = {}, []
    for name, layer in layers.items():
        with sharding.weights(layer, by_rows=False) as (weight_OI, rows):
            scores_OI, nonzero_OJ, finite = _admitted(layer, weight_OI, rows, rules)
        scores.append(scores_OI)
        chosen[name] = _Choice(nonzero_OJ, 0, finite)
    if all(choice.finite for choice in chosen.values()):
        keep = rules.mask(torch.cat([score.reshape(1, -1) for score in scores], dim=1), rules.sparsity, layers)
        parts = keep.split([score.numel() for score in scores], dim=1)
        for choice, score, part in zip(chosen.values(), scores, parts, strict=True):
            nonzero_OJ, choice.keep_OJ = choice.keep_OJ, masks.pack(part.view_as(score))
            choice.nonzero = masks.count(choice.keep_OJ & nonzero_OJ)
    return chosen


def _complete(chosen: Mapping[str, _Choice], layers: Mapping[str, MaskedMatrix]) -> None:
    """Put the rows together that processes have chosen: one gather of mask bits, with a count for each layer."""
    if not layers:
        return
    device = next(iter(layers.values())).weight_mask.device
    counts = [chosen[name].nonzero if chosen[name].finite else -1 for name in layers]
    header = torch.tensor(counts, dtype=torch.int64, device=device).view(torch.uint8)
    own = torch.cat([header, *(chosen[name].keep_OJ.reshape(-1) for name in layers)])
    widths = {name: layer.weight_mask.shape[1] for name, layer in layers.items()}
    rows = {name: sharding.rows_of(0, layer.out_features).stop for name, layer in layers.items()}  # the most
    gathered = gather_bytes(own, len(header) + sum(rows[name] * widths[name] for name in layers))
    found = torch.stack([each[: len(header)].view(torch.int64) for each in gathered])
    for index, name in enumerate(layers):
        chosen[name].finite = bool((found[:, index] >= 0).all())
        chosen[name].nonzero = int(found[:, index].sum())
    parts: dict[str, list[Tensor]] = {name: [] for name in layers}
    for process, each in enumerate(gathered):
        start = len(header)
        for name, layer in layers.items():
            here = sharding.rows_of(process, layer.out_features)
            size = (here.stop - here.start) * widths[name]
            parts[name].append(each[start : start + size].view(-1, widths[name]))
            start += size
    for name in layers:
        chosen[name].keep_OJ = torch.cat(parts[name])


def replace_mask(layer: MaskedMatrix, packed_OJ: Tensor, nonzero: int) -> LayerUpdate:
    """Put a packed mask, under which ``nonzero`` weights are not zero, in the place of the one that is there."""
    flips = masks.count_differing(layer.weight_mask, packed_OJ)
    layer.weight_mask.copy_(packed_OJ)
    layer.reached = False
    size = layer.in_features * layer.out_features
    return LayerUpdate(size, size - nonzero, flips)


def measure(layers: Mapping[str, MaskedMatrix]) -> dict[str, LayerUpdate]:
    """Count the zeros of masked layers, as they are; where rows are sharded, with one reduce."""
    counts = []
    for layer in layers.values():
        with sharding.weights(layer, by_rows=True) as (weight_OI, rows):
            counts.append(masks.count(masks.pack(weight_OI != 0) & layer.weight_mask[rows]))
    sharded = [sharding.is_dtensor(layer.weight_OI) for layer in layers.values()]
    if any(sharded):
        device = next(iter(layers.values())).weight_mask.device
        mine = [n if part or rank() == 0 else 0 for n, part in zip(counts, sharded, strict=True)]
        total = torch.tensor(mine, dtype=torch.int64, device=device)
        sum_over_ranks([total])
        counts = total.tolist()
    sizes = [layer.in_features * layer.out_features for layer in layers.values()]
    return {name: LayerUpdate(size, size - n, 0) for name, size, n in zip(layers, sizes, counts, strict=True)}


def masks_from_zeros(layers: Mapping[str, MaskedMatrix], pattern: Pattern, sparsity: float) -> bool:
    """Let the masks of a model that was pruned before stand where its zeros are; False if it is not that sparse.

    Args:
        layers: with masks that keep everything, which they go on doing in the latter case.
        pattern, sparsity: what the masks are to follow.
    """
    dense = measure(layers)
    if sum(u.zeros for u in dense.values()) < 0.99 * sparsity * sum(u.size for u in dense.values()):
        return False
    found = update_masks(layers, criterion=Magnitude(), pattern=pattern, sparsity=sparsity, policy=StraightThrough())
    if all(found[name].zeros == dense[name].zeros for name in layers):
        return True  # nothing was pruned that was not zero
    for layer in layers.values():
        masks.fill_full(layer.weight_mask, layer.in_features)
    return False


def check_masks(layers: Mapping[str, MaskedMatrix], pattern: Pattern, sparsity: float) -> None:
    """Raise ValueError where the masks that layers have are not of this pattern and sparsity."""
    # Scored by itself, a mask that has the pattern's count in every group is what the pattern selects.
    found = [layer.unpacked_mask() for layer in layers.values()]
    if pattern.model_wide:
        found = [torch.cat([mask.reshape(1, -1) for mask in found], dim=1)]
    for mask, name in zip(found, layers, strict=False):
        if not torch.equal(pattern.mask(mask.float(), sparsity), mask):
            raise ValueError(
                f"The model has masks already, and those of {name} are not {pattern} at a sparsity of {sparsity:g}, "
                "which this run starts with. Squash the model first to begin with new masks; to resume a run, pass "
                "its state, or build the updater before loading the model's state dict."
            )


def _admitted(layer: MaskedMatrix, weight_OI: Tensor, rows: slice, rules: _Rules) -> tuple[Tensor, Tensor, bool]:
    """Scores as selection sees them, which weights are not zero (packed), and whether the scores are finite."""
    by_score = rules.policy.revives and not rules.policy.grows
    asked = rules.shadow_factor != 1 or rules.margin or not by_score
    keep_OI = layer.unpacked_mask()[rows] if asked else None
    if rules.shadow_factor != 1:
        assert keep_OI is not None
        weight_OI = torch.where(keep_OI, weight_OI, weight_OI * rules.shadow_factor)
    stats = layer.statistics if rules.criterion.needs_activations else None
    assert stats is None or isinstance(stats, ActivationNorm)
    scores_OI = rules.criterion.scores(weight_OI, stats)
    # the sum is finite where all are, and ten times faster to look at; it may overflow where none is infinite
    finite = bool(scores_OI.sum().isfinite()) or bool(scores_OI.isfinite().all())
    if stats is not None and bool((stats.sum_squares_I == 0).any()):
        # An input that never comes makes every score 0: what is zero already goes first, so that pruning twice is once.
        scores_OI = scores_OI.masked_fill(weight_OI == 0, -torch.inf)
    if rules.margin:
        assert keep_OI is not None
        scores_OI = rules.margin.apply(scores_OI, keep_OI)
    if not by_score:
        assert keep_OI is not None
        scores_OI = rules.policy.admit(scores_OI, keep_OI)
    nonzero_OI = weight_OI != 0
    if rules.policy.grows:
        assert keep_OI is not None
        nonzero_OI &= keep_OI  # what comes back begins at zero
    return scores_OI, masks.pack(nonzero_OI), finite


def expect(name: str, value: T | None, default: T, base: type[Any]) -> T:
    """``value``, or ``default`` for None; ValueError where it is a class, a text, or anything but a ``base``."""
    if value is None:
        return default
    given: T = value
    if not isinstance(value, base):
        raise ValueError(f"{name} is an object such as {default!r}, got {value!r}.")
    return given
