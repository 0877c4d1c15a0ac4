"""Layers of different sparsities in a Lightning run."""

import pytest
import torch

from sparse_train import (
    OWL,
    Cubic,
    Explicit,
    FirstWindow,
    OneShot,
    prune,
    sparse_layers,
)
from sparse_train.callbacks import DynamicPruning
from sparse_train.oneshot.batches import random_batches
from tests.callbacks.runs import InInit, Interrupt, Tokens, loader, trainer
from tests.callbacks.test_first_mask import Start
from tests.conftest import shallow_llama

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")

BY_NAME = Explicit({"net.model.layers.0": 0.3, "layers.1.mlp.down_proj": 0.5})  # names in the LightningModule


def pruning(distribution=None, **settings):
    given = {"sparsity": 0.6, "update_freq": 4, "window": 3, "end_step": 100} | settings
    return DynamicPruning("unstructured", distribution=distribution or OWL(owl_m=2), **given)


def zeros(model):
    return {n: int((m.weight == 0).sum()) for n, m in model.named_modules() if n.endswith("proj")}


def test_the_first_mask_is_that_of_one_shot_pruning_and_its_counts_stay(tmp_path):
    start, model, callback = Start(), InInit(), pruning()
    trainer(tmp_path, start, callback).fit(model, loader())
    oneshot = shallow_llama()
    prune(oneshot, random_batches(Tokens(), 2, None, 32), "unstructured", 0.6, distribution=OWL(owl_m=2))
    for name, mask_OI in start.masks.items():
        assert torch.equal(dict(oneshot.named_modules())[name].weight != 0, mask_OI)
    assert zeros(model.net) == zeros(oneshot)
    assert any((dict(model.net.named_modules())[n].weight != 0).ne(mask).any() for n, mask in start.masks.items())


def test_a_gradual_run_ends_at_what_the_outliers_say(tmp_path):
    """Not at what the rounded first masks say, of which rows have one pruned weight or two."""
    model, callback = InInit(), pruning(sparsity=None, schedule=Cubic(0.6, init_sparsity=0.05), end_step=10)
    trainer(tmp_path, callback, max_steps=14).fit(model, loader())
    found = {name.removeprefix("net."): share for name, share in callback.updater._division.final_sparsities.items()}
    oneshot = shallow_llama()
    report = prune(oneshot, random_batches(Tokens(), 2, None, 32), "unstructured", 0.6, distribution=OWL(owl_m=2))
    blocks = [found[f"model.layers.{block}.self_attn.q_proj"] for block in range(2)]
    assert sorted(blocks, reverse=True) == [
        share for _, share in sorted(zip(report.outliers.values(), blocks, strict=True))
    ]
    assert max(blocks) - min(blocks) == pytest.approx(2 * 0.08)  # owl_lmbda
    rows = {name: module.out_features for name, module in oneshot.named_modules() if name.endswith("proj")}
    ours, theirs = zeros(model.net), zeros(oneshot)
    assert all(abs(ours[name] - theirs[name]) <= rows[name] for name in rows)  # the last count is rounding


@pytest.mark.parametrize("first_mask", [OneShot(), FirstWindow()], ids=["calibrated", "from a window"])
def test_names_are_those_of_the_module(tmp_path, first_mask):
    model = InInit()
    trainer(tmp_path, pruning(BY_NAME, sparsity=0.5, first_mask=first_mask)).fit(model, loader())
    found = zeros(model.net)
    assert found["model.layers.0.mlp.up_proj"] == 10 * 64  # 0.3 of 32
    assert found["model.layers.1.mlp.down_proj"] == 32 * 32
    size = sum(module.weight.numel() for name, module in model.net.named_modules() if name in found)
    assert 0 <= sum(found.values()) / size - 0.5 < 1 / 32


@pytest.mark.parametrize(
    ("schedule", "first_mask", "at"),
    [
        (None, FirstWindow(), 2),
        (Cubic(0.6, init_sparsity=0.2), OneShot(), 6),
    ],
)
def test_a_resumed_run_equals_the_uninterrupted_one(tmp_path, schedule, first_mask, at):
    def callback():
        given = {"sparsity": None, "schedule": schedule, "end_step": 10} if schedule else {}
        return pruning(first_mask=first_mask, squash=False, **given)

    whole, resumed, path = InInit(), InInit(), tmp_path / "middle.ckpt"
    trainer(tmp_path, callback(), max_steps=14).fit(whole, loader())
    with pytest.raises(SystemExit):
        trainer(tmp_path, callback(), Interrupt(at, path), max_steps=14).fit(InInit(), loader())
    trainer(tmp_path, callback(), max_steps=14).fit(resumed, loader(), ckpt_path=path, weights_only=False)
    ours, theirs = whole.state_dict(), resumed.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    layers = sparse_layers(whole.net)
    assert len({(~layers[f"model.layers.{b}.self_attn.q_proj"].unpacked_mask()).sum().item() for b in range(2)}) > 1
