"""Code and commands of README and docs, as written."""

import re
import shlex
from pathlib import Path

import pytest
import torch
from transformers import TrainingArguments

from sparse_train import Criterion, Magnitude, prune
from sparse_train.commands import COMMANDS, run_command

from .conftest import VOCABULARY, tiny_llama
from .test_recipes import WithoutObjects, lightning_cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
BLOCKS = [(page.name, *match) for page in PAGES for match in re.findall(r"```(\w+)\n(.*?)```", page.read_text(), re.S)]
COMMAND_LINES = [
    line
    for _, language, block in BLOCKS
    if language == "bash"
    for line in block.splitlines()
    if line.startswith("sparse-train ")
]


@pytest.mark.parametrize("code", [block for _, language, block in BLOCKS if language == "python"])
def test_python_blocks_run(code, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = tiny_llama()
    names = {
        "model": model,
        "batches": list(torch.randint(3, VOCABULARY, (12, 2, 16))),
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
        "make_module": lambda: model,
        "load_checkpoint": _sparse_checkpoint,
        "args": TrainingArguments("run", max_steps=4, report_to=[], use_cpu=True, disable_tqdm=True),
        "dataset": [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, VOCABULARY, (12, 16))],
    }
    exec(compile(code, "block", "exec"), names)
    if "squash(" in code or "prune(" in code:
        weight = model.model.layers[0].mlp.up_proj.weight
        assert ((weight.reshape(-1, 4) == 0).sum(1) == 2).all()
    if "Criterion" in code:
        own = next(v for v in names.values() if isinstance(v, type) and issubclass(v, Criterion) and v is not Criterion)
        prune(model, names["batches"], "2:4", criterion=own())


def _sparse_checkpoint():
    model = tiny_llama()
    prune(model, criterion=Magnitude(), squash=False)
    return {"state_dict": model.state_dict()}


def test_there_are_commands():
    assert {line.split()[1] for line in COMMAND_LINES} == {"fit", *COMMANDS}


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_command_lines_parse(line, monkeypatch):
    monkeypatch.setattr("sys.argv", ["sparse-train"])
    monkeypatch.chdir(ROOT)
    _, command, *options = shlex.split(line)
    if command == "fit":
        lightning_cli.run(["fit", *options], WithoutObjects)
        return
    called = {}
    monkeypatch.setitem(COMMANDS, command, (_recording(COMMANDS[command][0], called), COMMANDS[command][1]))
    run_command(command, options)
    assert called


def _recording(function, called):
    """The same signature, but it only notes its arguments."""
    import functools

    @functools.wraps(function)
    def record(**arguments):
        called.update(arguments)

    return record


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
