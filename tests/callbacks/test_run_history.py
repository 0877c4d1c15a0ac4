"""What a run records, that recording changes nothing, and that a resumed run has one history."""

import itertools
import json

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from sparse_train import SparseGPT
from sparse_train.callbacks import DynamicPruning, RunHistory
from sparse_train.report.collect import HISTORY, collect
from tests.callbacks.runs import InInit, Tokens, loader

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


class Module(InInit):
    def validation_step(self, batch, _):
        self.log("val_loss", self.net(**batch).loss)


def validation_loader():
    return DataLoader(Tokens(), batch_size=2)


def fit(folder, *, steps=12, callbacks=None, ckpt_path=None, **settings):
    """A run of ``steps`` with updates at 0, 3, 6, 9 and validations every 4 batches; returns the trained module."""
    module = Module()
    pruning = DynamicPruning("2:4", update_freq=3, end_step=9)
    callbacks = [pruning, RunHistory()] if callbacks is None else callbacks
    settings = {
        "max_steps": steps,
        "num_sanity_val_steps": -1,
        "limit_val_batches": 3,
        "val_check_interval": 4,
    } | settings
    trainer = L.Trainer(
        accelerator="cpu",
        logger=False,
        log_every_n_steps=2,
        callbacks=callbacks,
        default_root_dir=folder,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        **settings,
    )
    trainer.fit(module, loader(), validation_loader(), ckpt_path=ckpt_path)
    return module


def records(folder):
    return [json.loads(line) for line in (folder / HISTORY).read_text().splitlines()]


def steps_of(found, kind):
    return [record["step"] for record in found if record["kind"] == kind]


def test_a_run_leaves_its_history(tmp_path):
    module = fit(tmp_path)
    found = records(tmp_path)
    assert [record["kind"] for record in found[:4]] == ["start", "baseline", "baseline", "update"]
    assert steps_of(found, "update") == [0, 3, 6, 9]
    assert steps_of(found, "train") == [2, 4, 6, 8, 10, 12]
    assert steps_of(found, "validation") == [4, 8, 12]
    assert found[-1]["kind"] == "end"
    assert found[-1]["tokens"] == 12 * 2 * 16
    assert found[-1]["sparsity"] == 0.5
    assert found[-1]["peak_bytes"] > 1e8
    seconds = [record["seconds"] for record in found]
    assert seconds == sorted(seconds)

    settings = found[0]["pruning"]
    weights = dict(module.named_modules())
    assert {name: weights[name].weight.numel() for name in settings["layers"]} == settings["layers"]
    assert len(settings["layers"]) == 21
    first, *changes = [record for record in found if record["kind"] == "update"]
    assert sum(first["flips"]) == 0  # the first mask is none of a mask
    for update in changes:
        assert update["flip_rate"] == sum(update["flips"]) / sum(settings["layers"].values())
        assert update["flip_rate"] > 0

    run = collect([tmp_path])[0]
    corner = run.crop(run.updates[-1])
    shown = settings["crop"]
    assert shown["layer"] == list(settings["layers"])[10]
    weight_OI = weights[shown["layer"]].weight[: shown["outputs"], : shown["inputs"]]
    assert torch.equal(torch.from_numpy(corner), weight_OI != 0)  # masks are frozen after step 9


def test_baselines_are_the_dense_and_the_one_shot_model(tmp_path):
    fit(tmp_path, steps=1)
    dense, one_shot = {}, {}
    for record in records(tmp_path):
        if record["kind"] == "baseline":
            (dense if record["state"] == "dense" else one_shot).update(record)
    assert dense["sparsity"] == 0
    assert one_shot["sparsity"] == 0.5
    assert (dense["batches"], dense["of_batches"]) == (3, 3)
    model = Module().net.eval()
    with torch.no_grad():
        losses = [float(model(**batch).loss) for batch in itertools.islice(validation_loader(), 3)]
    assert dense["metrics"]["val_loss"] == pytest.approx(sum(losses) / 3)
    assert one_shot["metrics"]["val_loss"] != pytest.approx(dense["metrics"]["val_loss"], rel=1e-3)


def test_weights_that_a_solver_has_moved_are_not_called_the_dense_model(tmp_path):
    pruning = DynamicPruning("2:4", update_freq=3, initial_criterion=SparseGPT())
    fit(tmp_path, steps=1, callbacks=[pruning, RunHistory()])
    assert [record["state"] for record in records(tmp_path) if record["kind"] == "baseline"] == ["first mask"]


def test_recording_changes_nothing(tmp_path):
    with_history = fit(tmp_path / "a")
    without = fit(tmp_path / "b", callbacks=[DynamicPruning("2:4", update_freq=3, end_step=9)])
    assert not (tmp_path / "b" / HISTORY).exists()
    for (name, a), b in zip(with_history.state_dict().items(), without.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


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
        fit(killed, callbacks=[pruning, RunHistory(), Kill(), keep])
    assert steps_of(records(killed), "update") == [0, 3, 6]
    assert records(killed)[-1]["kind"] != "end"
    assert collect([killed])[0].end is None
    before = (killed / HISTORY).read_text()

    for folder in (resumed, killed):  # a new folder, and the old one, in which step 6 has been recorded
        fit(folder, ckpt_path=killed / "step=5.ckpt")
        found = records(folder)
        assert steps_of(found, "start") == [0, 5]
        assert steps_of(found, "update") == [0, 3, 6, 9]
        assert steps_of(found, "train") == [2, 4, 6, 8, 10, 12]
        assert found[-1]["tokens"] == 12 * 2 * 16
        seconds = [record["seconds"] for record in found]
        assert seconds == sorted(seconds)
        uninterrupted = [record for record in records(whole) if record["kind"] == "update"]
        for now, then in zip([r for r in found if r["kind"] == "update"], uninterrupted, strict=True):
            for key in ("step", "flip_rate", "initial_flip_rate", "zeros", "flips", "crop"):
                assert now[key] == then[key]
    assert before not in (killed / HISTORY).read_text()


def test_a_run_that_goes_on_has_one_end(tmp_path):
    done = fit(tmp_path / "done", steps=4, callbacks=[RunHistory()])
    done.trainer.save_checkpoint(tmp_path / "done.ckpt")
    fit(tmp_path / "longer", steps=6, callbacks=[RunHistory()], ckpt_path=tmp_path / "done.ckpt")
    found = records(tmp_path / "longer")
    assert steps_of(found, "start") == [0, 4]
    assert steps_of(found, "train") == [2, 4, 6]
    assert steps_of(found, "end") == [6]


def test_a_trainer_that_fits_once_more_measures_no_second_baseline(tmp_path):
    module = fit(tmp_path, steps=2, callbacks=[RunHistory()])
    module.trainer.fit_loop.epoch_loop.max_steps = 4
    module.trainer.fit(module, loader(), validation_loader())
    found = records(tmp_path)
    assert steps_of(found, "start") == [0, 2]
    assert steps_of(found, "baseline") == [0]
    assert steps_of(found, "train") == [2, 4]


def test_a_new_run_replaces_what_an_old_one_left(tmp_path):
    fit(tmp_path)
    fit(tmp_path, steps=2)
    assert records(tmp_path)[-1]["step"] == 2
    assert steps_of(records(tmp_path), "start") == [0]


def test_one_record_a_step_where_gradients_are_accumulated(tmp_path):
    fit(tmp_path, steps=4, accumulate_grad_batches=2, limit_val_batches=0)
    found = records(tmp_path)
    assert steps_of(found, "train") == [2, 4]
    assert steps_of(found, "baseline") == steps_of(found, "validation") == []
    assert found[-1]["tokens"] == 4 * 2 * 2 * 16


def test_a_dense_run_has_a_history_too(tmp_path):
    fit(tmp_path, steps=4, callbacks=[RunHistory()])
    found = records(tmp_path)
    assert found[0]["pruning"] is None
    assert [record["state"] for record in found if record["kind"] == "baseline"] == ["dense"]
    assert found[-1]["sparsity"] is None


def test_only_rank_0_writes_and_a_dev_run_leaves_nothing(tmp_path, monkeypatch):
    fit(tmp_path / "dev", callbacks=[DynamicPruning("2:4"), RunHistory()], fast_dev_run=True, max_steps=1)
    monkeypatch.setattr(L.Trainer, "is_global_zero", False)
    fit(tmp_path / "rank1", steps=1)
    assert not list(tmp_path.rglob("*.jsonl"))


def test_it_belongs_behind_the_pruning(tmp_path):
    with pytest.raises(ValueError, match="RunHistory comes before DynamicPruning"):
        fit(tmp_path, callbacks=[RunHistory(), DynamicPruning("2:4")])
