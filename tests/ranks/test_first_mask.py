"""A first mask from a solver, where several processes train."""

from pathlib import Path
from typing import Any

import lightning as L
import torch

from sparse_train import IHT, OneShot, sparse_layers
from sparse_train.callbacks import DynamicPruning
from sparse_train.distributed.collectives import rank
from tests.conftest import shallow_llama
from tests.ranks import engines, launch


class _RoundsByRank(IHT):
    """As on processes whose hardware rounds otherwise."""

    def solve(self, *args: Any) -> tuple[torch.Tensor, torch.Tensor]:
        weight_OI, mask_OI = super().solve(*args)
        return weight_OI * (1 + 1e-3 * rank()), mask_OI


class Start(L.Callback):
    """The masks and weights of the first step."""

    def on_train_batch_start(self, trainer: L.Trainer, pl_module: L.LightningModule, *args: Any) -> None:
        if trainer.global_step == 0:
            layers = sparse_layers(pl_module.model)  # type: ignore[arg-type]
            self.found = {
                name: (layer.unpacked_mask(), layer.weight_OI.detach().clone()) for name, layer in layers.items()
            }


def start(engine: str, folder: Path) -> Any:
    """What the run starts with, or the error with which it does not."""
    pruning = DynamicPruning("2:4", first_mask=OneShot(_RoundsByRank(), samples=16))
    seen = Start()
    try:
        engines.trainer(engine, folder, seen, pruning, max_steps=1).fit(engines.Module(), engines.loader())
    except ValueError as error:
        return str(error)
    return seen.found


REFUSED = {
    "zero1": "DeepSpeed would bring the old ones back",
    "zero3": "no one-shot pruning",
    "fsdp2": "is not sharded",
}


def test_both_processes_start_with_the_same_weights_or_are_refused(tmp_path):
    (one, two), *others = launch.each(start, [(engine, tmp_path) for engine in ("ddp", *REFUSED)]).values()
    assert one.keys() == two.keys()
    assert len(one) == 14
    dense = dict(shallow_llama().named_modules())
    for name, (mask_OI, weight_OI) in one.items():
        assert not torch.equal(weight_OI[mask_OI], dense[name].weight[mask_OI])
        assert (mask_OI.reshape(-1, 4).sum(1) == 2).all()
        assert torch.equal(mask_OI, two[name][0])
        assert torch.equal(weight_OI, two[name][1])
    for found, message in zip(others, REFUSED.values(), strict=True):
        assert all(message in each for each in found)
