"""``--text``: what is read, the same by every command."""

import json
from pathlib import Path

import pytest
import yaml
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from sparse_train.cli import main as cli
from tests.conftest import tiny_tokenizer

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("elsewhere")]


def test_documents_are_joined_by_the_separator_of_their_source(model_folder):
    Path("data").mkdir()
    Path("data/test.jsonl").write_text(json.dumps({"text": "abcd"}) + "\n" + json.dumps({"text": "efgh"}))
    text = {"path": "data", "splits": {"test": "test"}}
    for separator, tokens in [({}, 10), ({"separator": " "}, 9)]:
        source = json.dumps({"class_path": "HubText", "init_args": {**text, **separator}})
        with pytest.raises(SystemExit, match=f"has {tokens} tokens"):
            cli.main(["evaluate", str(model_folder), f"--text={source}", "--window=32"])


def test_each_window_begins_with_one_token_of_the_beginning(model_folder, text, capsys, monkeypatch):
    tokenizer = tiny_tokenizer()
    tokenizer._tokenizer.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    AutoModelForCausalLM.from_pretrained(model_folder).save_pretrained("with_bos")
    tokenizer.save_pretrained("with_bos")
    seen = []
    forward = LlamaForCausalLM.forward
    monkeypatch.setattr(
        LlamaForCausalLM,
        "forward",
        lambda self, input_ids, **rest: seen.append(input_ids) or forward(self, input_ids, **rest),
    )
    cli.main(["evaluate", "with_bos", f"--text={text}", "--window=32", "--max_tokens=96", "--bos=true", "--json"])
    (ids,) = seen
    assert ids.shape == (3, 33) and (ids == 1).sum(1).tolist() == [1, 1, 1] and (ids[:, 0] == 1).all()
    assert json.loads(capsys.readouterr().out)["prefix"] == 1


@pytest.mark.usefixtures("without_pictures")
def test_text_means_the_same_for_every_command(model_folder, text_file, capsys):
    """Files and folders; each command reads all of them."""
    Path("notes/inner").mkdir(parents=True)
    half = len(text_file.read_text()) // 2
    Path("notes/inner/a.txt").write_text(text_file.read_text()[:half])
    Path("notes/b.jsonl").write_text(json.dumps({"text": text_file.read_text()[half:]}))
    Path("notes/ignored.csv").write_text("a,b")
    small = ["--window=32", "--json"]
    found = []
    for given in (["notes"], ["notes/b.jsonl", "notes/inner/a.txt"]):
        cli.main(["evaluate", str(model_folder), "--text", *given, *small])
        found.append(json.loads(capsys.readouterr().out))
    assert found[0] == found[1] and found[0]["data"] == "b.jsonl, a.txt"
    samples = ["--num_calibration_samples=4", "--max_seq_length=32"]
    cli.main(["prune", str(model_folder), "pruned", "--text", "notes", *samples])
    details = json.loads(Path("pruned/pruning.json").read_text())
    assert details["calibration"]["text"] == "b.jsonl, a.txt"
    options = ["--data.block_size=32", "--trainer.max_steps=2", "--trainer.default_root_dir=run"]
    options += [f"--model.model={model_folder}"]
    cli.main(["fit", "--config=recipes/smollm2_2of4.yaml", "--text", "notes", *options, "--export=trained"])
    text = yaml.safe_load(Path("run/version_0/config.yaml").read_text())["data"]["text"]["init_args"]
    assert (text["train"], text["validation"]) == (["notes/b.jsonl", "notes/inner/a.txt"], [])
    capsys.readouterr()
    cli.main(["validate", "--config=recipes/smollm2_2of4.yaml", "--text", "notes/b.jsonl", *options, "--json"])
    assert json.loads(capsys.readouterr().out)["val/perplexity"] > 1
    for command in (["prune", str(model_folder), "out"], ["fit", f"--model.model={model_folder}"]):
        with pytest.raises(SystemExit, match=r"There is no text at nowhere.txt"):
            cli.main([*command, "--text", "nowhere.txt"])
