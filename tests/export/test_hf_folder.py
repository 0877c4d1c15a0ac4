"""The dtype of exported weights, and what a checkpoint brings along."""

import json

import lightning as L
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparse_train import Magnitude, prune
from sparse_train.callbacks import DynamicPruning
from sparse_train.export import export_checkpoint, export_model
from sparse_train.models.causal_lm import CausalLM
from sparse_train.models.sources import FromScratch, Pretrained
from tests.callbacks.runs import loader, trainer
from tests.conftest import tiny_gemma3, tiny_llama, tiny_tokenizer

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning")


@pytest.fixture(scope="module")
def bfloat16_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored") / "model"
    tiny_llama().bfloat16().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    (folder / "LICENSE").write_text("terms")
    return folder


def dtypes(folder):
    return {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()}


@pytest.mark.parametrize("squash", [True, False])
def test_a_model_is_written_in_the_dtype_of_its_files_or_another(bfloat16_folder, tmp_path, squash):
    model = AutoModelForCausalLM.from_pretrained(bfloat16_folder, dtype=torch.float32)
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.add_(1e-3)  # not a number of 16 bits
    prune(model, criterion=Magnitude(), squash=squash)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for asked, dtype in ((None, torch.bfloat16), (torch.float16, torch.float16), (torch.float32, torch.float32)):
        out = export_model(model, None, tmp_path / str(dtype), dtype=asked)
        assert dtypes(out) == {dtype}
        assert (out / "LICENSE").read_text() == "terms"
        assert "lm_head.weight" not in load_file(out / "model.safetensors")  # still tied
        loaded = AutoModelForCausalLM.from_pretrained(out, dtype="auto")
        weight = loaded.model.layers[0].mlp.up_proj.weight
        live = model.model.layers[0].mlp.up_proj
        exact = live.weight if squash else live.masked_weight()
        assert torch.equal(weight, exact.to(dtype))
        assert "counted sparsity: 0.5000 of the 21 pruned layers' weights" in (out / "README.md").read_text()
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize(("make", "blocks"), [(tiny_llama, "model"), (tiny_gemma3, "model.language_model")])
def test_files_without_the_zeros_of_the_model_are_not_left(make, blocks, tmp_path, monkeypatch):
    model = make()
    prune(model, criterion=Magnitude(), targets=[f"{blocks}.layers"], squash=False)
    monkeypatch.setattr(model, "save_pretrained", lambda folder, **_: make().save_pretrained(folder))
    with pytest.raises(ValueError, match=r"has 0 zeros in model.safetensors, and \d+ in the model"):
        export_model(model, None, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_zeros_that_rounding_makes_are_counted(tmp_path):
    model = tiny_llama()
    prune(model, criterion=Magnitude())
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.mul_(1e-8)  # below what float16 holds
    export_model(model, None, tmp_path / "out", dtype=torch.float16)
    assert "| up_proj | 3 | 0.6667 |" in (tmp_path / "out" / "README.md").read_text()


def test_weights_that_a_dtype_does_not_hold_are_not_written_as_infinite(tmp_path):
    model = tiny_llama()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = 1e5
    with pytest.raises(ValueError, match=r"layers.1.mlp.up_proj.weight has weights that are too large"):
        export_model(model, None, tmp_path / "out", dtype=torch.float16)
    assert not (tmp_path / "out").exists()


def test_a_model_of_no_files_keeps_its_dtype(tmp_path):
    assert dtypes(export_model(tiny_llama(), None, tmp_path / "whole")) == {torch.float32}
    assert dtypes(export_model(tiny_llama().bfloat16(), None, tmp_path / "half")) == {torch.bfloat16}


def checkpoint(source, folder):
    run = trainer(folder, DynamicPruning("2:4", update_freq=2, squash=False), max_steps=2)
    run.fit(CausalLM(source), loader())
    run.save_checkpoint(folder / "x.ckpt")
    return folder / "x.ckpt"


def test_a_checkpoint_brings_tokenizer_and_dtype_of_its_source(bfloat16_folder, tmp_path):
    L.seed_everything(0, verbose=False)
    path = checkpoint(str(bfloat16_folder), tmp_path)
    out = export_checkpoint(path, tmp_path / "out")
    assert dtypes(out) == {torch.bfloat16}
    assert json.loads((out / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoTokenizer.from_pretrained(out)("a b")["input_ids"] == tiny_tokenizer()("a b")["input_ids"]
    assert dtypes(export_checkpoint(path, tmp_path / "whole", dtype=torch.float32)) == {torch.float32}


def test_a_source_that_is_gone_is_said(bfloat16_folder, tmp_path, caplog):
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    source = FromScratch("llama", Pretrained(str(bfloat16_folder)), sizes | {"vocab_size": 128})
    path = checkpoint(source, tmp_path)
    out = export_checkpoint(path, tmp_path / "out")
    assert dtypes(out) == {torch.float32} and not (out / "tokenizer.json").exists()
    assert "The exported folder has no tokenizer" in caplog.text
    export_checkpoint(path, tmp_path / "given", tiny_tokenizer())
    assert (tmp_path / "given" / "tokenizer.json").exists()
