"""``SparseTrainerCallback``: re-prune a model while transformers' ``Trainer`` trains it. Imports transformers.

What happens when, in the Trainer's order:

    on_init_end       targets get masks that keep everything: before the optimizer, and before a checkpoint is loaded
    (model is loaded) a checkpoint's zeros become masks
    on_train_begin    the first mask, or masks, shadow values and state of the checkpoint
    (forward)         the recorder gets the batch's padding; activations are recorded in the window before an update
    on_step_end       after an optimizer step: update; before log, evaluation and checkpoint
    (model is saved)  what a checkpoint with zeros does not hold is written next to it
    on_train_end      squash, after the last checkpoint was written and the best one loaded

Shape suffixes: O out_features, I in_features, J packed mask bytes.
"""

import copy
import functools
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset
from transformers import Trainer, TrainerCallback
from transformers.trainer import TRAINER_STATE_NAME
from transformers.trainer_utils import get_last_checkpoint

from sparse_train.blocks import class_path, is_conv1d
from sparse_train.distributed.collectives import rank
from sparse_train.distributions import Outliers
from sparse_train.files import load_plain, replacing
from sparse_train.layers import masks
from sparse_train.layers.masked_layer import MaskedLayer, sparse_layers
from sparse_train.layers.masks import MASK_NAME
from sparse_train.layers.sparsify import unmask
from sparse_train.layers.targets import named
from sparse_train.oneshot.first_mask import random_batches, set_first_mask
from sparse_train.oneshot.forwards import Batch
from sparse_train.patterns import Pattern, group_label
from sparse_train.policies import MaskPolicy
from sparse_train.pruning.config import PruningConfig
from sparse_train.pruning.update import measure, sparsity_of
from sparse_train.pruning.updater import MaskUpdater, mask_targets

_log = logging.getLogger(__name__)

STATE_FILE = "sparse_training_state.pt"
"""What a checkpoint with true zeros lacks: masks, shadow values of pruned weights, and the updater's state."""
_WHOLE_DATA_SAMPLERS = {
    "torch.utils.data.sampler.SequentialSampler",
    "torch.utils.data.sampler.RandomSampler",
    "torch.utils.data.distributed.DistributedSampler",
    "accelerate.data_loader.SeedableRandomSampler",
    "transformers.trainer_pt_utils.LengthGroupedSampler",
    "transformers.trainer_pt_utils.BatchRebalanceSampler",
}
"""By name, because not all versions have all of them; and exact classes, because a subclass may leave data out."""


class SparseTrainerCallback(TrainerCallback):  # type: ignore[misc]
    """Keep a model at its target sparsity in a ``transformers.Trainer``, as ``DynamicPruning`` does in Lightning.

    ::

        trainer = Trainer(model, args, train_dataset=data, callbacks=[SparseTrainerCallback("2:4", update_freq=10)])
        trainer.train()
        trainer.save_model("sparse")  # pruned weights are zeros

    The metrics of an update are logged with the next training loss, as often as ``logging_steps`` says. If there are
    several updates between two rows of the log, the metrics of the last one are logged; those of the last update after
    the last row are in the summary at the end of the run.

    Each checkpoint folder of a transformers model holds the sparse model, with zeros, and next to it
    ``sparse_training_state.pt`` with masks, shadow values and norms, so that a resumed run continues bit for bit.
    For other modules it holds the state dict as the Trainer writes it: masks and shadow values.

    Args:
        mask_structure, sparsity, settings: of a ``PruningConfig``, where they are explained. Policies that look at
            gradients, such as ``Regrow``, are refused, because the Trainer lacks the hook that they need.
        config: the settings as one object, instead.
        squash: leave plain layers with true zeros after ``train``; False keeps the training state.

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
        config: PruningConfig | None = None,
        squash: bool = True,
        **settings: Any,
    ) -> None:
        self.config = config or PruningConfig(mask_structure, sparsity, **settings)
        """The settings of the run."""
        policy = self.config.policy
        if type(policy).before_optimizer_step is not MaskPolicy.before_optimizer_step:
            raise ValueError(
                f"{policy} reads gradients before clipping, where the Trainer has no hook for callbacks. Use another "
                "policy, or train with Lightning or a custom loop."
            )
        self._squash = squash
        self._hooks: list[Any] = []
        self._unlogged: dict[str, float] = {}
        self._resumed: Path | None = None
        self._saved: Path | None = None  # the checkpoint whose state has been written, until on_save
        self._first: _FirstMasks | None = None  # of this train(), which auto_find_batch_size may retry
        self.updater: MaskUpdater | None = None
        """The running updater; None before the run has begun."""

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

    # --- before training ---------------------------------------------------------------------------------------------

    def on_init_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        check_trainer(args, model, self.config)
        self._prepare(model)

    def _prepare(self, model: nn.Module) -> dict[str, MaskedLayer]:
        for hook in self._hooks:
            hook.remove()
        loading = model.register_load_state_dict_pre_hook(_zeros_to_masks)
        before: Any = model._load_state_dict_pre_hooks
        before.move_to_end(loading.id, last=False)  # must run before the hook that refuses dense state dicts
        self._hooks = [loading, model.register_forward_pre_hook(self._before_forward, with_kwargs=True)]
        layers = mask_targets(model, self.config)
        check_layers(layers)
        return layers

    def on_train_begin(
        self,
        args: Any,
        state: Any,
        control: Any,
        *,
        model: nn.Module,
        train_dataloader: Any,
        optimizer: Any,
        **kwargs: Any,
    ) -> None:
        check_trainer(args, model, self.config)  # again, because Trainer.add_callback comes after on_init_end
        layers = self._prepare(model)  # again: model_init makes a new model, and that of a second run is squashed
        restored: dict[str, Any] | None = None
        outliers: Outliers | None = None
        if state.global_step > 0:
            if self._first is not None:
                raise ValueError(
                    "auto_find_batch_size starts again after memory ran out, but does not load the checkpoint again, "
                    "so that the steps trained since would stay. Resume with a smaller per_device_train_batch_size and "
                    "without auto_find_batch_size."
                )
            self._first = _FirstMasks({}, None)
            restored = restore_state(self._resumed or _folder_of(args, state), layers, state.global_step)
        elif self._first is not None:
            outliers = self._first.bring_back(layers)
        else:
            size = state.train_batch_size or args.per_device_train_batch_size
            dtype = torch.float16 if args.fp16 else torch.bfloat16
            outliers = set_first_mask(
                model,
                layers,
                self.config,
                lambda count: calibration_batches(train_dataloader, size, count),
                torch.autocast(args.device.type, dtype, enabled=args.fp16 or args.bf16),
                progress=not args.disable_tqdm and rank() == 0,
            )
            self._first = _FirstMasks(layers, outliers) if args.auto_find_batch_size else None
        self.updater = MaskUpdater(
            model,
            config=self.config,
            layers=layers,
            total_steps=state.max_steps,
            outliers=outliers,
            state=restored,
        )
        self.updater.watch([optimizer])
        if rank() == 0:
            _log.info(
                "SparseTrainerCallback: %s at %s, final sparsity %g; %s.",
                named(layers),
                group_label(self.config.pattern),
                self.config.sparsity_at(1.0),
                self.updater.plan(),
            )
        if args.load_best_model_at_end and self.updater.sparsity is None:
            raise ValueError(
                "The first mask comes from the activations of the first steps, which run dense, and "
                "load_best_model_at_end would bring one of those back, as denser models have the lower loss. Leave it "
                "out, or prune the model before the run: sparse_train.prune(model, batches, ..., squash=False)."
            )
        self._unlogged = {}
        if restored is not None:
            self._unlogged = restored.get("metrics", {})
        elif self.updater.sparsity is not None:
            self._unlogged = self.updater.report().metrics()

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
        updater_state = {**self.updater.state_dict(), "metrics": self._unlogged}  # norms of all ranks
        if args.should_save:
            content = {
                "layers": {name: _shadow(layer) for name, layer in self.updater.layers.items()},
                "updater": updater_state,
            }
            with replacing(folder / STATE_FILE) as temporary:
                torch.save(content, temporary)
        self._saved = folder

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._saved != _folder_of(args, state):  # a subclass of Trainer saves models in a way of its own
            self.save_state(args, state, _folder_of(args, state))
        self._saved = None  # another run may write to the same folder

    def on_train_end(self, args: Any, state: Any, control: Any, *, model: nn.Module, **kwargs: Any) -> None:
        assert self.updater is not None
        self.updater.finish()
        self._first = None
        final, actual = self.config.sparsity_at(1.0), sparsity_of(measure(self.updater.layers))
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
            unmask(model)
        else:
            for layer in self.updater.layers.values():
                layer.recorder = layer.statistics = None


class _FirstMasks:
    """Masks and norms from right after the first mask was made, for a retry of ``auto_find_batch_size``.

    A retry does not make a new first mask: a solver has already moved the weights for this one, and would move them
    again. So no copy of weights is needed. The Trainer itself also keeps what was trained before the failure.
    """

    def __init__(self, layers: Mapping[str, MaskedLayer], outliers: Outliers | None) -> None:
        self._outliers = outliers
        self._layers = {
            # norms that an updater still records are not those of calibration
            name: (layer.weight_mask.clone(), copy.deepcopy(layer.statistics) if layer.recorder is None else None)
            for name, layer in layers.items()
        }

    def bring_back(self, layers: Mapping[str, MaskedLayer]) -> Outliers | None:
        for name, (mask_OJ, statistics) in self._layers.items():
            layers[name].weight_mask.copy_(mask_OJ)
            layers[name].recorder, layers[name].statistics = None, copy.deepcopy(statistics)
        return self._outliers


# --- the door --------------------------------------------------------------------------------------------------------


def check_trainer(args: Any, model: nn.Module, config: PruningConfig) -> None:
    """Raise ValueError for arguments of the Trainer under which masks, norms or checkpoints would be lost."""
    engines = {
        "FSDP": os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
        or getattr(args, "fsdp_plugin_args", None) is not None
        or bool(args.fsdp),
        "DeepSpeed": args.deepspeed_plugin is not None,
    }
    for engine in (name for name, runs in engines.items() if runs):
        raise ValueError(
            f"The Trainer runs on {engine}, whose checkpoints this callback does not support. Train on one device or "
            "with DDP, or use Lightning with sparse_train.callbacks.DynamicPruning, which supports FSDP2 and DeepSpeed."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"The Trainer would copy the model to {args.n_gpu} GPUs in each step (DataParallel), and activations "
            "recorded in copies are lost. Start it with torchrun, or let it use one GPU with CUDA_VISIBLE_DEVICES."
        )
    if getattr(args, "enable_jit_checkpoint", False):  # not in all versions
        raise ValueError(
            "enable_jit_checkpoint=True writes checkpoints without telling callbacks, so that masks and shadow values "
            "would be missing from them and they could not be resumed. Leave it out, and save as often as you can "
            'afford to lose steps: save_strategy="steps" with a small save_steps.'
        )
    if not args.load_best_model_at_end:
        return
    if config.sparsity_at(0.0) != config.sparsity_at(1.0) or config.start_step != 0:
        raise ValueError(
            "load_best_model_at_end would bring a checkpoint back from before the final sparsity, as denser models "
            "have the lower loss. Leave it out, or train at a constant sparsity from start_step 0."
        )
    if any(class_path(cls) == "peft.peft_model.PeftModel" for cls in type(model).__mro__):
        raise ValueError(
            "load_best_model_at_end brings the adapters of an earlier step back, but not the masks of their base. "
            "Leave it out for models of peft."
        )


def check_layers(layers: Mapping[str, MaskedLayer]) -> None:
    """Raise ValueError for layers that a checkpoint of the Trainer would not hold whole."""
    for name, layer in layers.items():
        if layer.layout.is_sharded:
            raise ValueError(
                f"{name} is divided among processes, and checkpoints of the Trainer would not be whole. Load the model "
                "without distributed_config and train with DDP, or use Lightning with "
                "sparse_train.callbacks.DynamicPruning, which supports FSDP2 and DeepSpeed."
            )
        if layer.adapted:
            raise ValueError(
                "The model has mask_lora adapters, which a checkpoint of the Trainer would merge, so that it could not "
                "be resumed. Train with Lightning, DynamicPruning(mask_lora=...), or a custom loop."
            )


# --- data for the first mask -----------------------------------------------------------------------------------------


def calibration_batches(loader: Any, batch_size: int, count: int) -> list[Batch] | None:
    """Random training batches, without changing the state of the loader; None if a model could not use any.

    Args:
        loader: that of the Trainer, as prepared by accelerate, or a custom one.
        batch_size: samples per batch.
        count: number of batches.
    """
    if isinstance(getattr(loader, "dataset", None), IterableDataset):
        return None
    sampler: Any = getattr(loader, "batch_sampler", None)  # what chooses the indices, inside known wrappers
    if class_path(type(sampler)) == "accelerate.data_loader.BatchSamplerShard":
        sampler = sampler.batch_sampler
    if class_path(type(sampler)) == "torch.utils.data.sampler.BatchSampler":
        sampler = sampler.sampler
    if class_path(type(sampler)) not in _WHOLE_DATA_SAMPLERS:
        _log.warning(
            "Training data is read by a %s, which may leave some of it out, so none is read for calibration.",
            type(loader if sampler is None else sampler).__name__,
        )
        return None
    return random_batches(loader.dataset, batch_size, loader.collate_fn, count)


# --- checkpoints -----------------------------------------------------------------------------------------------------


def _folder_of(args: Any, state: Any) -> Path:
    return Path(args.output_dir) / f"checkpoint-{state.global_step}"


def _zeros_to_masks(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Add the masks to a state dict that ``save_pretrained`` has written, or to a shard of it."""
    for name, layer in sparse_layers(module).items():
        weight, mask = (f"{prefix}{name}.{suffix}" for suffix in ("weight", MASK_NAME))
        if weight in state_dict and mask not in state_dict:
            stored = state_dict[weight]
            nonzero_OI = (stored.t() if is_conv1d(layer) else stored) != 0  # type: ignore[arg-type]
            state_dict[mask] = masks.pack(nonzero_OI)


def _shadow(layer: MaskedLayer) -> dict[str, Tensor]:
    return {
        "mask": layer.weight_mask.cpu(),
        "shadow": layer.weight_OI.detach()[~layer.unpacked_mask()].cpu(),
        "fingerprint": _fingerprint(layer.masked_weight()).cpu(),
    }


def _fingerprint(weight_OI: Tensor) -> Tensor:
    return masks.fingerprint(weight_OI.view(torch.uint8))


def check_whole(folder: Path) -> None:
    """Raise ValueError for a checkpoint folder that was not written to its end, or has lost files since.

    Without the files of optimizer, schedule or random numbers, the Trainer would go on to another result.
    """
    missing = [name for name in ("optimizer.*", "scheduler.pt", "rng_state*.pth") if not any(folder.glob(name))]
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text())  # which the Trainer writes last
    except (OSError, ValueError):
        missing.append(TRAINER_STATE_NAME)
    if missing:
        raise ValueError(
            f"{folder} is not complete: {', '.join(missing)} missing or cut off. The run was stopped while it wrote, "
            "or files were lost. Resume from an earlier checkpoint."
        )


@torch.no_grad()
def restore_state(folder: Path, layers: Mapping[str, MaskedLayer], step: int) -> dict[str, Any]:
    """Restore the masks and shadow values of layers whose kept weights come from a checkpoint.

    Args:
        folder: of the checkpoint.
        layers: by name.
        step: of the checkpoint.

    Returns:
        The updater's state.

    Raises:
        ValueError: there is no state, or the kept weights or the step are not those of the checkpoint that it was
            written for. Then nothing is changed.
    """
    path = folder / STATE_FILE
    if not path.is_file():
        raise ValueError(
            f"There is no {STATE_FILE} in {folder}, so there is no sparse run to resume: the checkpoint was "
            "written without SparseTrainerCallback, or with save_only_model, or before the callback could add its "
            "file. Resume from an earlier checkpoint, or load this one as a model and start a new run."
        )
    content: dict[str, Any] = load_plain(path)
    saved: dict[str, dict[str, Tensor]] = content["layers"]
    if saved.keys() != layers.keys():
        name = sorted(saved.keys() ^ layers.keys())[0]
        raise ValueError(
            f"{path} is of a run that pruned {len(saved)} layers, and this one prunes {len(layers)}; {name} is only in "
            "one of them. Resume with the same targets and ignore."
        )
    if content["updater"]["steps"] != step:
        raise ValueError(
            f"{path} was written after {content['updater']['steps']} steps, and the checkpoint after {step}: they do "
            "not belong together."
        )
    for name, layer in layers.items():
        mask_OJ = saved[name]["mask"].to(layer.weight_mask.device)
        kept_OI = masks.apply(layer.weight_OI.detach(), mask_OJ)
        if not torch.equal(_fingerprint(kept_OI).cpu(), saved[name]["fingerprint"]):
            raise ValueError(
                f"{path} does not belong to the weights that were loaded: {name} differs. Resume from an unchanged "
                "checkpoint folder."
            )
    for name, layer in layers.items():
        layer.weight_mask.copy_(saved[name]["mask"])
        layer.weight_OI[~layer.unpacked_mask()] = saved[name]["shadow"].to(layer.weight_OI)
    state: dict[str, Any] = content["updater"]
    return state


# --- what the callback API lacks -------------------------------------------------------------------------------------


def _patch(method: str, around: Any) -> None:
    """Replace a method of the class ``Trainer``, once; Trainers without this callback behave as before.

    To undo it: ``setattr(Trainer, method, getattr(Trainer, method).__wrapped__)``.
    """
    original = getattr(Trainer, method)
    if getattr(original, "serves_sparse_train", False):
        return

    @functools.wraps(original)
    def patched(self: Any, *args: Any, **kwargs: Any) -> Any:
        return around(original, self, *args, **kwargs)

    patched.serves_sparse_train = True  # type: ignore[attr-defined]
    setattr(Trainer, method, patched)


def _callbacks_of(trainer: Any) -> list[SparseTrainerCallback]:
    return [each for each in trainer.callback_handler.callbacks if isinstance(each, SparseTrainerCallback)]


def _train(train: Any, self: Any, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
    # the Trainer tells its callbacks which step it resumes, but not from which folder
    found = _callbacks_of(self)
    if len(found) > 1:
        raise ValueError(
            f"The Trainer has {len(found)} SparseTrainerCallbacks, and can use one: they would write the same file. "
            "For several patterns in one model, use several MaskUpdater in a callback of your own or in a custom loop."
        )
    folder = get_last_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
    if found and folder:
        check_whole(Path(folder))
    for callback in found:
        callback._resumed, callback._first = Path(folder) if folder else None, None
    return train(self, resume_from_checkpoint, *args, **kwargs)


def _log_with_metrics(log: Any, self: Any, logs: dict[str, float], *args: Any, **kwargs: Any) -> Any:
    # Reporters (TensorBoard, W&B) come before a user's callbacks, so that nothing added in on_log would reach them.
    # Rows of evaluations stay unchanged: ``evaluate`` returns them, and the Trainer writes them into model cards.
    if "loss" in logs or "train_loss" in logs:
        for callback in _callbacks_of(self):
            logs.update(callback._unlogged)
            callback._unlogged = {}
    return log(self, logs, *args, **kwargs)


def _save_with_state(save_model: Any, self: Any, output_dir: Any = None, _internal_call: bool = False) -> Any:
    # In on_save it would be too late: the Trainer has deleted older checkpoints by then, and may have begun to upload.
    saved = save_model(self, output_dir, _internal_call)
    if _internal_call and output_dir is not None:
        for callback in _callbacks_of(self):
            callback.save_state(self.args, self.state, Path(output_dir))
    return saved


for _method, _around in (("train", _train), ("log", _log_with_metrics), ("save_model", _save_with_state)):
    _patch(_method, _around)
