import builtins
import csv
import errno
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from lightning.fabric.utilities.exceptions import MisconfigurationException
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM

from sparse_train.cli import main as cli
from sparse_train.cli.commands import COMMANDS
from sparse_train.cli.evaluate import chosen_device
from sparse_train.export import export_checkpoint, export_model
from sparse_train.models.causal_lm import CausalLM
from tests.conftest import shallow_llama, tiny_llama, tiny_tokenizer

pytestmark = [pytest.mark.filterwarnings("ignore"), pytest.mark.usefixtures("elsewhere")]
ROOT = Path(__file__).parents[2]


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
    assert "| pruned in one shot, without training |" in card and "| Wanda() |" in card
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


def test_documents_are_joined_by_the_separator_of_their_source(model_folder):
    Path("data").mkdir()
    Path("data/test.jsonl").write_text(json.dumps({"text": "abcd"}) + "\n" + json.dumps({"text": "efgh"}))
    text = {"path": "data", "splits": {"test": "test"}}
    for separator, tokens in [({}, 10), ({"separator": " "}, 9)]:
        source = json.dumps({"class_path": "HubText", "init_args": {**text, **separator}})
        with pytest.raises(SystemExit, match=f"has {tokens} tokens"):
            cli.main(["evaluate", str(model_folder), f"--text={source}", "--window=32"])


def test_a_folder_keeps_its_dtype(model_folder, text, capsys):
    AutoModelForCausalLM.from_pretrained(model_folder, dtype=torch.bfloat16).save_pretrained("half")
    AutoTokenizer.from_pretrained(model_folder).save_pretrained("half")
    small = ["--num_calibration_samples=4", "--max_seq_length=32", f"--text={text}"]
    cli.main(["prune", "--model=half", *small, "--mask_structure=2:4", "--out=pruned_half"])
    assert "on cpu" in capsys.readouterr().out
    assert AutoModelForCausalLM.from_pretrained("pruned_half", dtype="auto").dtype == torch.bfloat16
    cli.main(["evaluate", "pruned_half", f"--text={text}", "--window=32", "--max_tokens=640", "--json"])
    assert json.loads(capsys.readouterr().out)["computed_in"] == "bfloat16"


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


def test_a_gpu_is_used_where_there_is_one(monkeypatch):
    assert chosen_device(None) == "cpu" and chosen_device("cpu") == "cpu"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert chosen_device(None) == "cuda" and chosen_device("cpu") == "cpu"


def test_a_distilled_model_names_its_teacher_and_its_report_shows_the_loss_that_was_trained(model_folder, text):
    options = ["--trainer.max_steps=3", "--trainer.log_every_n_steps=1", "--trainer.logger.init_args.save_dir=run"]
    options += ["--data.block_size=32", "--trainer.default_root_dir=run", "--trainer.enable_progress_bar=false"]
    recipe = ["--config=recipes/smollm2_2of4_distill.yaml", f"--model.model={model_folder}", f"--data.text={text}"]
    cli.main(["fit", *recipe, *options, "--export=exported"])
    assert f"| teacher | {model_folder}, dense |" in Path("exported/README.md").read_text()
    rows = csv.DictReader(Path("run/version_0/metrics.csv").read_text().splitlines())
    trained = [f"{float(row['train/loss']):.4g}" for row in rows if row["train/loss"]]
    report = Path("run/version_0/report.html").read_text()
    assert f"{trained[0]} at step 1 to {trained[-1]} at step 3" in report


@pytest.mark.usefixtures("without_pictures")
def test_fit_export_and_resume(model_folder, text, capsys):
    options = [
        "fit",
        "--config=recipes/smollm2_2of4.yaml",
        "--config=configs/precision/float32.yaml",
        f"--model.model={model_folder}",
        f"--data.text={text}",
        "--data.block_size=32",
        "--trainer.max_steps=12",
        "--trainer.val_check_interval=6",
        "--trainer.logger.init_args.save_dir=run",
        "--trainer.default_root_dir=run",
        "--trainer.enable_model_summary=false",
        "--trainer.callbacks.update_freq=4",
        "--trainer.enable_progress_bar=false",
    ]
    cli.main([*options, "--export=exported"])
    assert "exported to exported" in capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained("exported")
    assert set(model.state_dict()) == set(shallow_llama().state_dict())
    card = Path("exported/README.md").read_text()
    assert "updated every 4 steps" in card and "at the last validation" in card
    assert "max_steps: 12" in card[card.index("```yaml") :]
    assert ((model.model.layers[1].mlp.down_proj.weight.reshape(-1, 4) == 0).sum(1) == 2).all()

    metrics = Path("run/version_0/metrics.csv").read_text()
    for name in ("train/loss", "val/perplexity", "sparsity/flip_rate", "sparsity/initial_flip_rate"):
        assert name in metrics
    resolved = yaml.safe_load(Path("run/version_0/config.yaml").read_text())
    assert resolved["trainer"]["max_steps"] == 12

    checkpoint = next(Path("run").rglob("*.ckpt"))
    cli.main(["export", str(checkpoint), "from_checkpoint", f"--tokenizer={model_folder}"])
    assert "updated every 4 steps" in Path("from_checkpoint/README.md").read_text()
    again = AutoModelForCausalLM.from_pretrained("from_checkpoint")
    for key, value in again.state_dict().items():
        assert torch.equal(value, model.state_dict()[key]), key
    assert AutoTokenizer.from_pretrained("from_checkpoint").eos_token_id == 2

    resumed = [*options, "--trainer.max_steps=16", "--trainer.logger.init_args.save_dir=resumed"]
    cli.main([*resumed, f"--ckpt_path={checkpoint}"])
    rows = Path("resumed/version_0/metrics.csv").read_text().splitlines()
    steps = [int(row.split(",")[rows[0].split(",").index("step")]) for row in rows[1:]]
    assert min(steps) == 0 and max(steps) == 15  # the history of the interrupted run is kept

    # a run that is at its end already trains nothing, and is what it was
    cli.main(
        [
            *options,
            "--trainer.logger.init_args.save_dir=end",
            f"--ckpt_path={checkpoint}",
            "--export=ended",
            "--dtype=bfloat16",
        ]
    )
    assert "updated every 4 steps" in Path("ended/README.md").read_text()
    cli.main(["export", str(checkpoint), "half", f"--tokenizer={model_folder}", "--dtype=bfloat16"])
    for folder in ("ended", "half"):
        assert AutoModelForCausalLM.from_pretrained(folder, dtype="auto").dtype == torch.bfloat16
    for folder in ("exported", "from_checkpoint", "ended", "half"):
        cli.main(["inspect", folder, "--verify"])
    assert capsys.readouterr().out.count("every group of its 14 pruned layers has the zeros") == 4
    other = [*options, "--trainer.callbacks.mask_structure=1:4", f"--ckpt_path={checkpoint}"]
    with pytest.raises(SystemExit, match="The checkpoint was written with mask_structure"):
        cli.main([*other, "--trainer.logger.init_args.save_dir=other", "--export=other/model"])
    assert not Path("other/model").exists()

    dense = [option for option in options if "callbacks" not in option]
    dense[1] = "--config=recipes/smollm2_dense.yaml"
    with pytest.raises(SystemExit, match="this run has no DynamicPruning callback"):
        cli.main([*dense, f"--ckpt_path={checkpoint}"])

    for command, metric in (("validate", "val/perplexity"), ("test", "test/perplexity")):
        cli.main([command, *options[1:], f"--ckpt_path={checkpoint}"])
        assert re.search(rf"^{metric}  \d+\.\d{{4}}$", capsys.readouterr().out, re.M)


@pytest.mark.usefixtures("without_pictures")
def test_a_model_that_is_not_kept_is_said(model_folder, text, caplog):
    options = [f"--model.model={model_folder}", f"--data.text={text}", "--data.block_size=32", "--trainer.max_steps=2"]
    folder = ["--trainer.logger.init_args.save_dir=run", "--trainer.default_root_dir=run"]
    late = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=100"]
    cli.main(["fit", "--config=recipes/smollm2_dense.yaml", *options, *folder, *late])
    assert "so the trained model is not kept. Give --export FOLDER" in caplog.text
    caplog.clear()
    cli.main(["fit", "--config=recipes/smollm2_dense.yaml", *options, *folder, *late, "--export=model"])
    assert "not kept" not in caplog.text


def test_a_place_that_cannot_be_written_is_said_before_the_run(model_folder, text, capsys, monkeypatch):
    monkeypatch.setattr(CausalLM, "training_step", lambda *args: pytest.fail("it trains"))
    Path("file").write_text("")
    options = [f"--model.model={model_folder}", f"--data.text={text}", "--data.block_size=32", "--trainer.max_steps=2"]
    with pytest.raises(SystemExit, match=r"file/x cannot be created: .*file is not a folder"):
        cli.main(["fit", "--config=recipes/smollm2_dense.yaml", *options, "--export=file/x"])
    free = shutil.disk_usage(".")._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free)
    with pytest.raises(SystemExit, match="model needs about 0.0 GB, and 0.0 GB are free"):
        cli.main(["fit", "--config=recipes/smollm2_dense.yaml", *options, "--export=model"])


def test_a_run_without_what_is_monitored_is_one_line(model_folder, text):
    options = [f"--model.model={model_folder}", f"--data.text={text}", "--data.block_size=32", "--trainer.max_steps=2"]
    stopping = ["--trainer.callbacks+=EarlyStopping", "--trainer.callbacks.monitor=val_loss"]
    with pytest.raises(SystemExit, match="Early stopping conditioned on metric `val_loss`"):
        cli.main(["fit", "--config=recipes/smollm2_dense.yaml", *options, *stopping, "--trainer.val_check_interval=2"])


def test_a_run_that_is_terminated_has_not_succeeded(model_folder, text, monkeypatch, capsys):
    step = CausalLM.training_step

    def terminated(*args):
        os.kill(os.getpid(), signal.SIGTERM)  # as a scheduler does
        return step(*args)

    monkeypatch.setattr(CausalLM, "training_step", terminated)
    options = [f"--model.model={model_folder}", f"--data.text={text}", "--data.block_size=32", "--trainer.max_steps=2"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["fit", "--config=recipes/smollm2_2of4.yaml", *options, "--export=model"])
    assert ended.value.code == 143
    assert "ended by SIGTERM, before the run was complete" in capsys.readouterr().err
    assert not Path("model").exists()


@pytest.mark.usefixtures("without_pictures")
def test_the_last_checkpoint_is_that_of_an_earlier_run_or_an_error(model_folder, text, monkeypatch):
    step, trained = CausalLM.training_step, []
    monkeypatch.setattr(CausalLM, "training_step", lambda *args: trained.append(1) or step(*args))
    options = [f"--model.model={model_folder}", f"--data.text={text}", "--data.block_size=32"]
    options += ["--trainer.logger.init_args.save_dir=run", "--trainer.default_root_dir=run"]
    options += ["--data.max_validation_blocks=2"]
    command = ["fit", "--config=recipes/smollm2_2of4.yaml", *options, "--trainer.val_check_interval=2"]
    with pytest.raises(SystemExit, match="no last checkpoint: run .*default_root_dir"):
        cli.main([*command, "--trainer.max_steps=2", "--ckpt_path=last"])
    assert not trained
    cli.main([*command, "--trainer.max_steps=2"])
    cli.main([*command, "--trainer.max_steps=4", "--ckpt_path=last"])  # its own folder, version_1, has no checkpoint
    assert len(trained) == 4
    assert list(Path("run/version_1").rglob("*step=4.ckpt"))


def test_a_full_disk_leaves_the_last_checkpoint(model_folder, text, monkeypatch):
    """On another device than temporary files, which Lightning's own writer would copy over ``last.ckpt``."""
    options = [f"--model.model={model_folder}", f"--data.text={text}", "--data.block_size=32"]
    options += ["--trainer.logger.init_args.save_dir=run", "--trainer.default_root_dir=run"]
    options += ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.every_n_train_steps=2"]
    options += ["--trainer.callbacks.save_last=true", "--trainer.callbacks.save_top_k=0"]
    command = ["fit", "--config=recipes/smollm2_2of4.yaml", *options, "--trainer.max_steps=4"]
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
            cli.main(command)
    (last,) = Path("run").rglob("*ckpt*")
    assert last.name == "last.ckpt" and torch.load(last, weights_only=True)["global_step"] == 2
    cli.main([*command, "--ckpt_path=last"])
    assert sorted(torch.load(path, weights_only=True)["global_step"] for path in Path("run").rglob("*.ckpt")) == [2, 4]


def test_an_interruption_is_one_line(monkeypatch, capsys):
    # a shell lets what it runs in the background ignore the signal
    monkeypatch.setattr(cli, "run", lambda *args: signal.default_int_handler(signal.SIGINT, None))
    with pytest.raises(SystemExit) as ended:
        cli.main(["inspect", "x"])
    assert ended.value.code == 130
    assert capsys.readouterr().err == "sparse-train inspect: interrupted.\n"
    with pytest.raises(KeyboardInterrupt):
        cli.main(["inspect", "x", "--debug"])


def short_fit(text, *options):
    cli.main(
        [
            "fit",
            *options,
            f"--data.text={text}",
            "--data.block_size=32",
            "--trainer.max_steps=3",
            "--trainer.val_check_interval=3",
            "--trainer.logger.init_args.save_dir=run",
            "--trainer.default_root_dir=run",
            "--trainer.enable_checkpointing=false",
        ]
    )


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("recipe", ["smollm2_dense", "smollm2_2of4_distill"])
def test_short_fits(model_folder, text, recipe, monkeypatch, capsys):
    monkeypatch.setattr("sparse_train.terminal.SECONDS_BETWEEN_LINES", 0.0)
    short_fit(text, f"--config=recipes/{recipe}.yaml", f"--model.model={model_folder}")
    lines = capsys.readouterr().err.splitlines()  # no terminal: a line for what would be a state of a bar
    assert any(re.fullmatch(r"validation: batch 1/\d+", line) for line in lines)
    assert any(re.match(r"step 3/3, 0:00:00 left, .*val/perplexity \d", line) for line in lines)
    assert ("pruning: 2/2, 00:00 left" in lines) == ("2of4" in recipe)
    metrics = Path("run/version_0/metrics.csv").read_text()
    assert "val/perplexity" in metrics
    assert ("train/loss_kldiv" in metrics) == ("distill" in recipe)


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize(("recipe", "base"), [("lora", "--model.model.base"), ("mask_lora", "--model.model")])
def test_low_rank_fits_export_zeros(model_folder, text, recipe, base):
    options = f"--config=recipes/smollm2_2of4_{recipe}.yaml", f"{base}={model_folder}", "--export=exported"
    short_fit(text, *options)
    model = AutoModelForCausalLM.from_pretrained("exported")
    for name, weight in model.state_dict().items():
        if name.endswith("proj.weight"):
            assert ((weight.reshape(-1, 4) != 0).sum(1) == 2).all(), name
    cli.main(["inspect", "exported", "--verify"])
    assert Path("exported/adapter/adapter_model.safetensors").exists() == (recipe == "lora")
    assert ("| mask_lora | r=8, lora_alpha=16 on 4 of 14" in Path("exported/README.md").read_text()) == (
        recipe != "lora"
    )


def test_help_shows_the_commands(capsys):
    cli.main([])
    usage = capsys.readouterr().out
    assert all(f"\n  {name} " in usage for name in COMMANDS)


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_has_its_form_and_examples(command, capsys):
    with nullcontext() if command in ("fit", "validate", "test") else pytest.raises(SystemExit, match="0"):
        cli.main([command, "--help"])
    shown = capsys.readouterr().out
    places = "".join(f"{name.upper()} " for name in COMMANDS[command].positional)
    assert shown.startswith(f"usage: sparse-train {command} {places}")
    assert shown.endswith(f"example:\n  {COMMANDS[command].example}\n")


def test_help_of_fit_names_options_that_there_are(capsys):
    cli.main(["fit", "--help"])
    page = capsys.readouterr().out
    own = set(re.findall(r"^  (--[\w.]+)", page, re.M)) - {"--text", "--json"}  # which the parser does not see
    assert len(own) > 10
    with pytest.raises(SystemExit):
        cli.main(["fit", "--help", "all"])
    listed = capsys.readouterr().out
    assert listed.index("--model.lr ") < listed.index("--data.block_size ") < listed.index("--trainer.max_steps ")
    with pytest.raises(SystemExit):
        cli.main(["fit", "--help", "pruning"])
    listed += capsys.readouterr().out
    assert own <= set(re.findall(r"--[\w.]+", listed))


@pytest.mark.parametrize("arguments", [["--help"], ["fit", "--help"]])
def test_help_waits_for_no_library(arguments):
    heavy = "{'torch', 'lightning', 'transformers', 'jsonargparse', 'datasets'}"
    script = (
        f"import sys; from sparse_train.cli import main; main.main({arguments}); assert not {heavy} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL, env={"PYTHONPATH": str(ROOT)})


def test_an_unknown_command(capsys):
    with pytest.raises(SystemExit) as error:
        cli.main(["prun"])
    assert error.value.code == 2
    assert "there is no command 'prun'. Did you mean 'prune'" in capsys.readouterr().err


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
    samples = ["--num_calibration_samples=4", "--max_seq_length=32", "--window=32"]
    cli.main(["prune", str(model_folder), "pruned", "--text", "notes", "--perplexity", "notes/b.jsonl", *samples])
    details = json.loads(Path("pruned/pruning.json").read_text())
    assert (details["calibration"]["text"], details["perplexity"]["data"]) == ("b.jsonl, a.txt", "b.jsonl")
    options = ["--data.block_size=32", "--trainer.max_steps=2", "--trainer.default_root_dir=run"]
    options += [f"--model.model={model_folder}", "--trainer.logger.init_args.save_dir=run"]
    cli.main(["fit", "--config=recipes/smollm2_2of4.yaml", "--text", "notes", *options, "--export=trained"])
    text = yaml.safe_load(Path("run/version_0/config.yaml").read_text())["data"]["text"]["init_args"]
    assert (text["train"], text["validation"]) == (["notes/b.jsonl", "notes/inner/a.txt"], [])
    capsys.readouterr()
    cli.main(["validate", "--config=recipes/smollm2_2of4.yaml", "--text", "notes/b.jsonl", *options, "--json"])
    assert json.loads(capsys.readouterr().out)["val/perplexity"] > 1
    for command in (["prune", str(model_folder), "out"], ["fit", f"--model.model={model_folder}"]):
        with pytest.raises(SystemExit, match=r"There is no text at nowhere.txt"):
            cli.main([*command, "--text", "nowhere.txt"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["evaluate", "model", "--text=TextFiles", "--window=32"], "TextFiles has no files"),
        (["evaluate", "model", "--text=TextFiles", "--text.train+=a.txt"], "has no text in its test split"),
        (["export", "nowhere.ckpt", "out"], "There is no checkpoint at nowhere.ckpt"),
        (["evaluate", "model", "--autocast=bf16"], "must name a floating point dtype"),
        (["evaluate", "model", "--autocast=float32"], "autocast computes in bfloat16 or float16, got float32"),
        (["prune", "model", "out", "--autocast=float32"], "autocast computes in bfloat16 or float16, got float32"),
        (["prune", "--model=model", "--out=~/out"], "~ in ~/out was not replaced by a shell"),
        (["evaluate", "no/such-model"], "no/such-model"),
        (["evaluate", "model", "--window=8", "--batch_size=0"], "batch_size must be at least 1, got 0"),
        (["evaluate", "model", "--window=8", "--max_tokens=-1"], "max_tokens must be at least 1, got -1"),
    ],
)
def test_mistakes_are_one_line(arguments, message, model_folder):
    arguments = [str(model_folder) if argument == "model" else argument for argument in arguments]
    with pytest.raises(SystemExit, match="sparse-train") as error:
        cli.main(arguments)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("error", "is_a_line"),
    [
        (MisconfigurationException("no GPU was found"), True),
        (ModuleNotFoundError("No module named 'peft'"), True),
        (RuntimeError("shapes differ"), False),
        (KeyError("text"), False),
    ],
)
def test_what_is_no_bug_is_a_line(error, is_a_line, monkeypatch):
    monkeypatch.setattr(cli, "run", lambda *arguments: (_ for _ in ()).throw(error))
    with pytest.raises(SystemExit if is_a_line else type(error)) as raised:
        cli.main(["fit"])
    assert not is_a_line or str(raised.value) == f"sparse-train fit: {error}"
    with pytest.raises(type(error)):
        cli.main(["fit", "--debug"])


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
