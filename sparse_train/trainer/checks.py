"""What does not go together with ``SparseTrainerCallback``, and is refused before a run begins."""

import os
from typing import Any

from torch import nn

from sparse_train.models.lora import is_peft
from sparse_train.pipeline.run_settings import RunSettings


def check_engines(args: Any) -> None:
    """Raise ValueError where the Trainer runs on an engine, or in a way, that loses masks or statistics."""
    launched_with_fsdp = os.environ.get("ACCELERATE_USE_FSDP", "false").lower() == "true"
    engines = {
        "FSDP": launched_with_fsdp or getattr(args, "fsdp_plugin_args", None) is not None or bool(args.fsdp),
        "DeepSpeed": args.deepspeed_plugin is not None,
    }
    for engine in (name for name, runs in engines.items() if runs):
        raise ValueError(
            f"The Trainer runs on {engine}, whose checkpoints this callback cannot follow. Train on one device or with "
            "DDP, or use Lightning with sparse_train.callbacks.DynamicPruning, which knows FSDP2 and DeepSpeed."
        )
    if args.n_gpu > 1:
        raise ValueError(
            f"The Trainer would copy the model to {args.n_gpu} GPUs in each step (DataParallel), and activations "
            "recorded in copies are lost. Start it with torchrun, or show it one GPU with CUDA_VISIBLE_DEVICES."
        )


def check_best(model: nn.Module, settings: RunSettings) -> None:
    """Raise ValueError where ``load_best_model_at_end`` would bring back less than a sparse model."""
    schedule = settings.schedule
    if schedule.sparsity(0.0) != schedule.sparsity(1.0) or settings.start_step != 0:
        raise ValueError(
            "load_best_model_at_end would bring a checkpoint back from before the final sparsity, as denser models "
            "have the lower loss. Leave it out, or train at a constant sparsity from start_step 0."
        )
    if is_peft(model):
        raise ValueError(
            "load_best_model_at_end brings the adapters of an earlier step back, but not the masks of their base. "
            "Leave it out for models of peft."
        )
