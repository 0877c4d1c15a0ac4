"""Trainers for each engine, and a small language model in a module for them."""

from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.strategies import DDPStrategy, DeepSpeedStrategy, ModelParallelStrategy
from torch.utils.data import Dataset, DistributedSampler, Subset
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from sparse_train.distributed.collectives import rank, world_size
from sparse_train.distributed.fsdp2 import shard_blocks
from sparse_train.distributed.zero import whole_first
from tests.conftest import VOCABULARY, shallow_llama

ENGINES = ("ddp", "fsdp2", "zero1", "zero2", "zero3")
STEPS = 12


class CPUDeepSpeed(DeepSpeedStrategy):
    """DeepSpeed where Lightning's strategy asks for GPUs: the same engine, over gloo."""

    def setup_environment(self) -> None:
        DDPStrategy.setup_environment(self)

    def setup_distributed(self) -> None:
        self.set_world_ranks()
        self._init_deepspeed_distributed()

    @property
    def root_device(self) -> torch.device:
        return torch.device("cpu", self.local_rank)


def strategy(engine: str, accelerator: str = "cpu", **settings: Any) -> Any:
    """The Lightning strategy of an engine."""
    backend = "gloo" if accelerator == "cpu" else "nccl"
    if engine == "fsdp2":
        return ModelParallelStrategy(world_size(), tensor_parallel_size=1, **settings)
    if engine.startswith("zero"):
        # DeepSpeed has a list of optimizers that it knows, and torch's AdamW on CPU is not on it
        settings = {"stage": int(engine[-1]), "zero_allow_untested_optimizer": True} | settings
        of_engine = CPUDeepSpeed if accelerator == "cpu" else DeepSpeedStrategy
        return of_engine(process_group_backend=backend, logging_batch_size_per_gpu=1, **settings)
    return DDPStrategy(process_group_backend=backend, **settings) if engine == "ddp" else "auto"


class Tokens(Dataset):
    """The same random token ids in every process."""

    def __init__(self, length: int = 16, count: int = 256) -> None:
        self.ids = torch.randint(3, VOCABULARY, (count, length), generator=torch.Generator().manual_seed(1))

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        ids = self.ids[index]
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": ids}


def loader(ranks: int = 2, batch_size: int = 2) -> StatefulDataLoader:
    """Batches of ``ranks`` processes, or, in a process alone, all of theirs one after the other: a step's samples are
    the same, and so is how they are grouped (Adam makes much of the last bit of a small gradient)."""
    data: Any = Tokens()
    if world_size() == 1:
        of_rank = [list(DistributedSampler(data, ranks, each, shuffle=False, drop_last=True)) for each in range(ranks)]
        starts = range(0, len(of_rank[0]), batch_size)
        data = Subset(data, [i for start in starts for own in of_rank for i in own[start : start + batch_size]])
    sampler = StatefulDistributedSampler(data, world_size(), rank(), shuffle=False, drop_last=True)
    return StatefulDataLoader(data, batch_size=batch_size, sampler=sampler)


class Module(L.LightningModule):
    """A tiny Llama, built in ``configure_model``, sharded there where the strategy asks for it."""

    def __init__(self, model: Any = None, optimizer: Any = torch.optim.AdamW, lr: float = 3e-3) -> None:
        super().__init__()
        self.model, self.optimizer, self.lr = model, optimizer, lr

    def configure_model(self) -> None:
        if self.model is None:
            with whole_first():
                self.model = shallow_llama()
        if self.device_mesh is not None:
            shard_blocks(self.model, self.device_mesh["data_parallel"])

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return self.model(**batch).loss

    def configure_optimizers(self) -> Any:
        return self.optimizer(self.parameters(), lr=self.lr)


def trainer(
    engine: str,
    folder: Path,
    *callbacks: L.Callback,
    max_steps: int = STEPS,
    accelerator: str = "cpu",
    **settings: Any,
) -> L.Trainer:
    """A quiet trainer with as many processes as the group has."""
    settings = {"logger": False, "enable_checkpointing": False} | settings
    return L.Trainer(
        accelerator=accelerator,
        strategy=settings.pop("strategy", None) or strategy(engine, accelerator),
        devices=world_size(),
        max_steps=max_steps,
        callbacks=list(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        default_root_dir=folder,
        **settings,
    )
