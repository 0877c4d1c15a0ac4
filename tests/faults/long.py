"""A long run, watched: ``python -m tests.faults.long [STEPS] [PROCESSES]``, masks updated at every step.

It says how memory, objects of Python, open files and threads change with the steps (slope and standard error of a
straight line through the second half, when a process has what it needs), and how far the running norms are from sums
in float64. ``python -m tests.faults.long STEPS PROCESSES dense`` is the same run without the callback.
"""

import gc
import os
import sys
import tempfile
from dataclasses import dataclass, field
from functools import partial
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("DS_ACCELERATOR", "cpu")

import lightning as L
import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from sparse_train import FirstWindow, sparse_layers
from sparse_train.callbacks import DynamicPruning
from sparse_train.distributed.collectives import rank, sum_over_ranks, world_size
from tests.ranks import engines, launch

SAMPLES = 100
"""How often the process is looked at."""


class Module(L.LightningModule):
    """Three layers, of which the first two are pruned; its features have norms that differ by a factor of a hundred."""

    def __init__(self) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(32, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 4))

    def training_step(self, batch: list[Tensor], _: int) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.net(x), y)
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Watch(L.Callback):
    """Looks at the process, and sums what reaches the layers in float64."""

    def __init__(self, steps: int) -> None:
        self.every = max(1, steps // SAMPLES)
        self.rows: list[tuple[float, ...]] = []
        self.sums: dict[str, Tensor] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        gc.collect()
        gc.freeze()  # what is there is not looked at again
        for name, layer in sparse_layers(pl_module).items():
            self.sums[name] = torch.zeros(layer.in_features, dtype=torch.float64)
            layer.register_forward_pre_hook(partial(self._add, name))

    def _add(self, name: str, layer: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        self.sums[name] += inputs[0].detach().double().square().sum(0)

    def on_train_batch_end(self, trainer: L.Trainer, *args: Any) -> None:
        if trainer.global_step % self.every == 0:
            gc.collect()
            pages = int(open("/proc/self/statm").read().split()[1])  # noqa: SIM115
            handles, threads = (len(os.listdir(f"/proc/self/{each}")) for each in ("fd", "task"))
            kib = pages * os.sysconf("SC_PAGE_SIZE") / 1024
            self.rows.append((trainer.global_step, kib, len(gc.get_objects()), handles, threads))


@dataclass
class Found:
    """What a run of one process showed."""

    rows: np.ndarray
    """Step, memory in KiB, objects, open files, threads."""
    drift: float = 0.0
    """The largest relative difference of a running norm from that of the float64 sums; 0 where rank 0 has them."""
    slopes: dict[str, tuple[float, float]] = field(init=False)
    """What a thousand steps add, with its standard error."""

    def __post_init__(self) -> None:
        late = self.rows[len(self.rows) // 2 :]
        x = (late[:, 0] - late[:, 0].mean()) / 1000
        self.slopes = {}
        for name, y in zip(("KiB", "objects", "open files", "threads"), late[:, 1:].T, strict=True):
            slope = (x * y).sum() / (x * x).sum()
            rest = y - y.mean() - slope * x
            self.slopes[name] = float(slope), float(np.sqrt((rest**2).sum() / (len(x) - 2) / (x * x).sum()))


def watched(steps: int, dense: bool = False) -> Found:
    """A run of so many steps in this process, or in those of its group; ``dense``: without the callback."""
    torch.manual_seed(rank())
    x = torch.randn(4096, 32) * torch.logspace(-1, 1, 32)
    loader = DataLoader(TensorDataset(x, torch.randint(4, (len(x),))), batch_size=8)
    torch.manual_seed(0)
    module, watch = Module(), Watch(steps)
    pruning = DynamicPruning("2:4", update_freq=1, end_step=1.0, first_mask=FirstWindow(), squash=False)
    callbacks = [watch] if dense else [pruning, watch]
    with tempfile.TemporaryDirectory() as folder:
        trainer = engines.trainer("ddp" if world_size() > 1 else "one", folder, *callbacks, max_steps=steps)
        trainer.fit(module, loader)
    if dense:
        return Found(np.array(watch.rows))
    assert pruning.updater is not None
    assert pruning.updater.steps == steps
    sum_over_ranks(list(watch.sums.values()))
    norms = {name: layer.statistics.norm_I.double() for name, layer in sparse_layers(module).items()}
    drifts = [float((norms[name] / sums.sqrt() - 1).abs().max()) for name, sums in watch.sums.items()]
    return Found(np.array(watch.rows), max(drifts) if rank() == 0 else 0.0)


def main(steps: str = "20000", processes: str = "1", kind: str = "sparse") -> None:
    run = int(steps), kind == "dense"
    found = [watched(*run)] if processes == "1" else launch.run(watched, *run, ranks=int(processes), timeout=24 * 3600)
    for process, each in enumerate(found):
        slopes = ", ".join(f"{value:.2g} ± {error:.1g} {name}" for name, (value, error) in each.slopes.items())
        print(f"process {process}: {steps} steps; a thousand add {slopes}", flush=True)
    print(f"norms are off by at most {max(each.drift for each in found):.1e}")


if __name__ == "__main__":
    main(*sys.argv[1:])
