"""Models that are read from folders: whole, or not at all."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, LlamaForSequenceClassification

from sparse_train.files import check_free
from sparse_train.models.sources import Pretrained
from tests.conftest import tiny_llama


def test_a_folder_that_lacks_weights_is_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    save_file({n: w for n, w in load_file(file).items() if ".1.mlp." not in n}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"no weights for model.layers.1.mlp.down_proj.weight and 2 more .*incomplete"):
        Pretrained(str(tmp_path)).load()


def test_a_model_of_another_kind_is_refused_or_said_to_be_read_in_part(tmp_path, caplog):
    untied, tied = (LlamaForSequenceClassification(tiny_llama(tie_word_embeddings=tie).config) for tie in (False, True))
    untied.save_pretrained(tmp_path / "untied")
    with pytest.raises(ValueError, match=r"lm_head.weight .*holds a LlamaForSequenceClassification, and is read as a"):
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
    with pytest.raises(ValueError, match="comes with Python code of its own. If you trust it, run it: --model Pre"):
        Pretrained(str(tmp_path / "model")).load()
    assert type(Pretrained(str(tmp_path / "model"), trust_remote_code=True).load()).__name__ == "Own"


def test_a_home_folder_and_a_run_are_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    tiny_llama().save_pretrained(tmp_path / "model")
    Pretrained("~/model").load()
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "last.ckpt").touch()
    with pytest.raises(ValueError, match=r"the folder of a training run. .* sparse-train export .*last.ckpt FOLDER"):
        Pretrained("~/run").load()
    with pytest.raises(ValueError, match="was not replaced by a shell. Write the folder out: "):
        check_free(Path("~/out"))
