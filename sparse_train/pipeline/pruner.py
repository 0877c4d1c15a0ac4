"""One pass of the pipeline, scores -> masks -> policy, over sparsified layers: ``update_masks``.

One-shot pruning, the Lightning callback and plain loops all use it.

Shape suffixes: O out_features, I in_features, J packed mask bytes.
"""

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from sparse_train.distributed import rank, sum_over_ranks
from sparse_train.layers import masks, sharding
from sparse_train.layers.matrices import MaskedMatrix
from sparse_train.patterns import Pattern
from sparse_train.pipeline.choice import Rules, agreed_flips, choose
from sparse_train.pipeline.recording import check_reached
from sparse_train.pipeline.update_report import LayerUpdate


@torch.no_grad()
def update_masks(
    layers: Mapping[str, MaskedMatrix], rules: Rules, *, compare_halves: bool = False
) -> dict[str, LayerUpdate]:
    """Score every layer and replace its mask.

    Args:
        layers: masked layers by name; with ``statistics`` if the criterion needs them.
        rules: how masks are chosen.
        compare_halves: also count the flips that each half of the statistics, which must be ``HalvedNorm``, makes
            alone; this runs selection two more times.

    Raises:
        ValueError: a layer without activations, or with non-finite activations or weights.
    """
    check_reached(layers, rules.criterion)
    # First all new masks, then all changes, so that an error leaves every mask and weight unchanged, on every rank.
    chosen = choose(layers, rules)
    for name, choice in chosen.items():
        if not choice.finite:
            raise ValueError(
                f"{name}: scores are not finite, because a weight is infinite or NaN, or too large for its "
                "activations; masks were not changed. Lower the learning rate, or find out where the weight got its "
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
    """Replace a mask by a packed one under which ``nonzero`` weights are not zero."""
    flips = masks.count_differing(layer.weight_mask, packed_OJ)
    layer.weight_mask.copy_(packed_OJ)
    layer.reached = False
    size = layer.in_features * layer.out_features
    return LayerUpdate(size, size - nonzero, flips)


def measure(layers: Mapping[str, MaskedMatrix]) -> dict[str, LayerUpdate]:
    """Count the zeros of masked layers, without changing anything; if rows are sharded, with one reduce."""
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


def check_masks(layers: Mapping[str, MaskedMatrix], pattern: Pattern, sparsity: float | Mapping[str, float]) -> None:
    """Raise ValueError if the masks of layers do not follow this pattern and sparsity, over all or of each."""
    # With the mask itself as the scores, the pattern selects the mask if it has the right count in every group.
    found = [layer.unpacked_mask() for layer in layers.values()]
    if pattern.model_wide:
        found = [torch.cat([mask.reshape(1, -1) for mask in found], dim=1)]
    for mask, name in zip(found, layers, strict=False):
        own = sparsity[name] if isinstance(sparsity, Mapping) else sparsity
        if not torch.equal(pattern.mask(mask.float(), own), mask):
            raise ValueError(
                f"The model has masks already, and those of {name} are not {pattern} at a sparsity of {own:g}, "
                "which this run starts with (if layers are to differ, give it the allocation, too). Squash the model "
                "first to begin with new masks; to resume a run, pass its state (MaskUpdater(..., state=...)); to "
                "train with these masks unchanged, leave updater or callback out, and squash the model at the end."
            )
