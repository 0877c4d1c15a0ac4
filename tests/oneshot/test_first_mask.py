"""First masks of a run, without a trainer: the same as those of ``prune``, or none."""

import contextlib
import copy
import logging
from functools import partial

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
    StraightThrough,
    Unstructured,
    Wanda,
    prune,
    sparse_layers,
)
from sparse_train.oneshot.first_mask import make_first_mask
from sparse_train.pruning.updater import mask_targets
from tests.conftest import VOCABULARY, tiny_llama


class Root(nn.Module):
    """A model in a module that is trained."""

    def __init__(self, net=None):
        super().__init__()
        self.net = net or tiny_llama()
        self.other = nn.Linear(4, 4)


def begin(root, ids, *args, context=contextlib.nullcontext, layers=None, **settings):
    """A run as the callbacks begin it."""
    config = PruningConfig(*args, **settings)
    layers = layers or mask_targets(root, config)
    making = partial(
        make_first_mask, batches=lambda count: ids and ids[:count], context=context, say=print, progress=False
    )
    return MaskUpdater(root, config=config, layers=layers, total_steps=100, make_first_mask=making)


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
    prune(alone, ids, structure, sparsity, squash=False, **how)
    norms = {name: layer.calibration_norm["sum_squares"].sqrt() for name, layer in sparse_layers(alone).items()}
    updater = begin(root, ids, structure, sparsity, **how)
    assert updater.origin == updater.settings()["first_mask"] == "OneShot(criterion=None, samples=32)"
    expected, found = kept(alone), kept(root.net)
    assert expected.keys() == found.keys()
    assert all(torch.equal(found[name], mask) for name, mask in expected.items())
    # a masked weight that calibration computed once would hide the masks of all later updates
    assert not any("product" in vars(layer) for layer in sparse_layers(root).values())
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
    updater = begin(root, ids, "unstructured", schedule=Cubic(0.6, 0.3), distribution=OWL(owl_m=2.0))
    masks = kept(root.net).values()
    pruned = sum(int((~mask).sum()) for mask in masks) / sum(mask.numel() for mask in masks)
    assert 0 <= pruned - 0.3 < 1 / 32  # rows of 32 prune up to one more
    assert updater.sparsity == pytest.approx(0.3)


def test_a_first_sparsity_that_rounds_to_nothing_is_a_first_mask_all_the_same(ids):
    root = Root()
    updater = begin(root, ids, "2:4", schedule=Cubic(0.5, 0.1), first_mask=OneShot(IHT()))  # 4:4
    assert all(layer.is_dense() for layer in updater.layers.values())
    assert (updater.sparsity, updater.timing.start_step) == (0.1, 0)
    assert all(int(layer.statistics.tokens) for layer in updater.layers.values())


def test_a_solver_also_moves_weights_and_gives_pruned_ones_values_to_come_back_with(ids):
    root, alone, dense = Root(), tiny_llama(), dict(tiny_llama().named_modules())
    updater = begin(root, ids, "2:4", first_mask=OneShot(IHT()))
    prune(alone, ids, "2:4", criterion=IHT())
    pruned = dict(alone.named_modules())
    for name, layer in sparse_layers(root.net).items():
        keep = layer.unpacked_mask()
        assert torch.equal(pruned[name].weight, torch.where(keep, layer.weight, 0))
        assert not torch.equal(layer.weight[keep], dense[name].weight[keep])
        assert not torch.equal(layer.weight[~keep], dense[name].weight[~keep])
    assert updater.sparsity == 0.5


def test_settings_are_checked_before_a_solver_moves_weights(ids):
    root = Root().bfloat16()
    before = copy.deepcopy(root.state_dict())
    with pytest.raises(ValueError, match="srste_decay"):
        begin(root, ids, "2:4", first_mask=OneShot(IHT()), policy=StraightThrough(srste_decay=1e-9))
    with pytest.raises(ValueError, match="end_step"):
        begin(root, ids, "2:4", first_mask=OneShot(IHT()), start_step=0, end_step=-1)
    assert all(torch.equal(root.state_dict()[key], value) for key, value in before.items())


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
    [{"first_mask": FirstWindow()}, {"start_step": 4}, {"schedule": Cubic(0.5)}],
)
def test_where_later_steps_make_the_mask_it_keeps_all_until_then(settings, ids, caplog):
    caplog.set_level(logging.INFO)
    root = Root()
    updater = begin(root, ids, "2:4", **settings)
    assert len(sparse_layers(root)) == 21
    assert all(layer.is_dense() for layer in sparse_layers(root).values())
    assert updater.origin == "made by the first update"
    assert "run dense" not in caplog.text


def test_a_share_of_the_run_that_is_less_than_a_step_is_step_0(ids):
    assert begin(Root(), ids, "2:4", start_step=0.001).sparsity == 0.5


def test_without_activations_the_first_update_makes_the_mask_without_data():
    assert begin(Root(), None, "2:4", criterion=Magnitude()).sparsity == 0.5


def test_existing_masks_stay(ids, caplog):
    caplog.set_level(logging.INFO)
    root = Root()
    prune(root.net, ids, "4:8", squash=False)
    before = kept(root)
    for first_mask in (OneShot(), FirstWindow(), FromZeros(), None):
        assert begin(root, ids, "4:8", first_mask=first_mask).origin == "the model had masks"
    with pytest.raises(
        ValueError, match="those of net.model.layers.0.self_attn.q_proj are not 2:4 at a sparsity of 0.5"
    ):
        begin(root, ids, "2:4")
    with pytest.raises(ValueError, match="the model has masks already"):
        begin(root, ids, "4:8", first_mask=OneShot(Wanda()))
    assert all(torch.equal(mask, before[name]) for name, mask in kept(root).items())
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
    expected = pytest.raises(ValueError, match="first_mask=FirstWindow")
    with contextlib.nullcontext() if criterion is None else expected:
        assert begin(make(), batches, "2:4", first_mask=OneShot(criterion)).origin == "made by the first update"
    assert ("The first steps run dense" in caplog.text) == (criterion is None)


def test_an_error_of_a_batch_is_raised_as_it_is_and_says_where_it_comes_from():
    root = Root(GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=VOCABULARY, n_positions=16)))
    with pytest.raises(IndexError) as caught:  # not another class: a trainer may look for one
        begin(root, [torch.randint(3, VOCABULARY, (2, 17))], "2:4")
    assert "first_mask=FirstWindow()" in caught.value.__notes__[0]
    assert all(layer.is_dense() for layer in sparse_layers(root).values())


def test_a_copy_of_the_model_as_a_reference_stays_dense(ids):
    root = Root()
    layers = mask_targets(root, PruningConfig("2:4"))
    root.reference = copy.deepcopy(root.net).requires_grad_(False)  # with masks that keep all
    begin(root, ids, "2:4", layers=layers)
    assert all(layer.is_dense() for layer in sparse_layers(root.reference).values())
    assert not any(layer.is_dense() for layer in sparse_layers(root.net).values())


def test_a_plain_loop_is_told_that_it_has_to_prune_itself():
    with pytest.raises(ValueError, match=r"in a plain loop, prune the model before the run"):
        MaskUpdater(Root(), "2:4", first_mask=OneShot(IHT()), total_steps=20)
    assert MaskUpdater(Root(), "2:4", total_steps=20).origin == "made by the first update"


def test_outliers_of_a_pruning_that_measured_none_are_none(ids):
    root = Root()
    report = prune(root.net, ids, "unstructured", 0.5, squash=False)
    settings = {"distribution": OWL(owl_m=2.0), "total_steps": 100, "outliers": report.outliers}
    assert MaskUpdater(root, "unstructured", 0.5, **settings).sparsity == 0.5  # divided as the masks are


class Mine(Wanda):
    __repr__ = object.__repr__  # as of a criterion of a user's own, which is no dataclass


def test_where_a_mask_came_from_is_the_same_words_in_each_process(ids):
    first = [begin(Root(), ids, "2:4", first_mask=OneShot(Mine())).origin for _ in range(2)]
    assert first == ["OneShot(criterion=Mine(), samples=32)"] * 2


@pytest.mark.parametrize("structure", ["2:4", "unstructured"])
def test_zeros_that_a_solver_fills_are_told_and_others_not(structure, ids, caplog):
    root = Root()
    prune(root.net, ids, structure, 0.5)
    begin(root, ids, "2:4", first_mask=OneShot(IHT()))
    assert ("zeros that the first masks keep" in caplog.text) == (structure == "unstructured")
