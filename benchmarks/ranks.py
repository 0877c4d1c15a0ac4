"""Re-pruning against the same engine without it, on several processes: time per step, bytes kept; ratios from one run.

    torchrun --nproc_per_node 2 benchmarks/ranks.py --engine ddp
    torchrun --nproc_per_node 2 benchmarks/ranks.py --engine fsdp2

Same Trainer, model (SmolLM2-135M-Instruct, dequantised from Q4_1) and batches, bf16-mixed. Only whole intervals are
timed, including updates: from after the first step of an interval to after the step of its last update. Dense and
sparse runs alternate.
"""

import time
import warnings
from typing import Literal

import lightning as L
import torch
from jsonargparse import auto_cli
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy

from sparse_train.callbacks import DynamicPruning
from sparse_train.data.text_blocks import TextBlocks
from sparse_train.distributed.collectives import rank, world_size
from sparse_train.layers.masked_layer import MaskedLayer
from sparse_train.models.causal_lm import CausalLM
from sparse_train.models.sources import PackagedSmolLM2


class Clock(L.Callback):
    """Seconds of optimizer steps ``first`` + 1 to ``last``, including callbacks."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last, self.seconds = first, last, 0.0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: object) -> None:
        if trainer.global_step == self.first:
            self.began = time.perf_counter()
        if trainer.global_step == self.last:
            self.seconds = time.perf_counter() - self.began


class Kept(L.Callback):
    """Bytes per targeted weight that masks, statistics and the updater keep on this process."""

    def __init__(self, pruning: DynamicPruning) -> None:
        self.pruning, self.bytes = pruning, 0.0

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        updater = self.pruning.updater
        assert updater is not None
        layers: list[MaskedLayer] = list(updater.layers.values())
        statistics = {id(layer.statistics): layer.statistics for layer in layers if layer.statistics is not None}
        kept = sum(layer.weight_mask.nbytes for layer in layers)
        kept += sum(tensor.nbytes for each in statistics.values() for tensor in each.tensors())
        kept += sum(rows_SJ.nbytes for rows_SJ in updater.state_dict()["first_rows"].values())
        self.bytes = kept / sum(layer.in_features * layer.out_features for layer in layers)


def train(engine: str, first: int, steps: int, batch_size: int, *callbacks: L.Callback) -> Clock:
    L.seed_everything(0, verbose=False)
    clock = Clock(first, first + steps)
    strategy = DDPStrategy() if engine == "ddp" else ModelParallelStrategy(world_size(), tensor_parallel_size=1)
    trainer = L.Trainer(
        max_steps=first + steps + 1,
        callbacks=[*callbacks, clock],  # the clock comes last, so that its time includes updates
        strategy=strategy,
        devices=world_size(),
        precision="bf16-mixed",
        logger=False,
        enable_checkpointing=False,
        limit_val_batches=0,
        enable_model_summary=False,
    )
    trainer.fit(CausalLM(PackagedSmolLM2()), TextBlocks(PackagedSmolLM2(), batch_size=batch_size))
    return clock


def main(
    engine: Literal["ddp", "fsdp2"] = "ddp",
    update_freq: int = 10,
    intervals: int = 2,
    rounds: int = 1,
    batch_size: int = 4,
) -> None:
    """Print the ratio.

    Args:
        engine: ddp or fsdp2.
        update_freq: k.
        intervals: whole intervals that are timed.
        rounds: dense and sparse runs, alternating.
        batch_size: blocks of 512 tokens per process and step.
    """
    warnings.filterwarnings("ignore")
    if not torch.distributed.is_initialized():
        torch.distributed.init_process_group("nccl" if torch.cuda.is_available() else "gloo")
    steps = update_freq * intervals
    dense = sparse = 0.0
    for _ in range(rounds):
        # timed: steps update_freq + 1 to update_freq * (intervals + 1), with an update after the last one of each
        pruning = DynamicPruning("2:4", update_freq=update_freq, end_step=steps + 2 * update_freq)
        kept = Kept(pruning)
        sparse += train(engine, update_freq, steps, batch_size, pruning, kept).seconds
        dense += train(engine, update_freq, steps, batch_size).seconds
    if rank() == 0:
        print(
            f"{engine}, {world_size()} processes, {rounds} x {steps} steps of {batch_size} x 512 tokens each, "
            f"bf16-mixed, torch {torch.__version__}\n"
            f"without {dense / rounds / steps:.3f} s per step, 2:4 re-pruned every {update_freq} steps "
            f"{sparse / rounds / steps:.3f} s per step: ratio {sparse / dense:.3f} (target: at most 1.10)\n"
            f"kept by a process: {kept.bytes:.4f} byte per targeted weight (target: at most 0.13)"
        )


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
