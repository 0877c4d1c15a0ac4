"""What cannot be combined with ``SparseTrainerCallback`` and is refused before a run begins."""

import os
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from sparse_train.layers.matrices import MaskedLayer
from sparse_train.layers.sharding import is_sharded
from sparse_train.models.lora import is_peft
from sparse_train.pipeline.run_settings import RunSettings


def check_arguments(args: Any) -> None:
    """Raise ValueError for arguments of the Trainer under which masks, statistics or checkpoints would be lost."""
    launched_with_fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    engines = {
        "FSDP": launched_with_fsdp or getattr(args, "fsdp_plugin_args", None) is not None or bool(args.fsdp),
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


def check_one(callbacks: Sequence[Any]) -> None:
    """Raise ValueError if several callbacks would write the same file, and the first to end would fold all masks."""
    if len(callbacks) > 1:
        raise ValueError(
            f"The Trainer has {len(callbacks)} callbacks of the class {type(callbacks[0]).__name__}, and can use one. "
            "For several patterns in one model, use several MaskUpdater in a callback of your own or in a custom loop."
        )


def check_whole(layers: Mapping[str, MaskedLayer]) -> None:
    """Raise ValueError if the model was divided among processes when it was loaded."""
    name = next((name for name, layer in layers.items() if is_sharded(layer)), None)
    if name is not None:
        raise ValueError(
            f"{name} is divided among processes, and checkpoints of the Trainer would not be whole. Load the model "
            "without distributed_config and train with DDP, or use Lightning with "
            "sparse_train.callbacks.DynamicPruning, which supports FSDP2 and DeepSpeed."
        )


def check_first_mask(sparsity: float | None) -> None:
    """Raise ValueError if ``load_best_model_at_end`` could restore a step from before the first mask."""
    if sparsity is None:
        raise ValueError(
            "The first mask comes from the activations of the first steps, which run dense, and "
            "load_best_model_at_end would bring one of those back, as denser models have the lower loss. Leave it out, "
            "or prune the model before the run: sparse_train.prune(model, batches, ..., squash=False)."
        )


def check_first_try(first: bool) -> None:
    """Raise ValueError if auto_find_batch_size would retry from a checkpoint without loading it again."""
    if not first:
        raise ValueError(
            "auto_find_batch_size starts again after memory ran out, but does not load the checkpoint again, so that "
            "the steps trained since would stay. Resume with a smaller per_device_train_batch_size and without "
            "auto_find_batch_size."
        )


def check_best(model: nn.Module, settings: RunSettings) -> None:
    """Raise ValueError if ``load_best_model_at_end`` would not restore a whole sparse model."""
    if settings.sparsity_at(0.0) != settings.sparsity_at(1.0) or settings.start_step != 0:
        raise ValueError(
            "load_best_model_at_end would bring a checkpoint back from before the final sparsity, as denser models "
            "have the lower loss. Leave it out, or train at a constant sparsity from start_step 0."
        )
    if is_peft(model):
        raise ValueError(
            "load_best_model_at_end brings the adapters of an earlier step back, but not the masks of their base. "
            "Leave it out for models of peft."
        )
