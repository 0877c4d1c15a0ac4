"""First masks of a run, without a trainer: the same as those of ``prune``, or none."""

import contextlib
import copy
import logging

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel

from sparse_train import (
    IHT,
    OWL,
    Cubic,
    Explicit,
    FirstWindow,
    FromZeros,
    Magnitude,
    MaskUpdater,
    OneShot,
    PruningConfig,
    Unstructured,
    Wanda,
    prune,
    sparse_layers,
)
from sparse_train.oneshot.first_mask import set_first_mask
from sparse_train.pruning.updater import mask_targets
from tests.conftest import VOCABULARY, tiny_llama


class Root(nn.Module):
    """A model in a module that is trained."""

    def __init__(self, net=None):
        super().__init__()
        self.net = net or tiny_llama()
        self.other = nn.Linear(4, 4)


def begin(root, ids, *args, context=contextlib.nullcontext, **settings):
    config = PruningConfig(*args, **settings)
    layers = mask_targets(root, config)
    return config, set_first_mask(root, layers, config, lambda count: ids[:count], context, False)


def kept(model):
    return {name: layer.unpacked_mask() for name, layer in sparse_layers(model).items()}


CASES = [
    ("2:4", None, {}),
    ("unstructured", 0.6, {"distribution": OWL(owl_m=2.0)}),
    ("unstructured", 0.5, {"distribution": Explicit({"down_proj": 0.25})}),
    (Unstructured("model"), 0.5, {}),
]


@pytest.mark.parametrize(("structure", "sparsity", "how"), CASES, ids=["2:4", "OWL", "by name", "model"])
def test_it_is_that_of_prune_with_its_norms_and_a_run_begins_with_it(structure, sparsity, how, ids):
    root, alone = Root(), tiny_llama()
    config, outliers = begin(root, ids, structure, sparsity, **how)
    report = prune(alone, ids, structure, sparsity, squash=False, **how)
    assert (outliers or {}) == report.outliers
    expected, found = kept(alone), kept(root.net)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], mask) for name, mask in expected.items())
    # a masked weight that calibration computed once would hide the masks of all later updates
    assert not any("product" in vars(layer) for layer in sparse_layers(root).values())
    norms = {name: layer.calibration_norm["sum_squares"].sqrt() for name, layer in sparse_layers(alone).items()}
    MaskUpdater(root, config=config, total_steps=100, outliers=outliers)
    assert all(torch.equal(kept(root.net)[name], mask) for name, mask in expected.items())
    for name, layer in sparse_layers(root.net).items():  # norm_decay is 1
        assert torch.equal(layer.statistics.norm_I, norms[name])
        assert layer.calibration_norm is None  # a second run of these layers has norms of its own


def test_under_the_autocast_of_a_run_it_is_that_of_prune_under_autocast(ids):
    root, alone, plain = Root(), tiny_llama(), tiny_llama()
    begin(root, ids, "2:4", context=lambda: torch.autocast("cpu", torch.bfloat16))
    prune(alone, ids, "2:4", autocast=torch.bfloat16, squash=False)
    prune(plain, ids, "2:4", squash=False)
    found, expected, other = kept(root.net), kept(alone), kept(plain)
    assert all(torch.equal(found[name], mask) for name, mask in expected.items())
    assert any(not torch.equal(found[name], mask) for name, mask in other.items())


def test_on_the_way_to_a_sparsity_layers_have_theirs_in_proportion(ids):
    root = Root()
    config, outliers = begin(root, ids, "unstructured", schedule=Cubic(0.6, 0.3), distribution=OWL(owl_m=2.0))
    assert outliers
    masks = kept(root.net).values()
    pruned = sum(int((~mask).sum()) for mask in masks) / sum(mask.numel() for mask in masks)
    assert 0 <= pruned - 0.3 < 1 / 32  # rows of 32 prune up to one more
    assert MaskUpdater(root, config=config, total_steps=100, outliers=outliers).sparsity == pytest.approx(0.3)


def test_a_solver_also_moves_weights_and_gives_pruned_ones_values_to_come_back_with(ids):
    root, alone, dense = Root(), tiny_llama(), dict(tiny_llama().named_modules())
    config, _ = begin(root, ids, "2:4", first_mask=OneShot(IHT()))
    prune(alone, ids, "2:4", criterion=IHT())
    pruned = dict(alone.named_modules())
    for name, layer in sparse_layers(root.net).items():
        keep = layer.unpacked_mask()
        assert torch.equal(pruned[name].weight, torch.where(keep, layer.weight, 0))
        assert not torch.equal(layer.weight[keep], dense[name].weight[keep])
        assert not torch.equal(layer.weight[~keep], dense[name].weight[~keep])
    assert MaskUpdater(root, config=config, total_steps=100).sparsity == 0.5


def test_weights_that_cannot_move_are_not_solved_for(ids):
    root = Root()
    root.requires_grad_(False)
    with pytest.raises(ValueError, match="q_proj are frozen"):
        begin(root, ids, "2:4", first_mask=OneShot(IHT()))
    assert all(layer.is_dense() for layer in sparse_layers(root).values())


@pytest.mark.parametrize("first_mask", [OneShot(), OneShot(IHT())])
def test_a_failure_leaves_weights_as_they_were_and_masks_that_keep_all(first_mask, ids):
    root = Root()
    root.net.model.layers[1].input_layernorm.weight.data[3] = torch.nan  # found in the second block
    before = copy.deepcopy(root.state_dict())
    with pytest.raises(ValueError, match="not finite"):
        begin(root, ids, "2:4", first_mask=first_mask)
    after = root.state_dict()
    assert all(torch.equal(value.nan_to_num(7), after[key].nan_to_num(7)) for key, value in before.items())
    assert all(layer.is_dense() for layer in sparse_layers(root).values())


@pytest.mark.parametrize(
    "settings",
    [
        {"first_mask": FirstWindow()},
        {"first_mask": FromZeros()},
        {"first_mask": None},
        {"start_step": 4},
        {"criterion": Magnitude()},  # the first update does the same without data
    ],
)
def test_masks_that_are_made_elsewhere_keep_all_here(settings, ids, caplog):
    caplog.set_level(logging.INFO)
    root = Root()
    assert begin(root, ids, "2:4", **settings)[1] is None
    assert len(sparse_layers(root)) == 21
    assert all(layer.is_dense() for layer in sparse_layers(root).values())
    assert "run dense" not in caplog.text


def test_existing_masks_stay(ids, caplog):
    caplog.set_level(logging.INFO)
    root = Root()
    prune(root.net, ids, "4:8", squash=False)
    before = kept(root)
    assert begin(root, ids, "2:4")[1] is None
    assert all(torch.equal(mask, before[name]) for name, mask in kept(root).items())
    with pytest.raises(ValueError, match="the model has masks already"):
        begin(root, ids, "2:4", first_mask=OneShot(Wanda()))
    begin(root, ids, "2:4", first_mask=FirstWindow())
    assert "run dense" not in caplog.text


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))


@pytest.mark.parametrize("criterion", [None, Wanda()])
@pytest.mark.parametrize(("make", "batches"), [(Plain, []), (Root, None)])
def test_without_a_model_or_data_the_first_steps_run_dense_unless_a_criterion_is_given(
    criterion, make, batches, caplog
):
    caplog.set_level(logging.INFO)
    config = PruningConfig("2:4", first_mask=OneShot(criterion))
    root = make()
    layers = mask_targets(root, config)
    assert set_first_mask(root, layers, config, lambda count: batches, contextlib.nullcontext, False) is None
    expected = pytest.raises(ValueError, match="leave the criterion out of OneShot")  # also in a plain loop
    with contextlib.nullcontext() if criterion is None else expected:
        MaskUpdater(root, config=config, layers=layers, total_steps=20)
    assert ("The first steps run dense" in caplog.text) == (criterion is None)


def test_an_error_of_a_batch_is_raised_as_it_is_and_says_where_it_comes_from():
    root = Root(GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=16)))
    with pytest.raises(IndexError) as caught:  # not another class: a trainer may look for one
        begin(root, [torch.randint(3, VOCABULARY, (2, 17))], "2:4")
    assert "first_mask=FirstWindow()" in caught.value.__notes__[0]
    assert all(layer.is_dense() for layer in sparse_layers(root).values())


def test_a_copy_of_the_model_as_a_reference_stays_dense(ids):
    root = Root()
    config = PruningConfig("2:4")
    layers = mask_targets(root, config)
    root.reference = copy.deepcopy(root.net).requires_grad_(False)  # with masks that keep all
    set_first_mask(root, layers, config, lambda count: ids[:count], contextlib.nullcontext, False)
    assert all(layer.is_dense() for layer in sparse_layers(root.reference).values())
    assert not any(layer.is_dense() for layer in sparse_layers(root.net).values())
