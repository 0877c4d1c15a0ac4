"""A model that was pruned before: its zeros as masks, for training alone (``keep_zeros``) and as a run's first mask."""

import logging
from collections.abc import Mapping, Sequence

import torch
from torch import nn

from sparse_train.criteria import Magnitude
from sparse_train.distributed.collectives import rank, sum_over_ranks
from sparse_train.distributions import Division
from sparse_train.layers.masked_layer import MaskedLayer, sparse_layers
from sparse_train.layers.sparsify import sparsify, squash_layers
from sparse_train.layers.targets import find_targets
from sparse_train.patterns import Pattern, Unstructured, group_label
from sparse_train.pruning.counts import mask_sparsities, measure, sparsity_of
from sparse_train.pruning.update import Rules, update_masks

_log = logging.getLogger(__name__)

_A_FEW = 0.005  # masks prune zeros first, so they keep few of a dense model's
_DENSE = (
    "first_mask is FromZeros(), and the model is dense. Prune it first (sparse-train prune MODEL FOLDER) and train "
    "that folder, or make the first mask here: first_mask=OneShot()."
)
_TO_KEEP_THEM = (
    "To train with the existing zeros, leave DynamicPruning or MaskUpdater out: call sparse_train.keep_zeros(model) "
    "before training, and squash(model) after it."
)


@torch.no_grad()
def keep_zeros(model: nn.Module, targets: Sequence[str] | None = None, ignore: Sequence[str] = ()) -> float:
    """Mask the zeros of a model that was pruned before, wherever they are, so that training keeps all of them.

    ::

        model = AutoModelForCausalLM.from_pretrained("pruned")
        keep_zeros(model)
        ...  # train in any loop or trainer, without DynamicPruning or MaskUpdater
        squash(model)

    Pruned weights get no gradient, and masks do not change. This keeps zeros that follow no pattern, such as those of
    unstructured SparseGPT or of groups larger than a row; for zeros that do follow one, ``DynamicPruning`` with
    ``first_mask=FromZeros()`` and the policy ``Fixed()`` keeps them, too.

    Args:
        model: changed in place.
        targets, ignore: which layers, see ``sparse_train.layers.targets.find_targets``.

    Returns:
        The share of zeros among the targeted weights.

    Raises:
        ValueError: no weight of the targets is zero, or the model has masks already. It is then unchanged.
    """
    if sparse_layers(model):
        raise ValueError("The model has masks already, which keep its zeros. Squash it first to make new ones.")
    sparsify(model, find_targets(model, Unstructured(), targets, ignore).layers.values())
    masked = sparse_layers(model)
    for layer in masked.values():
        layer.straight_through = False
        _mask_zeros(layer)
    if all(layer.is_dense() for layer in masked.values()):
        squash_layers(model)
        raise ValueError("No weight of the targeted layers is zero, so there is nothing to keep: prune the model.")
    return sparsity_of(measure(masked).values())


def masks_from_zeros(layers: Mapping[str, MaskedLayer], pattern: Pattern, sparsity: float, division: Division) -> None:
    """Make the first masks of a run from the zeros of a model that was pruned before.

    Raises ValueError, and masks keep everything as before, if the zeros do not follow pattern and sparsity. How the
    sparsity is divided among layers is read from the zeros if it is not known.
    """
    dense, error = measure(layers), None
    percent = 100 * sparsity_of(dense.values())
    try:
        if not division.known:
            for layer in layers.values():
                _mask_zeros(layer)
            division.take_from_masks(mask_sparsities(layers, pattern), sparsity)
        # by magnitude, masks prune zeros first: if the zeros follow the pattern, nothing else
        updates = update_masks(layers, Rules(Magnitude(), pattern, division.at(sparsity)))
        misfits = [name for name in layers if updates[name].zeros != dense[name].zeros]
        if misfits:
            raise ValueError(
                f"first_mask is FromZeros(), and {percent:.1f} % of the targeted weights are zeros, but in "
                f"{len(misfits)} of {len(layers)} layers, such as {misfits[0]}, not where {group_label(pattern)} at "
                f"{sparsity:g} has them. Those of unstructured SparseGPT are "
                f'counted over layers: mask_structure=Unstructured(group="layer"). {_TO_KEEP_THEM} Or make a new first '
                "mask: first_mask=OneShot()."
            )
    except ValueError as own:
        error = own if percent > 100 * _A_FEW else ValueError(_DENSE)
    refused = torch.tensor(int(error is not None), device=next(iter(layers.values())).weight_mask.device)
    sum_over_ranks([refused])  # a process that ended alone would leave the others waiting
    if refused:
        for layer in layers.values():
            layer.keep_all()
        raise error or ValueError("The zeros of another process do not follow the pattern: it has another model.")


def warn_of_filled(layers: Mapping[str, MaskedLayer], kept: Mapping[str, int] | None = None) -> None:
    """Warn if masks keep zeros of a model that was pruned before: training fills them.

    ``kept`` is their number by layer, counted here if not given. A layer of zeros alone is new, such as LoRA's B.
    """
    kept = kept or {name: each.zeros - layers[name].pruned() for name, each in measure(layers).items()}
    filled = sum(zeros for name, zeros in kept.items() if zeros < layers[name].size)
    share = filled / sum(layer.size for layer in layers.values())
    if share > _A_FEW and rank() == 0:
        _log.warning(
            "The model was pruned before: %.1f %% of its weights are zeros that the first masks keep, so training "
            "fills them. A run masks zeros that follow its pattern with first_mask=FromZeros(). %s",
            100 * share,
            _TO_KEEP_THEM,
        )


def _mask_zeros(layer: MaskedLayer) -> None:
    with layer.read() as (weight_OI, _):
        layer.set_mask(weight_OI != 0)
