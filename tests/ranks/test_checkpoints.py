"""Interrupted runs: on as many ranks as before bit for bit, on another number with nothing lost, after a death too."""

import os
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from transformers import AutoModelForCausalLM

from sparse_train import FirstWindow
from sparse_train.callbacks import DynamicPruning
from sparse_train.distributed.collectives import rank, world_size
from sparse_train.distributed.engines import whole_state_dict
from sparse_train.export import export_checkpoint
from sparse_train.models.causal_lm import CausalLM
from sparse_train.models.checkpoints import check_runs_no_code
from tests.ranks import engines, launch

ONE_FILE = "fsdp2 in one file"
MIDDLE = 7  # in the window of the update at step 8


class Interrupt(L.Callback):
    """Writes a checkpoint, and then stops the run, or kills one of its ranks a step later."""

    def __init__(self, path: Path, kill: bool = False) -> None:
        self.path, self.kill = path, kill

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.global_step == MIDDLE:
            trainer.save_checkpoint(self.path)
            trainer.should_stop = not self.kill
        if trainer.global_step == MIDDLE + 1 and self.kill and rank() == 1:
            os.kill(os.getpid(), signal.SIGKILL)


class Keep(L.Callback):
    """Keeps all that a run ends with."""

    def __init__(self, pruning: DynamicPruning) -> None:
        self.pruning = pruning
        self.start: dict[str, Any] = {}
        self.end: dict[str, Any] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.start = self.pruning.state_dict()

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        self.end = {"weights and masks": whole_state_dict(pl_module.model), "callback": self.pruning.state_dict()}


def train(engine: str, folder: Path, module: Any, *callbacks: L.Callback, ckpt_path: Path | None = None) -> Keep:
    pruning = DynamicPruning("2:4", update_freq=3, window=2, end_step=100, first_mask=FirstWindow())
    keep = Keep(pruning)
    settings: dict[str, Any] = {"accumulate_grad_batches": 2 // world_size()}
    if engine == ONE_FILE:
        engine = "fsdp2"
        settings["strategy"] = engines.strategy("fsdp2", save_distributed_checkpoint=False)
    trainer = engines.trainer(engine, folder, pruning, *callbacks, keep, **settings)
    trainer.fit(module, engines.loader(), ckpt_path=ckpt_path, weights_only=False)
    return keep


def whole_and_interrupted(engine: str, folder: Path, model: Path) -> Any:
    keep = train(engine, folder, CausalLM(str(model), lr=3e-3))
    interrupted(engine, folder, model)
    return keep.end


def interrupted(engine: str, folder: Path, model: Path) -> None:
    train(engine, folder, CausalLM(str(model), lr=3e-3), Interrupt(folder / "middle.ckpt"))


def resumed(engine: str, folder: Path, model: Path) -> Any:
    keep = train(engine, folder, CausalLM(str(model), lr=3e-3), ckpt_path=folder / "middle.ckpt")
    return keep.start, keep.end


def same(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


ENGINES = ("ddp", "fsdp2", ONE_FILE, "zero2", "zero3")


@pytest.fixture(scope="module")
def runs(tmp_path_factory, model_folder):
    """By engine: its folder, what uninterrupted runs end with, and what resumed ones begin and end with."""
    cases = [(engine, tmp_path_factory.mktemp("run"), model_folder) for engine in ENGINES]
    whole, again = launch.each(whole_and_interrupted, cases), launch.each(resumed, cases)
    return {case[0]: (case[1], whole[case], again[case]) for case in cases}


@pytest.mark.parametrize("engine", ENGINES)
def test_resumed_on_as_many_ranks_equals_uninterrupted_and_exports_without_them(runs, engine):
    tmp_path, whole, again = runs[engine]
    for before, (start, after) in zip(whole, again, strict=True):
        by_rank = start["norms"]["norms_by_rank"]
        assert len(by_rank) == 2
        assert not same(by_rank[0], by_rank[1])  # each rank has its own back
        assert start["steps"] == MIDDLE
        assert same(before, after)

    check_runs_no_code(tmp_path / "middle.ckpt")
    export_checkpoint(tmp_path / "middle.ckpt", tmp_path / "model")
    if engine == "fsdp2":
        with pytest.raises(ValueError, match="part of a checkpoint folder"):
            export_checkpoint(tmp_path / "middle.ckpt" / "meta.pt", tmp_path / "other")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    for name, weight in model.named_parameters():
        if "proj" in name:
            assert int((weight.view(-1, 4) != 0).sum(1).max()) == 2, name


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
@pytest.mark.parametrize("ranks", [(2, 1), (1, 2)])
def test_resumed_on_another_number_of_ranks_no_token_is_lost(tmp_path, runs, model_folder, engine, ranks):
    folder = tmp_path if ranks[0] == 1 else runs[engine][0]
    if ranks[0] == 1:
        launch.alone(interrupted, engine, folder, model_folder)
    callbacks = torch.load(folder / "middle.ckpt/meta.pt" if engine == "fsdp2" else folder / "middle.ckpt")
    saved = callbacks["callbacks"]["DynamicPruning"]["norms"]["norms_by_rank"]
    for start, end in launch.run(resumed, engine, folder, model_folder, ranks=ranks[1]):
        for name in saved[0]:
            for key in ("tokens", "sum_squares"):
                found = sum(each[name][key] for each in start["norms"]["norms_by_rank"])
                assert torch.equal(found, sum(each[name][key] for each in saved)), name
            assert int(found.sum()) > 0
        assert end["callback"]["steps"] == engines.STEPS


def killed(folder: Path, model: Path) -> Any:
    try:
        train("ddp", folder, CausalLM(str(model), lr=3e-3), Interrupt(folder / "middle.ckpt", kill=True))
    except RuntimeError as error:  # gloo's
        return str(error)
    return "finished"


def test_a_rank_that_is_killed_takes_the_run_with_it_and_the_last_checkpoint_resumes(tmp_path, model_folder):
    survivor = launch.run(killed, tmp_path, model_folder, survivors=True)
    assert "finished" not in survivor[0]
    assert len(survivor) == 1
    for start, end in launch.run(resumed, "ddp", tmp_path, model_folder):
        assert start["steps"] == MIDDLE
        assert end["callback"]["steps"] == engines.STEPS
