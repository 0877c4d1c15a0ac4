"""Scenarios of two processes over gloo: the defaults on each engine, in one go and resumed."""

from collections.abc import Collection
from pathlib import Path
from tempfile import TemporaryDirectory

import lightning as L
import torch

from tests.golden import api
from tests.golden.models import model
from tests.golden.outcome import Outcome, quiet
from tests.golden.scenarios import STEPS, KeepMasks, Stop
from tests.ranks import engines, launch

NAMES = ["ddp", "ddp, resumed", "fsdp2", "fsdp2, resumed", "zero1", "zero2", "zero3"]


def outcomes(names: Collection[str]) -> dict[str, Outcome]:
    """What these scenarios end with: the masks, which are the same on both ranks, and the whole weights.

    One start of processes runs all of them, because it takes longer than a scenario.
    """
    with TemporaryDirectory() as folder:
        first, second = launch.run(_run, list(names), Path(folder))
    for name, outcome in first.items():
        others = second[name].masks
        assert outcome.masks.keys() == others.keys(), name
        assert all(torch.equal(mask, others[layer]) for layer, mask in outcome.masks.items()), name
    return first


def _run(names: list[str], folder: Path) -> dict[str, Outcome]:
    quiet()
    return {name: _fit(*name.split(", "), folder=folder / name) for name in names}


def _fit(engine: str, resumed: str = "", *, folder: Path) -> Outcome:
    path = folder / "middle.ckpt"
    if not resumed:
        return _train(engine, folder)
    _train(engine, folder, Stop(path))
    return _train(engine, folder, ckpt_path=path)


def _train(engine: str, folder: Path, *callbacks: L.Callback, ckpt_path: Path | None = None) -> Outcome:
    module, keep = engines.Module(model()), KeepMasks()
    torch.manual_seed(api.rank())
    pruning = api.DynamicPruning("2:4", update_freq=3, **api.one_shot())
    trainer = engines.trainer(engine, folder, pruning, *callbacks, keep, max_steps=STEPS)
    trainer.fit(module, engines.loader(), ckpt_path=ckpt_path, weights_only=False)
    return Outcome(keep.masks, api.whole_state_dict(module.model))
