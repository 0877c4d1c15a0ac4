import re

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from sparse_train.callbacks import DynamicPruning
from sparse_train.commands import training_progress
from sparse_train.commands.training_progress import TrainingBar, TrainingLines, numbers, total_steps
from tests.conftest import VOCABULARY, tiny_llama
from tests.terminal.test_progress import terminal, text  # noqa: F401  (a fixture)

pytestmark = pytest.mark.filterwarnings("ignore")


class Module(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = tiny_llama()

    def training_step(self, batch):
        loss = self.model(input_ids=batch, labels=batch).loss
        self.log("train/loss_ce", loss + 1)  # a term of it, as distillation logs them
        self.log("train/loss", loss)
        return loss

    def validation_step(self, batch):
        self.log("val/perplexity", self.model(input_ids=batch, labels=batch).loss.exp())

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def fit(*callbacks, **options):
    """Six steps of two micro-batches each, masks updated at the second and fourth."""
    data = DataLoader(torch.randint(3, VOCABULARY, (24, 16)), batch_size=2)
    settings = {"max_steps": 6, "accumulate_grad_batches": 2, "val_check_interval": 6, "limit_val_batches": 2}
    quiet = {"logger": False, "enable_checkpointing": False, "enable_model_summary": False, "accelerator": "cpu"}
    pruning = DynamicPruning("2:4", update_freq=2, calibration_batches=2)
    bar = any(isinstance(callback, TrainingBar) for callback in callbacks)
    trainer = L.Trainer(**quiet | settings | options, enable_progress_bar=bar, callbacks=[pruning, *callbacks])
    trainer.fit(Module(), data, data)
    return trainer


def test_a_line_after_each_validation(capsys):
    trainer = fit(TrainingLines())
    out, err = capsys.readouterr()
    lines = [line for line in err.splitlines() if line.startswith("step ")]
    number = r"\d+\.\d+"
    assert [line.split(",")[0] for line in lines] == ["step 3/6", "step 6/6"]
    for line in lines:
        shown = (
            rf"step ./6, 0:\d\d:\d\d left, loss {number}, perplexity {number}, sparsity 0.5000, flip rate {number} %"
        )
        assert re.fullmatch(shown, line)
    last = f"loss {float(trainer.callback_metrics['train/loss']):.4f}, "
    assert last in lines[-1]
    assert "step" not in out


def test_a_line_once_a_minute(capsys, monkeypatch):
    monkeypatch.setattr(training_progress, "_SECONDS_BETWEEN_LINES", 0.0)
    fit(TrainingLines(), limit_val_batches=0, num_sanity_val_steps=0)
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("step ")]
    assert len(lines) == 12  # as many as batches
    assert lines[0].startswith("step 0/6, loss")  # no step yet that says how long one takes


def test_the_bar_shows_the_whole_run(terminal, capsys, monkeypatch):  # noqa: F811
    monkeypatch.setattr(training_progress, "_SECONDS_BETWEEN_NOTES", 0.0)
    fit(TrainingBar())
    out, err = capsys.readouterr()
    shown = text(err)
    assert re.search(r"training .* 6/6 .* left", shown)  # steps, not the twelve batches
    assert re.search(r"validating .* 2/2", shown)
    assert re.search(r"loss \d\.\d+, perplexity \d+\.\d+, sparsity 0\.5000, flip rate \d+\.\d\d %\s*$", shown.rstrip())
    assert "training" not in out


def test_a_bar_that_is_disabled_draws_nothing(terminal, capsys):  # noqa: F811
    bar = TrainingBar()
    bar.disable()
    fit(bar)
    assert "training" not in capsys.readouterr().err
    bar.print("one", "line")
    assert capsys.readouterr().out == "one line\n"


def test_numbers_of_a_dense_run_and_of_none():
    trainer = L.Trainer(logger=False, enable_checkpointing=False, accelerator="cpu")
    assert numbers(trainer) == ""
    trainer._logger_connector._callback_metrics = {"val/loss": torch.tensor(1.0), "loss": torch.tensor(2.0)}
    assert numbers(trainer) == "loss 2.0000"


def test_a_run_without_end_has_no_total():
    class Endless:
        estimated_stepping_batches = float("inf")

    assert total_steps(Endless()) is None


def test_progress_bars_of_others_show_sparsity_and_flip_rate():
    seen = {}

    class Spy(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            seen.update(trainer.progress_bar_metrics)

    fit(Spy())
    assert set(seen) == {"sparsity/actual", "sparsity/flip_rate"}
    assert seen["sparsity/actual"] == 0.5
