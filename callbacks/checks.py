"""What cannot be combined with ``DynamicPruning`` and is refused before a run begins."""

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, ModelPruning
from lightning.pytorch.strategies import FSDPStrategy, ModelParallelStrategy
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.utilities import rank_zero_warn

from sparse_train.callbacks.averaging import check_averaging
from sparse_train.layers.matrices import FACTOR_NAMES
from sparse_train.layers.sharding import is_sharded
from sparse_train.layers.sparse_linear import sparse_layers
from sparse_train.pipeline.run_settings import RunSettings


def check_fit(
    trainer: L.Trainer, pl_module: L.LightningModule, pruning: L.Callback, settings: RunSettings, squash: bool
) -> None:
    """Raise ValueError if the trainer or one of its callbacks does not work with ``pruning``; or warn."""
    check_strategy(trainer, squash)
    check_shares(pl_module, settings)
    check_averaging(trainer, pruning)
    check_alone(trainer)
    warn_of_denser_best(trainer, settings)


def check_module(pl_module: object) -> None:
    """Raise ValueError for a module of ``pytorch_lightning``."""
    if not isinstance(pl_module, L.LightningModule):
        raise ValueError(
            f"{type(pl_module).__name__} is not a lightning.LightningModule. Modules and trainers of "
            "pytorch_lightning are different classes: write `import lightning as L` instead of "
            "`import pytorch_lightning as pl`, for both."
        )


def check_strategy(trainer: L.Trainer, squash: bool) -> None:
    """Raise ValueError if the strategy holds weights, or brings them back, in a way that masks do not support."""
    if not squash and isinstance(trainer.strategy.launcher, _MultiProcessingLauncher):
        raise ValueError(
            "squash=False keeps masks after fit, but the strategy trains in processes that it starts itself (spawn, "
            "fork, notebook) and brings only the module's weights back, so the masks would be lost. Leave squash out, "
            'or start the processes with torchrun, or use strategy="ddp".'
        )
    if isinstance(trainer.strategy, FSDPStrategy):
        raise ValueError(
            'strategy="fsdp" is FSDP1, which flattens weights into shards. Masks need whole rows, which those do not '
            "keep. Use ModelParallelStrategy (FSDP2, configs/strategy/fsdp2.yaml) or DeepSpeed."
        )


def check_shares(pl_module: L.LightningModule, settings: RunSettings) -> None:
    """Raise ValueError if steps are a share of the run and Lightning does not know its number of steps."""
    shares = {"start_step": settings.start_step, "end_step": settings.end_step}
    name = next((name for name, each in shares.items() if isinstance(each, float)), None)
    if name is not None and not pl_module.automatic_optimization:
        raise ValueError(
            f"{name} is {shares[name]}, a share of the run, and {type(pl_module).__name__} uses manual optimization, "
            f"so that the length of the run is not known. Give DynamicPruning a whole number: {name}=1000 means after "
            "1000 batches in which an optimizer stepped."
        )


def check_alone(trainer: L.Trainer) -> None:
    """Raise ValueError if another callback masks the same weights."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    other = next((each for each in callbacks if isinstance(each, ModelPruning)), None)
    if other is not None:
        raise ValueError(
            f"{type(other).__name__} adds a second set of masks to those of DynamicPruning, under the same "
            "name. Use one of them."
        )


def warn_of_denser_best(trainer: L.Trainer, settings: RunSettings) -> None:
    """Warn if the best checkpoint may be one from before the final sparsity."""
    rises = settings.first_sparsity < settings.sparsity_at(1.0)
    found = [each for each in trainer.checkpoint_callbacks if isinstance(each, ModelCheckpoint)]
    monitor = next(
        (each.monitor for each in found if each.monitor is not None and each.save_top_k not in (0, -1)), None
    )
    if rises and monitor is not None:
        rank_zero_warn(
            f"ModelCheckpoint keeps the checkpoints with the best {monitor}, and the sparsity of this run rises. "
            "Denser models have the lower loss, so the best one may be from before the final sparsity. Use the last "
            "one (save_last=True)."
        )


def check_sharded(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    """Raise ValueError if ``ModelParallelStrategy`` is used and no targeted layer is sharded."""
    if not isinstance(trainer.strategy, ModelParallelStrategy) or trainer.world_size == 1:
        return
    if not any(map(is_sharded, sparse_layers(pl_module).values())):
        raise ValueError(
            "ModelParallelStrategy leaves sharding to configure_model, and none of the targeted layers is sharded, so "
            "each process would train a separate model. Call sparse_train.layers.sharding.shard_blocks(model, "
            'self.device_mesh["data_parallel"]) there, or use strategy="ddp".'
        )


def check_factors(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    """Raise ValueError if the trainer's precision has converted factors of mask_lora to a 16-bit dtype."""
    for name, parameter in pl_module.named_parameters():
        if name.rpartition(".")[2] in FACTOR_NAMES and parameter.dtype in (torch.bfloat16, torch.float16):
            raise ValueError(
                f"precision {trainer.precision!r} has made {name}, a factor of mask_lora, {parameter.dtype}, in which "
                "an optimizer's steps would be lost. Use precision='bf16-mixed'; the frozen weights stay in half "
                "precision if they are loaded in it (the model source's dtype)."
            )
