"""What ``DynamicPruning`` cannot be combined with: refused, or warned of, before a run begins."""

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_warn

from sparse_train.callbacks.lightning_trainer import averaging
from sparse_train.layers.masked_layer import sparse_layers
from sparse_train.layers.masks import FACTOR_NAMES
from sparse_train.pruning.updater import BY_UPDATE, MaskUpdater


def check_fit(trainer: L.Trainer, squash: bool) -> None:
    """Raise ValueError if the trainer or one of its callbacks does not work with pruning."""
    if not squash and isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise ValueError(
            "squash=False keeps masks after fit, but the strategy trains in processes that it starts itself (spawn, "
            "fork, notebook) and brings only the module's weights back, so the masks would be lost. Leave squash out, "
            'or use strategy="ddp".'
        )
    if isinstance(trainer.strategy, FSDPStrategy):
        raise ValueError(
            'strategy="fsdp" is FSDP1, which flattens weights into shards. Masks need whole rows, which those do not '
            "keep. Use ModelParallelStrategy (FSDP2, configs/strategy/fsdp2.yaml) or DeepSpeed."
        )
    for callback in averaging(trainer):
        if callback._use_buffers:
            raise ValueError(
                f"{type(callback).__name__} would average the bytes of the masks. Give it use_buffers=False: weights "
                "are averaged, and the averaged model has the masks of the model in training."
            )


def warn_of_denser_best(trainer: L.Trainer, updater: MaskUpdater) -> None:
    """Warn if the best checkpoint may be one from before the final sparsity."""
    keeping = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
    best = next((each.monitor for each in keeping if each.monitor and each.save_top_k not in (0, -1)), None)
    soon = updater.timing.window if updater.config.criterion.needs_activations else 0
    late = updater.origin == BY_UPDATE and updater.timing.start_step > soon
    rises = updater.config.sparsity_at(0.0) < updater.config.sparsity_at(1.0)
    if best is not None and (late or rises):
        rank_zero_warn(
            f"ModelCheckpoint keeps the checkpoints with the best {best}, and the sparsity of this run rises. "
            "Denser models have the lower loss, so the best one may be from before the final sparsity. Use the last "
            "one (save_last=True)."
        )


def check_built(trainer: L.Trainer, pl_module: L.LightningModule, has_state: bool) -> None:
    """Raise ValueError if the module, which now has its layers and a checkpoint's weights, cannot be trained."""
    layers = sparse_layers(pl_module).values()
    sharding = isinstance(trainer.strategy, ModelParallelStrategy) and trainer.world_size > 1
    if sharding and not any(layer.layout.is_sharded for layer in layers):
        raise ValueError(
            "ModelParallelStrategy leaves sharding to configure_model, and none of the targeted layers is sharded, so "
            "each process would train a separate model. Call sparse_train.distributed.fsdp2.shard_blocks(model, "
            'self.device_mesh["data_parallel"]) there, or use strategy="ddp".'
        )
    for name, parameter in pl_module.named_parameters():
        if name.rpartition(".")[2] in FACTOR_NAMES and parameter.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"precision {trainer.precision!r} has made {name}, a factor of mask_lora, {parameter.dtype}, in which "
                "an optimizer's steps would be lost. Use precision='bf16-mixed'; the frozen weights stay in half "
                "precision if they are loaded in it (the model source's dtype)."
            )
    if not has_state and trainer.ckpt_path is not None and trainer.global_step > 0:
        raise ValueError(
            f"{trainer.ckpt_path} was written without DynamicPruning, so there is no run to resume. Load its "
            "weights into the module and fit without ckpt_path."
        )
