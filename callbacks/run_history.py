"""``RunHistory``: what a report of a training run needs, written to the run's folder while it trains.

One JSON object per line, in ``sparse_train_history.jsonl``, which ``sparse-train report`` reads. Every record has
``kind``, ``step`` (optimizer steps done) and, from the first step on, ``seconds`` (training time since the start):

    start        date, versions, machine, seed, precision, ranks, length of the run, settings and layers of the pruning;
                 one more each time the run is resumed
    baseline     validation before the first step: ``state`` "first mask", and "dense" with all weights kept
    train        losses, every ``log_every_n_steps`` steps
    validation   metrics, and the seconds they took
    evaluation   metrics and protocol of an ``Evaluation``
    update       target, sparsity, flip rates, seconds; zeros and flips of each layer; a crop of one mask
    end          tokens, peak memory, sparsity as counted on the weights
"""

import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from sparse_train import environment, memory
from sparse_train.callbacks.dynamic_pruning import DynamicPruning
from sparse_train.callbacks.evaluation import Evaluation
from sparse_train.callbacks.steps import steps_done
from sparse_train.files import replacing
from sparse_train.layers import masks
from sparse_train.layers.matrices import MaskedLayer
from sparse_train.pipeline.update_report import UpdateReport
from sparse_train.pipeline.updater import MaskUpdater
from sparse_train.report.collect import HISTORY

_CROP_OUTPUTS, _CROP_INPUTS = 32, 64


class RunHistory(L.Callback):
    """Record a run for ``sparse-train report``.

    ::

        trainer = L.Trainer(callbacks=[DynamicPruning("2:4"), RunHistory()])

    ``sparse-train fit`` adds this callback automatically. Metrics are those that the module logs: at validations, names
    that start with ``val``; in training, other names that contain ``loss``. The sanity check before training gives the
    baselines: its result is that of the first mask, and the same batches are run a second time with all weights kept,
    for the dense model (unless a solver has made the first mask, which also moves the weights that it keeps).
    ``num_sanity_val_steps=-1`` uses the whole validation set for this.

    Checkpoints contain the records so far. A run that was killed and resumed, in the same folder or in another, thus
    has one history; records written after the checkpoint are dropped. Only rank 0 writes.
    """

    def __init__(self) -> None:
        self.path: Path | None = None
        """The file of the run; None before it has begun, and in a ``fast_dev_run``, which writes no file."""
        self._lines: list[str] = []
        self._writes = False
        self._tokens = self._step = 0
        self._seconds_before = 0.0
        self._began = self._setup_began = self._validation_began = 0.0
        self._pruning: DynamicPruning | None = None
        self._seen: UpdateReport | None = None
        self._evaluations: dict[Evaluation, int] = {}
        """How many results of each callback have been written."""
        self._baselines: list[dict[str, Any]] = []

    # --- before training ---------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._setup_began = time.perf_counter()
        self._pruning = _pruning_ahead(self, trainer)
        callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
        self._evaluations = {each: 0 for each in callbacks if isinstance(each, Evaluation)}
        self._baselines = []
        if trainer.global_step == 0:  # a checkpoint, if there is one, is loaded later
            self._lines, self._tokens, self._seconds_before = [], 0, 0.0
        folder = Path(trainer.log_dir or trainer.default_root_dir)  # log_dir is collective: all ranks must read it
        self.path = None if trainer.fast_dev_run else folder / HISTORY  # type: ignore[attr-defined]
        self._writes = trainer.is_global_zero

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.global_step > 0:  # a second fit of this trainer: the weights are already trained
            return
        self._baseline(trainer, "first mask" if self._is_masked() else "dense")
        if self._is_masked() and self._pruning is not None and not self._pruning.first_mask_moves_weights:
            rank_zero_info("RunHistory: validating once more with all weights kept, for the report.")
            with _opened(self._layers()):
                trainer.fit_loop.epoch_loop.val_loop.run()  # still a sanity check: not logged, triggers no checkpoint
                self._baseline(trainer, "dense")

    def _baseline(self, trainer: L.Trainer, state: str) -> None:
        record: dict[str, Any] = {
            "state": state,
            "metrics": _validation_metrics(trainer),
            "batches": _total(trainer.num_sanity_val_batches),
            "of_batches": _total(trainer.num_val_batches),
        }
        if self._is_masked() and (updater := self._updater()):
            record["sparsity"] = updater.report().sparsity
        self._baselines.append(record)

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._began = time.perf_counter()
        self._step, step = trainer.global_step, steps_done(trainer, in_batch=False)
        self._lines = [line for line in self._lines if json.loads(line)["kind"] != "end"]  # the run continues
        if self._writes and self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(self.path) as beside:  # if the process is killed here, earlier records are kept
                beside.write_text("".join(line + "\n" for line in self._lines), encoding="utf-8")
        self._write("start", step, **self._settings(trainer))
        for baseline in self._baselines:
            self._write("baseline", step, **baseline)
        self._write_update(step)

    def _settings(self, trainer: L.Trainer) -> dict[str, Any]:
        return {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "versions": environment.versions(),
            "machine": environment.machine(),
            "seed": int(os.environ["PL_GLOBAL_SEED"]) if "PL_GLOBAL_SEED" in os.environ else None,
            "precision": str(trainer.precision),
            "ranks": trainer.world_size,
            "total_steps": _finite(trainer.estimated_stepping_batches),
            "prepare_seconds": self._began - self._setup_began,
            "pruning": self._pruning_settings(),
        }

    def _pruning_settings(self) -> dict[str, Any] | None:
        updater = self._updater()
        if updater is None:
            return None
        timing, (name, layer) = updater.timing, _shown_layer(updater)
        assert self._pruning is not None
        return {
            **updater.settings(),
            **self._pruning.first_mask_settings(),
            **asdict(timing),
            "layers": {name: layer.in_features * layer.out_features for name, layer in updater.layers.items()},
            "crop": {
                "layer": name,
                "outputs": min(_CROP_OUTPUTS, layer.out_features),
                "inputs": min(_CROP_INPUTS, layer.in_features),
            },
        }

    # --- in training -------------------------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._tokens += _tokens(batch) * trainer.world_size
        self._write_update(steps_done(trainer))
        self._write_evaluations()
        if trainer.global_step == self._step:  # a micro-batch
            return
        self._step, step = trainer.global_step, steps_done(trainer)
        if step % trainer.log_every_n_steps == 0:  # type: ignore[attr-defined]
            losses = {
                name: float(value)
                for name, value in trainer.callback_metrics.items()
                if "loss" in name and not name.startswith("val")
            }
            if losses:
                self._write("train", step, metrics=losses)

    def _write_update(self, step: int) -> None:
        report = None if self._pruning is None else self._pruning.last_report
        updater = self._updater()
        if updater is None or report is None or report is self._seen:
            return
        self._seen = report
        self._write(
            "update",
            step,
            took=report.seconds,
            target=report.target_sparsity,
            sparsity=report.sparsity,
            flip_rate=report.flip_rate,
            initial_flip_rate=report.initial_flip_rate,
            zeros=[report.layers[name].zeros for name in updater.layers],
            flips=[report.layers[name].flips for name in updater.layers],
            crop=_crop(_shown_layer(updater)[1]),
        )

    def _write_evaluations(self) -> None:
        for each, written in self._evaluations.items():
            for result in each.results[written:]:
                self._write("evaluation", result["step"], metrics=result["metrics"], protocol=result["protocol"])
            self._evaluations[each] = len(each.results)

    def on_validation_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._validation_began = time.perf_counter()

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn != "fit" or trainer.sanity_checking:
            return
        took = time.perf_counter() - self._validation_began
        self._write("validation", steps_done(trainer), took=took, metrics=_validation_metrics(trainer))

    # --- after training, and checkpoints -----------------------------------------------------------------------------

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        updater = self._updater()
        report = updater.report() if updater is not None and updater.sparsity is not None else None
        self._write(
            "end",
            steps_done(trainer, in_batch=False),
            date=datetime.now(UTC).isoformat(timespec="seconds"),
            tokens=self._tokens,
            peak_bytes=memory.peak_bytes(),
            peak_device_bytes=torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
            sparsity=None if report is None else report.sparsity,
            zeros=None if report is None else [layer.zeros for layer in report.layers.values()],
        )

    def state_dict(self) -> dict[str, Any]:
        return {"lines": list(self._lines), "tokens": self._tokens, "seconds": self._seconds()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._lines, self._tokens = list(state_dict["lines"]), state_dict["tokens"]
        self._seconds_before = state_dict["seconds"]
        self._began = 0.0

    def teardown(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage == "fit":
            self._write_evaluations()  # at the end of training, an Evaluation may run after this callback
            self._evaluations = {}
            self._seconds_before, self._began = self._seconds(), 0.0
            self._pruning = None  # also releases the model

    # --- parts -------------------------------------------------------------------------------------------------------

    def _seconds(self) -> float:
        return self._seconds_before + (time.perf_counter() - self._began if self._began else 0.0)

    def _write(self, kind: str, step: int, **values: Any) -> None:
        line = json.dumps({"kind": kind, "step": step, "seconds": round(self._seconds(), 3), **values})
        self._lines.append(line)
        if self._writes and self.path is not None:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(line + "\n")

    def _updater(self) -> MaskUpdater | None:
        return None if self._pruning is None else self._pruning.updater

    def _layers(self) -> list[MaskedLayer]:
        updater = self._updater()
        return [] if updater is None else list(updater.layers.values())

    def _is_masked(self) -> bool:
        updater = self._updater()
        return updater is not None and bool(updater.sparsity)


def _pruning_ahead(history: L.Callback, trainer: L.Trainer) -> DynamicPruning | None:
    callbacks: list[L.Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if isinstance(callback, DynamicPruning):
            if callbacks.index(callback) > callbacks.index(history):
                raise ValueError(
                    "RunHistory comes before DynamicPruning in the trainer's callbacks, and would see its updates one "
                    "batch late. Put it after."
                )
            return callback
    return None


@contextmanager
def _opened(layers: Sequence[MaskedLayer]) -> Iterator[None]:
    """Inside, all weights are kept, as in the dense model; the masks are restored afterwards."""
    kept = [layer.weight_mask.clone() for layer in layers]
    try:
        for layer in layers:
            masks.fill_full(layer.weight_mask, layer.in_features)
        yield
    finally:
        for layer, mask in zip(layers, kept, strict=True):
            layer.weight_mask.copy_(mask)


def _shown_layer(updater: MaskUpdater) -> tuple[str, MaskedLayer]:
    """The layer whose mask a report shows: always the middle one, so that it is not picked by its result."""
    return list(updater.layers.items())[len(updater.layers) // 2]


def _crop(layer: MaskedLayer) -> str:
    """The upper left corner of a packed mask, as hexadecimal digits row by row."""
    corner = layer.weight_mask[:_CROP_OUTPUTS, : masks.packed_width(min(_CROP_INPUTS, layer.in_features))]
    return corner.cpu().numpy().tobytes().hex()


def _validation_metrics(trainer: L.Trainer) -> dict[str, float]:
    return {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val")}


def _tokens(batch: Any) -> int:
    """Tokens of a batch, including padding; 0 if it is not a batch of token ids."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
    return ids.numel() if isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point() else 0


def _total(batches: Sequence[int | float]) -> int | None:
    return _finite(sum(batches))


def _finite(count: int | float) -> int | None:
    return int(count) if count < float("inf") else None
