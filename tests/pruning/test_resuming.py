"""``MaskUpdater`` on masks that are there: its own of before, one-shot pruning's, and those of other runs."""

import copy
import io

import numpy as np
import pytest
import torch

from sparse_train import (
    Dormant,
    Fixed,
    Magnitude,
    MaskUpdater,
    Unstructured,
    add_mask_lora,
    prune,
    sparse_layers,
    sparsify_like,
    squash,
)
from sparse_train.schedules import Linear
from tests.conftest import VOCABULARY, shallow_llama
from tests.pruning.loops import equal, snapshot, train


def test_interrupted_equals_uninterrupted(caplog):
    def fresh(state=None):
        model = shallow_llama()
        updater = MaskUpdater(model, "2:4", update_freq=4, total_steps=20, state=state)
        return model, updater, torch.optim.AdamW(model.parameters(), lr=3e-3)

    model, updater, optimizer = fresh()
    train(model, updater, 5, optimizer, seed=1)
    middle = copy.deepcopy((model.state_dict(), updater.state_dict(), optimizer.state_dict()))  # in a window
    assert any(int(s["tokens"]) for s in middle[1]["norms"]["norms_by_rank"][0].values())
    train(model, updater, 9, optimizer, seed=2)
    other, resumed, second = fresh(middle[1])
    assert "Masks freeze" not in caplog.text  # as it says of a longer run
    other.load_state_dict(middle[0])
    second.load_state_dict(middle[2])
    reports = train(other, resumed, 9, second, seed=2)
    assert reports[0].step == 6
    for (name, a), (_, b) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    assert resumed.state_dict()["first_rows"].keys() == updater.state_dict()["first_rows"].keys()


def test_an_interrupted_loop_with_mask_lora_goes_on():
    model = shallow_llama()
    updater = MaskUpdater(model, "2:4", update_freq=4, total_steps=20)
    optimizer = torch.optim.AdamW(add_mask_lora(model), lr=3e-3)
    train(model, updater, 5, optimizer, seed=1)
    saved = copy.deepcopy((model.state_dict(), updater.state_dict(), optimizer.state_dict()))
    train(model, updater, 9, optimizer, seed=2)

    other = shallow_llama()
    sparsify_like(other, saved[0])
    resumed = MaskUpdater(other, "2:4", update_freq=4, total_steps=20, state=saved[1])
    other.load_state_dict(saved[0])
    second = torch.optim.AdamW(add_mask_lora(other), lr=3e-3)
    second.load_state_dict(saved[2])
    train(other, resumed, 9, second, seed=2)
    for (name, a), (_, b) in zip(model.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_an_updater_that_fails_leaves_another_ones_layers_alone():
    model = shallow_llama()
    first = MaskUpdater(model, "2:4", criterion=Magnitude(), targets=["re:.*q_proj"], total_steps=20)
    weight = model.model.layers[0].self_attn.q_proj.weight.clone()
    with pytest.raises(ValueError, match="whose length is not known"):
        MaskUpdater(model, "2:4", targets=["re:.*k_proj"])
    state = first.state_dict()
    with pytest.raises(ValueError, match="update_freq = 10, and this run has 5"):
        MaskUpdater(model, "2:4", criterion=Magnitude(), targets=["re:.*q_proj"], update_freq=5, state=state)
    first.step()
    assert sparse_layers(model).keys() == first.layers.keys()
    assert torch.equal(model.model.layers[0].self_attn.q_proj.weight, weight)


def test_an_updater_that_fails_after_its_first_mask_leaves_the_weights(monkeypatch):
    model = shallow_llama()
    before = copy.deepcopy(model.state_dict())
    monkeypatch.setattr(Dormant, "before_step", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        MaskUpdater(model, "2:4", criterion=Magnitude(), policy=Dormant(), total_steps=20)
    assert model.state_dict().keys() == before.keys()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_two_updaters_of_one_layer_are_refused_at_their_first_step():
    model = shallow_llama()
    first = MaskUpdater(model, "2:4", criterion=Magnitude(), total_steps=20)
    MaskUpdater(model, "2:4", 0.5, criterion=Magnitude(), total_steps=20).step()
    with pytest.raises(ValueError, match="q_proj is pruned by another MaskUpdater"):
        first.step()
    squash(model)
    with pytest.raises(ValueError, match="or it was squashed"):
        first.step()


def test_numbers_of_numpy_are_numbers():
    """Checkpoints hold none, which torch refuses to load, and a run that resumes may have Python's."""

    def updater(number, whole, state=None):
        given = {"update_freq": whole(4), "end_step": whole(9), "window": whole(2), "norm_decay": number(0.5)}
        schedule = Linear(number(0.75), init_sparsity=number(0.5))
        given |= {"schedule": schedule, "total_steps": whole(12), "state": state}
        return MaskUpdater(shallow_llama(), "unstructured", **given)

    for number in (np.float32, np.float64, torch.tensor):
        began = updater(number, np.int64)
        train(began._model, began, 5)
        content = io.BytesIO()
        torch.save(began.state_dict(), content)
        content.seek(0)
        resumed = updater(float, int, torch.load(content, weights_only=True))
        assert (resumed.steps, resumed.sparsity, resumed.timing) == (5, began.sparsity, began.timing)


def test_resume_with_another_setting_is_refused():
    state = MaskUpdater(shallow_llama(), "2:4", total_steps=20).state_dict()
    with pytest.raises(ValueError, match=r"mask_structure = 2:4, and this run has 1:4"):
        MaskUpdater(shallow_llama(), "1:4", total_steps=20, state=state)
    with pytest.raises(ValueError, match="criterion = .*Wanda"):
        MaskUpdater(shallow_llama(), "2:4", criterion=Magnitude(), total_steps=20, state=state)
    with pytest.raises(ValueError, match="in only one of them"):
        MaskUpdater(shallow_llama(), "2:4", ignore=["re:.*q_proj"], total_steps=20, state=state)


def test_a_run_starts_from_the_masks_of_one_shot_pruning(ids):
    model = shallow_llama()
    prune(model, ids, "2:4", squash=False)
    masks = {n: m.weight_mask.clone() for n, m in sparse_layers(model).items()}
    updater = MaskUpdater(model, "2:4", update_freq=4, total_steps=20)
    assert all(torch.equal(masks[n], m.weight_mask) for n, m in sparse_layers(model).items())
    reports = train(model, updater, 8)
    assert [report.step for report in reports] == [4, 8]
    assert reports[0].initial_flip_rate > 0


@pytest.mark.parametrize("load_first", [True, False])
def test_a_run_whose_first_mask_came_from_a_window_resumes_on_the_same_steps(load_first):
    model = shallow_llama()
    updater = MaskUpdater(model, "2:4", update_freq=4, window=2, total_steps=20)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    train(model, updater, 7, optimizer, seed=1)
    masks, state = snapshot(model), copy.deepcopy(updater.state_dict())
    expected = [report.step for report in train(model, updater, 9, optimizer, seed=2)]
    other = shallow_llama()
    if load_first:
        prune(other, criterion=Magnitude(), squash=False)  # any masks at all: they are loaded over
        other.load_state_dict(masks)
        resumed = MaskUpdater(other, "2:4", update_freq=4, window=2, total_steps=20, state=state)
    else:
        resumed = MaskUpdater(other, "2:4", update_freq=4, window=2, total_steps=20, state=state)
        other.load_state_dict(masks)
    second = torch.optim.SGD(other.parameters(), lr=0.01)
    assert [report.step for report in train(other, resumed, 9, second, seed=2)] == expected == [10, 14, 15]
    assert equal(snapshot(model), snapshot(other))


def test_resuming_changes_no_mask_by_itself():
    settings = {"sparsity": 0.3, "criterion": Magnitude(), "update_freq": 10, "total_steps": 20}
    model = shallow_llama()
    updater = MaskUpdater(model, Unstructured("model"), **settings)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(5):
        batch = torch.randint(3, VOCABULARY, (2, 16))
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        updater.step()
    before = snapshot(model)
    MaskUpdater(model, Unstructured("model"), **settings, state=updater.state_dict())
    assert equal(snapshot(model), before)


@pytest.mark.parametrize(
    ("structure", "arguments"),
    [
        ("1:4", {}),
        ("unstructured", {"sparsity": 0.6}),
        ("2:4", {"schedule": Linear(0.5, 0.25)}),
        (Unstructured("model"), {"sparsity": 0.6}),
    ],
)
def test_masks_of_another_run_are_not_taken_for_this_ones(ids, structure, arguments):
    model = shallow_llama()
    prune(model, ids, "2:4", squash=False)
    with pytest.raises(ValueError, match="The model has masks already") as error:
        MaskUpdater(model, structure, policy=Fixed(), total_steps=20, **arguments)
    assert "Squash the model first" in str(error.value)


@pytest.mark.parametrize("model_loaded", ["not at all", "with dense masks", "with masks of another step"])
def test_masks_that_are_not_those_of_the_state_are_noticed(model_loaded):
    model = shallow_llama()
    updater = MaskUpdater(model, "2:4", update_freq=2, total_steps=20)
    train(model, updater, 4)
    weights, state = snapshot(model), copy.deepcopy(updater.state_dict())
    if model_loaded == "with dense masks":
        weights = {key: value | 0xFF if key.endswith("weight_mask") else value for key, value in weights.items()}
    elif model_loaded == "with masks of another step":
        train(model, updater, 6, seed=5)
        weights = snapshot(model)

    def resumed():
        other = shallow_llama()
        found = MaskUpdater(other, "2:4", update_freq=2, total_steps=20, state=state)
        if model_loaded != "not at all":
            other.load_state_dict(weights)
        return found

    for act in (MaskUpdater.step, MaskUpdater.finish):
        with pytest.raises(ValueError, match="and the mask of .* is not the one it had"):
            act(resumed())


@pytest.mark.parametrize("structure", ["2:4", Unstructured("model")])
def test_a_mask_that_was_replaced_in_the_run_is_noticed_at_its_end(structure):
    model = shallow_llama()
    updater = MaskUpdater(model, structure, 0.5, criterion=Magnitude(), update_freq=2, total_steps=4)
    for _ in range(4):
        updater.step()
    one, *_, another = updater.layers.values()
    another.set_mask(torch.zeros_like(another.unpacked_mask()))
    updater.finish()  # sparser is allowed
    another.keep_all()
    one.keep_all()
    with pytest.raises(ValueError, match="at a sparsity of 0.5, and the mask of .* prunes [0-9]+ weights, not the"):
        updater.finish()
