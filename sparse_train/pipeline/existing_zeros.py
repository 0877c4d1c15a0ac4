"""Masks of a model that was pruned before, from its zeros: ``keep_zeros``, and the first mask of a run."""

import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress

import torch
from torch import nn

from sparse_train.criteria import Magnitude
from sparse_train.distributed import all_ranks, rank
from sparse_train.layers import masks, sharding
from sparse_train.layers.matrices import MaskedLayer
from sparse_train.layers.sparse_linear import sparse_layers
from sparse_train.layers.sparsify import fold, sparsify
from sparse_train.patterns import Pattern, Unstructured, group_label
from sparse_train.pipeline.choice import Rules
from sparse_train.pipeline.divided_sparsity import DividedSparsity
from sparse_train.pipeline.policies import StraightThrough
from sparse_train.pipeline.pruner import measure, update_masks
from sparse_train.pipeline.update_report import LayerUpdate
from sparse_train.targets import select

_log = logging.getLogger(__name__)


@torch.no_grad()
def keep_zeros(model: nn.Module, targets: Sequence[str] | None = None, ignore: Sequence[str] = ()) -> float:
    """Mask the zeros of a model that was pruned before, wherever they are, so that training keeps all of them.

    ::

        model = AutoModelForCausalLM.from_pretrained("pruned")
        keep_zeros(model)
        ...  # train in any loop or trainer, without DynamicPruning or MaskUpdater
        squash(model)

    Pruned weights get no gradient, and masks do not change. This keeps zeros that follow no pattern, such as those of
    unstructured SparseGPT or of groups larger than a row; for zeros that do follow one, ``DynamicPruning`` with the
    policy ``Fixed()`` keeps them, too.

    Args:
        model: changed in place.
        targets, ignore: which layers, see ``sparse_train.targets.select``.

    Returns:
        The share of zeros among the targeted weights.

    Raises:
        ValueError: no weight of the targets is zero, or the model has masks already. It is then unchanged.
    """
    if sparse_layers(model):
        raise ValueError("The model has masks already, which keep its zeros. Squash it first to make new ones.")
    chosen = select(model, Unstructured(), targets, ignore).layers
    for name, module in chosen.items():
        sharding.check_layout(name, module)
    sparsify(model, chosen.values())
    masked = sparse_layers(model)
    for layer in masked.values():
        layer.straight_through = False
        _mask_zeros(layer)
    if all(layer.keeps_all() for layer in masked.values()):
        fold(model)
        raise ValueError(
            "No weight of the targeted layers is zero, so there is nothing to keep: prune the model first."
        )
    found = measure(masked).values()
    return sum(layer.zeros for layer in found) / sum(layer.size for layer in found)


def _mask_zeros(layer: MaskedLayer) -> None:
    with sharding.weights(layer, by_rows=False) as (weight_OI, _):
        layer.set_mask(weight_OI != 0)


def masks_from_zeros(
    layers: Mapping[str, MaskedLayer], pattern: Pattern, sparsity: float, division: DividedSparsity
) -> bool:
    """Make the first masks of a run from the zeros of a model that was pruned before.

    Warns if it was, but with zeros in other places than the pattern asks for, or with more of them.

    Args:
        layers: with masks that keep everything, and that stay so if the result is False.
        pattern, sparsity: what the masks must follow.
        division: how the sparsity is divided; if that is not known, it is read from the zeros.

    Returns:
        Whether the zeros are now masks: they are if they follow the pattern, on every rank. (DDP may give the others
        rank 0's weights later.)
    """
    follows, was_pruned = _try(layers, pattern, sparsity, division)
    if follows:
        warn_of_filled_zeros(layers, pattern, sparsity)
        return True
    if not was_pruned:
        return False
    found = measure(layers).values()  # on every rank, as the sum over shards of weights is
    if rank() == 0:
        _log.warning(
            "The model was pruned before: %.1f %% of its weights are zeros, but not where %s at %g has them. So "
            "training fills them, and the first mask prunes other weights, too. %s",
            100 * sum(u.zeros for u in found) / sum(u.size for u in found),
            group_label(pattern),
            sparsity,
            TO_KEEP_THEM,
        )
    return False


def warn_of_filled_zeros(layers: Mapping[str, MaskedLayer], pattern: Pattern, sparsity: float) -> None:
    """Warn if the masks of layers keep zeros of a model that was pruned before, so that training fills them."""
    kept = sum(masks.count(layer.weight_mask) for layer in layers.values())
    counts = measure(layers).values()
    size = sum(each.size for each in counts)
    zeros = sum(each.zeros for each in counts if each.zeros < each.size)  # new layers may begin at zero
    share = (zeros - (size - kept)) / size
    if share <= _A_FEW or rank() != 0:
        return
    mask = f"the first mask ({group_label(pattern)} at {sparsity:g}) keeps" if sparsity else "are not masked at first"
    _log.warning(
        "The model was pruned before: %.1f %% of its weights are zeros that %s, so training fills them%s. %s",
        100 * share,
        mask,
        ", and other weights are pruned"
        if kept < size
        else ". A run that starts at its final sparsity, at step 0, masks zeros that follow its pattern",
        TO_KEEP_THEM,
    )


def read_division(
    layers: Mapping[str, MaskedLayer], pattern: Pattern, sparsity: float, division: DividedSparsity
) -> None:
    """If a division is not known and the zeros of the model have one, take that; masks stay as they are.

    Arguments as in ``masks_from_zeros``.
    """
    if not division.known and _try(layers, pattern, sparsity, division)[0]:
        for layer in layers.values():
            masks.fill_full(layer.weight_mask, layer.in_features)


def _try(
    layers: Mapping[str, MaskedLayer], pattern: Pattern, sparsity: float, division: DividedSparsity
) -> tuple[bool, bool]:
    """Whether the zeros are now masks, and whether the model was pruned."""
    dense, reads = measure(layers), not division.known
    zeros, size = sum(u.zeros for u in dense.values()), sum(u.size for u in dense.values())
    # rows prune whole counts; an unpruned model has a few zeros of rounding
    needed = sum(layer.out_features * max(0.0, sparsity * layer.in_features - 1) for layer in layers.values())
    was_pruned = zeros >= max(0.99 * needed, _A_FEW * size, 1)
    if was_pruned and reads:
        for layer in layers.values():
            _mask_zeros(layer)
        with suppress(ValueError):  # the zeros are at another sparsity
            division.read_masks(sparsity)
    follows = was_pruned and division.known and _follows(layers, dense, pattern, division.at(sparsity))
    if all_ranks(follows, next(iter(layers.values())).weight_mask.device):
        return True, True
    for layer in layers.values():
        masks.fill_full(layer.weight_mask, layer.in_features)
    if reads:
        division.forget_masks()
    return False, was_pruned


def _follows(
    layers: Mapping[str, MaskedLayer],
    dense: Mapping[str, LayerUpdate],
    pattern: Pattern,
    sparsity: float | Mapping[str, float],
) -> bool:
    """Set masks by magnitude. Returns whether they prune only zeros."""
    found = update_masks(layers, Rules(Magnitude(), pattern, sparsity, StraightThrough()))
    return all(found[name].zeros == dense[name].zeros for name in layers)


_A_FEW = 0.005  # weights of 4 bits have 0.0003
TO_KEEP_THEM = (
    "To train with the existing zeros, leave DynamicPruning or MaskUpdater out: call sparse_train.keep_zeros(model) "
    "before training, and squash(model) after it."
)
"""Advice for models that were pruned in another way than a run would prune them."""
