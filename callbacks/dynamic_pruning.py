"""``DynamicPruning``: re-prune a model while Lightning trains it.

What happens when, in Lightning's order:

    setup                     existing targets get masks that keep everything, and the adapters of mask_lora
    setup, configure_model    the same for targets that the module creates there
    (checkpoint is loaded)    finds the mask buffers; the callback's state is kept for later
    (sanity check)            the model as it was built
    on_sanity_check_end       the first mask, so that RunRecord can validate both models
    on_train_start            the first mask, if there was no sanity check, or the state of the checkpoint
    on_train_batch_start      the recorder gets the batch's padding
    (forward)                 activations are recorded in the window before an update
    on_before_backward        in the first step: is a weight read beside its layer's forward?
    on_before_optimizer_step  policies look at the gradients; before clipping
    (optimizer step)
    on_train_batch_end        after an optimizer step: update, log; before ModelCheckpoint and validation
    on_fit_end                squash, after the last checkpoint
"""

import functools
from collections.abc import Callable
from typing import Any

import lightning as L
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor

from sparse_train.arguments import require_type
from sparse_train.callbacks import lightning_trainer
from sparse_train.callbacks.checks import check_built, check_fit, warn_of_denser_best
from sparse_train.distributed.fsdp2 import reshard
from sparse_train.export.verify import pruning_json
from sparse_train.layers.mask_lora import MaskLoRA, add_mask_lora, check_mask_lora
from sparse_train.layers.masked_layer import MaskedLayer, sparse_layers
from sparse_train.layers.masks import MASK_NAME
from sparse_train.layers.sparsify import squash_layers
from sparse_train.models.checkpoints import PRUNING_STATE
from sparse_train.oneshot.first_mask import make_first_mask
from sparse_train.patterns import Pattern
from sparse_train.pruning.config import PruningConfig
from sparse_train.pruning.counts import UpdateReport
from sparse_train.pruning.resuming import check_restored_masks, check_same_settings
from sparse_train.pruning.updater import MaskUpdater, mask_targets
from sparse_train.recorder import Recorder

_NO_MASK = {f"sparsity/{name}": 0.0 for name in ("target", "actual", "flip_rate", "initial_flip_rate")}
"""Logged before the first mask. Not counted on the weights: with sharded weights that would cost communication."""


class DynamicPruning(L.Callback):
    """Keep a model at its target sparsity in training: masks are recomputed every ``update_freq`` steps.

    ::

        trainer = L.Trainer(max_steps=1000, callbacks=[DynamicPruning("2:4", update_freq=10)])
        trainer.fit(module, data)

    Works with any LightningModule that holds ``nn.Linear`` layers. From the first training step on, or from the first
    mask, every forward pass (training, validation, generation) uses the sparse model. After ``fit``, pruned weights are
    true zeros, so ``save_pretrained`` and ``state_dict`` export a sparse model.

    Each update logs to all loggers ``sparsity/target``, ``sparsity/actual`` (zeros counted on the weights),
    ``sparsity/flip_rate`` (share of mask entries that changed), ``sparsity/initial_flip_rate`` (share that differs from
    the first mask, measured on every 128th row) and ``sparsity/update_seconds``. So do a first mask at step 0, and
    update steps that need not change the masks.

    A trainer can have one such callback. For several patterns in one model, use several ``MaskUpdater``, with targets
    that do not overlap, in a callback of your own or in a custom loop.

    Checkpoints hold shadow values and masks in the model's state dict, and norms and counters in the callback's
    state. A resumed run continues bit for bit, except for random numbers that Lightning does not save, such as those of
    dropout. To resume in the middle of an epoch, the data loader must be stateful, as that of ``TextBlocks`` is.

    Args:
        mask_structure: "unstructured", "N:M" with N kept of every M consecutive inputs ("2:4"), or a ``Pattern``.
            Default: "2:4", unless ``config`` is given.
        sparsity: share of targeted weights that are zero; implied by N:M and by ``schedule``.
        settings: those of a ``PruningConfig``, where they are explained.
        config: the settings as one object, instead.
        mask_lora: train only low-rank adapters inside the masks, and nothing else in the module; see
            ``sparse_train.MaskLoRA``. Default: train the weights themselves. In one process or with DDP.
        log_layers: also log ``layers/sparsity/NAME`` and ``layers/flip_rate/NAME`` of each layer at updates.
        squash: leave plain layers with true zeros after ``fit``; False keeps the training state.

    Raises:
        ValueError: at construction or at ``fit``, if arguments are out of range or in conflict, if there is nothing to
            prune, or if the mask of a layer would have no effect; at an update, if a layer has seen no token with
            finite activations; at resume, if pattern, schedule, criterion or timing differ.
    """

    def __init__(
        self,
        mask_structure: str | Pattern | None = None,
        sparsity: float | None = None,
        *,
        config: PruningConfig | None = None,
        mask_lora: MaskLoRA | None = None,
        log_layers: bool = False,
        squash: bool = True,
        **settings: Any,
    ) -> None:
        self.config = PruningConfig.of(config, mask_structure, sparsity, **settings)
        """The settings of the run."""
        require_type("mask_lora", mask_lora, MaskLoRA(), MaskLoRA)
        self._mask_lora, self._squash = mask_lora, squash
        self.log_layers = log_layers
        self._layers: dict[str, MaskedLayer] = {}  # chosen in setup: other callbacks may freeze layers since
        self._restored: dict[str, Any] | None = None  # of a checkpoint, until the run begins
        self._global_step = 0  # the trainer's when the updater last counted one: micro-batches leave it as it is
        self._metrics: dict[str, float] = {}  # of the latest update, also if an earlier process made it
        self._logged = self._looked_at_loss = False
        self._undo_loading: Callable[[], None] | None = None
        self.updater: MaskUpdater | None = None
        """The running updater; None before the run has begun."""
        self.last_report: UpdateReport | None = None
        """Report of the latest update of the fit, in this process; None before the first."""
        self.pruning_json: dict[str, Any] | None = None
        """Where the zeros of a finished run are, for ``pruning.json`` of its model."""

    @property
    def state_key(self) -> str:
        return PRUNING_STATE  # the same for subclasses: code that loads or exports checkpoints looks for this key

    def token_mask(self, batch: Any) -> Tensor | None:
        """Which tokens of a batch count in activation statistics: (B, L), 0 = padding; None = all.

        Override it for batches that mark padding in another way than by ``batch["attention_mask"]``. An encoder-decoder
        model reads two texts, and that mask belongs to one of them, so that by default all tokens of both count.
        """
        return (self.updater or Recorder()).padding_of(batch)  # the first mask is made before there is an updater

    # --- before training ---------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        mask = functools.partial(self._mask, trainer)
        if stage != "fit":
            # evaluates the module unchanged, or a checkpoint: of a sparse run, with masks, or of a dense one
            self._undo_loading = lightning_trainer.masks_as_loaded(pl_module)
            if trainer.strategy.restore_checkpoint_after_setup:
                # FSDP2 and DeepSpeed load only what the module has, and would silently leave masks out
                lightning_trainer.call_when_built(pl_module, mask)
            return
        check_fit(trainer, self._squash)
        self.updater = self._restored = self.last_report = self.pruning_json = None
        lightning_trainer.call_when_built(pl_module, mask)

    def _mask(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._layers = mask_targets(pl_module, self.config)
        lightning_trainer.sparsify_averages(trainer, self._layers)
        if self._mask_lora is not None:
            add_mask_lora(pl_module, self._mask_lora)

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step == 0 and 0 not in (trainer.max_steps, trainer.max_epochs):  # otherwise, is there a step?
            self._begin(trainer, pl_module)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._begin(trainer, pl_module)
        # a checkpoint may have been written after the last optimizer step, before this callback saw that step
        self._advance(trainer, pl_module, in_batch=False)

    def _begin(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Set the first mask, or take the state of a checkpoint; nothing if this fit has begun."""
        if self.updater is not None:
            return
        state, total_steps = self._restored, None
        reshard(pl_module)  # the sanity check may have gathered the root's parameters
        check_built(trainer, pl_module, state is not None)
        if pl_module.automatic_optimization:  # steps of this run only: the trainer may have run an earlier fit
            before = trainer.global_step if state is None else 0
            total_steps = max(1, lightning_trainer.total_steps(trainer) - before)  # 0 if the fit is over
        first_maker = functools.partial(
            make_first_mask,
            batches=functools.partial(lightning_trainer.batches_of_training, trainer),
            context=trainer.precision_plugin.forward_context,
            say=lambda what: rank_zero_info(f"DynamicPruning: {what}."),
            progress=trainer.is_global_zero and trainer.progress_bar_callback is not None,
            token_mask=self.token_mask if is_overridden("token_mask", self, DynamicPruning) else None,
        )
        self.updater = MaskUpdater(
            pl_module,
            config=self.config,
            layers=self._layers,
            total_steps=total_steps,
            optimizers=trainer.optimizers,
            make_first_mask=first_maker,
            state=state,
        )
        warn_of_denser_best(trainer, self.updater)
        rank_zero_info(f"DynamicPruning: {self.updater.in_words()}.")
        self._global_step = trainer.global_step if state is None else state["global_step"]
        self._metrics = {} if state is None else state["metrics"]
        self._logged = self._looked_at_loss = False
        solved = state is None and self.config.first_solver is not None
        lightning_trainer.mask_averages(trainer, pl_module, weights=solved)
        if state is None and self.updater.sparsity is not None:
            self._log_update(trainer, self.updater.report(), lightning_trainer.steps_done(trainer, in_batch=False))
        self._restored = None

    # --- in training -------------------------------------------------------------------------------------------------

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._begin(trainer, pl_module)  # again, if a tuner has trained a little and restored the run
        assert self.updater is not None
        self.updater.token_mask = self.token_mask(batch)

    def on_before_backward(self, trainer: L.Trainer, pl_module: L.LightningModule, loss: Tensor) -> None:
        if not self._looked_at_loss:
            self._looked_at_loss = True
            assert self.updater is not None
            self.updater.warn_of_other_readers(loss)

    def on_before_optimizer_step(
        self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: torch.optim.Optimizer
    ) -> None:
        assert self.updater is not None
        self.updater.before_optimizer_step(optimizer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        assert self.updater is not None
        self.updater.token_mask = None
        report = self._advance(trainer, pl_module, in_batch=True)
        if report is None and self._logged:
            return  # each value would be a copy to the device
        # for callbacks that monitor metrics, such as EarlyStopping, which may ask before the first update; and two of
        # them for the progress bar
        for name, value in (self._metrics or _NO_MASK).items():
            pl_module.log(name, value, logger=False, prog_bar=name in ("sparsity/actual", "sparsity/flip_rate"))
        self._logged = True

    def _advance(self, trainer: L.Trainer, pl_module: L.LightningModule, in_batch: bool) -> UpdateReport | None:
        # Micro-batches do not move the count of optimizer steps; a batch that steps several optimizers is one step.
        assert self.updater is not None
        if trainer.global_step == self._global_step:
            return None
        report = self.updater.step()
        self._global_step = trainer.global_step
        if report is not None:
            lightning_trainer.mask_averages(trainer, pl_module)
            self._log_update(trainer, report, lightning_trainer.steps_done(trainer, in_batch=in_batch))
        return report

    def _log_update(self, trainer: L.Trainer, report: UpdateReport, step: int) -> None:
        self.last_report, self._metrics = report, report.metrics()
        of_layers = report.layer_metrics() if self.log_layers else {}
        for logger in trainer.loggers:  # directly: updates need not coincide with log_every_n_steps
            logger.log_metrics({**self._metrics, **of_layers}, step=step)

    # --- after training, and checkpoints -----------------------------------------------------------------------------

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self.updater is not None:
            if self.updater.steps == 0:
                rank_zero_warn(
                    "No optimizer step was seen, so masks never changed. Under manual optimization, call step() on "
                    "what self.optimizers() returns, which Lightning counts; do not use use_pl_optimizer=False."
                )
            self.updater.finish()
            self.pruning_json = pruning_json(self.updater.settings(), self.updater.sparsity, self.updater.layers)
        elif self._restored is not None:
            check_same_settings(self._restored["settings"], self.config.as_data())  # no updater has checked them
            check_restored_masks(self._restored["masks"], self._layers, self._restored["sparsity"])
            self.pruning_json = pruning_json(self._restored["settings"], self._restored["sparsity"], self._layers)
            rank_zero_warn(f"The run is at step {trainer.global_step} already, where it ends: nothing was trained.")
        else:
            rank_zero_warn("The run had no step, so nothing was pruned.")
        if self._squash:
            squash_layers(pl_module)  # squash without its checks: masks have just been checked, or there are none

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self.teardown(trainer, pl_module, "")  # Lightning calls none after an exception

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        lightning_trainer.forget(pl_module)
        if self._undo_loading is not None:
            self._undo_loading()
            self._undo_loading = None

    def state_dict(self) -> dict[str, Any]:
        if self.updater is None:
            return self._restored or {}
        if not all(isinstance(layer, MaskedLayer) for layer in self.updater.layers.values()):
            return {}  # squashed: a checkpoint of this model is that of a dense model with zeros
        # seconds differ between processes, and would make two equal states differ
        metrics = {name: value for name, value in self._metrics.items() if name != "sparsity/update_seconds"}
        return {**self.updater.state_dict(), "global_step": self._global_step, "metrics": metrics}

    def on_load_checkpoint(self, trainer: L.Trainer, pl_module: L.LightningModule, checkpoint: dict[str, Any]) -> None:
        self.updater = self._restored = None  # also after a tuner has trained a little and restores
        if trainer.state.fn != TrainerFn.FITTING:
            state, weights = checkpoint.get("callbacks", {}).get(PRUNING_STATE), checkpoint.get("state_dict", {})
            masked = state["masks"] if state and weights else ()  # sharded checkpoints hold their weights elsewhere
            if gone := [name for name in masked if f"{name}.{MASK_NAME}" not in weights]:
                raise ValueError(
                    f"The checkpoint was written in a sparse run, and has no mask of {gone[0]} (on_save_checkpoint may "
                    "have left it out), so that other weights would be evaluated. Evaluate the exported model instead."
                )
            return
        if checkpoint.get("optimizer_states") == []:  # Lightning would go on with a new optimizer
            raise ValueError(
                "The checkpoint has no state of an optimizer, so a run cannot continue from it. Load its weights "
                "(sparse_train.load_from_checkpoint), and fit without ckpt_path."
            )
        if self._mask_lora is not None:
            check_mask_lora(pl_module, self._mask_lora)  # compares with the adapters of the checkpoint
        elif any(layer.has_factors for layer in sparse_layers(pl_module).values()):
            raise ValueError(
                "The checkpoint was written with mask_lora, and this run has none, so it would train other weights. "
                "Give DynamicPruning the mask_lora that it had, or export the checkpoint and start from that."
            )

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._restored = state_dict or None
