"""Kept weights ahead of pruned ones: counts stay exact, and flips are those that clear the margin."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from sparse_train import (
    Fixed,
    Magnitude,
    MaskUpdater,
    StraightThrough,
    Unstructured,
    UpdateReport,
    Wanda,
    sparse_layers,
    sparsify,
)
from sparse_train.patterns import NM
from sparse_train.pipeline.choice import Rules
from sparse_train.pipeline.margins import Margin, standard_error
from sparse_train.pipeline.pruner import update_masks
from sparse_train.pipeline.schedules import Linear
from sparse_train.statistics.activations import ActivationNorm, HalvedNorm
from tests.conftest import tiny_llama
from tests.pipeline.loops import assert_exact, train
from tests.reference import row_mask
from tests.test_contract import PATTERNS


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
    new = pattern.mask(margin.apply(scores, old, None), sparsity)
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


@given(
    case=st.sampled_from(PATTERNS), errors=st.sampled_from([0.1, 1.0, 5.0, float("inf")]), seed=st.integers(0, 2**31)
)
def test_a_flip_needs_scores_whose_errors_do_not_overlap(case, errors, seed):
    pattern, sparsity = case
    generator = torch.Generator().manual_seed(seed)
    old = pattern.mask(torch.rand(4, 16, generator=generator), sparsity)
    scores, error = torch.rand(2, 4, 16, generator=generator)
    new = pattern.mask(Margin(noise_margin=errors).apply(scores, old, error / 10), sparsity)
    assert torch.equal(groups_of(pattern, new).sum(1), groups_of(pattern, old).sum(1))
    if errors == float("inf"):
        assert torch.equal(new, old)
        return
    came, went = groups_of(pattern, new & ~old), groups_of(pattern, old & ~new)
    lowest = groups_of(pattern, scores - errors * error / 10).masked_fill(~came, torch.inf).min(1).values
    highest = groups_of(pattern, scores + errors * error / 10).masked_fill(~went, 0).max(1).values
    assert (lowest >= highest - 1e-6)[came.any(1)].all()
    assert torch.equal(Margin(noise_margin=errors).apply(scores, old, None) > -torch.inf, old)  # nothing is known


def halved(*windows):
    """Statistics of float64 inputs (T, I), of which each goes to the other half."""
    norm = HalvedNorm(windows[0].shape[1])
    for x in windows:
        norm.add(x)
        norm.turn()
    return norm


def test_halves_are_disjoint_and_together_the_whole():
    first, second, third = (torch.randn(tokens, 6).double() for tokens in (5, 9, 2))
    norm, whole = halved(first, second, third), ActivationNorm(6)
    whole.add(torch.cat([first, second, third]))
    torch.testing.assert_close(norm.sum_squares_I, whole.sum_squares_I)
    assert int(norm.tokens) == int(whole.tokens) == 16
    by_tokens = {int(half.tokens): half.sum_squares_I for half in norm.halves}
    torch.testing.assert_close(by_tokens[9], second.square().sum(0).float())
    torch.testing.assert_close(by_tokens[7], torch.cat([first, third]).square().sum(0).float())
    alone = [norm.alone(index) for index in (0, 1)]
    assert [int(each.tokens) for each in alone] == [16, 16]
    own = next(each for each, half in zip(alone, norm.halves, strict=True) if int(half.tokens) == 9)
    torch.testing.assert_close(own.sum_squares_I, second.square().mean(0).float() * 16)
    twice = HalvedNorm(6)
    for _ in range(2):
        twice.merge_state_dict(norm.state_dict())
    assert all(torch.equal(a * 2, b) for a, b in zip(norm.tensors(), twice.tensors(), strict=True))
    norm.reset()
    assert int(norm.tokens) == 0
    assert not norm.sum_squares_I.any()


def test_the_error_of_a_score_is_that_of_repeated_windows():
    # 4000 features of one distribution are 4000 repetitions of one window, of halves of 60 and 40 tokens
    torch.manual_seed(0)
    x = torch.randn(100, 4000).double() * torch.rand(100, 1).double()
    weight = torch.full((1, 4000), -2.0)
    stats = halved(x[:60], x[60:])
    found = standard_error(Wanda(), weight, stats)[0].double()
    halves = [2 * x[:60].square().mean(0).mul(100).sqrt(), 2 * x[60:].square().mean(0).mul(100).sqrt()]
    torch.testing.assert_close(found, (halves[0] - halves[1]).abs() * (60 * 40) ** 0.5 / 100, rtol=1e-3, atol=1e-4)
    iid = torch.randn(100, 4000).double()
    found = standard_error(Wanda(), weight, halved(iid[:60], iid[60:]))[0].double()
    spread = (2 * iid.square().sum(0).sqrt()).std()
    assert float(found.square().mean().sqrt()) == pytest.approx(float(spread), rel=0.05)
    assert standard_error(Wanda(), weight, halved(x)) is None


def test_agreement_is_counted_on_masks_of_either_half():
    layer = torch.nn.Linear(64, 32, bias=False)
    sparsify(layer, [layer])
    first, second = torch.randn(2, 6, 64)
    layer.statistics = halved(first.double(), second.double())
    weight = layer.weight.detach().abs()
    old = row_mask(torch.rand(32, 64), 0.5)
    layer.set_mask(old)
    update = update_masks({"a": layer}, Rules(Wanda(), Unstructured(), 0.5, StraightThrough()), compare_halves=True)[
        "a"
    ]
    new = row_mask(weight * torch.cat([first, second]).square().sum(0).sqrt(), 0.5)
    ones = [row_mask(weight * x.square().sum(0).sqrt(), 0.5) for x in (first, second)]
    assert torch.equal(layer.unpacked_mask(), new)
    agreed = (new != old) & (ones[0] != old) & (ones[1] != old)
    assert 0 < update.agreed_flips == int(agreed.sum()) < update.flips
    report = UpdateReport(1, 0.5, {"a": update}, 0.0, 0.0)
    assert report.flip_agreement == int(agreed.sum()) / int((new != old).sum())


def test_odd_and_even_steps_of_a_window_are_its_halves():
    model = tiny_llama()
    updater = MaskUpdater(model, "2:4", update_freq=8, window=7, noise_margin=1.0, total_steps=20)
    train(model, updater, 3)
    for layer in updater.layers.values():
        assert sorted(int(half.tokens) for half in layer.statistics.halves) == [32, 64]


@pytest.mark.parametrize("memory", [0.0, 0.5])
def test_noise_margins_and_agreement_in_a_run(memory):
    flips = []
    for errors in (0.0, 2.0, float("inf")):
        reports = run(mask_structure="2:4", noise_margin=errors, flip_agreement=True, memory=memory)[1]
        assert [report.step for report in reports] == [2, 6, 10, 14, 15]
        assert reports[0].flip_agreement is None  # there was no mask to flip
        if errors < float("inf"):
            # of the one step before the last update there are no halves; with memory there are those of before
            assert [report.flip_agreement is None for report in reports[1:]] == [False] * 3 + [memory == 0]
            assert all(0 < report.flip_agreement <= 1 for report in reports[1:4])
        flips.append(sum(report.flip_rate for report in reports[1:]))
    assert flips[0] > flips[1] > flips[2] == 0


def test_halves_that_there_are_not_are_refused():
    for arguments, message in (
        ({"noise_margin": -1.0}, "noise_margin is a number of standard errors"),
        ({"noise_margin": 1.0, "window": 1}, "compare the odd and the even steps of a window, which is 1 step long"),
        ({"noise_margin": 1.0, "memory": "frozen"}, 'with memory="frozen" none are recorded'),
        ({"flip_agreement": True, "criterion": Magnitude()}, r"flip_agreement compares .* Magnitude\(\) reads none"),
    ):
        with pytest.raises(ValueError, match=message):
            MaskUpdater(tiny_llama(), "2:4", total_steps=20, **arguments)


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


@pytest.mark.parametrize("hysteresis", [0.5, 1.0, 3.0])
def test_hysteresis_keeps_what_is_kept_whatever_the_sign_of_scores(hysteresis):
    scores = torch.tensor([[2.0, 1.0, 0.0, -1.0, -2.0, -torch.inf]])
    kept = Margin(hysteresis).apply(scores, torch.ones(1, 6, dtype=torch.bool), None)
    more = 1 + hysteresis
    assert kept.tolist() == [pytest.approx([2 * more, more, 0.0, -1 / more, -2 / more, -torch.inf])]
    assert (kept >= scores).all() and kept.tolist() == [sorted(kept.tolist()[0], reverse=True)]  # ahead, in their order
    assert torch.equal(Margin(hysteresis).apply(scores, torch.zeros(1, 6, dtype=torch.bool), None), scores)
