"""One pass of the pipeline, scores -> masks -> policy, over sparsified layers: ``update_masks``.

One-shot pruning, the Lightning callback and plain loops all go through here.

Shape suffixes: O out_features, I in_features, J packed mask bytes.
"""

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from sparse_train import masks
from sparse_train.activations import ActivationNorm, Statistics
from sparse_train.criteria import Criterion
from sparse_train.distributed import sum_over_ranks
from sparse_train.matrices import MaskedLayer, MaskedMatrix, Recorder
from sparse_train.patterns import Pattern
from sparse_train.policies import MaskPolicy

_log = logging.getLogger(__name__)

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
    """Share of mask entries that differ from the first mask, measured on every 32nd row."""
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
) -> dict[str, LayerUpdate]:
    """Score every layer and replace its mask.

    Args:
        layers: masked layers by name; with ``statistics`` where the criterion needs them.
        criterion: gives the scores, from the shadow values, in float32.
        pattern: selects, over one layer at a time or over all of them.
        sparsity: target over each group; by layer, where layers differ.
        policy: may keep pruned weights out.
        shadow_factor: multiplies the values of pruned weights before they are scored.

    Raises:
        ValueError: a layer without activations, or with non-finite activations or weights.
    """
    _check_reached(layers, criterion)
    # All new masks first, then all changes: an error leaves every mask and weight as it was.
    new: dict[str, Tensor] = {}
    if pattern.model_wide:
        assert isinstance(sparsity, float), "one group has one sparsity"
        scores = [_admitted(name, layer, criterion, policy, shadow_factor) for name, layer in layers.items()]
        keep = pattern.mask(torch.cat([score.reshape(1, -1) for score in scores], dim=1), sparsity)
        parts = keep.split([score.numel() for score in scores], dim=1)
        for (name, layer), part in zip(layers.items(), parts, strict=True):
            new[name] = masks.pack(part.view(layer.out_features, layer.in_features))
    else:
        for name, layer in layers.items():
            scores_OI = _admitted(name, layer, criterion, policy, shadow_factor)
            own = sparsity[name] if isinstance(sparsity, Mapping) else sparsity
            new[name] = masks.pack(pattern.mask(scores_OI, own))
    updates = {}
    for name, layer in layers.items():
        if shadow_factor != 1:
            layer.weight_OI.copy_(_decayed(layer, shadow_factor))
        updates[name] = replace_mask(layer, new[name])
    return updates


def replace_mask(layer: MaskedMatrix, packed_OJ: Tensor) -> LayerUpdate:
    """Put a packed mask in the place of the one that is there."""
    flips = masks.count_differing(layer.weight_mask, packed_OJ)
    layer.weight_mask.copy_(packed_OJ)
    layer.reached = False
    return measure(layer, flips)


def measure(layer: MaskedMatrix, flips: int = 0) -> LayerUpdate:
    """Count the zeros of a masked layer."""
    weight_OI = layer.weight_OI.detach()
    nonzero = masks.count(masks.pack(weight_OI != 0) & layer.weight_mask)
    return LayerUpdate(weight_OI.numel(), weight_OI.numel() - nonzero, flips)


def _admitted(name: str, layer: MaskedMatrix, criterion: Criterion, policy: MaskPolicy, shadow_factor: float) -> Tensor:
    weight_OI = layer.weight_OI.detach() if shadow_factor == 1 else _decayed(layer, shadow_factor)
    stats = layer.statistics if criterion.needs_activations else None
    assert stats is None or isinstance(stats, ActivationNorm)
    scores_OI = criterion.scores(weight_OI, stats)
    # the sum is finite where all are, and ten times faster to look at; it may overflow where none is infinite
    if not bool(scores_OI.sum().isfinite()) and not bool(scores_OI.isfinite().all()):
        raise ValueError(
            f"{name}: scores are not finite, because a weight is infinite or NaN, or too large for its activations; "
            "masks were not changed. Lower the learning rate, or look for where the weight got its value."
        )
    if stats is not None and bool((stats.sum_squares_I == 0).any()):
        # An input that never comes makes every score 0: what is zero already goes first, so that pruning twice is once.
        scores_OI = scores_OI.masked_fill(weight_OI == 0, -torch.inf)
    return policy.admit(scores_OI, layer.unpacked_mask())


def _decayed(layer: MaskedMatrix, shadow_factor: float) -> Tensor:
    weight_OI = layer.weight_OI.detach()
    return torch.where(layer.unpacked_mask(), weight_OI, weight_OI * shadow_factor)


def _check_reached(layers: Mapping[str, MaskedMatrix], criterion: Criterion) -> None:
    if criterion.needs_activations:
        for name, layer in layers.items():
            check_statistics(name, layer.statistics)
        return
    unreached = [name for name, layer in layers.items() if not layer.reached]
    if unreached and len(unreached) < len(layers):  # none reached: there has been no forward yet
        raise ValueError(
            f"{unreached[0]} is a target, but no forward reached it since the last mask update, so its mask has no "
            f"effect; masks were not changed. Leave it out with ignore=[{unreached[0]!r}]."
        )


def check_statistics(name: str, stats: Statistics | None) -> None:
    """Raise ValueError where a layer has seen no token, or activations that are not finite."""
    if stats is None or int(stats.tokens) == 0:
        raise ValueError(
            f"{name} is a target, but no token reached it since the last mask update, so it has no activations to "
            f"score with. If the model does not use it, leave it out with ignore=[{name!r}]; if forwards happen with "
            "the model in eval mode and under no_grad, they are taken for evaluation and do not count."
        )
    if not bool(stats.sum_squares_I.isfinite().all()):
        feature = int((~stats.sum_squares_I.isfinite()).nonzero()[0])
        raise ValueError(
            f"{name}: the input activations are not finite (first at feature {feature} of {len(stats.sum_squares_I)}), "
            "so Wanda scores cannot be computed; masks were not changed. Look for NaN in the data, a learning rate "
            "that is too high, or an overflow of float16."
        )


def attach(layers: Iterable[MaskedMatrix], recorder: Recorder, statistics: type[Statistics] | None) -> None:
    """Give layers a common recorder and fresh statistics of this kind; None = none."""
    for layer in layers:
        if isinstance(layer, MaskedLayer):
            layer.recorder, layer.records = recorder, True
        layer.statistics = None if statistics is None else statistics(layer.in_features, layer.weight_OI.device)


def needed_statistics(criterion: Criterion) -> type[ActivationNorm] | None:
    """What a criterion reads."""
    return ActivationNorm if criterion.needs_activations else None


def share_statistics(recorder: Recorder) -> None:
    """After a forward under ``recorder.sharing``: let layers that read one input use one statistic."""
    assert recorder.sharing is not None
    for layer, leader in recorder.sharing.leaders().items():
        assert isinstance(layer, MaskedLayer) and isinstance(leader, MaskedLayer)
        if leader is not layer:
            layer.statistics, layer.records = leader.statistics, False
    recorder.sharing = None


def reduce_statistics(layers: Iterable[MaskedMatrix]) -> list[Statistics]:
    """Sum the statistics of ``layers`` over ranks and return the distinct ones."""
    distinct = {id(layer.statistics): layer.statistics for layer in layers if layer.statistics is not None}
    sum_over_ranks([tensor for each in distinct.values() for tensor in each.tensors()])
    return list(distinct.values())


def warn_of_padding(recorder: Recorder) -> None:
    """Say, once, that a token mask did not fit an input, so that padding counts in its statistics."""
    if recorder.mask_misfit is not None and not recorder.warned:
        recorder.warned = True
        _log.warning(
            "The batch's attention_mask does not fit a layer's input of shape %s, so padding counts in its activation "
            "statistics. Override DynamicPruning.token_mask, or set MaskUpdater.token_mask, to say which tokens count; "
            "in one-shot pruning calibrate on samples without padding.",
            recorder.mask_misfit,
        )


def expect(name: str, value: T | None, default: T, base: type[Any]) -> T:
    """``value``, or ``default`` for None; ValueError where it is a class, a text, or anything but a ``base``."""
    if value is None:
        return default
    given: T = value
    if not isinstance(value, base):
        raise ValueError(f"{name} is an object such as {default!r}, got {value!r}.")
    return given
