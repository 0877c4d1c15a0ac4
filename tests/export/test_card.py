import re

import pytest
import torch
import yaml
from huggingface_hub import ModelCard as HubCard

from sparse_train import Magnitude, MaskUpdater, __version__, prune
from sparse_train.export import export_model
from sparse_train.export.card import ModelCard, training_rows
from sparse_train.inspection import layer_sparsities
from sparse_train.models.sources import PackagedSmolLM2, Pretrained
from tests.conftest import tiny_llama, tiny_tokenizer


@pytest.fixture
def pruned():
    model = tiny_llama()
    prune(model, criterion=Magnitude(), ignore=["re:.*down_proj"])
    return model


def read(folder):
    card = HubCard.load(folder / "README.md")  # raises for front matter that the hub could not read
    return card.data.to_dict(), card.text


def test_what_is_known_is_in_the_card(tmp_path, pruned):
    card = ModelCard(
        base_model="HuggingFaceTB/SmolLM2-135M",
        hub_id="HuggingFaceTB/SmolLM2-135M",
        license="apache-2.0",
        made={"method": "a | b"},
        perplexity="12.34 on something",
        recipe="trainer:\n  max_steps: 4\n",
    )
    export_model(pruned, tiny_tokenizer(), tmp_path / "out", card)
    data, text = read(tmp_path / "out")
    assert data == {
        "base_model": "HuggingFaceTB/SmolLM2-135M",
        "library_name": "transformers",
        "license": "apache-2.0",
        "pipeline_tag": "text-generation",
        "tags": ["sparse-train", "sparse", "pruned", "2:4"],
    }
    assert "# HuggingFaceTB/SmolLM2-135M, 2:4" in text
    assert "method: a | b\n" in text
    assert "0.5000 of the 18 pruned layers' weights" in text
    assert "| up_proj | 3 | 0.5000 | 2:4 |" in text
    assert "| down_proj | 3 | 0.0000 | dense |" in text
    assert "12.34 on something" in text
    assert f"sparse-train {__version__}" in text
    assert "```yaml\ntrainer:\n  max_steps: 4\n```" in text
    assert "vLLM" in text and "Not faster on a CPU" in text


def test_nothing_is_claimed_that_is_not_known(tmp_path, pruned):
    export_model(pruned, None, tmp_path / "out")
    data, text = read(tmp_path / "out")
    assert set(data) == {"library_name", "pipeline_tag", "tags"}
    assert all(word not in text for word in ("perplexity", "Recipe", "base model", "method"))


def test_a_layer_with_the_few_zeros_of_rounding_is_not_one_that_was_pruned(tmp_path, pruned):
    with torch.no_grad():
        pruned.lm_head.weight.view(-1)[::50] = 0  # 2 %; weights of four bits have 1
    export_model(pruned, None, tmp_path / "out")
    data, text = read(tmp_path / "out")
    assert "0.5000 of the 18 pruned layers' weights" in text and "unstructured" not in data["tags"]


def test_sparsity_is_counted_on_what_is_written(tmp_path):
    model = tiny_llama()
    prune(model, criterion=Magnitude(), squash=False)
    export_model(model, None, tmp_path / "masked")
    assert "0.5000 of the 21 pruned layers' weights" in read(tmp_path / "masked")[1]
    whole = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    expected = layer_sparsities(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(1)  # as the tensors of a sharded model say nothing
    assert layer_sparsities(model, whole) == expected


def test_settings_are_data_whatever_they_hold(pruned):
    settings = {
        "mask_structure": "2:4",
        "sparsity": 0.5,
        "criterion": {"class": "Wanda"},
        "schedule": {"class": "Cubic", "final_sparsity": 0.5, "init_sparsity": 0.0},
        "distribution": {"class": "OWL", "owl_m": 5.0, "inner": {"class": "Uniform"}},
        "targets": None,
        "ignore": [],
        "update_freq": 5,
        "start_step": 0.05,
    }
    timing = {"update_freq": 5, "start_step": 3, "end_step": 30, "window": 2}
    text = ModelCard(made=training_rows(settings, timing, 40)).text(layer_sparsities(pruned))
    made = yaml.safe_load(re.search(r"```yaml\n(.*?)```", text, re.S)[1])
    assert made.pop("counted sparsity").startswith("0.5000 of the 18 pruned layers' weights")
    assert made.pop("made with").startswith("sparse-train ")
    expected = {name: value for name, value in settings.items() if name not in ("targets", "ignore")}
    assert made == {"method": "trained sparse", **expected, **timing, "steps": 40}


def test_a_run_and_one_shot_pruning_say_how_they_made_a_model(pruned):
    state = MaskUpdater(tiny_llama(), "2:4", update_freq=5, total_steps=40).state_dict()
    text = ModelCard(made=training_rows(state["settings"], state["timing"], 40)).text(layer_sparsities(pruned))
    assert "class: Wanda" in text and "update_freq: 5\n" in text and "end_step: 30\n" in text
    stage = {"criterion": "SparseGPT()", "mask_structure": "2:4", "allocation": "OWL()"}
    calibration = {"text": "c4", "num_calibration_samples": 8, "seed": 0}
    text = ModelCard(made={**stage, "calibration": calibration}).text(layer_sparsities(pruned))
    assert "criterion: SparseGPT()\n" in text
    assert "calibration:\n  text: c4\n  num_calibration_samples: 8\n  seed: 0\n" in text


def test_a_local_folder_is_no_id_of_the_hub(model_folder):
    assert Pretrained(str(model_folder)).hub_id is None
    assert Pretrained("org/name").hub_id == "org/name"
    assert PackagedSmolLM2().license == "apache-2.0"
