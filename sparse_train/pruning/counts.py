"""Counts of zeros and mask entries: what an update did, and what masks prune.

Shape suffixes: O out_features, I in_features, J packed mask bytes.
"""

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sparse_train.distributed.collectives import rank, sum_over_ranks, world_size
from sparse_train.layers import masks
from sparse_train.layers.masked_layer import MaskedMatrix
from sparse_train.patterns import Pattern, Unstructured, sparsity_for


@dataclass(frozen=True)
class LayerUpdate:
    """What an update did to one layer, or, with 0 flips, what ``measure`` counted; numbers of weights."""

    size: int
    zeros: int
    """Zeros counted on the masked weights, including kept weights that happen to be zero."""
    flips: int
    """Mask entries that changed."""


@dataclass(frozen=True)
class UpdateReport:
    """What an update did."""

    step: int
    target_sparsity: float
    layers: Mapping[str, LayerUpdate] = field(repr=False)
    initial_flip_rate: float
    """Share of mask entries that differ from the first mask, measured on every 128th row, at least four of a layer."""
    seconds: float

    @property
    def sparsity(self) -> float:
        """Share of zeros among the targeted weights, counted on the weights."""
        return sparsity_of(self.layers.values())

    @property
    def flip_rate(self) -> float:
        """Share of mask entries that this update changed; 0 in a report without an update."""
        return sum(layer.flips for layer in self.layers.values()) / sum(layer.size for layer in self.layers.values())

    def metrics(self) -> dict[str, float]:
        """The metrics for loggers, by name."""
        return {
            "sparsity/target": self.target_sparsity,
            "sparsity/actual": self.sparsity,
            "sparsity/flip_rate": self.flip_rate,
            "sparsity/initial_flip_rate": self.initial_flip_rate,
            "sparsity/update_seconds": self.seconds,
        }

    def layer_metrics(self) -> dict[str, float]:
        """The metrics of each layer, by name."""
        sparsities = {f"layers/sparsity/{name}": layer.zeros / layer.size for name, layer in self.layers.items()}
        return sparsities | {f"layers/flip_rate/{n}": layer.flips / layer.size for n, layer in self.layers.items()}


def sparsity_of(layers: Collection[Any]) -> float:
    """Share of zeros over the weights of layers, each with ``zeros`` and ``size``; 0 if there are none."""
    size = sum(layer.size for layer in layers)
    return sum(layer.zeros for layer in layers) / size if size else 0.0


def measure(layers: Mapping[str, MaskedMatrix]) -> dict[str, LayerUpdate]:
    """Count the zeros of masked layers, without changing anything; if rows are sharded, with one reduce."""
    counts = {}
    for name, layer in layers.items():
        with layer.read(by_rows=True) as (weight_OI, rows):
            counts[name] = [masks.count(masks.pack(weight_OI.bool()) & layer.weight_mask[rows])]
    nonzero = {name: number for name, (number,) in sum_counts(layers, counts).items()}
    return {name: LayerUpdate(layer.size, layer.size - nonzero[name], 0) for name, layer in layers.items()}


def sum_counts(layers: Mapping[str, MaskedMatrix], counts: Mapping[str, list[int]]) -> Mapping[str, list[int]]:
    """Counts of each layer over all processes; of layers that are not sharded, all of them have counted the same."""
    sharded = {name: layer.rows_are_divided for name, layer in layers.items()}
    if not any(sharded.values()):
        return counts
    mine = [each if sharded[name] or rank() == 0 else [0] * len(each) for name, each in counts.items()]
    total = torch.tensor(mine, dtype=torch.int64, device=next(iter(layers.values())).weight_mask.device)
    sum_over_ranks([total])
    return dict(zip(counts, total.tolist(), strict=True))


def check_agreement(layers: Mapping[str, MaskedMatrix]) -> None:
    """Raise ValueError, on every rank, if ranks hold different masks; one small reduce."""
    if world_size() == 1:
        return
    # a row for each mask: its fingerprint as zeros and ones; ranks agree on a bit if its sum is 0 or all
    bits = torch.stack([masks.fingerprint(layer.weight_mask) for layer in layers.values()]).long()
    sum_over_ranks([bits])
    differing = ((bits > 0) & (bits < world_size())).any(1).tolist()
    for name, differs in zip(layers, differing, strict=True):
        if differs:
            raise ValueError(
                f"{name}: the masks of the {world_size()} processes are not the same, so they have been training "
                "different models since the last update. Masks were changed in one of them, or its memory is faulty; "
                "resume from a checkpoint, and leave masks to the updates."
            )


def misfitting_layer(
    layers: Mapping[str, MaskedMatrix], pattern: Pattern, sparsities: Mapping[str, float]
) -> str | None:
    """The first layer whose mask does not follow this pattern and its sparsity; None if all do."""
    # With the mask itself as the scores, the pattern selects the mask if it has the right count in every group.
    unpacked: Iterable[Tensor] = (layer.unpacked_mask() for layer in layers.values())
    if pattern.model_wide:
        unpacked = [torch.cat([mask.reshape(1, -1) for mask in unpacked], dim=1)]
    for name, mask in zip(layers, unpacked, strict=False):
        if not torch.equal(pattern.mask(mask.float(), sparsities[name]), mask):
            return name
    return None


def mask_sparsities(layers: Mapping[str, MaskedMatrix], pattern: Pattern) -> dict[str, float]:
    """By layer, the sparsity at which the pattern prunes as many weights as the mask does."""
    sparsities = {}
    for name, layer in layers.items():
        if not isinstance(pattern, Unstructured):  # a user-defined pattern may round down
            sparsities[name] = sparsity_for(layer.pruned(), layer.size)
        elif pattern.group == "row":
            # zeros that a model has had before pruning make some rows sparser than the pattern
            sparsities[name] = int((~layer.unpacked_mask()).sum(1).min()) / layer.in_features
        else:
            sparsities[name] = layer.pruned() / layer.size
    return sparsities
