"""Counts under every policy; the decay of shadow values, and that nothing but steps decides how much of it there is."""

from contextlib import nullcontext
from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sparse_train import (
    Dormant,
    Magnitude,
    MaskLoRA,
    MaskUpdater,
    Regrow,
    StraightThrough,
    Wanda,
    add_mask_lora,
    prune,
    sparse_layers,
    sparsify,
)
from sparse_train.pipeline.choice import Rules
from sparse_train.pipeline.margins import Margin
from sparse_train.pipeline.pruner import update_masks
from sparse_train.pipeline.regrow import Growth
from sparse_train.statistics.activations import HalvedNorm
from tests.conftest import VOCABULARY, tiny_llama
from tests.pipeline.test_margins import groups_of
from tests.ranks import launch
from tests.test_contract import PATTERNS, POLICIES


@given(
    policy=st.sampled_from(POLICIES),
    case=st.sampled_from(PATTERNS),
    margin=st.sampled_from([Margin(), Margin(0.3), Margin(0.1, 2.0), Margin(float("inf"))]),
    seed=st.integers(0, 2**31),
)
def test_counts_are_exact_in_every_group_under_every_policy(policy, case, margin, seed):
    pattern, sparsity = case
    torch.manual_seed(seed)
    layer = nn.Linear(16, 8, bias=False)
    sparsify(layer, [layer])
    old = pattern.mask(torch.rand(8, 16), sparsity)
    layer.set_mask(old)
    layer.statistics = HalvedNorm(16)
    for _ in range(2):
        layer.statistics.add(torch.randn(5, 16))
        layer.statistics.turn()
    growth = None
    if isinstance(policy, Regrow):
        growth = Growth({"a": layer}, policy, Wanda())
        growth.request_gradients(0.0)
        growth.gradients = {"a": torch.randn(8, 16)}
    rules = Rules(Wanda(), pattern, sparsity, policy, shadow_factor=0.9, margin=margin, growth=growth)
    update = update_masks({"a": layer}, rules, compare_halves=True)["a"]
    new = layer.unpacked_mask()
    assert torch.equal(groups_of(pattern, new).sum(1), groups_of(pattern, old).sum(1))
    assert update.flips == int((old ^ new).sum())
    assert 0 <= update.agreed_flips <= update.flips
    if policy.comes_back == "never":
        assert torch.equal(new, old)


def rate(policy, progress):
    return 1 - policy.shadow_decay(progress, 1)


def test_the_rate_ramps_up_stays_and_is_annealed():
    policy = StraightThrough(srste_decay=0.2, ramp=0.25, anneal=0.5)
    expected = {0: 0.0, 0.125: 0.1, 0.25: 0.2, 0.4: 0.2, 0.5: 0.2, 0.75: 0.1, 1: 0.0}
    for progress, value in expected.items():
        assert rate(policy, progress) == pytest.approx(value)
    assert policy.shadow_decay(0.75, 10) == pytest.approx(0.9**10)


def test_without_anneal_the_rate_stays():
    assert [rate(StraightThrough(0.2), progress) for progress in (0.5, 0.9, 1.0)] == pytest.approx([0.2] * 3)
    assert rate(StraightThrough(0.2, ramp=0.0), 0.0) == pytest.approx(0.2)


def test_a_ramp_that_meets_the_fall_is_a_triangle():
    policy = StraightThrough(0.2, ramp=0.5, anneal=0.5)
    values = [rate(policy, step / 8) for step in range(9)]
    assert values == pytest.approx([0, 0.05, 0.1, 0.15, 0.2, 0.15, 0.1, 0.05, 0])


@pytest.mark.parametrize("anneal", [0.4, 1.1, -1.0])
def test_the_fall_comes_behind_the_ramp(anneal):
    with pytest.raises(ValueError, match=r"from ramp \(0.5\) to 1 \(never\), got"):
        StraightThrough(0.1, anneal=anneal)


def shadows(accumulate=1, loss_scale=1.0, clip=None):
    """Shadow values before and after a run at a learning rate of 0, in which nothing but the decay acts on them."""
    model = tiny_llama()
    wrapped = DistributedDataParallel(model) if torch.distributed.is_initialized() else model
    policy = StraightThrough(srste_decay=0.05, ramp=0.5, anneal=0.75)
    updater = MaskUpdater(
        model, "2:4", criterion=Magnitude(), policy=policy, update_freq=4, end_step=12, total_steps=12
    )
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    before = {name: layer.weight.detach().clone() for name, layer in sparse_layers(model).items()}
    keep = {name: layer.unpacked_mask() for name, layer in sparse_layers(model).items()}
    for _ in range(12):
        for _ in range(accumulate):
            batch = torch.randint(3, VOCABULARY, (2, 8))
            (wrapped(input_ids=batch, labels=batch).loss * loss_scale).backward()
        if clip is not None:
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        updater.step()
    return before, keep, {name: layer.weight.detach() for name, layer in sparse_layers(model).items()}


def test_decay_knows_nothing_of_accumulation_loss_scale_clipping_and_ranks():
    before, keep, plain = shadows()
    # updates after 4, 8 and 12 of 12 steps: at 2/3 of the ramp, between ramp and fall, and at the end of the fall
    factor = torch.tensor((1 - 0.05 * 2 / 3) ** 4 * (1 - 0.05) ** 4)
    for name, weight in plain.items():
        expected = torch.where(keep[name], before[name], before[name] * factor)
        torch.testing.assert_close(weight, expected, rtol=1e-6, atol=0)
    others = [shadows(accumulate=3), shadows(loss_scale=1024.0), shadows(clip=1e-3)]
    others += launch.run(shadows)
    for one, other in pairwise([plain, *(found for _, _, found in others)]):
        assert all(torch.equal(weight, other[name]) for name, weight in one.items())


def test_dormant_weights_come_back_as_they_were():
    model = tiny_llama()
    start = {name: layer.weight.detach().clone() for name, layer in model.named_modules() if name.endswith("proj")}
    updater = MaskUpdater(model, "2:4", policy=Dormant(), update_freq=3, total_steps=12, criterion=Magnitude())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.3)
    always_pruned = {name: ~layer.unpacked_mask() for name, layer in updater.layers.items()}
    back = 0
    for _ in range(12):
        batch = torch.randint(3, VOCABULARY, (2, 16))
        model(input_ids=batch, labels=batch).loss.backward()
        for layer in updater.layers.values():
            assert not layer.weight.grad[~layer.unpacked_mask()].any()
        optimizer.step()
        optimizer.zero_grad()
        updater.step()
        for name, layer in updater.layers.items():
            returned = always_pruned[name] & layer.unpacked_mask()
            always_pruned[name] &= ~returned
            back += int(returned.sum())
            assert torch.equal(layer.weight[returned], start[name][returned])
            assert torch.equal(layer.weight[always_pruned[name]], start[name][always_pruned[name]])
    assert back > 0


def test_policies_that_write_weights_are_refused_where_adapters_keep_them():
    model = tiny_llama()
    prune(model, criterion=Magnitude(), squash=False)
    add_mask_lora(model)
    for policy, word in ((Regrow(), "come back"), (StraightThrough(srste_decay=1e-4), "srste_decay to 0")):
        with pytest.raises(ValueError, match=word):
            MaskUpdater(model, "2:4", policy=policy, total_steps=10)
    late = nn.Sequential(nn.Linear(16, 8))
    decay = StraightThrough(srste_decay=0.1, ramp=0)
    updater = MaskUpdater(late, criterion=Magnitude(), policy=decay, targets=["0"], update_freq=1, total_steps=9)
    add_mask_lora(late, MaskLoRA(target_modules=["0"]))
    late(torch.randn(2, 16))
    with pytest.raises(ValueError, match="srste_decay to 0"):
        updater.step()


def test_a_decay_that_rounding_would_undo_is_refused():
    for decay, refused in ((1e-4, True), (3e-4, True), (5e-4, False)):
        policy = StraightThrough(srste_decay=decay)
        with pytest.raises(ValueError, match="lost when .*q_proj is rounded") if refused else nullcontext():
            MaskUpdater(tiny_llama().bfloat16(), "2:4", policy=policy, update_freq=10, total_steps=100)
        MaskUpdater(tiny_llama(), "2:4", policy=policy, update_freq=10, total_steps=100)


def test_frozen_weights_are_not_shrunk_either():
    model = tiny_llama().requires_grad_(False)
    with pytest.raises(ValueError, match="q_proj is frozen, and StraightThrough.* would shrink its pruned weights"):
        MaskUpdater(model, "2:4", policy=StraightThrough(srste_decay=0.1), total_steps=10)
    assert not sparse_layers(model)
    MaskUpdater(model, "2:4", total_steps=10)
