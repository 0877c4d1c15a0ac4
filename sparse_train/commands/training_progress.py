"""Progress of ``sparse-train fit``: a bar in a terminal, lines of text elsewhere. Both on stderr."""

import math
import sys
import time
from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import lightning as L
from lightning.pytorch.callbacks import ProgressBar

from sparse_train.callbacks import DynamicPruning
from sparse_train.terminal.drawn import DrawnProgress

_SECONDS_BETWEEN_LINES = 60.0
_SECONDS_BETWEEN_NOTES = 0.25  # reading the loss waits for the GPU


def numbers(trainer: L.Trainer) -> str:
    """Latest loss, perplexity, sparsity and flip rate, as far as they are known: "loss 3.2451, sparsity 0.5000"."""
    found = []
    metrics = trainer.callback_metrics
    losses = {name: value for name, value in metrics.items() if "loss" in name and not name.startswith("val")}
    # the loss that is trained on, and not one of its terms
    loss = next((losses[name] for name in ("train/loss", "train_loss", "loss") if name in losses), None)
    if loss is None:
        loss = next(iter(losses.values()), None)
    perplexity = next((value for name, value in metrics.items() if "perplexity" in name), None)
    if loss is not None:
        found.append(f"loss {float(loss):.4f}")
    if perplexity is not None:
        found.append(f"perplexity {float(perplexity):.2f}")
    callbacks: Sequence[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    report = next((each.last_report for each in callbacks if isinstance(each, DynamicPruning)), None)
    if report is not None:
        found.append(f"sparsity {report.sparsity:.4f}, flip rate {100 * report.flip_rate:.2f} %")
    return ", ".join(found)


def total_steps(trainer: L.Trainer) -> int | None:
    """Optimizer steps of the whole run; None if it has no end."""
    steps = trainer.estimated_stepping_batches
    return int(steps) if math.isfinite(steps) and steps > 0 else None


class TrainingBar(ProgressBar):
    """Steps done and time left of the whole run (Lightning's bar shows an epoch); below it, ``numbers``."""

    def __init__(self) -> None:
        super().__init__()
        self._enabled = True
        self._drawn: DrawnProgress | None = None
        self._training: Any = None
        self._validating: Any = None
        self._noted = 0.0

    def disable(self) -> None:
        self._enabled = False

    def enable(self) -> None:
        self._enabled = True

    def print(self, *args: Any, sep: str = " ", **kwargs: Any) -> None:
        if self._drawn is None:
            print(*args, sep=sep, **kwargs)
        else:
            self._drawn.console.print(sep.join(map(str, args)), markup=False, highlight=False)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if drawn := self._drawing(stays=True):
            total, done = total_steps(trainer), trainer.global_step
            self._training = drawn.add_task("training", total=total, completed=done)
            drawn.note = numbers(trainer)

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._drawn is not None and self._training is not None:
            self._drawn.update(self._training, completed=trainer.global_step)
            if time.monotonic() - self._noted >= _SECONDS_BETWEEN_NOTES:
                self._noted, self._drawn.note = time.monotonic(), numbers(trainer)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if drawn := self._drawing():
            batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
            total = sum(batches) if isinstance(batches, list) else batches
            self._validating = drawn.add_task("validating", total=total if math.isfinite(total) else None)

    def on_validation_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *batch: Any) -> None:
        if self._drawn is not None and self._validating is not None:
            self._drawn.advance(self._validating)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if self._drawn is not None and self._validating is not None:
            self._drawn.refresh()  # otherwise a short validation would never be drawn
            self._drawn.remove_task(self._validating)
            self._validating = None
            self._drawn.note = numbers(trainer)
        if trainer.sanity_checking:
            self._stop()  # others may draw until training starts

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._stop()

    def on_exception(self, trainer: L.Trainer, pl_module: L.LightningModule, exception: BaseException) -> None:
        self._stop()

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        self._stop()

    def _drawing(self, stays: bool = False) -> DrawnProgress | None:
        if self._enabled and self._drawn is None:
            self._drawn = DrawnProgress(stays)
            self._drawn.start()
        return self._drawn

    def _stop(self) -> None:
        if self._drawn is not None:
            self._drawn.stop()
        self._drawn = self._training = self._validating = None


class TrainingLines(L.Callback):
    """A line after each validation, and every minute in between: "step 25/100, 0:01:20 left, loss 3.2451, ..."."""

    def __init__(self) -> None:
        self._began = self._last = 0.0
        self._first_step = 0

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._began = self._last = time.monotonic()
        self._first_step = trainer.global_step

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if time.monotonic() - self._last >= _SECONDS_BETWEEN_LINES:
            self._line(trainer)

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._line(trainer)

    def _line(self, trainer: L.Trainer) -> None:
        self._last = time.monotonic()
        step, total = trainer.global_step, total_steps(trainer)
        parts = [f"step {step}" if total is None else f"step {step}/{total}"]
        if total is not None and step > self._first_step:
            seconds = (self._last - self._began) / (step - self._first_step) * (total - step)
            parts.append(f"{timedelta(seconds=round(seconds))} left")
        if trainer.is_global_zero:
            print(", ".join([*parts, numbers(trainer)]), file=sys.stderr, flush=True)
