"""The first mask of a run, where one-shot pruning makes it from batches of the training data."""

import logging

import lightning as L
from lightning.pytorch.utilities import rank_zero_info

from sparse_train.callbacks.calibration import peek
from sparse_train.layers import sparse_layers
from sparse_train.oneshot import first_mask
from sparse_train.oneshot.engine import Method
from sparse_train.oneshot.training_data import causal_lm
from sparse_train.pruner import masks_from_zeros
from sparse_train.run_settings import RunSettings
from sparse_train.sharding import is_sharded, reshard

_log = logging.getLogger("sparse_train.callbacks.dynamic_pruning")  # whose users it speaks to


def make_first_mask(
    trainer: L.Trainer,
    pl_module: L.LightningModule,
    settings: RunSettings,
    batches: int,
    initial_criterion: Method | None = None,
) -> None:
    """Set the masks that a run starts with; leaves them alone where its first window of steps has to make them.

    Args:
        trainer, pl_module: of the run, which has just begun.
        settings: of the run.
        batches: of training data to calibrate on.
        initial_criterion: scores of these masks, or a solver of weights and masks; default: the run's criterion.

    Raises:
        ValueError: there is an ``initial_criterion``, and one-shot pruning makes no first mask here.
    """
    made = _one_shot(trainer, pl_module, settings, batches, initial_criterion)
    if initial_criterion is not None and not made:
        raise first_mask.none_made(initial_criterion)


def _one_shot(
    trainer: L.Trainer, pl_module: L.LightningModule, settings: RunSettings, count: int, initial: Method | None
) -> bool:
    layers, pattern, sparsity = sparse_layers(pl_module), settings.mask_structure, settings.first_sparsity
    if not first_mask.is_wanted(initial, settings.criterion, layers, sparsity):
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
    with trainer.precision_plugin.forward_context():
        first_mask.make(
            model,
            found[trainer.global_rank :: trainer.world_size],
            initial or settings.criterion,
            pattern,
            sparsity,
            progress=trainer.is_global_zero and trainer.progress_bar_callback is not None,
        )
    return True
