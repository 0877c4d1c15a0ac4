"""Each command in a process of its own: with --json stdout is one object, whose names docs/terminal.md lists."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from sparse_train.cli.commands import COMMANDS

ROOT = Path(__file__).parents[2]
# The processes are forks of one that has imported everything: nine imports of it would take a minute.
FORKS = """
import json, os, sys, traceback
from sparse_train.cli import main as cli
from sparse_train.cli.streams import quiet_libraries
quiet_libraries()  # as main does, before it imports them
import sparse_train.cli.lightning_cli, sparse_train.cli.prune, sparse_train.cli.permute, sparse_train.cli.evaluate
from sparse_train.report import page
import transformers.utils.logging, datasets

for name, arguments in json.load(open("commands.json")).items():
    if os.fork() == 0:
        for descriptor, end in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"{name}.{end}", os.O_CREAT | os.O_WRONLY), descriptor)
        if name != "report":  # pictures take longer than the rest of a short fit
            page.curves = lambda *arguments, **settings: ""
        status = 0
        try:
            cli.main(arguments)
        except SystemExit as stop:
            status = 1
            print(stop.code, file=sys.stderr)
        except BaseException:
            status = 2
            traceback.print_exc()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    _, status = os.wait()
    print(name, os.waitstatus_to_exitcode(status))
"""


def commands(model, text):
    small = ["--num_calibration_samples=4", "--max_seq_length=32", f"--text={text}"]
    windows = ["--window=32", "--max_tokens=320"]
    run = [
        "--config=recipes/smollm2_2of4.yaml",
        "--config=configs/precision/float32.yaml",
        f"--model.model={model}",
        f"--data.text={text}",
        "--data.block_size=32",
        "--trainer.max_steps=4",
        "--trainer.val_check_interval=2",
        "--trainer.default_root_dir=run",
        "--pruning.update_freq=2",
        "--pruning.first_mask.criterion=Wanda",
    ]
    taught = ["--model.distillation=Distillation", "--model.distillation.cache=answers"]
    checkpoint = "run/version_0/checkpoints/epoch=0-step=4.ckpt"
    return {
        "fit": ["fit", *run, "--export=exported", "--json"],
        "test": ["test", *run, f"--ckpt_path={checkpoint}", "--json"],
        "validate": ["validate", *run, f"--ckpt_path={checkpoint}", "--json"],
        "cache-teacher": ["cache-teacher", *run, *taught, "--json"],
        "report": ["report", "run/version_0", "--json"],
        "export": ["export", checkpoint, "again", f"--tokenizer={model}", "--json"],
        "permute": ["permute", f"--model={model}", *small, "--out=permuted", "--json"],
        "prune": ["prune", f"--model={model}", *small, "--out=pruned", "--json"],
        "evaluate": ["evaluate", "pruned", f"--text={text}", *windows, "--json"],
        "inspect": ["inspect", "--json", "pruned"],
        "fails": ["fit", *run, "--export=exported", "--json"],
        "plain": ["inspect", "pruned"],
        "plain_prune": ["prune", f"--model={model}", *small, "--out=plain_pruned"],
        "plain_fit": ["fit", *run, "--trainer.default_root_dir=plain_run"],
    }


@pytest.fixture(scope="module")
def done(tmp_path_factory, model_folder, text_file):
    """By name: exit status, stdout, stderr."""
    folder = tmp_path_factory.mktemp("json")
    files = {"train": [str(text_file)], "validation": [str(text_file)], "test": [str(text_file)]}
    text = json.dumps({"class_path": "TextFiles", "init_args": files})
    (folder / "commands.json").write_text(json.dumps(commands(model_folder, text)))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TOKENIZERS_PARALLELISM": "false"}
    ran = subprocess.run([sys.executable, "-c", FORKS], cwd=folder, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    codes = dict(line.split() for line in ran.stdout.splitlines())
    return {
        name: (int(code), *((folder / f"{name}.{end}").read_text() for end in ("out", "err")))
        for name, code in codes.items()
    }


def found(done, name):
    code, out, err = done[name]
    assert code == 0, err
    assert out.count("\n") == 1
    return json.loads(out, parse_constant=pytest.fail)


def test_every_command_is_here(done):
    assert set(done) >= set(COMMANDS)


def documented():
    """Names by what docs/terminal.md has in its first column."""
    names = {}
    for first, second in re.findall(r"^\| ([^|]*) \| (`[^|]*`) \|", (ROOT / "docs" / "terminal.md").read_text(), re.M):
        for where in first.split(", "):
            names.setdefault(where, set()).update(re.findall(r"`(\w+)`", second))
    return names


@pytest.mark.parametrize("name", ["fit", "cache-teacher", "report", "export", "permute", "prune", "inspect"])
def test_names_are_those_of_the_page(name, done):
    names, result = documented(), found(done, name)
    expected = names[name]
    if name == "fit":
        expected = expected | names["in `runs`"]
    assert set(result) == expected
    for rows, where in (("runs", "in `runs`"), ("layers", "in `layers`")):
        if isinstance(result.get(rows), list):
            assert set(result[rows][0]) == names[where]


def test_names_of_evaluate_are_those_of_the_page(done):
    names, result = documented(), found(done, "evaluate")
    assert set(result) == names["evaluate"] - {"zero_shot"}


def test_fit_says_what_came_out(done):
    result = found(done, "fit")
    assert (result["export"], result["report"]) == ("exported", "run/version_0/report.html")
    assert (result["steps"], result["finished"], result["sparsity"]) == (4, True, 0.5)
    assert result["tokens"] == 4 * 4 * 32
    assert 0 < result["initial_flip_rate"] < 1
    assert result["perplexity"] == pytest.approx(found(done, "validate")["val/perplexity"], rel=1e-3)
    assert found(done, "report")["runs"][0] == {key: result[key] for key in documented()["in `runs`"]}


def test_a_teacher_is_asked_what_a_run_will_read(done):
    assert found(done, "cache-teacher")["blocks"] == 4 * 4


def test_an_error_is_on_stderr_and_stdout_empty(done):
    code, out, err = done["fails"]
    assert (code, out) == (1, "")
    assert err.splitlines()[-1].startswith("sparse-train fit: exported exists already")  # after Lightning's lines


@pytest.mark.parametrize("name", ["prune", "evaluate", "inspect", "export", "report"])
def test_nothing_else_is_said(name, done):
    said = {"prune": "reading .*tiny-llama and topics.txt\n", "evaluate": "reading topics.txt\n"}.get(name, "")
    assert re.fullmatch(said, done[name][2])


@pytest.mark.parametrize("name", ["plain", "plain_prune", "plain_fit"])
def test_logs_hold_no_bars_no_frames_and_no_codes(name, done):
    code, out, err = done[name]
    assert code == 0, err
    assert not re.search(r"[\x1b\r\u2500-\u259f]", out + err)
    if name == "plain_fit":
        assert "step: 2/4, " in err and "Tip" not in err
        words = [line.split() for line in out.splitlines()]
        assert [row[0] for row in words[:4]] == ["state", "dense", "after", "at"]
        assert words[3][:4] == ["at", "the", "end", "4"]
        assert words[4][1:3] == ["of", "training,"]
