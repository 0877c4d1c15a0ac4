"""Counts under every policy, the decay of shadow values, and policies and criteria of a user's own."""

import copy
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
    MaskPolicy,
    MaskUpdater,
    Regrow,
    StraightThrough,
    Wanda,
    add_mask_lora,
    prune,
    sparse_layers,
    sparsify,
)
from sparse_train.criteria import Criterion
from sparse_train.policies import Optimizers
from sparse_train.pruning.update import Rules, update_masks
from sparse_train.statistics import ActivationNorm
from tests.conftest import VOCABULARY, shallow_llama
from tests.pruning.loops import groups_of, train
from tests.ranks import launch
from tests.test_contract import PATTERNS, POLICIES


@given(policy=st.sampled_from(POLICIES), case=st.sampled_from(PATTERNS), seed=st.integers(0, 2**31))
def test_counts_are_exact_in_every_group_under_every_policy(policy, case, seed):
    pattern, sparsity = case
    torch.manual_seed(seed)
    layer = nn.Linear(16, 8, bias=False)
    sparsify(layer, [layer])
    old = pattern.mask(torch.rand(8, 16), sparsity)
    layer.set_mask(old)
    layer.statistics = ActivationNorm(16)
    layer.statistics.add(torch.randn(5, 16))
    policy = copy.deepcopy(policy)
    policy.begin({"a": layer}, Optimizers(), 1)
    policy.before_step(0.0)
    if isinstance(policy, Regrow):
        policy.gradients = {"a": torch.randn(8, 16)}
    policy.before_update(1)
    update = update_masks({"a": layer}, Rules(Wanda(), pattern, {"a": sparsity}, policy))["a"]
    policy.after_update()
    new = layer.unpacked_mask()
    assert torch.equal(groups_of(pattern, new).sum(1), groups_of(pattern, old).sum(1))
    assert update.flips == int((old ^ new).sum())
    assert update.zeros == int((layer.masked_weight() == 0).sum())
    if policy.regrowth == "never":
        assert torch.equal(new, old)


def shadows(accumulate=1, loss_scale=1.0, clip=None):
    """Shadow values before and after a run at a learning rate of 0, in which nothing but the decay acts on them."""
    model = shallow_llama()
    wrapped = DistributedDataParallel(model) if torch.distributed.is_initialized() else model
    policy = StraightThrough(srste_decay=0.05)
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
    factor = torch.tensor((1 - 0.05) ** 12)
    for name, weight in plain.items():
        expected = torch.where(keep[name], before[name], before[name] * factor)
        torch.testing.assert_close(weight, expected, rtol=1e-6, atol=0)
    others = [shadows(accumulate=3), shadows(loss_scale=1024.0), shadows(clip=1e-3)]
    others += launch.run(shadows)
    for one, other in pairwise([plain, *(found for _, _, found in others)]):
        assert all(torch.equal(weight, other[name]) for name, weight in one.items())


def test_dormant_weights_come_back_as_they_were():
    model = shallow_llama()
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
    model = shallow_llama()
    prune(model, criterion=Magnitude(), squash=False)
    add_mask_lora(model)
    for policy, word in ((Regrow(), "come back"), (StraightThrough(srste_decay=1e-4), "srste_decay to 0")):
        with pytest.raises(ValueError, match=word):
            MaskUpdater(model, "2:4", policy=policy, total_steps=10)
    late = nn.Sequential(nn.Linear(16, 8))
    decay = StraightThrough(srste_decay=0.1)
    updater = MaskUpdater(late, criterion=Magnitude(), policy=decay, targets=["0"], update_freq=1, total_steps=9)
    add_mask_lora(late, MaskLoRA(target_modules=["0"]))
    late(torch.randn(2, 16))
    with pytest.raises(ValueError, match="srste_decay to 0"):
        updater.step()


def test_a_decay_that_rounding_would_undo_is_refused():
    for decay, refused in ((1e-4, True), (3e-4, True), (5e-4, False)):
        policy = StraightThrough(srste_decay=decay)
        with pytest.raises(ValueError, match="lost when .*q_proj is rounded") if refused else nullcontext():
            MaskUpdater(shallow_llama().bfloat16(), "2:4", policy=policy, update_freq=10, total_steps=100)
        MaskUpdater(shallow_llama(), "2:4", policy=policy, update_freq=10, total_steps=100)


def test_frozen_weights_are_not_shrunk_either():
    model = shallow_llama().requires_grad_(False)
    with pytest.raises(ValueError, match="q_proj is frozen, and StraightThrough.* would shrink its pruned weights"):
        MaskUpdater(model, "2:4", policy=StraightThrough(srste_decay=0.1), total_steps=10)
    assert not sparse_layers(model)
    MaskUpdater(model, "2:4", total_steps=10)


# --- of a user's own -------------------------------------------------------------------------------------------------


class Moments(Criterion):
    """The momentum of a weight, as soon as there is some; notes what it has seen."""

    def __init__(self, seen):
        self._seen = seen

    def __repr__(self):
        return "Moments()"

    def scores(self, layer):
        momentum = layer.optimizer_state.get("exp_avg")
        self._seen.append((layer.name, None if momentum is None else momentum.clone()))
        return layer.weight_OI.abs().float() if momentum is None else momentum.abs().float()


class ByMomentum(MaskPolicy):
    """Brings back the weights with the largest gradients in Adam's memory, and counts what it is told."""

    straight_through = True
    regrowth = "by score"

    def __init__(self):
        self.told = []
        self.changed = 0

    def before_step(self, progress):
        self.told.append("step")

    def before_optimizer_step(self, optimizer):
        self.told.append("optimizer")

    def before_update(self, steps):
        self.told.append(f"update after {steps}")
        self.before = {name: layer.weight_mask.clone() for name, layer in self.layers.items()}

    def scores(self, scores_OI, layer):
        variance = layer.optimizer_state.get("exp_avg_sq")
        return scores_OI if variance is None else torch.where(layer.keep_OI, scores_OI, variance.sqrt() * 1e3)

    def after_update(self):
        for name, layer in self.layers.items():
            self.changed += int((self.before[name] != layer.weight_mask).sum())

    def state_dict(self):
        return {"changed": self.changed}

    def load_state_dict(self, state):
        self.changed = state["changed"]


def test_a_policy_of_a_users_own_is_told_everything_and_resumes():
    model, given = shallow_llama(), ByMomentum()
    settings = {"policy": given, "criterion": Magnitude(), "update_freq": 2, "total_steps": 8, "end_step": 6}
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    updater = MaskUpdater(model, "2:4", optimizers=[optimizer], **settings)
    for _ in range(2):
        ids = torch.randint(3, VOCABULARY, (2, 16))
        model(input_ids=ids, labels=ids).loss.backward()
        updater.before_optimizer_step(optimizer)
        optimizer.step()
        before = {name: layer.unpacked_mask() for name, layer in updater.layers.items()}
        updater.step()
    own = updater.policy
    assert own.told == ["update after 0", "step", "optimizer", "step", "optimizer", "update after 2", "step"]
    assert own.changed > 0 and own is not given and given.told == []  # a run works on its own copy
    for name, layer in updater.layers.items():
        scores = torch.where(before[name], layer.weight.abs(), optimizer.state[layer.weight]["exp_avg_sq"].sqrt() * 1e3)
        assert torch.equal(layer.unpacked_mask(), updater.config.pattern.mask(scores.detach(), 0.5))
    resumed = MaskUpdater(model, "2:4", **settings, state=updater.state_dict())
    assert resumed.policy.changed == own.changed


def test_a_criterion_sees_what_the_optimizer_remembers():
    model, seen = shallow_llama(), []
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    settings = {"criterion": Moments(seen), "update_freq": 2, "total_steps": 8}
    updater = MaskUpdater(model, "2:4", optimizers=[optimizer], **settings)
    train(model, updater, 2, optimizer)
    first, second = seen[:14], seen[14:]
    assert all(momentum is None for _, momentum in first) and len(second) == 14
    for name, momentum in second:
        layer = updater.layers[name]
        assert torch.equal(momentum, optimizer.state[layer.weight]["exp_avg"])
        assert torch.equal(layer.unpacked_mask(), updater.config.pattern.mask(momentum.abs(), 0.5))
