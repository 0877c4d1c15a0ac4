"""Progress of ``sparse-train fit`` where a bar would fill a log."""

import sys
import time
from datetime import timedelta
from typing import Any

import lightning as L

_SECONDS_BETWEEN_LINES = 60.0


class TrainingLines(L.Callback):
    """A line on stderr after each validation, and every minute in between, with what Lightning's bar shows.

    "step 25/100, 0:01:20 left, train/loss 3.245, val/perplexity 25.17, sparsity/actual 0.5, ..."
    """

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
        step, total = trainer.global_step, trainer.estimated_stepping_batches
        parts = [f"step {step}/{total}"]
        if total != float("inf") and step > self._first_step:
            seconds = (self._last - self._began) / (step - self._first_step) * (total - step)
            parts.append(f"{timedelta(seconds=round(seconds))} left")
        metrics = [f"{name} {float(value):.4g}" for name, value in trainer.progress_bar_metrics.items()]
        if trainer.is_global_zero:
            print(", ".join([*parts, *metrics]), file=sys.stderr, flush=True)
