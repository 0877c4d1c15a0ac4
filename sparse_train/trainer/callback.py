"""``SparseTrainerCallback``: re-prune a model while transformers' ``Trainer`` trains it. Imports transformers.

What happens when, in the Trainer's order:

    on_init_end       targets get masks that keep everything: before the optimizer, and before a checkpoint is loaded
    (model is loaded) a checkpoint's zeros become masks
    on_train_begin    the first mask, or masks, shadow values and state of the checkpoint
    (forward)         the recorder gets the batch's padding; activations are recorded in the window before an update
    on_step_end       after an optimizer step: update; before log, evaluation and checkpoint
    (model is saved)  what a checkpoint with zeros does not hold is written next to it
    on_train_end      squash, after the last checkpoint was written and the best one loaded
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback

from sparse_train.allocation import Allocation, Outliers
from sparse_train.criteria import Criterion
from sparse_train.distributed import rank
from sparse_train.layers import masks
from sparse_train.layers.matrices import MASK_NAME, MaskedLayer, is_conv1d
from sparse_train.layers.sparse_linear import sparse_layers
from sparse_train.layers.sparsify import fold
from sparse_train.oneshot.first_mask import check_initial, set_first_mask
from sparse_train.patterns import Pattern
from sparse_train.pipeline.earlier_windows import Memory
from sparse_train.pipeline.policies import MaskPolicy
from sparse_train.pipeline.pruner import measure
from sparse_train.pipeline.run_settings import RunSettings
from sparse_train.pipeline.schedules import Schedule
from sparse_train.pipeline.updater import MaskUpdater
from sparse_train.solvers import Solver
from sparse_train.trainer import shadow_file
from sparse_train.trainer.calibration import peek
from sparse_train.trainer.checks import check_arguments, check_best, check_first_mask, check_first_try, check_whole
from sparse_train.trainer.first_try import FirstTry
from sparse_train.trainer.patching import patch_trainer

_log = logging.getLogger(__name__)


class SparseTrainerCallback(TrainerCallback):  # type: ignore[misc]
    """Keep a model at its target sparsity in a ``transformers.Trainer``, as ``DynamicPruning`` does in Lightning.

    ::

        trainer = Trainer(model, args, train_dataset=data, callbacks=[SparseTrainerCallback("2:4", update_freq=10)])
        trainer.train()
        trainer.save_model("sparse")  # pruned weights are zeros

    With ``start_step`` 0, the first mask is calibrated block by block on ``calibration_batches`` batches of the
    training data. If the data is a stream, or has a custom sampler, the mask comes from the first ``window`` steps,
    which run dense.

    The metrics of an update are logged with the next training loss, as often as ``logging_steps`` says. If there are
    several updates between two rows of the log, the metrics of the last one are logged; those of the last update after
    the last row are in the summary at the end of the run.

    Each checkpoint folder of a transformers model holds the sparse model, with zeros, and next to it
    ``sparse_training_state.pt`` with masks, shadow values and statistics, so that a resumed run continues bit for bit.
    For other modules it holds the state dict as the Trainer writes it: masks and shadow values.

    The arguments are those of ``sparse_train.callbacks.DynamicPruning``, except ``mask_lora``. ``Regrow`` is refused,
    because the Trainer lacks a hook that it needs.

    Raises:
        ValueError: for what ``DynamicPruning`` refuses; for a Trainer that shards the model (FSDP, DeepSpeed) or copies
            it in each step (``DataParallel``); for ``load_best_model_at_end`` if the best model might not be a sparse
            one; and at a resume, for a checkpoint that was written without this callback.
    """

    def __init__(
        self,
        mask_structure: str | Pattern = "2:4",
        sparsity: float | None = None,
        *,
        update_freq: int = 10,
        criterion: Criterion | None = None,
        policy: MaskPolicy | None = None,
        schedule: Schedule | None = None,
        allocation: Allocation | None = None,
        targets: Sequence[str] | None = None,
        ignore: Sequence[str] = (),
        start_step: int | float = 0,
        end_step: int | float = 0.75,
        window: int | float = 0.5,
        memory: Memory = 1.0,
        hysteresis: float = 0.0,
        noise_margin: float = 0.0,
        flip_agreement: bool = False,
        calibration_batches: int = 8,
        initial_criterion: Criterion | Solver | None = None,
        squash: bool = True,
    ) -> None:
        if calibration_batches < 0:
            raise ValueError(f"calibration_batches must be at least 0, got {calibration_batches}.")
        self._settings = RunSettings.resolve(
            mask_structure,
            sparsity,
            schedule,
            criterion,
            policy,
            allocation=allocation,
            targets=targets,
            ignore=ignore,
            update_freq=update_freq,
            start_step=start_step,
            end_step=end_step,
            window=window,
            memory=memory,
            hysteresis=hysteresis,
            noise_margin=noise_margin,
            flip_agreement=flip_agreement,
        )
        if self._settings.policy.comes_back == "by gradient":
            raise ValueError(
                f"{self._settings.policy} reads gradients before clipping, where the Trainer has no hook for "
                "callbacks. Use another policy, or train with Lightning or a custom loop."
            )
        check_initial(initial_criterion, self._settings.mask_structure)
        self._calibration_batches = calibration_batches
        self._initial_criterion = initial_criterion
        self._squash = squash
        self._hooks: list[Any] = []
        self._unlogged: dict[str, float] = {}
        self._resumed: Path | None = None
        self._saved: Path | None = None  # the checkpoint whose state has been written, until on_save
        self._first_try: FirstTry | None = None  # of this train(), which auto_find_batch_size may retry
        self.updater: MaskUpdater | None = None
        """The running pipeline; None before the run has begun."""

    state_key = "SparseTrainerCallback"  # Lightning asks for it before it calls setup

    def setup(self, *args: Any, **kwargs: Any) -> None:
        """Called by Lightning's trainer if it is given this callback, which is one of transformers."""
        raise ValueError(
            "SparseTrainerCallback is a transformers callback. For Lightning use "
            "sparse_train.callbacks.DynamicPruning, with the same arguments."
        )

    def on_exception(self, *args: Any, **kwargs: Any) -> None:
        """Also called by Lightning's trainer, which can then report what ``setup`` raised."""

    def token_mask(self, inputs: Mapping[str, Any]) -> Tensor | None:
        """Which tokens of a forward's keyword arguments count in activation statistics, (B, L), 0 = padding.

        All tokens of an encoder-decoder model, which reads two texts.
        """
        assert self.updater is not None
        return self.updater.padding_of(inputs)

    def resume_from(self, folder: Path | None) -> None:
        """Sets which checkpoint the run that begins resumes; None = it is a new run."""
        self._resumed, self._first_try = folder, None

    def take_metrics(self) -> dict[str, float]:
        """The metrics of the last update, if no row of the log has them yet."""
        taken, self._unlogged = self._unlogged, {}
        return taken

    # --- before training ---------------------------------------------------------------------------------------------

    def on_init_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        self._check(args, model)
        self._prepare(model)

    def _check(self, args: Any, model: nn.Module) -> None:
        check_arguments(args)
        if args.load_best_model_at_end:
            check_best(model, self._settings)

    def _prepare(self, model: nn.Module) -> dict[str, MaskedLayer]:
        for hook in self._hooks:
            hook.remove()
        loading = model.register_load_state_dict_pre_hook(_zeros_to_masks)
        before: Any = model._load_state_dict_pre_hooks
        before.move_to_end(loading.id, last=False)  # must run before the hook that refuses dense state dicts
        self._hooks = [loading, model.register_forward_pre_hook(self._before_forward, with_kwargs=True)]
        if any(layer.adapted for layer in sparse_layers(model).values()):
            raise ValueError(
                "The model has mask_lora adapters, which a checkpoint of the Trainer would merge, so that it could not "
                "be resumed. Train with Lightning, DynamicPruning(mask_lora=...), or a custom loop."
            )
        return self._settings.sparsify(model)

    def on_train_begin(
        self, args: Any, state: Any, control: Any, *, model: nn.Module, train_dataloader: Any, **kwargs: Any
    ) -> None:
        self._check(args, model)  # again, because Trainer.add_callback comes after on_init_end
        layers = self._prepare(model)  # again: model_init makes a new model, and that of a second run is squashed
        check_whole(layers)
        restored: dict[str, Any] | None = None
        outliers: Outliers | None = None
        if state.global_step > 0:
            check_first_try(self._first_try is None)
            self._first_try = FirstTry({}, None)
            restored = shadow_file.restore(
                _file_in(self._resumed or _folder_of(args, state)), layers, state.global_step
            )
        elif self._first_try is not None:
            outliers = self._first_try.bring_back(layers)
        else:
            outliers = self._set_first_mask(args, state, model, train_dataloader)
            self._first_try = FirstTry(layers, outliers) if args.auto_find_batch_size else None
        self.updater = MaskUpdater(
            model, total_steps=state.max_steps, outliers=outliers, state=restored, **vars(self._settings)
        )
        if args.load_best_model_at_end:
            check_first_mask(self.updater.sparsity)
        self._unlogged = {}
        if restored is not None:
            self._unlogged = restored.get("metrics", {})
        elif self.updater.sparsity is not None:
            self._unlogged = self.updater.report().metrics()

    def _set_first_mask(self, args: Any, state: Any, model: nn.Module, loader: Any) -> Outliers | None:
        size = state.train_batch_size or args.per_device_train_batch_size
        dtype = torch.float16 if args.fp16 else torch.bfloat16
        return set_first_mask(
            model,
            self._settings,
            self._initial_criterion,
            self._calibration_batches,
            lambda count: peek(loader, size, count),
            torch.autocast(args.device.type, dtype, enabled=args.fp16 or args.bf16),
            progress=not args.disable_tqdm and rank() == 0,
        )

    # --- in training -------------------------------------------------------------------------------------------------

    def _before_forward(self, model: nn.Module, positional: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        if self.updater is not None:
            self.updater.token_mask = self.token_mask(keywords)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        assert self.updater is not None
        report = self.updater.step()
        if report is not None:
            self._unlogged = report.metrics()

    # --- checkpoints, and after training -----------------------------------------------------------------------------

    def save_state(self, args: Any, state: Any, folder: Path) -> None:
        """Called after the Trainer has written the model of a checkpoint, in every process."""
        assert self.updater is not None
        if args.save_only_model or state.is_hyper_param_search:
            return  # such a run is not resumed
        updater_state = {**self.updater.state_dict(), "metrics": self._unlogged}  # statistics of all ranks
        if args.should_save:
            shadow_file.save(folder / shadow_file.FILE_NAME, self.updater.layers, updater_state)
        self._saved = folder

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._saved != _folder_of(args, state):  # a subclass of Trainer saves models in a way of its own
            self.save_state(args, state, _folder_of(args, state))
        self._saved = None  # another run may write to the same folder

    def on_train_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        assert self.updater is not None
        self.updater.finish()
        self._first_try = None
        final, found = self._settings.sparsity_at(1.0), measure(self.updater.layers).values()
        actual = sum(layer.zeros for layer in found) / sum(layer.size for layer in found)
        rounding = 1 / min(layer.in_features for layer in self.updater.layers.values())  # rows prune whole counts
        if self.updater.sparsity == final and actual < 0.99 * (final - rounding):
            _log.warning(
                "The model is at a sparsity of %.4f instead of %g: its best checkpoint was written before the masks "
                "reached the final sparsity.",
                actual,
                final,
            )
        for hook in self._hooks:
            hook.remove()
        self._hooks = []
        if self._squash:
            fold(model)
        else:
            for layer in self.updater.layers.values():
                layer.recorder = layer.statistics = None


def _zeros_to_masks(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Add the masks to a state dict that ``save_pretrained`` has written, or to a shard of it."""
    for name, layer in sparse_layers(module).items():
        weight, mask = (f"{prefix}{name}.{suffix}" for suffix in ("weight", MASK_NAME))
        if weight in state_dict and mask not in state_dict:
            stored = state_dict[weight]
            nonzero_OI = (stored.t() if is_conv1d(layer) else stored) != 0  # type: ignore[arg-type]
            state_dict[mask] = masks.pack(nonzero_OI)


def _file_in(folder: Path) -> Path:
    file = folder / shadow_file.FILE_NAME
    if not file.is_file():
        raise ValueError(
            f"There is no {shadow_file.FILE_NAME} in {folder}, so there is no sparse run to resume: the checkpoint was "
            "written without SparseTrainerCallback, or with save_only_model, or before the callback could add its "
            "file. Resume from an earlier checkpoint, or load this one as a model and start a new run."
        )
    return file


def _folder_of(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


patch_trainer(SparseTrainerCallback)
