"""What users combine with an engine: precision, accumulation, clipping, checkpointing, how modules are built.

In each run sparsity is exact after every step, and statistics hold each token once.
"""

import logging
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from torch import nn

from sparse_train import FirstWindow, MaskUpdater, StraightThrough, sparse_layers, squash
from sparse_train.callbacks import DynamicPruning
from sparse_train.distributed.collectives import rank, world_size
from sparse_train.distributed.engines import whole_state_dict
from sparse_train.distributed.fsdp2 import shard_blocks
from sparse_train.models.causal_lm import CausalLM
from tests.conftest import shallow_llama
from tests.ranks import engines, launch

TOKENS = 2 * 16  # of a micro-batch


class Check(L.Callback):
    """Looks at every layer after every step, and counts tokens in the middle of a window."""

    def __init__(self, pruning: DynamicPruning) -> None:
        self.pruning = pruning
        self.kept: set[int] = set()
        self.tokens: set[int] = set()
        self.dtypes: set[torch.dtype] = set()

    def on_train_batch_end(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        step = trainer.global_step
        if step >= 3:
            assert self.pruning.updater.report().sparsity == 0.5
            for layer in sparse_layers(pl_module).values():
                self.kept |= set(layer.unpacked_mask().view(-1, 4).sum(1).tolist())
                self.dtypes.add(layer.weight.dtype)
        if step == 6 and not self.tokens:
            state = self.pruning.updater.state_dict()["norms"]["norms_by_rank"][rank()]
            self.tokens |= {int(each["tokens"]) for each in state.values()}


def train(engine: str, folder: Path, module: Any, accumulate: int = 1, **settings: Any) -> Any:
    pruning = DynamicPruning("2:4", update_freq=4, window=3, end_step=7, first_mask=FirstWindow(), norm_decay=0.0)
    check = Check(pruning)
    settings = {"max_steps": 8, "accumulate_grad_batches": accumulate} | settings
    trainer = engines.trainer(engine, folder, pruning, check, **settings)
    trainer.fit(module, engines.loader())
    zeros = [
        (int((weight == 0).sum()), weight.numel(), str(weight.dtype))
        for name, weight in whole_state_dict(module).items()
        if "proj" in name and name.endswith("weight")
    ]
    return check.kept, check.tokens, check.dtypes, zeros


def small_lm(folder: Path, checkpointing: bool) -> CausalLM:
    return CausalLM(str(folder), lr=1e-3, weight_decay=0.1, gradient_checkpointing=checkpointing)


def train_lm(engine: str, folder: Path, model: Path, precision: str, checkpointing: bool = True) -> Any:
    lm = small_lm(model, checkpointing)
    return train(engine, folder, lm, accumulate=2, precision=precision, gradient_clip_val=0.5)


PRECISIONS = [("ddp", "bf16-mixed"), ("fsdp2", "bf16-mixed"), ("fsdp2", "bf16-true")]
PRECISIONS += [("zero2", "bf16-mixed"), ("zero3", "bf16-true")]


@pytest.fixture(scope="module")
def in_precision(tmp_path_factory, model_folder):
    folder = tmp_path_factory.mktemp("runs")
    cases = [(engine, folder, model_folder, precision) for engine, precision in PRECISIONS]
    return dict(zip(PRECISIONS, launch.each(train_lm, cases).values(), strict=True))


@pytest.mark.parametrize(("engine", "precision"), PRECISIONS)
def test_precision_accumulation_clipping_and_checkpointing(in_precision, engine, precision):
    for kept, tokens, dtypes, zeros in in_precision[engine, precision]:
        assert kept == {2}
        # two whole steps of two micro-batches, and not one more for the batch of step 6 that is to come
        assert tokens == {2 * 2 * TOKENS}
        masters_apart = engine.startswith("zero") and precision != "32-true"  # DeepSpeed's parameters are bfloat16
        assert dtypes == {torch.bfloat16 if masters_apart or precision == "bf16-true" else torch.float32}
        assert all(2 * count == size for count, size, _ in zeros)


class Net(nn.Module):
    """Plain layers that all can initialise themselves."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(128, 32)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)) for _ in range(2))
        self.head = nn.Linear(32, 128)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


class Plain(L.LightningModule):
    """Builds its layers in ``__init__`` or in ``configure_model``, there on the meta device or under zero.Init."""

    def __init__(self, where: str) -> None:
        super().__init__()
        self.where = where
        self.net = Net() if where == "__init__" else None

    def configure_model(self) -> None:
        if self.net is None:
            with torch.device("meta" if self.where == "meta" else "cpu"):
                self.net = Net()
            if self.device_mesh is not None:
                shard_blocks(self.net, self.device_mesh["data_parallel"])

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return nn.functional.cross_entropy(self.net(batch["input_ids"]).flatten(0, 1), batch["labels"].flatten())

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def train_plain(engine: str, folder: Path, where: str) -> Any:
    module = Plain(where)
    found = train(engine, folder, module)
    return found[0], found[1]


BUILT = [("ddp", "__init__"), ("zero3", "__init__"), ("zero3", "configure_model"), ("fsdp2", "meta")]


def test_modules_from_anywhere(tmp_path):
    found = launch.each(train_plain, [(engine, tmp_path, where) for engine, where in BUILT])
    for case, results in found.items():
        assert results == [({2}, {2 * TOKENS})] * 2, case


def plain_loop() -> Any:
    """A model that is sharded already, and no Lightning."""
    model = shallow_llama()
    shard_blocks(model, torch.distributed.init_device_mesh("cpu", (world_size(),)))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    updater = MaskUpdater(model, "2:4", update_freq=4, total_steps=12)
    assert all(layer.layout.is_sharded for layer in updater.layers.values())
    flips = []
    for batch, _ in zip(engines.loader(), range(12), strict=False):
        model(**batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if report := updater.step():
            flips.append(report.flip_rate)
            assert report.sparsity == 0.5  # zeros of all processes
            with updater.layers["model.layers.0.mlp.up_proj"].read(by_rows=True) as (own, rows):
                assert own.shape == (32, 32)
                assert rows == slice(32 * rank(), 32 * rank() + 32)
    squash(model)
    counted = [w.full_tensor() for name, w in model.named_parameters() if "proj" in name]
    return flips, [int((w == 0).sum()) / w.numel() for w in counted]


def test_a_model_that_is_sharded_already_in_a_plain_loop():
    for flips, sparsities in launch.run(plain_loop):
        assert flips[0] == 0.5
        assert all(0 < flip < 0.5 for flip in flips[1:])
        assert set(sparsities) == {0.5}


def train_alone(engine: str, folder: Path) -> float:
    """Nothing but DynamicPruning looks at the model: share of zeros that a fit leaves."""
    module = engines.Module()
    pruning = DynamicPruning("2:4", update_freq=5, first_mask=FirstWindow())
    engines.trainer(engine, folder, pruning, max_steps=8).fit(module, engines.loader())
    found = [w for name, w in whole_state_dict(module.model).items() if "proj" in name]
    return sum(int((w == 0).sum()) for w in found) / max(1, sum(w.numel() for w in found))


def test_a_fit_leaves_zeros_whoever_looks(tmp_path):
    found = launch.each(train_alone, [(engine, tmp_path) for engine in ("fsdp2", "zero2", "zero3")])
    for case, results in found.items():
        assert results[0] == 0.5, case  # ZeRO-3 keeps all of so small a model gathered


class InRoot(Plain):
    """Its targets are in FSDP2's root group, which stays gathered after an evaluation."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.net(batch["input_ids"])


def train_root(folder: Path) -> float:
    module = InRoot("configure_model")
    pruning = DynamicPruning(
        "2:4", update_freq=2, targets=["net.head"], first_mask=FirstWindow(), policy=StraightThrough(srste_decay=0.3)
    )
    trainer = engines.trainer("fsdp2", folder, pruning, max_steps=8, val_check_interval=1, limit_val_batches=1)
    trainer.fit(module, engines.loader(), engines.loader())
    return float((whole_state_dict(module.net).get("head.weight", torch.zeros(1)) == 0).float().mean())


def test_zeros_reach_the_shards_of_a_group_that_is_gathered(tmp_path):
    assert launch.run(train_root, tmp_path)[0] == 0.5


def odd_shapes() -> list[float]:
    """Rows that do not divide, a last process without any, and masks of no whole words."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 10), nn.Linear(10, 64), nn.Linear(64, 1), nn.Linear(1, 5))
    torch.distributed.fsdp.fully_shard(model, mesh=torch.distributed.init_device_mesh("cpu", (world_size(),)))
    updater = MaskUpdater(model, "unstructured", sparsity=0.5, targets=["0", "1", "2"], update_freq=2, total_steps=6)
    for _ in range(6):
        model(torch.randn(7, 12)).sum().backward()
        updater.step()
    squash(model)
    return [int((layer.weight.full_tensor() == 0).sum()) / layer.weight.numel() for layer in model[:3]]


def test_any_shape_can_be_sharded():
    assert launch.run(odd_shapes) == [[0.5, 0.5, 0.5]] * 2


class Tied(Plain):
    """Its loss reads the weight of one layer also beside the layer's forward."""

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        first = self.net.blocks[0][0]
        hidden = first(self.net.embed(batch["input_ids"]))
        return super().training_step(batch, batch_idx) + nn.functional.linear(hidden, first.weight.t()).square().mean()


def warnings_of(engine: str, folder: Path, kind: type[Plain]) -> list[str]:
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())
    logging.getLogger("sparse_train").addHandler(handler)
    pruning = DynamicPruning("2:4", update_freq=2, first_mask=FirstWindow())
    engines.trainer(engine, folder, pruning, max_steps=2).fit(kind("__init__"), engines.loader())
    logging.getLogger("sparse_train").removeHandler(handler)
    return [each for each in found if "beside their forward" in each]


def test_a_weight_that_is_also_read_beside_its_layer_is_named_once(tmp_path):
    cases = [(engine, tmp_path, kind) for engine in ("ddp", "zero2") for kind in (Tied, Plain)]
    for (engine, _, kind), (first, second) in launch.each(warnings_of, cases).items():
        assert len(first) == (kind is Tied), engine
        assert kind is Plain or ("such as net.blocks.0.0," in first[0] and "1 targets" in first[0])
        assert not second
