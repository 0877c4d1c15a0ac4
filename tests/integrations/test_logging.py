"""What a ``Trainer`` logs of updates."""

import copy
import shutil

import pytest
from transformers import Trainer, TrainerCallback

from sparse_train.integrations.transformers import SparseTrainerCallback
from tests.integrations.runs import pruning, trainer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class Reports(SparseTrainerCallback):
    """Notes what each update reports."""

    def __init__(self, **changes):
        super().__init__("2:4", end_step=1.0, **changes)
        self.reported = {}

    def on_step_end(self, args, state, control, **kwargs):
        super().on_step_end(args, state, control, **kwargs)
        self.reported[state.global_step] = dict(self._unlogged)


def sparsity_in(row):
    return {name: value for name, value in row.items() if name.startswith("sparsity/")}


def test_updates_are_in_the_rows_of_the_trainer_and_reach_reporters_that_come_first(tmp_path):
    rows = []

    class Reporter(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            rows.append({"step": state.global_step, **logs})

    pruning = Reports(update_freq=2)
    run = trainer(tmp_path, Reporter(), pruning)
    run.train()
    assert rows == run.state.log_history
    assert [row["step"] for row in rows if "loss" in row] == [5, 10]
    five, ten, summary = rows
    for row, update in ((five, 4), (ten, 10), (summary, 12)):
        assert sparsity_in(row) == pruning.reported[update]
    assert ten["sparsity/target"] == ten["sparsity/actual"] == 0.5
    assert 0 < ten["sparsity/flip_rate"] < 0.5
    assert {"sparsity/initial_flip_rate", "sparsity/update_seconds"} <= set(ten)


def test_each_update_is_logged_once(tmp_path):
    run = trainer(tmp_path, pruning(), logging_steps=3)
    run.train()
    assert [row["step"] for row in run.state.log_history if sparsity_in(row)] == [3, 6, 9, 12]
    assert [row["step"] for row in run.state.log_history if "loss" in row] == [3, 6, 9, 12]
    assert not sparsity_in(run.state.log_history[-1])
    run = trainer(tmp_path, pruning(), logging_steps=1)
    run.train()
    assert [row["step"] for row in run.state.log_history if sparsity_in(row)] == [1, 4, 8, 12]


def test_rows_of_evaluations_have_none_of_it(tmp_path):
    evaluated = []

    class Evaluations(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs):
            evaluated.append(copy.copy(metrics))

    run = trainer(tmp_path, pruning(), Evaluations(), eval_strategy="steps", eval_steps=3, logging_steps=50)
    run.train()
    assert len(evaluated) == 4 and not any(map(sparsity_in, evaluated))
    assert [row["step"] for row in run.state.log_history if sparsity_in(row)] == [12]


def test_a_resumed_run_logs_what_the_checkpoint_had_not_logged(tmp_path):
    settings = {"save_strategy": "steps", "save_steps": 5, "logging_steps": 6}
    whole = trainer(tmp_path / "whole", pruning(), **settings)
    whole.train()
    shutil.copytree(tmp_path / "whole" / "checkpoint-5", tmp_path / "again" / "checkpoint-5")
    again = trainer(tmp_path / "again", pruning(), **settings)
    again.train(resume_from_checkpoint=True)
    (expected,), (found,) = (
        [sparsity_in(row) for row in run.state.log_history if row["step"] == 6] for run in (whole, again)
    )
    assert found == expected and found["sparsity/flip_rate"] > 0


def test_the_patches_of_the_trainer_can_be_taken_back(monkeypatch):
    patched = Trainer.train, Trainer.training_step, Trainer.log, Trainer._save_checkpoint
    for each in patched:
        monkeypatch.setattr(Trainer, each.__name__, each.__wrapped__)
    assert not any(hasattr(getattr(Trainer, each.__name__), "__wrapped__") for each in patched)
