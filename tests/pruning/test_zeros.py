"""Training of a model that was pruned before: its zeros stay, or a warning says that they do not."""

import pytest
import torch

from sparse_train import (
    OWL,
    Cubic,
    FirstWindow,
    Fixed,
    FromZeros,
    Magnitude,
    MaskUpdater,
    SparseGPT,
    StraightThrough,
    Unstructured,
    keep_zeros,
    prune,
    sparse_layers,
    squash,
)
from tests.conftest import VOCABULARY, tiny_llama


def train(model, updater=None, steps=12):
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(steps):
        ids = torch.randint(3, VOCABULARY, (2, 16))
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if updater is not None:
            updater.step()
    squash(model)


def nonzero(model):
    return {name: weight != 0 for name, weight in model.named_parameters() if "proj" in name}


@pytest.mark.parametrize(("structure", "sparsity"), [("2:4", None), ("unstructured", 0.6)])
def test_a_run_starts_with_the_zeros_of_its_model_if_it_is_told_to(ids, structure, sparsity):
    def pruned():
        model = tiny_llama()
        prune(model, ids, structure, sparsity)
        return model

    def run(model, policy):
        updater = MaskUpdater(
            model, structure, sparsity, policy=policy, first_mask=FromZeros(), update_freq=4, total_steps=12
        )
        assert updater.sparsity is not None  # from the first step on, not from the first window on
        masked = {name: layer.unpacked_mask() for name, layer in sparse_layers(model).items()}
        assert all(torch.equal(mask, before[f"{name}.weight"]) for name, mask in masked.items())
        train(model, updater)
        return nonzero(model)

    before = nonzero(pruned())
    assert all(torch.equal(mask, before[name]) for name, mask in run(pruned(), Fixed()).items())
    assert not all(torch.equal(mask, before[name]) for name, mask in run(pruned(), StraightThrough()).items())


def test_the_plan_of_a_run_from_zeros_counts_them_until_it_has_begun(ids):
    model = tiny_llama()
    prune(model, ids, "2:4")
    layers = [name for name in nonzero(model) if "down_proj" in name]
    with torch.no_grad():
        model.get_parameter(layers[0])[:8].zero_()
    zeros, size = sum(int((~m).sum()) for m in nonzero(model).values()), sum(m.numel() for m in nonzero(model).values())
    updater = MaskUpdater(model, "2:4", criterion=Magnitude(), first_mask=FromZeros(), update_freq=4, total_steps=12)
    assert f"{100 * zeros / size:.2f} %" in updater.in_words()
    updater.step()
    assert "%" not in updater.in_words()
    kept = MaskUpdater(tiny_llama(), "2:4", first_mask=FirstWindow(), policy=Fixed(), update_freq=4, total_steps=12)
    assert "masks are made at step 2, and kept" in kept.in_words()


def test_a_run_that_is_refused_leaves_the_layers_plain(ids):
    model = tiny_llama()
    prune(model, ids, "2:4")
    with pytest.raises(ValueError, match="total_steps"):
        MaskUpdater(model, "2:4", first_mask=FromZeros())
    assert not sparse_layers(model)


def test_nothing_is_guessed_from_zeros(ids, caplog):
    model = tiny_llama()
    prune(model, ids, "2:4")
    updater = MaskUpdater(model, "2:4", update_freq=4, total_steps=12)
    assert updater.sparsity is None and all(layer.is_dense() for layer in sparse_layers(model).values())
    assert "50.0 % of its weights are zeros that the first masks keep" in caplog.text
    assert "first_mask=FromZeros()" in caplog.text


def test_zeros_that_do_not_follow_the_pattern_are_no_first_mask(ids, caplog):
    model = tiny_llama()
    prune(model, ids, Unstructured("layer"), 0.5)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"50.0 % of the targeted weights are zeros, but in 21 of 21 layers, such as"):
        MaskUpdater(model, "unstructured", 0.5, first_mask=FromZeros(), total_steps=12)
    assert not sparse_layers(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for structure, settings in (("2:4", {}), ("unstructured", {"sparsity": 0.5, "distribution": OWL()})):
        with pytest.raises(ValueError, match=r"the model is dense\. Prune it first .*, or make .*OneShot\(\)\.$"):
            MaskUpdater(tiny_llama(), structure, first_mask=FromZeros(), total_steps=12, **settings)
    MaskUpdater(tiny_llama(), "2:4", total_steps=12)
    assert not caplog.records


def test_without_a_first_mask_the_model_must_have_one(ids):
    with pytest.raises(ValueError, match="first_mask is None, so the model must have masks already"):
        MaskUpdater(tiny_llama(), "2:4", first_mask=None, total_steps=12)
    model = tiny_llama()
    prune(model, ids, "2:4", squash=False)
    assert MaskUpdater(model, "2:4", first_mask=None, total_steps=12).sparsity == 0.5


@pytest.mark.parametrize(
    ("options", "percent"),
    [
        ({"sparsity": 0.5, "criterion": Magnitude()}, 25),
        ({"sparsity": 0.75, "start_step": 3}, 75),
        ({"schedule": Cubic(0.75)}, 75),
    ],
)
def test_zeros_that_a_run_fills_are_said_to_be_lost(ids, caplog, options, percent):
    model = tiny_llama()
    prune(model, ids, "unstructured", 0.75)
    MaskUpdater(model, "unstructured", policy=Fixed(), update_freq=4, total_steps=12, **options)
    assert f"{percent}.0 % of its weights are zeros that the first masks keep" in caplog.text


@pytest.mark.parametrize("features", [1, 2, 8])
def test_a_narrow_layer_is_not_taken_for_a_pruned_one(features, caplog):
    model = torch.nn.Sequential(torch.nn.Linear(features, 64), torch.nn.Linear(64, 64))
    MaskUpdater(model, "unstructured", 0.1, targets=["Linear"], total_steps=12)
    assert not caplog.records


@pytest.mark.parametrize("pruned", ["by SparseGPT", "within layers"])
def test_zeros_are_kept_wherever_they_are(ids, pruned):
    model = tiny_llama()
    if pruned == "by SparseGPT":
        prune(model, ids, "unstructured", 0.5, criterion=SparseGPT())
    else:
        prune(model, ids, Unstructured("layer"), 0.5)
    before = {name: mask.clone() for name, mask in nonzero(model).items()}
    weights = [parameter.detach().clone() for parameter in model.parameters()]
    assert keep_zeros(model) == pytest.approx(0.5, abs=0.02)
    assert len(sparse_layers(model)) == 21
    train(model)
    assert not sparse_layers(model)
    for name, mask in nonzero(model).items():
        assert not (mask & ~before[name]).any(), name
    assert not all(map(torch.equal, weights, model.parameters()))


def test_what_has_no_zeros_to_keep_is_refused():
    model = tiny_llama()
    with pytest.raises(ValueError, match="No weight of the targeted layers is zero"):
        keep_zeros(model)
    assert not sparse_layers(model)
    prune(model, mask_structure="2:4", criterion=Magnitude(), squash=False)
    with pytest.raises(ValueError, match="has masks already"):
        keep_zeros(model)


def test_a_layer_that_begins_at_zero_was_not_pruned(caplog):
    model = tiny_llama()
    torch.nn.init.zeros_(model.model.layers[2].mlp.down_proj.weight)
    MaskUpdater(model, "2:4", start_step=4, total_steps=12)
    assert not caplog.records


def test_a_layer_that_begins_at_zero_hides_no_zeros_of_others(caplog):
    model = torch.nn.ModuleDict({name: torch.nn.Linear(64, 64) for name in ("a", "b", "last")})
    prune(model, mask_structure="unstructured", sparsity=0.6, criterion=Magnitude())
    torch.nn.init.zeros_(model["b"].weight)
    MaskUpdater(model, "2:4", criterion=Magnitude(), total_steps=12)
    assert "zeros that the first masks keep" in caplog.text
