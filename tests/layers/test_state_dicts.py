import copy
import inspect

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from sparse_train.layers.masked_layer import sparse_layers
from sparse_train.layers.sparsify import sparsify, squash
from sparse_train.layers.state_dicts import folded_state_dict
from tests.conftest import tiny_llama


def test_save_pretrained_of_a_sparsified_model_writes_zeros(tmp_path):
    model = tiny_llama().eval()
    sparsify(model, [m for n, m in model.named_modules() if n.endswith("proj")])
    for layer in sparse_layers(model).values():
        layer.set_mask(torch.rand_like(layer.weight) < 0.5)
    ids = torch.randint(0, 128, (1, 8))
    shadow = {name: layer.weight.clone() for name, layer in sparse_layers(model).items()}
    for variant in (model, copy.deepcopy(model)):
        variant.save_pretrained(tmp_path / "out")
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
        assert torch.equal(loaded(input_ids=ids).logits, variant(input_ids=ids).logits)
        name = "model.layers.0.mlp.up_proj"
        assert int((loaded.get_submodule(name).weight == 0).sum()) > 900
        assert torch.equal(variant.get_submodule(name).weight, shadow[name])
    taught = PreTrainedModel.save_pretrained
    sparsify(model, [])
    assert PreTrainedModel.save_pretrained is taught  # once, and not once for each model
    squash(model)
    model.save_pretrained(tmp_path / "squashed")


def masked_llama():
    model = tiny_llama()
    sparsify(model, [m for n, m in model.named_modules() if n.endswith("proj")])
    for layer in sparse_layers(model).values():
        layer.set_mask(torch.rand_like(layer.weight) < 0.5)
    return model


def huggingface_trainer(model, folder):
    from transformers import Trainer, TrainingArguments

    Trainer(model=model, args=TrainingArguments(folder, report_to=[], use_cpu=True)).save_model(folder)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "save",
    [
        lambda model, folder: model.save_pretrained(folder, state_dict=None),
        lambda model, folder: model.save_pretrained(folder, True, model.state_dict()),
        lambda model, folder: model.save_pretrained(folder, state_dict=model.state_dict()),
        huggingface_trainer,
    ],
    ids=["none", "by position", "its own state dict", "transformers.Trainer"],
)
def test_however_save_pretrained_is_called(tmp_path, save):
    model = masked_llama()
    save(model, str(tmp_path))
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, layer in sparse_layers(model).items():
        assert torch.equal(loaded.get_submodule(name).weight, layer.masked_weight())


def test_a_model_around_the_sparsified_one_saves_zeros_too(tmp_path):
    model = tiny_llama()
    inner = model.model.layers[0]
    sparsify(inner, [inner.mlp.up_proj])
    inner.mlp.up_proj.set_mask(torch.rand_like(inner.mlp.up_proj.weight) < 0.5)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(loaded.model.layers[0].mlp.up_proj.weight, inner.mlp.up_proj.masked_weight())


def test_a_layer_that_is_registered_twice():
    layer = nn.Linear(8, 8)
    model = nn.ModuleList([layer, layer])
    sparsify(model, [layer])
    layer.set_mask(torch.zeros(8, 8, dtype=torch.bool))
    state = folded_state_dict(model)
    assert not any("mask" in key for key in state)
    assert not state["0.weight"].any()
    assert not state["1.weight"].any()


def test_a_dense_state_dict_is_refused_with_a_way_out():
    model = tiny_llama()
    dense = copy.deepcopy(model.state_dict())
    sparsify(model, [m for n, m in model.named_modules() if n.endswith("proj")])
    with pytest.raises(ValueError, match="holds no masks") as error:
        model.load_state_dict(dense)
    assert "before sparsifying" in str(error.value)
    squash(model)
    model.load_state_dict(dense)
    state = masked_llama().state_dict()
    del state["model.layers.0.mlp.up_proj.weight_mask"]
    model = masked_llama()
    with pytest.raises(ValueError, match="no model.layers.0.mlp.up_proj.weight_mask"):
        model.load_state_dict(state, strict=False)


def test_sparsify_alone_teaches_save_pretrained(tmp_path, monkeypatch):
    monkeypatch.setattr(PreTrainedModel, "save_pretrained", inspect.unwrap(PreTrainedModel.save_pretrained))
    model = masked_llama()
    model.save_pretrained(tmp_path)
    weight = AutoModelForCausalLM.from_pretrained(tmp_path).model.layers[0].mlp.up_proj.weight
    assert torch.equal(weight, model.model.layers[0].mlp.up_proj.masked_weight())


def test_averaged_parameters_without_masks_are_saved_with_those_of_the_model(tmp_path):
    model = masked_llama()
    average = {name: 2 * value.detach() for name, value in model.named_parameters()}
    model.save_pretrained(tmp_path, state_dict=average)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    for name, layer in sparse_layers(model).items():
        assert torch.equal(loaded.get_submodule(name).weight, 2 * layer.masked_weight())


def test_what_a_masked_model_has_saved_can_be_loaded_into_it(tmp_path):
    model = masked_llama()
    saved, before = folded_state_dict(model), {n: m.weight_mask.clone() for n, m in sparse_layers(model).items()}
    model.load_state_dict(saved)
    for name, layer in sparse_layers(model).items():
        assert torch.equal(layer.weight, saved[f"{name}.weight"]) and torch.equal(layer.weight_mask, before[name])


def test_what_has_zeros_elsewhere_or_another_shape_is_refused():
    with pytest.raises(ValueError, match="holds no masks"):
        masked_llama().load_state_dict(folded_state_dict(masked_llama()))
    model = masked_llama()
    saved = folded_state_dict(model)
    saved["model.layers.0.mlp.up_proj.weight"] = torch.zeros(3, 3)
    with pytest.raises(ValueError, match="holds no masks"):
        model.load_state_dict(saved)


def test_a_layer_under_two_names_is_completed_under_both():
    layer = nn.Linear(8, 8)
    model = nn.ModuleList([layer, layer])
    sparsify(model, [layer])
    layer.set_mask(torch.rand(8, 8) < 0.5)
    model.load_state_dict(folded_state_dict(model))
    with torch.device("meta"):
        empty = nn.ModuleList([nn.Linear(8, 8)])
    sparsify(empty, empty)
    with pytest.raises(ValueError, match="holds no masks"):
        empty.load_state_dict(nn.ModuleList([nn.Linear(8, 8)]).state_dict(), assign=True)
