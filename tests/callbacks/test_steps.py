"""Steps, as all callbacks count them."""

import csv
import json
from pathlib import Path

import lightning as L
import pytest

from sparse_train.callbacks import DynamicPruning, RunHistory
from tests.callbacks.runs import loader, trainer
from tests.callbacks.test_dynamic_pruning import TwoOptimizers

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


def test_of_several_optimizers_all_callbacks_count_batches_as_loggers_do(tmp_path):
    class Logs(TwoOptimizers):
        def training_step(self, batch, batch_idx):
            super().training_step(batch, batch_idx)
            self.log("loss", 1.0 * batch_idx)

    logger = L.pytorch.loggers.CSVLogger(tmp_path)
    history = RunHistory()
    pruning = DynamicPruning("2:4", update_freq=2, window=1, end_step=8)
    run = trainer(tmp_path, pruning, history, max_steps=16, logger=logger, log_every_n_steps=1)
    run.fit(Logs(), loader())
    rows = list(csv.DictReader((Path(logger.log_dir) / "metrics.csv").open()))
    losses = [int(row["step"]) for row in rows if row["loss"]]
    updates = [int(row["step"]) for row in rows if row["sparsity/flip_rate"]]
    assert losses == list(range(8))
    assert updates[-4:] == [2, 4, 6, 8]
    lines = [json.loads(line) for line in history.path.read_text().splitlines()]
    steps = [(line["kind"], line["step"]) for line in lines if line["kind"] in ("train", "update", "end")]
    assert [step for kind, step in steps if kind == "train"] == list(range(1, 9))
    assert [step for kind, step in steps if kind == "update"][-4:] == [2, 4, 6, 8]
    assert steps[-1] == ("end", 8)
