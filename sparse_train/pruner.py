"""One pass of the pipeline, scores -> masks -> policy, over sparsified layers: ``update_masks``.

One-shot pruning, the Lightning callback and plain loops all go through here.

Shape suffixes: O out_features, I in_features, J packed mask bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from sparse_train import masks, sharding
from sparse_train.choice import Rules, agreed_flips, choose
from sparse_train.criteria import Magnitude
from sparse_train.distributed import rank, sum_over_ranks
from sparse_train.matrices import MaskedMatrix
from sparse_train.patterns import Pattern
from sparse_train.policies import StraightThrough
from sparse_train.recording import check_reached

T = TypeVar("T")

# ``initial_flip_rate`` is measured on a sample: a whole first mask would double what masks take.
_SAMPLE_STRIDE = 128


@dataclass(frozen=True)
class LayerUpdate:
    """What an update did to one layer; counts of weights."""

    size: int
    zeros: int
    """Counted on the masked weights, so kept weights that happen to be zero are in it."""
    flips: int
    """Mask entries that changed."""
    agreed_flips: int | None = None
    """Those of them that either half of the window makes by itself; None where they were not compared."""


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
    def flip_agreement(self) -> float | None:
        """Share of the flips that either half of the window makes by itself; None: not compared, or no flips."""
        agreed = [layer.agreed_flips for layer in self.layers.values() if layer.agreed_flips is not None]
        flips = sum(layer.flips for layer in self.layers.values())
        return sum(agreed) / flips if agreed and flips else None

    def metrics(self) -> dict[str, float]:
        """What loggers get, under the names that they show."""
        metrics = {
            "sparsity/target": self.target_sparsity,
            "sparsity/actual": self.sparsity,
            "sparsity/flip_rate": self.flip_rate,
            "sparsity/initial_flip_rate": self.initial_flip_rate,
            "sparsity/update_seconds": self.seconds,
        }
        if self.flip_agreement is not None:
            metrics["sparsity/flip_agreement"] = self.flip_agreement
        return metrics

    @property
    def _size(self) -> int:
        return sum(layer.size for layer in self.layers.values())


@torch.no_grad()
def update_masks(
    layers: Mapping[str, MaskedMatrix], rules: Rules, *, compare_halves: bool = False
) -> dict[str, LayerUpdate]:
    """Score every layer and replace its mask.

    Args:
        layers: masked layers by name; with ``statistics`` where the criterion needs them.
        rules: how.
        compare_halves: also count the flips that either half of the statistics, which must be ``HalvedNorm``, makes by
            itself; that selects twice more.

    Raises:
        ValueError: a layer without activations, or with non-finite activations or weights.
    """
    check_reached(layers, rules.criterion)
    # All new masks first, then all changes: an error leaves every mask and weight as it was, on every rank.
    chosen = choose(layers, rules)
    for name, choice in chosen.items():
        if not choice.finite:
            raise ValueError(
                f"{name}: scores are not finite, because a weight is infinite or NaN, or too large for its "
                "activations; masks were not changed. Lower the learning rate, or look for where the weight got its "
                "value."
            )
    agreed = agreed_flips(layers, chosen, rules) if compare_halves else None
    updates = {}
    for name, layer in layers.items():
        if rules.shadow_factor != 1:
            sharding.decay_shadow(layer, rules.shadow_factor)
        update = replace_mask(layer, chosen[name].keep_OJ, chosen[name].nonzero)
        updates[name] = update if agreed is None else replace(update, agreed_flips=agreed[name])
    return updates


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


def sample_rows(layers: Mapping[str, MaskedMatrix]) -> dict[str, Tensor]:
    """Every 128th row of each packed mask, and four rows of small layers at least."""
    strides = {name: max(1, min(_SAMPLE_STRIDE, layer.out_features // 4)) for name, layer in layers.items()}
    return {name: layer.weight_mask[:: strides[name]].clone() for name, layer in layers.items()}


def share_differing(layers: Mapping[str, MaskedMatrix], first_rows: Mapping[str, Tensor]) -> float:
    """The share of mask entries that differ from those of a sample, scaled to whole layers."""
    rows = sample_rows(layers)
    differing = {name: masks.count_differing(row, first_rows[name]) for name, row in rows.items()}
    scaled = sum(n * layers[name].out_features / len(rows[name]) for name, n in differing.items())
    return scaled / sum(layer.in_features * layer.out_features for layer in layers.values())


def masks_from_zeros(layers: Mapping[str, MaskedMatrix], pattern: Pattern, sparsity: float) -> bool:
    """Let the masks of a model that was pruned before stand where its zeros are; False if it is not that sparse.

    Args:
        layers: with masks that keep everything, which they go on doing in the latter case.
        pattern, sparsity: what the masks are to follow.
    """
    dense = measure(layers)
    if sum(u.zeros for u in dense.values()) < 0.99 * sparsity * sum(u.size for u in dense.values()):
        return False
    found = update_masks(layers, Rules(Magnitude(), pattern, sparsity, StraightThrough()))
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
                "its state (MaskUpdater(..., state=...)); to train under these masks as they are, leave updater or "
                "callback out, and squash the model at the end."
            )


def expect(name: str, value: T | None, default: T, base: type[Any] | tuple[type[Any], ...]) -> T:
    """``value``, or ``default`` for None; ValueError where it is a class, a text, or anything but a ``base``."""
    if value is None:
        return default
    given: T = value
    if not isinstance(value, base):
        way_out = f" Write {value.__name__}()." if isinstance(value, type) and issubclass(value, base) else ""
        raise ValueError(f"{name} is an object such as {default!r}, got {value!r}.{way_out}")
    return given
