"""The first mask of a run, where one-shot pruning makes it from batches of the training data."""

import logging
from collections.abc import Mapping

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from sparse_train import masks
from sparse_train.callbacks.calibration import peek
from sparse_train.criteria import Criterion, Wanda
from sparse_train.distributed import take_from_rank_0
from sparse_train.layers import sparse_layers
from sparse_train.mask_lora import MaskLoRA
from sparse_train.matrices import MaskedLayer
from sparse_train.oneshot import set_initial_masks
from sparse_train.oneshot.engine import Method, Undo
from sparse_train.oneshot.training_data import causal_lm
from sparse_train.patterns import Pattern
from sparse_train.pruner import check_masks, expect, masks_from_zeros
from sparse_train.sharding import has_masters, is_sharded, reshard
from sparse_train.solvers import Solver, SparseGPT

_log = logging.getLogger("sparse_train.callbacks.dynamic_pruning")  # whose users it speaks to


def check_initial(
    method: Method | None, criterion: Method | None, pattern: Pattern, mask_lora: MaskLoRA | None
) -> None:
    """Raise ValueError unless a method can make a first mask, and ``criterion``, which re-prunes, is no solver."""
    if isinstance(criterion, Solver):
        raise ValueError(
            f"criterion is {criterion}, which moves weights and has no scores to re-prune by. Give it as "
            "initial_criterion, for the first mask, and a Criterion such as Wanda() for updates."
        )
    expect("initial_criterion", method, Wanda(), (Criterion, Solver))
    if not isinstance(method, Solver):
        return
    method.check_pattern(pattern)
    if isinstance(method, SparseGPT) and method.preserve_sparsity_mask:
        raise ValueError(
            "SparseGPT(preserve_sparsity_mask=True) keeps fewer weights than the pattern says where there are more "
            "zeros already, and masks in training keep its count exactly. Leave preserve_sparsity_mask out."
        )
    if mask_lora is not None:
        raise ValueError(
            f"initial_criterion is {method}, which moves weights, and mask_lora trains adapters of weights that stay "
            f"as they are. Prune the model before (sparse_train.prune with criterion={type(method).__name__}()), or "
            "take a criterion."
        )


def make_first_mask(
    trainer: L.Trainer,
    pl_module: L.LightningModule,
    criterion: Criterion,
    pattern: Pattern,
    sparsity: float,
    batches: int,
    initial_criterion: Method | None = None,
) -> None:
    """Set the masks that a run starts with; leaves them alone where its first window of steps has to make them.

    Args:
        trainer, pl_module: of the run, which has just begun.
        criterion: of the run.
        pattern, sparsity: of the masks, at step 0.
        batches: of training data to calibrate on.
        initial_criterion: scores of these masks, or a solver of weights and masks; default: ``criterion``.

    Raises:
        ValueError: there is an ``initial_criterion``, and one-shot pruning makes no first mask here.
    """
    made = _one_shot(trainer, pl_module, criterion, pattern, sparsity, batches, initial_criterion)
    if initial_criterion is not None and not made:
        raise ValueError(
            f"initial_criterion is {initial_criterion}, but no one-shot pruning makes the first mask here: it does at "
            "start_step 0, with calibration_batches above 0, for a transformers model that is not sharded and has no "
            "masks yet, and where there is something to prune. Leave initial_criterion out, or prune the model before "
            "the run (sparse_train.prune)."
        )


def _one_shot(
    trainer: L.Trainer,
    pl_module: L.LightningModule,
    criterion: Criterion,
    pattern: Pattern,
    sparsity: float,
    count: int,
    initial_criterion: Method | None,
) -> bool:
    layers = sparse_layers(pl_module)
    if isinstance(initial_criterion, Solver):
        _check_movable(initial_criterion, layers)
    needless = initial_criterion is None and not criterion.needs_activations
    if needless or sparsity == 0 or not all(layer.keeps_all() for layer in layers.values()):
        return False
    reshard(pl_module)
    if any(map(is_sharded, layers.values())):
        if not masks_from_zeros(layers, pattern, sparsity):
            rank_zero_info(
                "The model is sharded, so its blocks cannot be calibrated one by one: the first mask will come "
                "from the activations of the first steps, which run dense. A model that was pruned before starts "
                "with the zeros that it has."
            )
        return False
    if not count:
        return False
    model = causal_lm(pl_module, layers)
    each = -(-count // trainer.world_size) * trainer.world_size  # as many for each rank
    found = peek(trainer, each) if model is not None else None
    if model is None or found is None or len(found) < trainer.world_size:
        _log.info("The first mask will come from the activations of the first steps, which run dense.")
        return False
    own, undo = sparse_layers(model), Undo()
    try:
        with trainer.precision_plugin.forward_context():
            set_initial_masks(
                model,
                own,
                found[trainer.global_rank :: trainer.world_size],  # statistics are summed over ranks
                criterion=initial_criterion or criterion,
                pattern=pattern,
                sparsity=sparsity,
                progress=trainer.is_global_zero and trainer.progress_bar_callback is not None,
                save=undo.save,
            )
        check_masks(own, pattern, sparsity)  # a solver of the user's own may have kept others
    except BaseException:
        undo.restore()
        for layer in own.values():
            masks.fill_full(layer.weight_mask, layer.in_features)  # as they were
        raise
    if isinstance(initial_criterion, Solver):  # linear algebra may round otherwise on other hardware
        take_from_rank_0([tensor for each in own.values() for tensor in (each.weight_OI.detach(), each.weight_mask)])
    return True


def _check_movable(solver: Solver, layers: Mapping[str, MaskedLayer]) -> None:
    """Raise ValueError where weights that a solver moves would not stay moved, or are not to be."""
    if any(map(has_masters, layers.values())):
        raise ValueError(
            f"initial_criterion is {solver}, which moves weights, and DeepSpeed would bring the old ones back: it "
            "holds float32 masters of them. Take strategy='ddp', or prune before the run (sparse-train prune)."
        )
    frozen = next((name for name, layer in layers.items() if not layer.weight_OI.requires_grad), None)
    if frozen is not None:
        raise ValueError(
            f"initial_criterion is {solver}, which moves weights, and {frozen} is frozen. Prune the model before it "
            "gets adapters (sparse-train prune), or take a criterion."
        )
