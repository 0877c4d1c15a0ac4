"""What a run records, that recording changes nothing, and that a resumed run has one history."""

import itertools
import json

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader

from sparse_train import IHT, OneShot, prune
from sparse_train.callbacks import DynamicPruning, RunRecord
from sparse_train.report import collect, read_metrics
from tests.callbacks.runs import InInit, Tokens, loader

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class Module(InInit):
    def validation_step(self, batch, _):
        self.log("val_loss", self.net(**batch).loss)


def validation_loader():
    return DataLoader(Tokens(), batch_size=2)


def fit(folder, *, steps=12, callbacks=None, ckpt_path=None, module=None, **settings):
    """A run of ``steps`` with updates at 0, 3, 6, 9 and validations every 4 batches; returns the trained module."""
    module = module or Module()
    pruning = DynamicPruning("2:4", update_freq=3, end_step=9)
    callbacks = [pruning, RunRecord()] if callbacks is None else callbacks
    settings = {
        "max_steps": steps,
        "num_sanity_val_steps": -1,
        "limit_val_batches": 3,
        "val_check_interval": 4,
        "logger": CSVLogger(folder, name="", version=""),
        "enable_progress_bar": False,
    } | settings
    trainer = L.Trainer(
        accelerator="cpu",
        log_every_n_steps=2,
        callbacks=callbacks,
        default_root_dir=folder,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        **settings,
    )
    trainer.fit(module, loader(), validation_loader(), ckpt_path=ckpt_path)
    return module


def facts(folder):
    return json.loads((folder / "run.json").read_text())


def steps_of(folder, name):
    """Optimizer steps done at which a metric was recorded."""
    return [step for step, _ in collect([folder])[0].curve(name)]


def test_a_run_leaves_its_record(tmp_path):
    module = fit(tmp_path)
    assert steps_of(tmp_path, "sparsity/flip_rate") == [0, 3, 6, 9]
    assert steps_of(tmp_path, "loss") == [2, 4, 6, 8, 10, 12]
    assert steps_of(tmp_path, "val_loss") == [4, 8, 12]
    found = facts(tmp_path)
    assert (found["finished"], found["step"], found["tokens"]) == (True, 12, 12 * 2 * 16)
    assert found["about"]["peak memory of the process, GiB"] > 0.1
    assert found["about"]["targeted layers"] == 14
    now = collect([tmp_path])[0].now
    last = float(module.trainer.callback_metrics["val_loss"])
    assert (now.name, now.step, now.sparsity) == ("at the end", 12, 0.5)
    assert now.loss == pytest.approx(last)


def test_states_before_training_are_the_dense_and_the_one_shot_model(tmp_path):
    fit(tmp_path, steps=1)
    dense, one_shot = collect([tmp_path])[0].before
    assert (dense.name, dense.sparsity) == ("dense", 0)
    assert (one_shot.name, one_shot.sparsity) == ("after the first mask", 0.5)
    model = Module().net.eval()
    with torch.no_grad():
        losses = [float(model(**batch).loss) for batch in itertools.islice(validation_loader(), 3)]
    assert dense.loss == pytest.approx(sum(losses) / 3)
    assert one_shot.loss != pytest.approx(dense.loss, rel=1e-3)


def test_the_dense_model_is_measured_before_a_solver_moves_its_weights(tmp_path):
    fit(tmp_path / "wanda", steps=1)
    solved = DynamicPruning("2:4", update_freq=3, first_mask=OneShot(IHT()))
    bar = TQDMProgressBar()  # prepares for the sanity check; in any order
    fit(tmp_path / "iht", steps=1, callbacks=[RunRecord(), solved, bar], enable_progress_bar=True)
    dense, one_shot = collect([tmp_path / "iht"])[0].before
    other_dense, other_one_shot = collect([tmp_path / "wanda"])[0].before
    assert dense == other_dense and one_shot.loss != other_one_shot.loss


def test_a_model_with_masks_has_no_dense_row(tmp_path):
    module = Module()
    prune(module.net, [batch["input_ids"] for batch in itertools.islice(loader(), 4)], criterion=IHT(), squash=False)
    fit(tmp_path, steps=1, module=module)
    assert [state.name for state in collect([tmp_path])[0].before] == ["after the first mask"]


def test_a_part_of_the_validation_does_not_pass_for_all(tmp_path):
    fit(tmp_path, steps=4, num_sanity_val_steps=2)
    run = collect([tmp_path])[0]
    assert run.before == [] and [step for step, _ in run.validation("loss")] == [4]


def test_a_model_that_was_pruned_before_is_not_called_dense(tmp_path):
    trained = fit(tmp_path / "first", steps=1)
    trainer = L.Trainer(
        max_steps=1,
        callbacks=[DynamicPruning("2:4", update_freq=3), RunRecord()],
        default_root_dir=tmp_path / "second",
        num_sanity_val_steps=-1,
        limit_val_batches=3,
        logger=False,
        enable_checkpointing=False,
        accelerator="cpu",
    )
    trainer.fit(trained, loader(), validation_loader())
    names = [state.name for state in collect([tmp_path / "second"])[0].before]
    assert names == ["without masks", "after the first mask"]


def test_recording_changes_nothing(tmp_path):
    recorded = fit(tmp_path / "a")
    without = fit(tmp_path / "b", callbacks=[DynamicPruning("2:4", update_freq=3, end_step=9)])
    assert not (tmp_path / "b" / "run.json").exists()
    assert recorded.seen == without.seen
    for (name, a), b in zip(recorded.state_dict().items(), without.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("limits", "steps"),
    [({"steps": 6}, 6), ({"steps": -1, "max_epochs": 2, "limit_train_batches": 3}, 6)],
)
def test_final_weights_are_validated_and_the_run_is_not_shorter(limits, steps, tmp_path):
    every = {"val_check_interval": 4, "check_val_every_n_epoch": None}
    module = fit(tmp_path, **limits, **every)
    assert module.trainer.global_step == steps
    assert steps_of(tmp_path, "val_loss") == [4, 6]


def test_a_killed_and_resumed_run_has_one_history(tmp_path):
    whole, killed, resumed = tmp_path / "whole", tmp_path / "killed", tmp_path / "resumed"
    fit(whole)

    class Kill(L.Callback):
        def on_train_batch_end(self, trainer, *_):
            if trainer.global_step == 8:
                raise KeyError("power cut")

    keep = ModelCheckpoint(killed, every_n_train_steps=5, filename="{step}")
    pruning = DynamicPruning("2:4", update_freq=3, end_step=9)
    with pytest.raises(KeyError, match="power cut"):
        fit(killed, callbacks=[pruning, RunRecord(), Kill(), keep])
    assert steps_of(killed, "sparsity/flip_rate") == [0, 3, 6]
    assert not facts(killed)["finished"]
    assert collect([killed])[0].now.name == "latest"

    uninterrupted = collect([whole])[0]
    for folder in (resumed, killed):  # a new folder, and the old one, in which step 6 has been recorded
        fit(folder, ckpt_path=killed / "step=5.ckpt")
        found, run = facts(folder), collect([folder])[0]
        assert found["about"]["resumed at steps"] == [5]
        assert (found["tokens"], found["finished"]) == (12 * 2 * 16, True)
        assert run.before == uninterrupted.before
        assert run.now == uninterrupted.now
        for name in ("sparsity/flip_rate", "sparsity/initial_flip_rate", "sparsity/actual", "loss", "val_loss"):
            assert run.curve(name) == uninterrupted.curve(name), name


def test_a_run_that_goes_on_has_one_end(tmp_path):
    done = fit(tmp_path / "done", steps=4, callbacks=[RunRecord()])
    done.trainer.save_checkpoint(tmp_path / "done.ckpt")
    fit(tmp_path / "longer", steps=6, callbacks=[RunRecord()], ckpt_path=tmp_path / "done.ckpt")
    (run,) = collect([tmp_path / "longer"])
    assert run.facts["about"]["resumed at steps"] == [4]
    losses = [value for _, value in run.curve("val_loss")]
    assert len(losses) == 2
    now = run.now
    assert (now.name, now.step, now.loss) == ("at the end", 6, losses[-1])


def test_a_trainer_that_fits_once_more_measures_no_second_baseline(tmp_path):
    module = fit(tmp_path, steps=2, callbacks=[RunRecord()])
    module.trainer.fit_loop.epoch_loop.max_steps = 4
    module.trainer.fit(module, loader(), validation_loader())
    found = facts(tmp_path)
    assert found["about"]["resumed at steps"] == [2]
    assert [state["name"] for state in found["states"]] == ["dense"]
    assert steps_of(tmp_path, "loss") == [2, 4]
    assert found["tokens"] == 4 * 2 * 16


def test_a_new_run_replaces_what_an_old_one_left(tmp_path):
    fit(tmp_path)
    fit(tmp_path, steps=2)
    assert facts(tmp_path)["step"] == collect([tmp_path])[0].now.step == 2
    assert facts(tmp_path)["about"]["resumed at steps"] == []


def test_micro_batches_are_no_steps(tmp_path):
    fit(tmp_path, steps=4, accumulate_grad_batches=2, limit_val_batches=0)
    assert steps_of(tmp_path, "loss") == [2, 4]
    assert facts(tmp_path)["states"] == []
    assert facts(tmp_path)["tokens"] == 4 * 2 * 2 * 16


def test_a_dense_run_has_a_record_too(tmp_path):
    fit(tmp_path, steps=4, callbacks=[RunRecord()])
    found = facts(tmp_path)
    assert found["now"]["sparsity"] is None
    assert [state["name"] for state in found["states"]] == ["dense"]


def test_without_a_csv_logger_there_are_metrics_too_and_checkpoints_stay_where_they_were(tmp_path):
    fit(tmp_path, logger=False, callbacks=[DynamicPruning("2:4", update_freq=3), RunRecord(), ModelCheckpoint()])
    assert read_metrics(tmp_path / "metrics.csv")
    assert steps_of(tmp_path, "sparsity/flip_rate") == [0, 3, 6, 9]
    assert list((tmp_path / "checkpoints").iterdir())


def test_a_finished_run_that_is_started_again_keeps_its_metrics(tmp_path):
    def again(ckpt_path=None):
        saver = ModelCheckpoint(tmp_path / "saved", save_last=True, every_n_train_steps=2)
        fit(tmp_path, steps=4, logger=False, callbacks=[RunRecord(), saver], ckpt_path=ckpt_path)
        return (tmp_path / "metrics.csv").read_text(), facts(tmp_path)

    assert again() == again(tmp_path / "saved" / "last.ckpt")


def test_only_rank_0_writes_and_a_dev_run_leaves_nothing(tmp_path, monkeypatch):
    fit(tmp_path / "dev", callbacks=[DynamicPruning("2:4"), RunRecord()], fast_dev_run=True, max_steps=1, logger=False)
    monkeypatch.setattr(L.Trainer, "is_global_zero", False)
    fit(tmp_path / "rank1", steps=1)
    assert not list(tmp_path.rglob("run.json"))
