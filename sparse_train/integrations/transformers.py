"""``SparseTrainerCallback``: re-prune a model while transformers' ``Trainer`` trains it. Imports transformers.

What happens when, in the Trainer's order:

    on_init_end       targets get masks that keep everything: before the optimizer, and before a checkpoint is loaded
    (model is loaded) a checkpoint's zeros become masks
    on_train_begin    the first mask, or masks, shadow values and state of the checkpoint
    (training_step)   the recorder gets the batch's padding
    (forward)         or that of its own arguments; activations are recorded in the window before an update
    on_step_end       after an optimizer step: update; before log, evaluation and checkpoint
    (checkpoint)      what a model with zeros does not hold is written first, next to it
    on_train_end      after the last checkpoint and loading the best one: the base of adapters is saved; squash
"""

import functools
import logging
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from sparse_train.distributed.collectives import rank
from sparse_train.export.verify import pruning_json
from sparse_train.files import write_json
from sparse_train.integrations.trainer_checkpoints import (
    STATE_FILE,
    check_complete,
    restore_state,
    write_state,
    zeros_to_masks,
)
from sparse_train.layers.masked_layer import MaskedLayer
from sparse_train.layers.sparsify import squash_layers
from sparse_train.model_folders import PRUNING_FILE
from sparse_train.models import lora
from sparse_train.oneshot.batches import training_batches
from sparse_train.oneshot.first_mask import make_first_mask
from sparse_train.oneshot.forwards import under_autocast
from sparse_train.patterns import Pattern
from sparse_train.policies import MaskPolicy
from sparse_train.pruning.config import PruningConfig
from sparse_train.pruning.updater import MaskUpdater, mask_targets
from sparse_train.recorder import Recorder

_log = logging.getLogger(__name__)

_LIGHTNING = (
    "Train on one device or with DDP (torchrun), or use Lightning with sparse_train.callbacks.DynamicPruning, which "
    "supports FSDP2, DeepSpeed and mask_lora."
)
_BEST = (
    "load_best_model_at_end would load an earlier checkpoint. Before the final sparsity, that is a denser model, which "
    "has the lower loss. With peft, it holds adapters without the masks of their base."
)


class SparseTrainerCallback(TrainerCallback):  # type: ignore[misc]
    """Keep a model at its target sparsity in a ``transformers.Trainer``, as ``DynamicPruning`` does in Lightning.

    ::

        trainer = Trainer(model, args, train_dataset=data, callbacks=[SparseTrainerCallback("2:4", update_freq=10)])
        trainer.train()
        trainer.save_model("sparse")  # pruned weights are zeros

    The metrics of the last update are logged with the next training loss, as often as ``logging_steps`` says; those of
    the last update after the last row are in the summary at the end of the run.

    Each checkpoint folder of a transformers model holds the sparse model, with zeros, and next to it
    ``sparse_training_state.pt`` with masks, shadow values and norms, so that a resumed run continues bit for bit.
    For other modules it holds the state dict as the Trainer writes it: masks and shadow values.

    Args:
        mask_structure, sparsity, settings: of a ``PruningConfig``, where they are explained. Policies that look at
            gradients, such as ``Regrow``, are refused, because the Trainer lacks the hook that they need.
        config: the settings as one object, instead.
        squash: leave plain layers with true zeros after ``train``; False keeps the training state.

    Raises:
        ValueError: for what ``DynamicPruning`` refuses; for a Trainer that ``check_trainer`` refuses; and at a resume,
            for a checkpoint that was written without this callback.
    """

    def __init__(
        self,
        mask_structure: str | Pattern | None = None,
        sparsity: float | None = None,
        *,
        config: PruningConfig | None = None,
        squash: bool = True,
        **settings: Any,
    ) -> None:
        self.config = PruningConfig.of(config, mask_structure, sparsity, **settings)
        """The settings of the run."""
        policy = self.config.policy
        if type(policy).before_optimizer_step is not MaskPolicy.before_optimizer_step:
            raise ValueError(
                f"{policy} reads gradients before clipping, where the Trainer has no hook for callbacks. Use another "
                "policy, or train with Lightning or a custom loop."
            )
        self._squash = squash
        self._hooks: list[Any] = []
        self._padding: Tensor | None = None  # of the batch of the running step
        self._unlogged: dict[str, float] = {}
        self._resumed: Path | None = None
        self._saved_step: int | None = None  # of the last checkpoint
        self.updater: MaskUpdater | None = None
        """The running updater; None before the run has begun."""

    def token_mask(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Which tokens of a forward's keyword arguments count in activation statistics, (B, L), 0 = padding."""
        return (self.updater or Recorder()).padding_of(inputs)  # the first mask is made before there is an updater

    # --- before training ---------------------------------------------------------------------------------------------

    def on_init_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        check_trainer(args, model, self.config)
        self._prepare(model)

    def _prepare(self, model: nn.Module) -> dict[str, MaskedLayer]:
        for hook in self._hooks:
            hook.remove()
        loading = model.register_load_state_dict_pre_hook(zeros_to_masks)
        before: Any = model._load_state_dict_pre_hooks
        before.move_to_end(loading.id, last=False)  # must run before the hook that refuses dense state dicts
        self._hooks = [loading, model.register_forward_pre_hook(self._before_forward, with_kwargs=True)]
        layers = mask_targets(model, self.config)
        for name, layer in layers.items():
            if layer.layout.is_sharded or layer.has_factors:
                raise ValueError(
                    f"{name} is divided among processes or has a mask_lora adapter, and a checkpoint of the Trainer "
                    f"would not hold it whole. {_LIGHTNING}"
                )
        return layers

    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, model: nn.Module, train_dataloader: Any, optimizer: Any, **_: Any
    ) -> None:
        # again: Trainer.add_callback comes after on_init_end, model_init makes a new model, a second run is squashed
        check_trainer(args, model, self.config)
        layers = self._prepare(model)
        restored = self._saved_step = None
        if state.global_step > 0:
            assert self._resumed is not None, "a run that does not begin at step 0 has been resumed"
            restored = restore_state(self._resumed, layers, state.global_step)
        dtype = torch.float16 if args.fp16 else torch.bfloat16
        first_maker = functools.partial(
            make_first_mask,
            batches=lambda samples: training_batches(train_dataloader, samples, args.per_device_train_batch_size),
            context=under_autocast(dtype if args.fp16 or args.bf16 else None, args.device),
            say=_say,
            progress=not args.disable_tqdm and rank() == 0,
            token_mask=None if type(self).token_mask is SparseTrainerCallback.token_mask else self.token_mask,
        )
        self.updater = MaskUpdater(
            model,
            config=self.config,
            layers=layers,
            total_steps=state.max_steps,
            optimizers=[optimizer],
            make_first_mask=first_maker,
            state=restored,
        )
        _say(self.updater.in_words())
        if args.load_best_model_at_end and self.updater.sparsity is None:
            raise ValueError(f"{_BEST} Leave it out, or prune the model before the run (prune(..., squash=False)).")
        begins_masked = restored is None and self.updater.sparsity is not None
        self._unlogged = self.updater.report().metrics() if begins_masked else (restored or {}).get("metrics", {})

    # --- in training -------------------------------------------------------------------------------------------------

    def _before_forward(self, model: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if self.updater is not None:
            mask = self.token_mask(keywords)
            self.updater.token_mask = self._padding if mask is None and "attention_mask" not in keywords else mask

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.updater is not None
        report = self.updater.step()
        if report is not None:
            self._unlogged = report.metrics()

    # --- checkpoints, and after training -----------------------------------------------------------------------------

    def save_state(self, args: Any, state: Any) -> None:
        """Write what the model of a checkpoint will lack; called in every process."""
        assert self.updater is not None
        self._saved_step = state.global_step
        if args.save_only_model or state.is_hyper_param_search:
            return  # such a run is not resumed
        updater_state = {**self.updater.state_dict(), "metrics": self._unlogged}  # norms of all ranks
        if args.should_save:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            write_state(folder, self.updater.layers, updater_state)
            self._write_pruning(folder)

    def _write_pruning(self, folder: Path) -> None:
        assert self.updater is not None
        pruning = pruning_json(self.updater.settings(), self.updater.sparsity, self.updater.layers)
        write_json(folder / PRUNING_FILE, pruning)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        # not whether the file exists: on a node with disks of its own, it does not, and the others would wait
        if self._saved_step != state.global_step:
            self.save_state(args, state)  # a Trainer that saves checkpoints in its own way

    def on_train_end(
        self, args: Any, state: Any, control: Any, *, model: nn.Module, optimizer: Any, **kwargs: Any
    ) -> None:
        assert self.updater is not None
        best = args.load_best_model_at_end and state.best_model_checkpoint  # is loaded already, and not to be moved
        if not best and callable(getattr(optimizer, "eval", None)):  # a schedule-free one moves weights: before zeros
            optimizer.eval()
        self.updater.finish()
        for hook in self._hooks:
            hook.remove()
        if lora.is_peft(model) and args.should_save:
            _save_base(model, Path(args.output_dir) / "base")
        elif args.should_save:
            self._write_pruning(Path(args.output_dir))  # where save_model() puts the model
        if self._squash:
            squash_layers(model)


def _say(what: str) -> None:
    if rank() == 0:
        print(f"SparseTrainerCallback: {what}.", file=sys.stderr)  # as the Trainer prints its logs


def check_trainer(args: Any, model: nn.Module, config: PruningConfig) -> None:
    """Raise ValueError for arguments of the Trainer under which masks, norms or checkpoints would be lost."""
    fsdp = bool(args.fsdp) or os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    if fsdp or args.deepspeed_plugin is not None or args.n_gpu > 1:
        raise ValueError(
            "The Trainer runs on FSDP or DeepSpeed, whose checkpoints this callback does not support, or on "
            f"DataParallel, which loses the activations recorded in its copies of the model. {_LIGHTNING}"
        )
    if args.auto_find_batch_size:
        raise ValueError(
            "auto_find_batch_size begins the run again where memory runs out, but not with the masks and weights that "
            "it had. Leave it out, and set a smaller per_device_train_batch_size."
        )
    if args.enable_jit_checkpoint:
        raise ValueError(
            "enable_jit_checkpoint=True writes checkpoints without telling callbacks, and they would lack masks and "
            'shadow values. Leave it out, and save often: save_strategy="steps" with a small save_steps.'
        )
    if beside := [each for each in ("use_vllm", "sync_ref_model") if getattr(args, each, False)]:  # of TRL
        raise ValueError(
            f"{beside[0]}=True copies the model's weights without the masks, so that another model would generate, or "
            "be the reference, than the one in training. Leave it out."
        )
    rises = config.sparsity_at(0.0) != config.sparsity_at(1.0)
    if args.load_best_model_at_end and (rises or lora.is_peft(model)):
        raise ValueError(f"{_BEST} Leave it out, or train all weights at a constant sparsity from start_step 0.")


def _save_base(model: Any, folder: Path) -> None:
    """Write the sparse model below adapters of peft, since ``save_model`` writes adapters alone."""
    try:
        model.get_base_model().save_pretrained(folder, state_dict=lora.base_of(model)[0])
    except Exception as error:  # whatever it is, the adapter can still be saved
        foreseen = isinstance(error, (ValueError, OSError))
        what = "The sparse model below the adapter was not saved, and save_model does not save it: %s"
        _log.error(what, error, exc_info=not foreseen)
    else:
        _log.warning("save_model writes the adapter alone. The sparse model that it belongs to is in %s.", folder)


# --- what the callback API lacks -------------------------------------------------------------------------------------


def _around(method: str) -> Callable[[Any], Any]:
    """Wrap a method of the class ``Trainer``, which has no hook there; without this callback it does what it did.

    To undo it: ``setattr(Trainer, method, getattr(Trainer, method).__wrapped__)``.
    """

    def wrap(around: Any) -> Any:
        original = getattr(Trainer, method)

        @functools.wraps(original)
        def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
            callbacks = [each for each in self.callback_handler.callbacks if isinstance(each, SparseTrainerCallback)]
            return around(callbacks, original, self, *args, **kwargs)

        setattr(Trainer, method, patched)
        return around

    return wrap


@_around("train")
def _train(callbacks: Any, train: Any, self: Any, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
    # the Trainer tells its callbacks which step it resumes, but not from which folder
    if len(callbacks) > 1:
        raise ValueError(
            f"The Trainer has {len(callbacks)} SparseTrainerCallbacks, and can use one: they would write the same "
            "file. For several patterns in one model, use several MaskUpdater in a callback or loop of your own."
        )
    folder = get_last_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
    if callbacks and folder:
        check_complete(Path(folder))
    elif folder and (Path(folder) / STATE_FILE).exists():
        raise ValueError(
            f"{folder} is of a sparse run, and the Trainer has no SparseTrainerCallback, without which training would "
            "fill its zeros. Add the callback."
        )
    for callback in callbacks:
        callback._resumed = Path(folder) if folder else None
    return train(self, resume_from_checkpoint, *args, **kwargs)


@_around("training_step")
def _with_padding(callbacks: Any, step: Any, self: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
    # a loss of one's own may give the model, or a part of it, the batch's mask in another way than by its name
    running = [callback for callback in callbacks if callback.updater is not None]
    for callback in running:
        callback.updater.token_mask = callback._padding = callback.updater.padding_of(inputs)
    try:
        return step(self, model, inputs, *args, **kwargs)
    finally:
        for callback in running:
            callback.updater.token_mask = callback._padding = None


@_around("log")
def _log_with_metrics(callbacks: Any, log: Any, self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
    # Reporters (TensorBoard, W&B) come before a user's callbacks, so that nothing added in on_log would reach them.
    # Rows of evaluations stay unchanged: ``evaluate`` returns them, and the Trainer writes them into model cards.
    if "loss" in logs or "train_loss" in logs:
        for callback in callbacks:
            logs.update(callback._unlogged)
            callback._unlogged = {}
    return log(self, logs, *args, **kwargs)


@_around("_save_checkpoint")
def _save_with_state(callbacks: Any, save: Any, self: Any, *args: Any, **kwargs: Any) -> Any:
    # in on_save it would be too late: the Trainer has deleted older checkpoints by then, and may have begun to upload
    for callback in callbacks:
        callback.save_state(self.args, self.state)
    return save(self, *args, **kwargs)
