"""Training with re-pruning against dense training: time per step, and bytes of masks; ratios from one run.

    python benchmarks/overhead.py
    python benchmarks/overhead.py --update_freq 10 --intervals 2 --rounds 2

Same Trainer, same model (SmolLM2-135M-Instruct, dequantised from Q4_1), same batches, bf16-mixed, default settings of
DynamicPruning. Only whole intervals are timed, including updates: from after the first step of an interval to after the
step of its last update. The first mask, made once per run, is left out. Dense and sparse runs alternate, and rounds are
summed, so that disturbances of the machine affect both.
"""

import os
import time
import warnings
from typing import Any

import lightning as L
import torch
from jsonargparse import auto_cli
from rich.console import Console

from sparse_train import sparse_layers
from sparse_train.callbacks import DynamicPruning
from sparse_train.data.text_blocks import TextBlocks
from sparse_train.models.causal_lm import CausalLM
from sparse_train.models.sources import PackagedSmolLM2


class Clock(L.Callback):
    """Seconds of optimizer steps ``first`` + 1 to ``last``, including callbacks."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last, self.seconds, self.mask_bytes = first, last, 0.0, 0.0

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: object) -> None:
        if trainer.global_step == self.first:
            self.began = time.perf_counter()
        if trainer.global_step == self.last:
            self.seconds = time.perf_counter() - self.began
            layers = sparse_layers(pl_module).values()
            if layers:
                weights = sum(layer.weight.numel() for layer in layers)
                self.mask_bytes = sum(layer.weight_mask.nbytes for layer in layers) / weights


def settings() -> dict[str, Any]:
    """Settings of the trainers that are compared."""
    return {
        "precision": "bf16-mixed",
        "logger": False,
        "enable_checkpointing": False,
        "limit_val_batches": 0,
        "enable_model_summary": False,
    }


def train(first: int, steps: int, *callbacks: L.Callback) -> Clock:
    L.seed_everything(0, verbose=False)
    clock = Clock(first, first + steps)
    # the clock comes last, so that its time includes updates
    trainer = L.Trainer(max_steps=first + steps + 1, callbacks=[*callbacks, clock], **settings())
    trainer.fit(CausalLM(PackagedSmolLM2()), TextBlocks(PackagedSmolLM2()))
    return clock


def main(update_freq: int = 10, intervals: int = 2, rounds: int = 1) -> None:
    """Print the ratio.

    Args:
        update_freq: k.
        intervals: whole intervals that are timed.
        rounds: dense and sparse runs, alternating.
    """
    warnings.filterwarnings("ignore")
    steps = update_freq * intervals
    dense = sparse = 0.0
    for _ in range(rounds):
        # timed: steps update_freq + 1 to update_freq * (intervals + 1), with an update after the last one of each
        pruning = DynamicPruning("2:4", update_freq=update_freq, end_step=steps + 2 * update_freq)
        clock = train(update_freq, steps, pruning)
        sparse += clock.seconds
        mask_bytes = clock.mask_bytes
        dense += train(update_freq, steps).seconds
    cores = os.cpu_count()
    Console(width=120).print(
        f"{rounds} x {steps} steps of 4 x 512 tokens, bf16-mixed, {cores} cores, torch {torch.__version__}\n"
        f"dense {dense / rounds / steps:.3f} s per step, 2:4 re-pruned every {update_freq} steps "
        f"{sparse / rounds / steps:.3f} s per step: ratio {sparse / dense:.3f} (target: at most 1.10)\n"
        f"masks: {mask_bytes:.4f} byte per targeted weight (target: at most 0.13)",
        highlight=False,
    )


if __name__ == "__main__":
    auto_cli(main, as_positional=False)
