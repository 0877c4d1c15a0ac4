"""``RunRecord``: what is not a metric of a training run, in ``run.json`` beside Lightning's ``metrics.csv``.

states                validations before training, of "dense" and "after the first mask", as ``report.runs.State``
now                   the latest validation, or the one at the end
step, seconds, tokens optimizer steps done, training time, and tokens trained on (with padding), so far
finished              whether the run came to its end; the sparsity of ``now`` is then that of its final weights
protocols             what ``Evaluation`` callbacks measured
about                 what the page lists: settings, when and on what the run ran, peak memory of the first process
"""

import os
import re
import time
import warnings
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loggers.logger import DummyLogger
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from sparse_train import environment
from sparse_train.callbacks.dynamic_pruning import DynamicPruning
from sparse_train.callbacks.evaluation import Evaluation
from sparse_train.callbacks.lightning_trainer import callbacks_of, steps_done
from sparse_train.files import write_json
from sparse_train.layers.masked_layer import sparse_layers
from sparse_train.oneshot.forwards import ids_of
from sparse_train.patterns import PRUNED
from sparse_train.pruning.counts import measure, sparsity_of
from sparse_train.pruning.updater import MaskUpdater
from sparse_train.report.runs import METRICS, RUN_FILE, State, metric_named, read_metrics


class RunRecord(L.Callback):
    """Record a run for ``sparse-train report``, and validate its final weights.

    ::

        trainer = L.Trainer(callbacks=[DynamicPruning("2:4"), RunRecord()])

    ``sparse-train fit`` adds this callback. Metrics are in the ``metrics.csv`` of Lightning's ``CSVLogger``, which is
    added to a trainer that has none. With ``num_sanity_val_steps=-1``, the sanity check before training gives the
    baselines: it reads the dense model, and the same batches are run once more with the first mask. A check of fewer
    batches gives none, since it could not be compared with later validations.

    Checkpoints contain the record and the metrics so far, so a run that was killed and resumed, in the same folder or
    in another, has one history. Only rank 0 writes.
    """

    def __init__(self) -> None:
        self.folder: Path | None = None
        """The run's folder, with ``run.json`` and ``metrics.csv``; None if it has not begun, or was a fast_dev_run."""
        self._facts: dict[str, Any] = {}
        self._earlier: list[dict[str, float]] = []  # metrics, from a checkpoint
        self._logger: CSVLogger | None = None
        self._pruning: DynamicPruning | None = None
        self._began = self._counted = 0.0
        self._was_dense = True
        self._zeros: float | None = None  # both before the first mask

    # --- before training ---------------------------------------------------------------------------------------------

    def setup(self, trainer: L.Trainer, pl_module: L.LightningModule, stage: str) -> None:
        if stage != "fit":
            return
        self._began, self.folder = 0.0, None
        self._pruning = next((each for each in callbacks_of(trainer) if isinstance(each, DynamicPruning)), None)
        if trainer.global_step == 0 or not self._facts:  # a checkpoint, if there is one, is loaded later
            counts: dict[str, Any] = {"step": 0, "seconds": 0.0, "tokens": 0}
            self._facts, self._earlier = counts | {"states": [], "protocols": [], "about": {}}, []

    def on_fit_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        trial = trainer.fast_dev_run or any(isinstance(logger, DummyLogger) for logger in trainer.loggers)  # type: ignore[attr-defined]
        # here, after the setup of ModelCheckpoint, whose folder depends on whether there is a logger
        logger = None if trial else _csv_logger(trainer)
        self._logger = logger if trainer.is_global_zero else None

    def on_sanity_check_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        layers = sparse_layers(pl_module)
        self._was_dense = all(layer.is_dense() for layer in layers.values())
        self._zeros = sparsity_of(measure(layers).values()) if layers else None

    def on_sanity_check_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        whole = trainer.num_sanity_val_batches == trainer.num_val_batches
        if trainer.global_step > 0 or not whole:  # a second fit of this trainer: the weights are already trained
            return
        if self._was_dense:
            self._add_state(trainer, "without masks" if (self._zeros or 0) > PRUNED else "dense", self._zeros)
        if self._pruning is not None:
            self._pruning.on_sanity_check_end(trainer, pl_module)  # it does nothing when Lightning calls it, too
        if (updater := self._updater()) is not None and updater.sparsity:
            if self._was_dense:
                rank_zero_info("RunRecord: validating the model with its first mask, too, for the report.")
                trainer.fit_loop.epoch_loop.val_loop.run()  # still a sanity check: not logged, triggers no checkpoint
            self._add_state(trainer, "after the first mask", updater.report().sparsity)

    def _add_state(self, trainer: L.Trainer, name: str, sparsity: float | None) -> None:
        self._facts["states"].append(_validated(trainer, name, 0, sparsity))

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._began, self._counted = time.perf_counter(), self._facts["seconds"]
        if self._logger is not None:
            self.folder = Path(self._logger.log_dir)
            writer = self._logger.experiment  # deletes an older metrics.csv
            for row in self._earlier:
                writer.log_metrics(row, int(row["step"]))
        self._earlier = []
        before, step = self._facts["about"], steps_done(trainer, in_batch=False)
        resumed = before.get("resumed at steps", [])
        about = {
            "length, steps": trainer.estimated_stepping_batches,
            "precision": str(trainer.precision),
            "processes": trainer.world_size,
            "seed": os.environ.get("PL_GLOBAL_SEED"),
            "begun": before.get("begun", datetime.now(UTC).isoformat(timespec="seconds")),
            "resumed at steps": [*resumed, step] if before else resumed,
            **environment.machine(),
            **environment.versions(),
        }
        if (updater := self._updater()) is not None:
            size = sum(layer.size for layer in updater.layers.values())
            targets = {"targeted layers": len(updater.layers), "targeted weights": size}
            about = {**updater.settings(), **asdict(updater.timing), **targets, **about}
        now = self._facts.get("now", asdict(State("", step))) | {"name": "latest"}  # a run may go on that had ended
        self._facts |= {"finished": False, "about": about, "now": now}
        self._write(step)

    # --- in training -------------------------------------------------------------------------------------------------

    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self._facts["tokens"] += _tokens(batch) * trainer.world_size
        last_epoch = trainer.is_last_batch and trainer.current_epoch + 1 == trainer.max_epochs
        if last_epoch or 0 < trainer.max_steps <= trainer.global_step:
            trainer.should_stop = True  # as it will; and before it stops, Lightning then validates

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            step, report = steps_done(trainer), self._pruning.last_report if self._pruning else None
            self._facts["now"] = _validated(trainer, "latest", step, report.sparsity if report else None)
            self._write(step)

    # --- after training, and checkpoints -----------------------------------------------------------------------------

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self._facts["finished"] = True
        step, updater = steps_done(trainer, in_batch=False), self._updater()
        now = self._facts["now"] if self._facts["now"]["step"] == step else asdict(State("", step))
        sparsity = updater.report().sparsity if updater else None  # now: later, masks may be folded into the weights
        self._facts["now"] = now | {"name": "at the end", "sparsity": sparsity}
        self._write(step)

    def on_fit_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        evaluations = [each for each in callbacks_of(trainer) if isinstance(each, Evaluation)]
        protocols = [result["protocol"] for each in evaluations for result in each.results]
        self._facts["protocols"] = list(dict.fromkeys([*self._facts["protocols"], *protocols]))
        self._pruning = None  # also releases the model
        self._write(self._facts["step"])

    def state_dict(self) -> dict[str, Any]:
        if self.folder is None or self._logger is None:
            return {"facts": self._facts, "metrics": self._earlier}
        self._logger.save()
        return {"facts": {**self._facts, "seconds": self._seconds()}, "metrics": read_metrics(self.folder / METRICS)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._facts, self._earlier = dict(state_dict["facts"]), list(state_dict["metrics"])

    # --- parts -------------------------------------------------------------------------------------------------------

    def _seconds(self) -> float:
        return self._counted + time.perf_counter() - self._began if self._began else self._facts["seconds"]

    def _write(self, step: int) -> None:
        self._facts |= {"step": step, "seconds": self._seconds()}
        self._facts["about"]["peak memory of the process, GiB"] = environment.peak_bytes() / 2**30
        if torch.cuda.is_available():
            self._facts["about"]["peak memory of the accelerator, GiB"] = torch.cuda.max_memory_allocated() / 2**30
        if self.folder is not None and self._logger is not None:
            self._logger.save()
            self.folder.mkdir(parents=True, exist_ok=True)
            write_json(self.folder / RUN_FILE, self._facts)

    def _updater(self) -> MaskUpdater | None:
        return None if self._pruning is None else self._pruning.updater


def _validated(trainer: L.Trainer, name: str, step: int, sparsity: float | None) -> dict[str, Any]:
    """The state with the perplexity and loss of the validation that has just ended."""
    values = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val")}
    perplexity, loss = (values.get(metric_named(word, list(values)) or "") for word in ("perplexity", "loss"))
    return asdict(State(name, step, perplexity, loss, sparsity))


def _csv_logger(trainer: L.Trainer) -> CSVLogger:
    """The trainer's; or one that is added to it, in the folder of the run."""
    for logger in trainer.loggers:
        if isinstance(logger, CSVLogger):
            return logger
    folder = trainer.log_dir or trainer.default_root_dir  # collective: on all ranks
    warnings.filterwarnings("ignore", f"Experiment logs directory {re.escape(folder)} exists")  # no logs but ours
    logger = _Metrics(folder, name="", version="")
    trainer.loggers = [*trainer.loggers, logger]
    return logger


class _Metrics(CSVLogger):
    """Replaces an older file when training begins. Lightning would before, also where a run had come to its end."""

    def log_hyperparams(self, params: Any = None) -> None:
        pass

    def save(self) -> None:
        if self._experiment is not None:
            super().save()


def _tokens(batch: Any) -> int:
    """Tokens of a batch, including padding; 0 if it is not a batch of token ids."""
    ids = ids_of(batch)
    return ids.numel() if isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point() else 0
