import errno
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, GPT2Config, GPT2LMHeadModel, LlamaForCausalLM

from sparse_train import model_folders
from sparse_train.cli import main as cli
from sparse_train.data.texts import TextFiles
from sparse_train.model_folders import copy_companions
from tests.conftest import tiny_llama, tiny_tokenizer


@pytest.fixture
def model_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_llama().save_pretrained("model")
    tiny_tokenizer().save_pretrained("model")
    return "model"


@pytest.fixture
def run(model_folder, text_file):
    files = {"train": [str(text_file)], "test": [str(text_file)]}
    text = json.dumps({"class_path": "TextFiles", "init_args": files})

    def run(*options, out="out"):
        small = ["--num_calibration_samples=4", "--max_seq_length=32"]
        cli.main(["prune", f"--model={model_folder}", f"--text={text}", *small, f"--out={out}", *options])
        return AutoModelForCausalLM.from_pretrained(out), json.loads(Path(out, "pruning.json").read_text())

    return run


def test_streaming_gives_the_same_model(run, capsys):
    whole, _ = run("--autocast=bfloat16", out="whole")
    streamed, details = run("--autocast=bfloat16", "--streaming=true", out="streamed")
    assert details["streaming"] is True and details["calibration"]["autocast"] == "bfloat16"
    for (name, a), (_, b) in zip(whole.named_parameters(), streamed.named_parameters(), strict=True):
        assert torch.equal(a, b), name
    assert sorted(path.name for path in Path().iterdir()) == ["model", "streamed", "whole"]


def test_what_stands_before_a_recipe_changes_it_too(model_folder, text_file):
    recipe = "model: nowhere\nout: theirs\ncriterion: Magnitude\nmask_structure: 1:4\n"
    Path("recipe.yaml").write_text(recipe)
    cli.main(["prune", model_folder, "out", "--mask_structure", "2:4", "--config", "recipe.yaml"])
    (stage,) = json.loads(Path("out", "pruning.json").read_text())["stages"]
    assert (stage["criterion"], stage["mask_structure"]) == ("Magnitude()", "2:4") and not Path("theirs").exists()


def test_streamed_files_that_are_dense_are_told(run, monkeypatch):
    def forgets(source, out):
        copy_companions(source, out)
        shutil.copy(Path(source, "model.safetensors"), out)  # which is read before shards

    monkeypatch.setattr(model_folders, "copy_companions", forgets)
    with pytest.raises(SystemExit, match="proj.weight has 0 zeros in model.safetensors"):
        run("--streaming=true")
    assert not Path("out").exists()


@pytest.mark.parametrize("streaming", ["true", "false"])
def test_a_folder_without_its_record_gets_no_name(streaming, run, monkeypatch):
    def full(path, *args, **kwargs):
        if "pruning.json" in path.name:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write_text(path, *args, **kwargs)

    write_text = Path.write_text
    with monkeypatch.context() as on_a_full_disk:
        on_a_full_disk.setattr(Path, "write_text", full)
        with pytest.raises(SystemExit, match="No space left"):
            run(f"--streaming={streaming}")
    assert not Path("out").exists()
    assert run(f"--streaming={streaming}")[1]["sparsity"] == 0.5


def test_a_card_tells_no_share_of_layers_that_were_not_counted(run):
    run("--ignore=['re:.*down_proj']", out="whole")
    run("--ignore=['re:.*down_proj']", "--streaming=true", out="streamed")
    whole, streamed = (Path(folder, "README.md").read_text() for folder in ("whole", "streamed"))
    share = "0.5000 of the 18 pruned layers' weights"
    assert f"{share}, 0.3" in whole and "of all linear layers'" in whole
    assert f"{share}, counted on" in streamed and "of all" not in streamed


@pytest.mark.parametrize("how", ["--streaming=true", "--seed=1"])
def test_samples_that_are_too_long_are_said_before_the_pruning(run, how):
    config = GPT2Config(vocab_size=128, n_embd=32, n_layer=2, n_head=4, n_positions=64)
    GPT2LMHeadModel(config).save_pretrained("model")
    with pytest.raises(SystemExit, match="max_seq_length is 80 tokens, and GPT2LMHeadModel has 64 positions"):
        run(how, "--max_seq_length=80")
    assert [path.name for path in Path().iterdir()] == ["model"]


@pytest.mark.parametrize("how", ["--streaming=true", "--seed=1"])
def test_layers_that_are_not_there_are_said_before_text_is_read(run, how, monkeypatch, capsys):
    with monkeypatch.context() as unread:
        unread.setattr(TextFiles, "documents", lambda *_: pytest.fail("it is read"))
        with pytest.raises(SystemExit, match="targets: 'up_prj' matches no layer"):
            run(how, "--targets=[up_prj]")
    assert [path.name for path in Path().iterdir()] == ["model"]
    run(how)
    assert "reading model and topics.txt\n" in capsys.readouterr().err


def test_what_a_folder_holds_beside_the_model_is_kept(run, model_folder):
    for name in ("LICENSE", "preprocessor_config.json", "trainer_state.json"):
        Path(model_folder, name).write_text("{}")
    run()
    assert Path("out", "LICENSE").is_file() and Path("out", "preprocessor_config.json").is_file()
    assert not Path("out", "trainer_state.json").exists()


def test_a_full_disk_is_said_before_the_pruning_and_after_it(run, monkeypatch):
    free = shutil.disk_usage(".")._replace(free=1000)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda path: free)
        with pytest.raises(SystemExit, match="out needs about 0.0 GB, and 0.0 GB are free"):
            run()
        weights = 4 * sum(weight.numel() for weight in tiny_llama().parameters())
        free = free._replace(free=weights * 3 // 4)
        with pytest.raises(SystemExit, match="out needs about"):
            run()
        run("--dtype=bfloat16", out="half")

    def fill(*args, **kwargs):
        raise SafetensorError("I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(LlamaForCausalLM, "save_pretrained", fill)
    with pytest.raises(SystemExit, match="out.* could not be written: I/O error: No space left"):
        run()
    assert not Path("out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device=cuda:99x"], "torch cannot compute on device='cuda:99x' here"),
        (["--streaming=true", "--dtype=bfloat16"], "streaming keeps the dtype of each file"),
        (["--distribution=OWL"], "2:4 has one sparsity"),
        (["--num_calibration_samples=0"], "num_calibration_samples must be at least 1"),
        (["--sampling=documents", "--max_seq_length=100000"], "gives no calibration sample of 100000 tokens"),
        (["--batch_size=0"], "batch_size must be at least 1, got 0"),
        (["--device=meta"], "torch cannot compute on device='meta' here"),
    ],
)
def test_mistakes_are_answered_and_nothing_is_left_behind(run, options, message, capsys):
    with pytest.raises(SystemExit) as error:
        run(*options)
    assert message in f"{error.value}{capsys.readouterr().err}"
    assert [path.name for path in Path().iterdir()] == ["model"]
