"""Ranks that go wrong: one that holds another mask, one that dies."""

import io
import logging
import os
import re
import signal
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.strategies import ModelParallelStrategy
from torch.distributed.device_mesh import init_device_mesh

from sparse_train import FirstWindow, Fixed, FromZeros, Magnitude, MaskUpdater, prune, sparse_layers
from sparse_train.callbacks import DynamicPruning
from sparse_train.distributed.collectives import rank, world_size
from sparse_train.distributed.fsdp2 import shard_blocks
from tests.conftest import shallow_llama
from tests.ranks import engines, launch


class AtStep(L.Callback):
    """Does something in one rank, behind an optimizer step."""

    def __init__(self, step: int, act: Any, only_rank: int = 1) -> None:
        self.step, self.act, self.only_rank = step, act, only_rank

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.global_step == self.step and rank() == self.only_rank:
            self.act(pl_module)


def corrupt(pl_module: Any) -> None:
    layer = sparse_layers(pl_module.model)["model.layers.1.mlp.up_proj"]
    layer.weight_mask[3, 2] ^= 0b11  # still two of four


def overflow(pl_module: Any) -> None:
    weight = pl_module.model.model.layers[1].self_attn.o_proj.weight
    with torch.no_grad():
        getattr(weight, "to_local", lambda: weight)()[0, 0] = torch.inf


def die(pl_module: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def train(engine: str, folder: Path, step: int, act: Any, **settings: Any) -> str:
    """The error that a rank stops with, and the step at which it does."""
    pruning = DynamicPruning("2:4", update_freq=3, window=2, first_mask=FirstWindow())
    trainer = engines.trainer(engine, folder, pruning, AtStep(step, act), **settings)
    try:
        trainer.fit(engines.Module(), engines.loader())
    except ValueError as error:
        return f"{error} @{trainer.global_step}"
    return "no error"


# the last update is at step 9; frozen masks are compared every 3 steps, and at the end
def test_ranks_that_disagree_on_a_mask_all_stop_at_the_next_comparison(tmp_path):
    expected = {("ddp", 6): 8, ("ddp", 9): 12, ("ddp", 11): 12, ("ddp", 12): 12, ("fsdp2", 6): 8}
    cases = [(engine, tmp_path, corrupted, corrupt) for engine, corrupted in expected]
    for messages, found in zip(launch.each(train, cases).values(), expected.values(), strict=True):
        for message in messages:
            assert message.startswith("model.model.layers.1.mlp.up_proj: the masks of the 2 processes are not the same")
            assert message.endswith(f"@{found}")


def test_masks_that_cannot_change_are_compared_too(tmp_path):
    for message in launch.run(train_fixed, tmp_path):
        assert "not the same" in message
        assert message.endswith("@5")


def train_fixed(folder: Path) -> str:
    pruning = DynamicPruning("2:4", update_freq=5, policy=Fixed(), criterion=Magnitude())
    trainer = engines.trainer("ddp", folder, pruning, AtStep(4, corrupt))
    try:
        trainer.fit(engines.Module(), engines.loader())
    except ValueError as error:
        return f"{error} @{trainer.global_step}"
    return "no error"


def test_a_row_that_is_not_finite_stops_the_ranks_that_do_not_hold_it(tmp_path):
    messages = launch.run(train, "fsdp2", tmp_path, 7, overflow)
    # the forward of step 8 would spread the infinity into the activations of later layers, and is named for them
    for message in messages:
        assert "not finite" in message
        assert message.endswith("@8")
    assert messages[0] == messages[1]


def test_a_rank_that_is_killed_is_an_error(tmp_path):
    with pytest.raises(launch.RankFailed, match="rank 1 ended with -9|rank 0"):
        launch.run(train, "ddp", tmp_path, 6, die)


def pruned_otherwise(columns: int) -> str:
    """What is logged of a sharded model whose zeros are whole columns, at the start of a run."""
    model, said = shallow_llama(), io.StringIO()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "proj" in name:
                parameter[:, :columns] = 0
    shard_blocks(model, init_device_mesh("cpu", (world_size(),)))
    handler = logging.StreamHandler(said)
    logging.getLogger("sparse_train").addHandler(handler)
    MaskUpdater(model, "2:4", total_steps=10)
    MaskUpdater(shallow_llama(), "2:4", start_step=4, total_steps=10)
    return said.getvalue()


def test_a_sharded_model_that_was_pruned_otherwise_starts_with_a_warning_of_one_rank(tmp_path):
    first, second = launch.run(pruned_otherwise, 18)
    assert first.count("The model was pruned before") == 1 and not second


def from_zeros_of_other_models() -> str:
    """Why a run does not start with the zeros of a model that only rank 0 has pruned."""
    model = engines.shallow_llama()
    if rank() == 0:
        prune(model, criterion=Magnitude())
    try:
        MaskUpdater(model, "2:4", first_mask=FromZeros(), total_steps=10)
    except ValueError as error:
        return str(error)
    return "no error"


def test_zeros_of_other_models_are_refused_in_every_process():
    first, second = launch.run(from_zeros_of_other_models, timeout=60)
    assert "it has another model" in first and "the model is dense. Prune it first" in second


class Unsharded(engines.Module):
    def configure_model(self) -> None:
        self.model = self.model or shallow_llama()


class OverTheWholeMesh(engines.Module):
    def configure_model(self) -> None:
        if self.model is None:
            self.model = shallow_llama()
            shard_blocks(self.model, self.device_mesh)


def mistaken(folder: Path, module: Any, data_parallel_size: int) -> str:
    sizes = {"data_parallel_size": data_parallel_size, "tensor_parallel_size": world_size() // data_parallel_size}
    trainer = engines.trainer(
        "fsdp2", folder, DynamicPruning("2:4", first_mask=FirstWindow()), strategy=ModelParallelStrategy(**sizes)
    )
    try:
        trainer.fit(module(), engines.loader())
    except ValueError as error:
        return f"{error} @{trainer.global_step}"
    return "no error"


@pytest.mark.parametrize(
    ("module", "data_parallel_size", "message"),
    [
        (Unsharded, 2, "none of the targeted layers is sharded"),
        (OverTheWholeMesh, 2, r"Replicate\(\), Shard\(dim=0\)"),
        (engines.Module, 1, "over 1 of 2 processes.*Set data_parallel_size to the number of processes"),
    ],
    ids=["nothing sharded", "hybrid", "Lightning's own sizes"],
)
def test_other_ways_to_shard_are_refused_before_the_first_step(tmp_path, module, data_parallel_size, message):
    for found in launch.run(mistaken, tmp_path, module, data_parallel_size):
        assert re.search(message, found), found
        assert found.endswith("@0")
