"""What docs/scaling.md says about traffic and memory, counted in runs of two processes."""

import sys
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from sparse_train import FirstWindow, StraightThrough, Unstructured, sparse_layers
from sparse_train.callbacks import DynamicPruning
from sparse_train.distributed import collectives
from tests.ranks import engines, launch

ROOT = Path(__file__).parent.parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import scaling  # noqa: E402

BLOCK = scaling.llama_block(32, 64, 16)
BLOCKS = 2
UPDATES = 4  # at steps 2, 5, 8 and 9


class Counting:
    """Stands in for torch.distributed in sparse_train.distributed, and counts what goes through."""

    def __init__(self) -> None:
        self.reduces: list[int] = []
        self.gathers: list[int] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(torch.distributed, name)

    def all_reduce(self, tensor: torch.Tensor) -> None:
        self.reduces.append(tensor.nbytes)
        torch.distributed.all_reduce(tensor)

    def all_gather_into_tensor(self, output: torch.Tensor, tensor: torch.Tensor) -> None:
        self.gathers.append(tensor.nbytes)
        torch.distributed.all_gather_into_tensor(output, tensor)


class Gathers(L.Callback):
    """Counts gathers of ZeRO-3 at updates: of how many weights at once."""

    def __init__(self) -> None:
        self.sizes: list[int] = []

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        from deepspeed.runtime import zero

        real, sizes = zero.GatheredParameters, self.sizes

        def counted(parameters: Any, *args: Any, **kwargs: Any) -> Any:
            sizes.append(len(parameters))
            return real(parameters, *args, **kwargs)

        zero.GatheredParameters = counted


class Keep(L.Callback):
    """Bytes that layers and updater keep, at the end of training."""

    def __init__(self, pruning: DynamicPruning) -> None:
        self.pruning = pruning
        self.kept: dict[str, int] = {}

    def on_train_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        layers = sparse_layers(pl_module).values()
        self.kept = {
            "masks": sum(layer.weight_mask.nbytes for layer in layers),
            "statistics": sum(tensor.nbytes for layer in layers for tensor in layer.statistics.tensors()),
            "rows of the first mask": sum(
                rows.nbytes for rows in self.pruning.updater.state_dict()["first_rows"].values()
            ),
        }


def run(engine: str, folder: Path, **arguments: Any) -> Any:
    counting, gathers = Counting(), Gathers()
    collectives.dist = counting
    arguments = {"mask_structure": "2:4"} | arguments
    pruning = DynamicPruning(update_freq=3, window=2, end_step=9, first_mask=FirstWindow(), **arguments)
    keep = Keep(pruning)
    callbacks = [gathers, pruning, keep] if engine == "zero3" else [pruning, keep]
    engines.trainer(engine, folder, *callbacks).fit(engines.Module(), engines.loader())
    return counting.reduces, counting.gathers, gathers.sizes, keep.kept


@pytest.mark.parametrize("engine", ["ddp", "fsdp2", "zero3"])
def test_traffic_and_memory_are_what_the_formulas_say(tmp_path, engine):
    layers = BLOCKS * len(BLOCK)
    for reduces, gathers, sizes, kept in launch.run(run, engine, tmp_path):
        # FSDP2 counts zeros once, when training begins, to see if the model was pruned, and what each process has
        # chosen at updates; masks that are frozen are compared every k steps, here at step 12 and at the end
        fsdp2, agreement = engine == "fsdp2", [8 * 32 * layers] * 2
        counts = [8 * 2 * layers] if fsdp2 else []
        assert reduces == [8 * layers] * fsdp2 + [*scaling.reduce_bytes(BLOCK, BLOCKS), *counts] * UPDATES + agreement
        assert len(gathers) == fsdp2 * layers * UPDATES
        assert sum(gathers) == fsdp2 * scaling.gather_bytes(BLOCK, BLOCKS, 2) * UPDATES
        assert sizes == ([1] * layers * (1 + UPDATES) if engine == "zero3" else [])  # once at the start, as above
        assert kept == scaling.kept_bytes(BLOCK, BLOCKS)


def test_groups_larger_than_a_row_gather_no_bits(tmp_path):
    for _, gathers, _, _ in launch.run(run, "fsdp2", tmp_path, mask_structure=Unstructured("layer"), sparsity=0.5):
        assert gathers == []


class InUpdates(DynamicPruning):
    """Counts all reduces there are in updates, DeepSpeed's with them."""

    reduces = 0

    def on_train_start(self, *args: Any) -> None:
        super().on_train_start(*args)
        update, real = self.updater.update, torch.distributed.all_reduce

        def counted(*arguments: Any, **settings: Any) -> Any:
            self.reduces += 1
            return real(*arguments, **settings)

        def watched() -> Any:
            torch.distributed.all_reduce = counted
            try:
                return update()
            finally:
                torch.distributed.all_reduce = real

        self.updater.update = watched


def decaying(engine: str, folder: Path) -> int:
    pruning = InUpdates(
        "2:4", update_freq=3, window=2, first_mask=FirstWindow(), policy=StraightThrough(srste_decay=0.01)
    )
    engines.trainer(engine, folder, pruning).fit(engines.Module(), engines.loader())
    return pruning.reduces


def test_masters_are_rewritten_where_they_are(tmp_path):
    assert launch.run(decaying, "zero2", tmp_path) == [3 * UPDATES, 3 * UPDATES]  # masks, floats, integers


class Calls(L.Callback):
    """Counts what gloo is asked for in the steps from one to another, by whomever."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last = first, last
        self.profiler = profile(activities=[ProfilerActivity.CPU])
        self.found: dict[str, int] = {}

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.global_step == self.first:
            self.profiler.start()
        if trainer.global_step == self.last:
            self.profiler.stop()
            events = self.profiler.key_averages()
            self.found = {event.key: event.count for event in events if event.key.startswith("gloo:")}


def calls(engine: str, folder: Path, first: int, last: int, *callbacks: L.Callback) -> dict[str, int]:
    counted = Calls(first, last)
    trainer = engines.trainer(engine, folder, *callbacks, counted, max_steps=8)
    trainer.fit(engines.Module(), engines.loader())
    return counted.found


def with_and_without(engine: str, folder: Path, first: int, last: int) -> Any:
    pruning = DynamicPruning("2:4", update_freq=5, window=4, end_step=8, first_mask=FirstWindow())
    return calls(engine, folder, first, last, pruning), calls(engine, folder, first, last)


@pytest.mark.parametrize("engine", ["ddp", "fsdp2"])
def test_nothing_is_sent_between_updates(tmp_path, engine):
    for sparse, dense in launch.run(with_and_without, engine, tmp_path, 4, 7):  # in which steps are recorded
        assert sum(dense.values()) >= 3  # the engine's own are seen
        assert sparse == dense


def test_the_page_shows_what_the_formulas_give():
    page = (ROOT / "docs" / "scaling.md").read_text()
    assert page.partition(scaling.BEGIN)[2].partition(scaling.END)[0].strip() == scaling.tables().strip()


def test_about_0_13_byte_a_weight():
    for setup in scaling.SETUPS:
        assert sum(scaling.kept_bytes(setup.layers, setup.blocks).values()) / setup.weights <= 0.127
    smollm2 = scaling.llama_block(576, 1536, 192)
    assert sum(scaling.kept_bytes(smollm2, 30).values()) / (30 * sum(layer.size for layer in smollm2)) <= 0.132
