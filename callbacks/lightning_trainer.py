"""What callbacks need from Lightning's trainer: its steps, batches for calibration, and when modules have layers."""

import functools
import math
from collections.abc import Callable, Iterable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import GradientAccumulationScheduler, WeightAveraging
from lightning.pytorch.utilities.model_helpers import is_overridden

from sparse_train.environment import isolated_rng
from sparse_train.layers.masked_layer import sparse_layers
from sparse_train.layers.sparsify import sparsify, sparsify_like, squash_layers
from sparse_train.oneshot.batches import first_samples, training_batches
from sparse_train.oneshot.forwards import Batch

# Lightning has no hook after a module has created its layers, so the last of these that the module has is wrapped once.
_HOOKS = ("configure_model", "setup")  # the later one first; a callback's setup runs before both


def steps_done(trainer: L.Trainer, *, in_batch: bool = True) -> int:
    """The step at which Lightning's own logs of this batch are, counted from 1.

    ``trainer.global_step``, unless the module optimizes by hand: it then counts the steps of every optimizer, and
    Lightning's loggers count batches. ``in_batch``: in ``on_train_batch_end``, before Lightning has counted the batch.
    """
    if trainer.lightning_module.automatic_optimization:
        return trainer.global_step
    return trainer.fit_loop.epoch_loop._batches_that_stepped + in_batch


def total_steps(trainer: L.Trainer) -> float:
    """Optimizer steps of a fit, infinite if its end is not known.

    Lightning's estimate is -1 for a stream that only max_epochs ends, and does not see a callback that accumulates
    batches by epochs.
    """
    estimate = trainer.estimated_stepping_batches
    batches, epochs = trainer.num_training_batches, trainer.max_epochs
    for each in callbacks_of(trainer):
        if isinstance(each, GradientAccumulationScheduler) and math.isfinite(batches) and epochs not in (None, -1):
            steps = sum(math.ceil(batches / each.get_accumulate_grad_batches(epoch)) for epoch in range(epochs))
            return steps if trainer.max_steps == -1 else min(steps, trainer.max_steps)
    return estimate if estimate >= 0 else math.inf


def callbacks_of(trainer: L.Trainer) -> list[L.Callback]:
    return trainer.callbacks  # type: ignore[attr-defined]


def batches_of_training(trainer: L.Trainer, samples: int) -> list[Batch] | None:
    """Random training batches, as ``training_step`` gets them, without changing the state of the loader; None if a
    model could not use any.

    If the data module has a method ``calibration_dataloader`` that returns a loader, its first batches are used.
    """
    trainer.fit_loop.setup_data()
    own = getattr(getattr(trainer, "datamodule", None), "calibration_dataloader", lambda: None)()
    with isolated_rng():
        torch.manual_seed(0)  # the same batches in each process
        batches = training_batches(trainer.train_dataloader, samples) if own is None else first_samples(own, samples)
        if batches is None:
            return None
        before = trainer.lightning_module._on_before_batch_transfer
        return [trainer.strategy.batch_to_device(before(batch)) for batch in batches]


# --- when layers exist -----------------------------------------------------------------------------------------------


def call_when_built(pl_module: L.LightningModule, act: Callable[[L.LightningModule], None]) -> None:
    """Call ``act`` after the last hook in which the module may create layers; now, if it has no such hook."""
    for hook in _HOOKS:
        if is_overridden(hook, pl_module):
            pl_module.__dict__[hook] = functools.partial(_call, hook, pl_module, act)
            return
    act(pl_module)


def _call(
    hook: str, pl_module: L.LightningModule, act: Callable[[L.LightningModule], None], *args: Any, **arguments: Any
) -> None:
    del pl_module.__dict__[hook]
    getattr(pl_module, hook)(*args, **arguments)
    act(pl_module)


def forget(pl_module: L.LightningModule) -> None:
    """Cancel a call that has not happened yet."""
    for hook in _HOOKS:
        pl_module.__dict__.pop(hook, None)


def masks_as_loaded(pl_module: L.LightningModule) -> Callable[[], None]:
    """Give layers a mask when the module loads a state dict that has one. Returns a function that ends this.

    If the module had no masks before, those that it has loaded are then folded into its weights.
    """
    was_dense = not sparse_layers(pl_module)
    hook = pl_module.register_load_state_dict_pre_hook(  # type: ignore[no-untyped-call]
        lambda module, state_dict, prefix, *_: sparsify_like(module, state_dict, prefix)
    )

    def end() -> None:
        hook.remove()
        if was_dense and sparse_layers(pl_module):
            squash_layers(pl_module)

    return end


# --- averaged models -------------------------------------------------------------------------------------------------


def averaging(trainer: L.Trainer) -> list[WeightAveraging]:
    return [each for each in callbacks_of(trainer) if isinstance(each, WeightAveraging)]


def sparsify_averages(trainer: L.Trainer, names: Iterable[str]) -> None:
    """Give averaged models that were copied before the module had masked layers such layers, too."""
    for callback in averaging(trainer):
        if callback._average_model is not None:
            modules = dict(callback._average_model.module.named_modules())
            sparsify(callback._average_model.module, [modules[name] for name in names if name in modules])


def mask_averages(trainer: L.Trainer, pl_module: L.LightningModule, weights: bool = False) -> None:
    """Give averaged models the masks of the module, and with ``weights`` also those; call after they have changed.

    They copy masks only together with weights, which may begin late and happen seldom. Until then they would be dense,
    or have the masks of an earlier update, in validation, in checkpoints, and at the end of training.
    """
    for callback in averaging(trainer):
        if callback._average_model is not None:
            averaged = sparse_layers(callback._average_model.module)
            for name, layer in sparse_layers(pl_module).items():
                averaged[name].weight_mask.copy_(layer.weight_mask)
                if weights:
                    averaged[name].weight.data.copy_(layer.weight.detach())
