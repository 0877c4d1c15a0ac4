"""``sparse-train prune``, ``evaluate`` and ``inspect``, one after the other."""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparse_train.cli import main as cli
from sparse_train.models.sources import chosen_device

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("elsewhere")]


def prune(model_folder, text, out, *options):
    cli.main(
        [
            "prune",
            "--config=recipes/oneshot_wanda_2of4.yaml",
            f"--model={model_folder}",
            f"--text={text}",
            f"--out={out}",
            "--num_calibration_samples=4",
            "--max_seq_length=32",
            *options,
        ]
    )


def test_a_permuted_model_is_pruned_like_any_other(model_folder, text, capsys):
    small = [f"--text={text}", "--num_calibration_samples=4", "--max_seq_length=32"]
    cli.main(["permute", str(model_folder), "permuted", *small, "--json"])
    result = json.loads(capsys.readouterr().out)
    assert result["kept"] > result["kept_before"]
    dense, permuted = (AutoModelForCausalLM.from_pretrained(each).eval() for each in (model_folder, "permuted"))
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(permuted(ids).logits, dense(ids).logits, rtol=1e-3, atol=1e-4)
    card = Path("permuted/README.md").read_text()
    assert "channels permuted for: '2:4'" in card and "pruned" not in card
    prune("permuted", text, "pruned")
    assert "sparsity of the targeted weights 0.5000" in capsys.readouterr().out
    assert "channels permuted for: '2:4'" in Path("pruned/README.md").read_text()
    first, second = json.loads(Path("pruned/pruning.json").read_text())["stages"]
    assert first["channels permuted for"] == second["mask_structure"] == "2:4"


def test_prune_evaluate_and_inspect(model_folder, text, capsys):
    prune(model_folder, text, "pruned")  # the recipe is found although the folder here has no recipes/
    assert "sparsity of the targeted weights 0.5000" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained("pruned")
    weight = model.model.layers[0].mlp.up_proj.weight
    assert ((weight.reshape(-1, 4) == 0).sum(1) == 2).all()
    assert AutoTokenizer.from_pretrained("pruned").eos_token_id == 2
    details = json.loads(Path("pruned/pruning.json").read_text())
    assert details["sparsity"] == pytest.approx(0.5, abs=1e-3)
    card = Path("pruned/README.md").read_text()
    assert "method: pruned in one shot, without training\n" in card and "criterion: Wanda()\n" in card
    calibration = details["calibration"]
    assert (calibration["num_calibration_samples"], calibration["max_seq_length"], calibration["seed"]) == (4, 32, 0)

    cli.main(["evaluate", "pruned", f"--text={text}", "--window=32", "--max_tokens=640", "--json"])
    result = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert result["tokens"] == 620
    assert result["perplexity"] > 1
    cli.main(["evaluate", "pruned", f"--text={text}", "--window=32", "--max_tokens=640"])
    printed = capsys.readouterr().out
    assert f"{result['perplexity']:.2f}  token perplexity of pruned on topics.txt" in printed

    cli.main(["inspect", "pruned", "--json"])
    layers = {row["name"]: row for row in json.loads(capsys.readouterr().out.splitlines()[-1])["layers"]}
    assert layers["model.layers.0.mlp.up_proj"]["pattern"] == "2:4"
    assert layers["model.layers.0.mlp.up_proj"]["sparsity"] == 0.5
    assert layers["lm_head"]["sparsity"] < 0.05
    cli.main(["inspect", "pruned"])
    printed = capsys.readouterr().out
    assert "all linear layers" in printed
    assert printed.count("model.layers.*.mlp.up_proj ") == 1  # a row for all blocks


def test_a_folder_keeps_its_dtype(model_folder, text, capsys):
    AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16).save_pretrained("half")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained("half")
    small = ["--num_calibration_samples=4", "--max_seq_length=32", f"--text={text}"]
    cli.main(["prune", "--model=half", *small, "--mask_structure=2:4", "--out=pruned_half"])
    assert "on cpu" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained("pruned_half", dtype="auto").dtype == torch.bfloat16
    cli.main(["evaluate", "pruned_half", f"--text={text}", "--window=32", "--max_tokens=640", "--json"])
    assert json.loads(capsys.readouterr().out)["computed_in"] == "bfloat16"


def test_a_gpu_is_used_where_there_is_one(monkeypatch):
    assert chosen_device(None) == "cpu" and chosen_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert chosen_device(None) == "cuda" and chosen_device("cpu") == "cpu"


def test_places_are_names(model_folder, text_file, capsys):
    small = ["--num_calibration_samples=4", "--max_seq_length=32"]
    cli.main(["prune", str(model_folder), "pruned", "--text", str(text_file), *small, "--mask_structure=1:4"])
    assert "topics.txt" in Path("pruned/README.md").read_text()
    capsys.readouterr()
    cli.main(["inspect", "pruned", "--json"])
    assert json.loads(capsys.readouterr().out)["layers"][0]["sparsity"] == 0.75
    prune(model_folder, json.dumps({"class_path": "TextFiles", "init_args": {"train": [str(text_file)]}}), "again")
    with pytest.raises(SystemExit) as error:
        cli.main(["prune", str(model_folder), "a", "b"])
    assert error.value.code == 2
    assert "unexpected argument 'b'" in capsys.readouterr().err


def test_other_groups_by_class(model_folder, text):
    pattern = json.dumps({"class_path": "Unstructured", "init_args": {"group": "model"}})
    prune(model_folder, text, "out", f"--mask_structure={pattern}", "--sparsity=0.5")
    assert json.loads(Path("out/pruning.json").read_text())["stages"][0]["mask_structure"] == "unstructured (model)"


def test_mistakes_come_before_the_work(model_folder, text, monkeypatch):
    monkeypatch.setattr("sparse_train.models.sources.Pretrained.load", lambda self: pytest.fail("loaded a model"))
    Path("taken").mkdir()
    Path("taken/file").touch()
    with pytest.raises(SystemExit, match="taken exists already"):
        prune(model_folder, text, "taken")
    with pytest.raises(SystemExit, match="in conflict with 0.7"):
        prune(model_folder, text, "out", "--sparsity=0.7")
    assert not Path("out").exists()
