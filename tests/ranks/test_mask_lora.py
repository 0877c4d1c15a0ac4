"""Adapters inside masks where several processes train: the same in all under DDP, refused where weights are divided."""

from pathlib import Path

import torch

from sparse_train import MaskLoRA
from sparse_train.callbacks import DynamicPruning
from sparse_train.distributed.collectives import rank
from tests.ranks import engines, launch

ENGINES = ("ddp", "fsdp2", "zero2", "zero3")


def train(engine: str, folder: Path) -> dict[str, torch.Tensor] | str:
    torch.manual_seed(rank())  # each process draws an A of its own, and must get the first one's
    pruning = DynamicPruning("2:4", update_freq=4, mask_lora=MaskLoRA(r=4))
    try:
        module = engines.Module()
        engines.trainer(engine, folder, pruning, max_steps=6).fit(module, engines.loader())
    except ValueError as error:
        return str(error)
    return module.model.state_dict()


def test_ddp_trains_one_model_and_engines_that_divide_parameters_are_refused(tmp_path):
    (first, second), *refused = launch.each(train, [(engine, tmp_path) for engine in ENGINES]).values()
    assert first.keys() == second.keys()
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    weight = first["model.layers.0.self_attn.q_proj.weight"]
    assert ((weight.reshape(-1, 4) != 0).sum(1) == 2).all()
    assert not any("mask" in name for name in first)
    for messages in refused:
        for message in messages:
            assert "has a mask_lora adapter, and its parameters are divided" in message
            assert "with DDP" in message
