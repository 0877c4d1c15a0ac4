"""Kept weights ahead of pruned ones: counts stay exact, and flips are those that clear the margin."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_train import Fixed, Magnitude, MaskUpdater, Unstructured, sparse_layers
from sparse_train.margins import Margin
from sparse_train.patterns import NM
from sparse_train.schedules import Linear

from .conftest import tiny_llama
from .test_contract import PATTERNS
from .test_pruner import assert_exact, train


def groups_of(pattern, mask):
    if isinstance(pattern, NM):
        return mask.reshape(-1, pattern.m)
    return mask if pattern.group == "row" else mask.reshape(1, -1)


@given(
    case=st.sampled_from(PATTERNS),
    hysteresis=st.sampled_from([0.0, 0.01, 0.5, 3.0, float("inf")]),
    seed=st.integers(0, 2**31),
)
def test_counts_are_exact_and_only_flips_that_clear_the_margin_happen(case, hysteresis, seed):
    pattern, sparsity = case
    generator = torch.Generator().manual_seed(seed)
    old = pattern.mask(torch.rand(4, 16, generator=generator), sparsity)
    scores = torch.randint(0, 50, (4, 16), generator=generator).float()  # with ties and zeros
    margin = Margin(hysteresis)
    new = pattern.mask(margin.apply(scores, old), sparsity)
    assert torch.equal(groups_of(pattern, new).sum(1), groups_of(pattern, old).sum(1))
    if hysteresis == 0:
        assert torch.equal(new, pattern.mask(scores, sparsity))
    if hysteresis == float("inf"):
        assert torch.equal(new, old)
    came, went = groups_of(pattern, new & ~old), groups_of(pattern, old & ~new)
    value = groups_of(pattern, scores)
    lowest_that_came = value.masked_fill(~came, torch.inf).min(1).values
    highest_that_went = value.masked_fill(~went, 0).max(1).values
    assert (lowest_that_came >= highest_that_went * (1 + hysteresis) - 1e-5)[came.any(1)].all()


def run(steps=20, **arguments):
    model = tiny_llama()
    updater = MaskUpdater(model, update_freq=4, total_steps=20, **arguments)
    reports = train(model, updater, steps)
    return model.state_dict(), reports


@pytest.mark.parametrize("structure", [{"mask_structure": "2:4"}, {"mask_structure": Unstructured(), "sparsity": 0.6}])
def test_no_hysteresis_is_todays_run_and_more_of_it_is_fewer_flips(structure):
    plain, without = run(**structure), run(**structure, hysteresis=0.0)
    assert all(torch.equal(plain[0][name], value) for name, value in without[0].items())
    flips = [
        sum(report.flip_rate for report in run(**structure, hysteresis=h)[1][1:]) for h in (0.0, 0.1, 1.0, float("inf"))
    ]
    assert flips == sorted(flips, reverse=True)
    assert flips[0] > flips[1] > flips[3] == 0


def test_infinite_hysteresis_loses_what_the_schedule_asks_for_by_score():
    model = tiny_llama()
    arguments = {"criterion": Magnitude(), "update_freq": 2, "total_steps": 20, "end_step": 1.0}
    updater = MaskUpdater(model, "unstructured", schedule=Linear(0.7, 0.3), hysteresis=float("inf"), **arguments)
    layer = sparse_layers(model)["model.layers.0.mlp.up_proj"]
    pruned = ~layer.unpacked_mask()
    for _ in range(10):
        train(model, updater, 1)
        weight = layer.weight.detach().abs()
        train(model, updater, 1)
        now = ~layer.unpacked_mask()
        assert (now | ~pruned).all()
        lost, kept = now & ~pruned, ~now
        assert weight[lost].mean() < weight[kept].mean()
        pruned = now
    assert_exact(model, updater)


def test_the_first_mask_knows_no_margin():
    masks = [run(2, mask_structure="2:4", hysteresis=h)[0] for h in (0.0, 0.3, float("inf"))]
    for name, mask in masks[0].items():
        assert torch.equal(mask, masks[1][name]) and torch.equal(mask, masks[2][name])


@pytest.mark.parametrize("hysteresis", [-0.1, float("nan")])
def test_hysteresis_is_not_negative(hysteresis):
    with pytest.raises(ValueError, match="hysteresis is the share by which kept weights count more"):
        MaskUpdater(tiny_llama(), "2:4", hysteresis=hysteresis, total_steps=20)


def test_a_margin_without_effect_is_refused():
    with pytest.raises(ValueError, match=r"Margin.hysteresis=0.1.* has no effect with Fixed\(\)"):
        MaskUpdater(tiny_llama(), "2:4", policy=Fixed(), hysteresis=0.1, total_steps=20)
