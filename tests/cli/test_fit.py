"""``sparse-train fit``, ``validate``, ``test`` and ``export``: what a run leaves, goes on from, and says at its end."""

import builtins
import csv
import errno
import io
import json
import os
import re
import shutil
import signal
import tempfile
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparse_train.cli import main as cli
from sparse_train.export import export_checkpoint, export_model
from sparse_train.models.causal_lm import CausalLM
from tests.conftest import shallow_llama, tiny_llama, tiny_tokenizer

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("elsewhere")]


@pytest.fixture
def fit(model_folder, text):
    """Trains a tiny model for two steps by a recipe; options come last and win."""

    def fit(*options, recipe="smollm2_2of4", command="fit"):
        small = [
            f"--model.model={model_folder}",
            f"--data.text={text}",
            "--data.block_size=32",
            "--trainer.max_steps=2",
        ]
        small += ["--data.max_validation_blocks=4", "--trainer.default_root_dir=run"]
        cli.main([command, f"--config=recipes/{recipe}.yaml", *small, *options])

    return fit


def test_a_distilled_model_names_its_teacher_and_its_report_shows_the_loss_that_was_trained(fit, model_folder):
    fit("--trainer.max_steps=3", "--trainer.log_every_n_steps=1", "--export=exported", recipe="smollm2_2of4_distill")
    assert f"teacher: {model_folder}, dense\n" in Path("exported/README.md").read_text()
    rows = csv.DictReader(Path("run/version_0/metrics.csv").read_text().splitlines())
    trained = [f"{float(row['train/loss']):.4g}" for row in rows if row["train/loss"]]
    report = Path("run/version_0/report.html").read_text()
    assert f"{trained[0]} at step 1 to {trained[-1]} at step 3" in report


@pytest.mark.usefixtures("without_pictures")
def test_fit_export_and_resume(fit, model_folder, capsys):
    options = [
        "--config=configs/precision/float32.yaml",
        "--trainer.max_steps=6",
        "--trainer.val_check_interval=3",
        "--trainer.enable_model_summary=false",
        "--trainer.enable_progress_bar=false",
    ]
    pruned = [*options, "--pruning.update_freq=2"]
    fit(*pruned, "--export=exported")
    assert "exported to exported" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained("exported")
    assert set(model.state_dict()) == set(shallow_llama().state_dict())
    card = Path("exported/README.md").read_text()
    assert "update_freq: 2\n" in card and "at the last validation" in card
    assert "max_steps: 6" in card[card.index("## Recipe") :]
    assert ((model.model.layers[1].mlp.down_proj.weight.reshape(-1, 4) == 0).sum(1) == 2).all()

    metrics = Path("run/version_0/metrics.csv").read_text()
    for name in ("train/loss", "val/perplexity", "sparsity/flip_rate", "sparsity/initial_flip_rate"):
        assert name in metrics
    resolved = yaml.safe_load(Path("run/version_0/config.yaml").read_text())
    assert resolved["trainer"]["max_steps"] == 6

    checkpoint = max(Path("run").rglob("*.ckpt"), key=lambda path: path.stat().st_mtime_ns)
    cli.main(["export", "run", "from_checkpoint", f"--tokenizer={model_folder}"])
    assert f"{checkpoint} exported to from_checkpoint" in capsys.readouterr().out
    assert "update_freq: 2\n" in Path("from_checkpoint/README.md").read_text()
    again = AutoModelForCausalLM.from_pretrained("from_checkpoint")
    for key, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    assert AutoTokenizer.from_pretrained("from_checkpoint").eos_token_id == 2

    going_on = f"--ckpt_path={checkpoint}"
    fit(*pruned, "--trainer.max_steps=8", "--trainer.default_root_dir=resumed", going_on)
    rows = Path("resumed/version_0/metrics.csv").read_text().splitlines()
    steps = [int(row.split(",")[rows[0].split(",").index("step")]) for row in rows[1:]]
    assert min(steps) == 0 and max(steps) == 7  # the history of the interrupted run is kept

    # a run that is at its end already trains nothing, and is what it was
    fit(*pruned, "--trainer.default_root_dir=end", going_on, "--export=ended", "--dtype=bfloat16")
    assert "update_freq: 2\n" in Path("ended/README.md").read_text()
    cli.main(["export", str(checkpoint), "half", f"--tokenizer={model_folder}", "--dtype=bfloat16"])
    for folder in ("ended", "half"):
        assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == torch.bfloat16
    for folder in ("exported", "from_checkpoint", "ended", "half"):
        cli.main(["inspect", folder, "--verify"])
    assert capsys.readouterr().out.count("every group of its 14 pruned layers has the zeros") == 4
    with pytest.raises(SystemExit, match="The checkpoint was written with mask_structure"):
        fit(*pruned, "--pruning.mask_structure=1:4", going_on, "--export=other/model")
    assert not Path("other/model").exists()
    with pytest.raises(SystemExit, match="this run has no DynamicPruning callback"):
        fit(*options, going_on, recipe="smollm2_dense")
    with pytest.raises(SystemExit, match="did not prune the same layers as this one; .*self_attn"):
        fit(*pruned, "--pruning.ignore+=self_attn", going_on)

    for command, metric in (("validate", "val/perplexity"), ("test", "test/perplexity")):
        fit(*pruned, going_on, command=command)
        assert re.search(rf"^{metric}  \d+\.\d{{4}}$", capsys.readouterr().out, re.M)


@pytest.mark.usefixtures("without_pictures")
def test_what_was_pruned_before_is_said_with_how(fit, model_folder, text_file):
    calibration = [f"--text={text_file}", "--num_calibration_samples=4", "--max_seq_length=32"]

    def criteria(folder):
        card = yaml.safe_load(re.search(r"```yaml\n(.*?)```", Path(folder, "README.md").read_text(), re.S)[1])
        stages = json.loads(Path(folder, "pruning.json").read_text())["stages"]
        assert card.get("made before", []) == stages[:-1]
        return [stage["criterion"].partition("(")[0] for stage in stages]

    cli.main(["prune", str(model_folder), "first", "--criterion=SparseGPT", *calibration])
    for how in ("true", "false"):
        again = ["--criterion=Magnitude", "--mask_structure=1:4", f"--streaming={how}"]
        cli.main(["prune", "first", f"again_{how}", *again])
        assert criteria(f"again_{how}") == ["SparseGPT", "Magnitude"]
    options = ["--pruning.first_mask=FromZeros", "--pruning.policy=Fixed"]
    fit("--model.model=first", "--trainer.val_check_interval=2", *options, "--export=trained")
    assert criteria("first") == ["SparseGPT"] and criteria("trained") == ["SparseGPT", "Wanda"]
    shutil.rmtree("first")  # the checkpoint says it, too
    cli.main(["export", "run", "from_checkpoint"])
    assert criteria("from_checkpoint") == ["SparseGPT", "Wanda"]
    cli.main(["prune", "trained", "third", "--criterion=Magnitude", "--mask_structure=1:4"])
    assert criteria("third") == ["SparseGPT", "Wanda", "Magnitude"]


SHORT = ["--trainer.max_steps=3", "--trainer.val_check_interval=3", "--trainer.enable_checkpointing=false"]


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("recipe", ["smollm2_dense", "smollm2_2of4_distill"])
def test_short_fits(fit, recipe, monkeypatch, capsys):
    monkeypatch.setattr("sparse_train.terminal.SECONDS_BETWEEN_LINES", 0.0)
    fit(*SHORT, recipe=recipe)
    lines = capsys.readouterr().err.splitlines()  # no terminal: a line for what would be a state of a bar
    assert any(re.fullmatch(r"validation: 1/\d+, .* left", line) for line in lines)
    assert any(re.match(r"step: 3/3, 00:00 left, .*val/perplexity \d", line) for line in lines)
    assert ("pruning: 2/2, 00:00 left" in lines) == ("2of4" in recipe)
    metrics = Path("run/version_0/metrics.csv").read_text()
    assert "val/perplexity" in metrics
    assert ("train/loss_kldiv" in metrics) == ("distill" in recipe)


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("recipe", ["lora", "mask_lora"])
def test_low_rank_fits_export_zeros(fit, recipe):
    """Also on another model than that of the recipe, which keeps its adapters."""
    fit(*SHORT, "--export=exported", recipe=f"smollm2_2of4_{recipe}")
    model = AutoModelForCausalLM.from_pretrained("exported")
    for name, weight in model.state_dict().items():
        if name.endswith("proj.weight"):
            assert ((weight.reshape(-1, 4) != 0).sum(1) == 2).all(), name
    cli.main(["inspect", "--verify", "exported"])
    assert Path("exported/adapter/adapter_model.safetensors").exists() == (recipe == "lora")
    assert ("mask_lora: r=8, lora_alpha=16 on 4 of 14" in Path("exported/README.md").read_text()) == (recipe != "lora")


@pytest.mark.usefixtures("without_pictures")
def test_a_model_that_is_not_kept_is_said(fit, caplog):
    late = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=100"]
    fit(*late, recipe="smollm2_dense")
    assert "so the trained model is not kept. Give --export FOLDER" in caplog.text
    caplog.clear()
    fit(*late, "--export=model", recipe="smollm2_dense")
    assert "not kept" not in caplog.text


@pytest.mark.usefixtures("without_pictures")
def test_a_list_of_callbacks_leaves_pruning_in_its_place(fit):
    Path("own.yaml").write_text("trainer: {callbacks: [{class_path: ModelCheckpoint}]}")
    fit("--config=own.yaml", "--export=model")
    cli.main(["inspect", "--verify", "model"])
    Path("own.yaml").write_text("trainer: {callbacks: [{class_path: DynamicPruning}]}")
    with pytest.raises(SystemExit, match="DynamicPruning is in trainer.callbacks. Its arguments are the key pruning"):
        fit("--config=own.yaml")


def test_a_place_that_cannot_be_written_is_said_before_the_run(fit, monkeypatch):
    monkeypatch.setattr(CausalLM, "training_step", lambda *args: pytest.fail("it trains"))
    Path("file").write_text("")
    with pytest.raises(SystemExit, match=r"file/x cannot be created: .*file is not a folder"):
        fit("--export=file/x", recipe="smollm2_dense")
    free = shutil.disk_usage(".")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(SystemExit, match="model needs about 0.0 GB, and 0.0 GB are free"):
        fit("--export=model", recipe="smollm2_dense")


def test_a_run_without_what_is_monitored_is_one_line(fit):
    stopping = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val_loss"]
    with pytest.raises(SystemExit, match="Early stopping conditioned on metric `val_loss`"):
        fit(*stopping, "--trainer.val_check_interval=2", recipe="smollm2_dense")


def test_a_run_that_is_terminated_has_not_succeeded(fit, monkeypatch, capsys):
    step = CausalLM.training_step

    def terminated(*args):
        os.kill(os.getpid(), signal.SIGTERM)  # as a scheduler does
        return step(*args)

    monkeypatch.setattr(CausalLM, "training_step", terminated)
    with pytest.raises(SystemExit) as ended:
        fit("--export=model")
    assert ended.value.code == 143
    assert "ended by SIGTERM, before the run was complete" in capsys.readouterr().err
    assert not Path("model").exists()


@pytest.mark.usefixtures("without_pictures")
def test_the_last_checkpoint_is_that_of_an_earlier_run_or_an_error(fit, monkeypatch, model_folder, caplog):
    step, trained = CausalLM.training_step, []
    monkeypatch.setattr(CausalLM, "training_step", lambda *args: trained.append(1) or step(*args))
    often = "--trainer.val_check_interval=2"
    with pytest.raises(SystemExit, match="no last checkpoint: run .*default_root_dir"):
        fit(often, "--ckpt_path=last")
    assert not trained
    fit(often)
    shutil.copytree(model_folder, "another")  # or the same, moved
    with pytest.warns(
        match="step=2.ckpt is of a run of .*, and this is one of another. Weights are those of the check"
    ):
        # its own folder, version_1, has no checkpoint
        fit(often, "--model.model=another", "--trainer.max_steps=4", "--ckpt_path=last")
    assert "Masks freeze at step 1, as in the run that is resumed" in caplog.text
    assert len(trained) == 4
    assert list(Path("run").rglob("*step=4.ckpt"))


@pytest.mark.usefixtures("without_pictures")
def test_a_full_disk_leaves_the_last_checkpoint(fit, monkeypatch):
    """On another device than temporary files, which Lightning's own writer would copy over ``last.ckpt``."""
    options = ["--trainer.max_steps=4", "--trainer.callbacks+=ModelCheckpoint"]
    options += ["--trainer.callbacks.every_n_train_steps=2", "--trainer.callbacks.save_last=true"]
    options += ["--trainer.callbacks.save_top_k=0"]
    opened, real, rename = [], io.open, os.rename

    def open_or_fill(file, mode="r", *args, **kwargs):
        found = real(file, mode, *args, **kwargs)
        if mode == "wb" and ".ckpt" in str(file) and opened.append(file) is None and len(opened) > 1:
            found.close()
            raise OSError(errno.ENOSPC, "No space left on device")
        return found

    def rename_here(source, target):
        if str(source).startswith(tempfile.gettempdir()) and str(target).endswith(".ckpt"):
            raise OSError(errno.EXDEV, "Invalid cross-device link")
        rename(source, target)

    with monkeypatch.context() as full:
        full.setattr(builtins, "open", open_or_fill)
        full.setattr(io, "open", open_or_fill)
        full.setattr(os, "rename", rename_here)
        with pytest.raises(SystemExit, match="No space left on device"):
            fit(*options)
    (last,) = Path("run").rglob("*ckpt*")
    assert last.name == "last.ckpt" and torch.load(last, weights_only=True)["global_step"] == 2
    fit(*options, "--ckpt_path=last")
    assert sorted(torch.load(path, weights_only=True)["global_step"] for path in Path("run").rglob("*.ckpt")) == [2, 4]


def test_an_export_is_complete_or_absent(monkeypatch):
    model = tiny_llama()
    tokenizer = tiny_tokenizer()
    monkeypatch.setattr(type(tokenizer), "save_pretrained", lambda *args: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        export_model(model, tokenizer, "out/model")
    assert list(Path("out").iterdir()) == []


def test_export_of_another_modules_checkpoint_says_what_to_do(tmp_path):
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    with pytest.raises(ValueError, match="was not written by sparse_train's CausalLM"):
        export_checkpoint(tmp_path / "other.ckpt", tmp_path / "out")


def test_an_interrupted_run_says_how_to_go_on(fit, monkeypatch, capsys):
    def interrupt(self, batch, batch_idx):
        raise KeyboardInterrupt

    monkeypatch.setattr(CausalLM, "training_step", interrupt)
    with pytest.raises(SystemExit):
        fit()
    said = capsys.readouterr().err
    assert "sparse-train fit: interrupted at step 0. It has written no checkpoint." in said
