"""A run in which layers have different sparsities: what each has, that it keeps it, and where it comes from."""

import itertools
from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from sparse_train import (
    OWL,
    Cubic,
    Explicit,
    Fixed,
    FromZeros,
    Linear,
    Magnitude,
    MaskUpdater,
    Pattern,
    Schedule,
    StraightThrough,
    Uniform,
    Unstructured,
    prune,
    sparse_layers,
    sparsify,
    squash,
)
from sparse_train.distributions import Division
from sparse_train.pruning.counts import mask_sparsities
from sparse_train.pruning.update import shapes_of
from tests.conftest import VOCABULARY, tiny_llama
from tests.distributions.test_owl import papers_outlier_ratio, papers_sparsities

EXPLICIT = Explicit({"down_proj": 0.25, "re:model.layers.1.self_attn": 0.5})
SHAPES = [(3, 7), (5, 7), (4, 20), (6, 12)]


def layers_of(shapes=SHAPES):
    model = nn.ModuleDict({f"layer{i}": nn.Linear(columns, rows) for i, (rows, columns) in enumerate(shapes)})
    sparsify(model, model.values())
    return model, sparse_layers(model)


def pruned_by_row(layer):
    """The number of pruned weights in each row, which is the same in all."""
    counts = (~layer.unpacked_mask()).sum(1)
    assert (counts == counts[0]).all()
    return int(counts[0])


def train(model, steps=12, seed=3, **settings):
    updater = MaskUpdater(model, "unstructured", total_steps=steps, update_freq=2, end_step=steps - 2, **settings)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    generator, pruned = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        ids = torch.randint(3, VOCABULARY, (2, 16), generator=generator)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if updater.step() is not None:
            pruned.append({name: layer.unpacked_mask() for name, layer in updater.layers.items()})
    return updater, pruned


def division(model, layers, distribution, pattern, final):
    return Division(distribution, shapes_of(model, layers), pattern, final)


def test_uniform_is_one_number():
    model, layers = layers_of()
    assert set(division(model, layers, divides("uniform"), Unstructured(), 0.6).at(0.3).values()) == {0.3}


def divides(what):
    values = {"layer0": 0.9, "layer1": 0.1, "layer2": 0.55}
    return Uniform() if what == "uniform" else Explicit(values)


def test_by_hand():
    model, layers = layers_of([(2, 10), (2, 10), (1, 40)])
    by_layer = division(model, layers, Explicit({"layer0": 0.8, "layer1": 0.2}), Unstructured(), 0.5)
    assert by_layer.final_sparsities == pytest.approx({"layer0": 0.8, "layer1": 0.2, "layer2": 0.5})
    count = {name: int(value * layers[name].in_features) for name, value in by_layer.at(0.5).items()}
    assert count == {"layer0": 8, "layer1": 2, "layer2": 20}
    count = {name: int(value * layers[name].in_features) for name, value in by_layer.at(0.25).items()}
    assert count == {"layer0": 4, "layer1": 1, "layer2": 10}
    count = {name: int(value * layers[name].in_features) for name, value in by_layer.at(0.26).items()}
    assert count == {"layer0": 5, "layer1": 2, "layer2": 11}


@given(steps=st.lists(st.floats(0, 0.6), min_size=1, max_size=6))
def test_a_rising_sparsity_makes_no_layer_denser_and_is_met(steps):
    model, layers = layers_of()
    by_layer = division(model, layers, divides("by name"), Unstructured(), 0.6)
    size = sum(layer.size for layer in layers.values())
    before = dict.fromkeys(layers, 0)
    for sparsity in [*sorted(steps), 0.6]:
        now = {name: int(value * layers[name].in_features) for name, value in by_layer.at(sparsity).items()}
        assert all(now[name] >= before[name] for name in layers)
        zeros = sum(now[name] * layer.out_features for name, layer in layers.items())
        assert -1e-4 <= zeros - sparsity * size < sum(layer.out_features for layer in layers.values())
        before = now


def test_more_than_everything_is_refused():
    model, layers = layers_of()
    by_layer = division(model, layers, divides("by name"), Unstructured(), 0.6)
    with pytest.raises(ValueError, match=r"The final sparsity, 0\.6, is what is divided: 0\.7 must not be above it"):
        by_layer.at(0.7)


@pytest.mark.parametrize("group", ["row", "layer"])
def test_read_from_masks_it_is_what_they_have(group):
    named, _ = layers_of()
    model = nn.ModuleList(nn.ModuleDict({name: layer}) for name, layer in named.items())
    layers = sparse_layers(model)  # in decoder blocks, as OWL wants them
    pattern, distribution = Unstructured(group), divides("by name")
    made = division(model, layers, distribution, pattern, 0.6)
    for name, layer in layers.items():
        layer.set_mask(pattern.mask(torch.rand(layer.out_features, layer.in_features), made.at(0.6)[name]))
    read = division(model, layers, OWL(), pattern, 0.6)
    read.take_from_masks(mask_sparsities(layers, pattern), 0.6)
    assert read.at(0.6) == made.at(0.6)
    other = division(model, layers, OWL(), pattern, 0.6)
    with pytest.raises(ValueError, match=r"at a sparsity of 0\.\d+, and this run starts at 0\.4"):
        other.take_from_masks(mask_sparsities(layers, pattern), 0.4)
    rising = division(model, layers, OWL(), pattern, 0.9)
    with pytest.raises(ValueError, match=r"starts at 0\.6 and ends at 0\.9\. Start at the final sparsity"):
        rising.take_from_masks(mask_sparsities(layers, pattern), 0.6)
    assert not rising.known


# --- In a run --------------------------------------------------------------------------------------------------------


def test_layers_keep_their_own_sparsities(ids):
    model = tiny_llama()
    updater, masks = train(model, sparsity=0.6, distribution=EXPLICIT, criterion=Magnitude())
    shapes = shapes_of(model, updater.layers)
    wanted = Division(EXPLICIT, shapes, Unstructured(), 0.6).at(0.6)
    assert len(masks) == 5
    for each in masks:
        assert {n: int((~mask).sum(1)[0]) for n, mask in each.items()} == {
            n: int(share * updater.layers[n].in_features) for n, share in wanted.items()
        }
    assert any(not torch.equal(masks[0][name], masks[-1][name]) for name in masks[0])
    squash(model)
    down = model.model.layers[2].mlp.down_proj.weight
    assert int((down == 0).sum()) == 16 * len(down)


def test_owl_divides_by_the_outliers_of_the_first_window():
    """The paper's code, in float64, on inputs that a hook has seen."""
    model, inputs = tiny_llama(), {}

    def see(name):
        return lambda module, args: inputs.setdefault(name, []).append(args[0].detach().double().reshape(-1, 32))

    hidden = {n: m for n, m in model.named_modules() if n.endswith(("q_proj", "gate_proj"))}
    for name, module in hidden.items():
        module.register_forward_pre_hook(see(name))
    before = {name: module.weight for name, module in hidden.items()}
    targets = ["re:.*(q_proj|gate_proj)"]
    distribution = OWL(owl_m=2, owl_lmbda=0.1)
    updater = MaskUpdater(
        model, "unstructured", 0.6, distribution=distribution, targets=targets, window=1, total_steps=9
    )
    ids = torch.randint(3, VOCABULARY, (2, 16))
    model(input_ids=ids, labels=ids).loss.backward()
    assert updater.step() is not None
    ratios = []
    for block in range(3):
        own = [name for name in hidden if name.startswith(f"model.layers.{block}.")]
        norms = [torch.cat(inputs[name]).pow(2).sum(0).sqrt() for name in own]
        scores = [before[n].detach().double().abs() * norm for n, norm in zip(own, norms, strict=True)]
        ratios.append(papers_outlier_ratio(scores, 2))
    wanted = papers_sparsities(ratios, 0.6, 0.1)
    assert len(set(ratios)) == 3
    found = [1 - pruned_by_row(updater.layers[f"model.layers.{b}.self_attn.q_proj"]) / 32 for b in range(3)]
    np.testing.assert_allclose(found, 1 - wanted, atol=1 / 32)
    exact = [updater._division.final_sparsities[f"model.layers.{block}.self_attn.q_proj"] for block in range(3)]
    np.testing.assert_allclose(exact, wanted, atol=1e-9)


@pytest.mark.parametrize("squashed", [False, True], ids=["masks", "zeros"])
def test_a_model_that_owl_has_pruned_keeps_its_sparsities(ids, squashed):
    model = tiny_llama()
    prune(model, ids, "unstructured", 0.6, distribution=OWL(owl_m=2), squash=squashed)
    dense = {name: module for name, module in model.named_modules() if name.endswith("proj")}
    zeros = {
        name: int((~each.unpacked_mask() if name in sparse_layers(model) else each.weight == 0).sum())
        for name, each in dense.items()
    }
    first = {"first_mask": FromZeros()} if squashed else {}
    updater, masks = train(model, sparsity=0.6, distribution=OWL(owl_m=2), **first)
    assert len({zeros[f"model.layers.{block}.self_attn.q_proj"] for block in range(3)}) == 3
    assert {name: int((~mask).sum()) for name, mask in masks[-1].items()} == zeros
    assert any(not torch.equal(masks[0][name], masks[-1][name]) for name in masks[0])
    assert updater.sparsity == 0.6


def test_without_the_distribution_such_masks_are_refused(ids):
    model = tiny_llama()
    prune(model, ids, "unstructured", 0.6, distribution=OWL(owl_m=2), squash=False)
    with pytest.raises(ValueError, match="if layers are to differ, give it the distribution, too"):
        MaskUpdater(model, "unstructured", 0.6, total_steps=10)


def test_zeros_of_another_sparsity_are_not_the_first_masks(ids):
    model = tiny_llama()
    prune(model, ids, "unstructured", 0.7, distribution=OWL(owl_m=2))
    settings = {"distribution": OWL(owl_m=2), "first_mask": FromZeros(), "total_steps": 10}
    with pytest.raises(ValueError, match=r"at a sparsity of 0\.\d+, and this run starts at 0\.6"):
        MaskUpdater(model, "unstructured", 0.6, **settings)
    assert not sparse_layers(model)


@pytest.mark.parametrize(
    ("distribution", "policy", "init_sparsity", "start_step"),
    [
        (OWL(owl_m=2), StraightThrough(), 0.1, 2),
        (OWL(owl_m=2), Fixed(), 0.0, 4),
        (EXPLICIT, StraightThrough(), 0.0, 4),
        (EXPLICIT, Fixed(), 0.0, 0),
    ],
)
def test_a_gradual_run_reaches_the_sparsities_in_proportion(distribution, policy, init_sparsity, start_step):
    model = tiny_llama()
    schedule = Cubic(0.6, init_sparsity=init_sparsity)
    updater, masks = train(
        model, steps=20, schedule=schedule, distribution=distribution, policy=policy, start_step=start_step
    )
    assert len(masks) in (8, 9)
    counts = [{name: int((~mask).sum()) for name, mask in each.items()} for each in masks]
    for earlier, later in itertools.pairwise(counts):
        assert all(later[name] >= earlier[name] for name in earlier)
    if policy == Fixed():
        for earlier, later in itertools.pairwise(masks):
            assert all(not (later[name] & ~earlier[name]).any() for name in earlier)
    size = sum(mask.numel() for mask in masks[0].values())
    assert 0 <= sum(counts[-1].values()) / size - 0.6 < 1 / 32  # of 32 inputs or more, rows prune up to one more
    last = {name: count / masks[0][name].numel() for name, count in counts[-1].items()}
    exact = updater._division.final_sparsities
    assert all(abs(last[name] - exact[name]) <= 1.01 / masks[0][name].shape[1] for name in last)
    assert len({round(share, 3) for share in exact.values()}) > 1


@dataclass(frozen=True)
class Straight(Schedule):
    """A schedule of one's own, which is asked for nothing beyond the last update."""

    def sparsity(self, progress):
        return 0.3 + 0.3 * progress


def test_the_end_of_a_schedule_of_ones_own_is_divided():
    _, own = train(tiny_llama(), schedule=Straight(), distribution=EXPLICIT, criterion=Magnitude())
    _, linear = train(
        tiny_llama(), schedule=Linear(0.6, init_sparsity=0.3), distribution=EXPLICIT, criterion=Magnitude()
    )
    for found, wanted in zip(own, linear, strict=True):
        assert all(torch.equal(mask, wanted[name]) for name, mask in found.items())


class ByRow(Pattern):
    """A pattern of one's own, which rounds as it likes."""

    def mask(self, scores_OI, sparsity):
        return Unstructured().mask(scores_OI, sparsity)


def test_a_pattern_of_ones_own_rounds_as_it_likes(ids):
    model, whole = tiny_llama(), tiny_llama()
    report = prune(model, ids, ByRow(), 0.55, distribution=OWL(owl_m=2), squash=False)
    before = {name: pruned_by_row(layer) for name, layer in sparse_layers(model).items()}
    exact = OWL(owl_m=2).sparsities(shapes_of(model, sparse_layers(model)), 0.55, report.outliers)
    assert before == {name: int(share * sparse_layers(model)[name].in_features) for name, share in exact.items()}
    updater = MaskUpdater(model, ByRow(), 0.55, distribution=OWL(owl_m=2), total_steps=9)  # reads the masks
    assert {name: int(updater.layers[name].in_features * s) for name, s in updater._division.at(0.55).items()} == before
    assert len(report.outliers) == 3 and not prune(whole, ids, "unstructured", 0.5).outliers


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mask_structure": "2:4", "distribution": OWL()}, "2:4 has one sparsity, 0.5, in every layer"),
        ({"criterion": Magnitude(), "distribution": OWL()}, r"OWL\(.*\) reads activations, and Magnitude\(\) does not"),
        ({"distribution": Explicit({"nose": 0.1})}, "'nose' is not the name of a targeted layer"),
        ({"distribution": OWL}, r"distribution is an object such as Uniform\(\), got .* Write OWL\(\)"),
        ({"mask_structure": Unstructured("model"), "distribution": OWL()}, "compares over the whole model"),
    ],
)
def test_what_cannot_be_divided_is_refused(settings, message):
    model = tiny_llama()
    sparsity = None if settings.get("mask_structure") == "2:4" else 0.6
    with pytest.raises(ValueError, match=message):
        MaskUpdater(model, **({"mask_structure": "unstructured", "sparsity": sparsity, "total_steps": 9} | settings))
    assert not sparse_layers(model)


def test_owl_in_a_model_without_blocks_is_refused_before_the_first_step():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    with pytest.raises(ValueError, match="OWL compares decoder blocks, but no targeted layer is in one"):
        MaskUpdater(model, "unstructured", 0.5, distribution=OWL(), total_steps=9)
    assert not sparse_layers(model)


def test_outliers_that_are_given_are_not_measured_again():
    model, outliers = tiny_llama(), {0: 0.3, 1: 0.2, 2: 0.1}
    updater = MaskUpdater(model, "unstructured", 0.6, distribution=OWL(), outliers=outliers, window=1, total_steps=9)
    ids = torch.randint(3, VOCABULARY, (2, 16))
    model(input_ids=ids, labels=ids).loss.backward()
    updater.step()
    found = [updater._division.final_sparsities[f"model.layers.{block}.mlp.up_proj"] for block in range(3)]
    assert found == pytest.approx([0.52, 0.6, 0.68])
