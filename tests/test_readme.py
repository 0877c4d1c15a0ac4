"""Code and commands of README and docs are run, on tiny models and few steps.

With SPARSE_TRAIN_DOCS=full all of them run as they are written; only what other commands would have left is tiny then.
A page marks what cannot run here with ``<!-- needs: hub -->`` (or gpu) before the block: such commands are parsed.
"""

import functools
import json
import os
import re
import runpy
import shlex
import shutil
import sys
from contextlib import nullcontext
from dataclasses import dataclass
from importlib import import_module
from itertools import pairwise, takewhile
from pathlib import Path

import lightning
import pytest
import torch
from jsonargparse import auto_parser
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, TrainingArguments

from sparse_train import Criterion, Magnitude, MaskUpdater, prune
from sparse_train.cli.commands import COMMANDS
from sparse_train.cli.main import OF_RECIPES, main, run
from tests.conftest import VOCABULARY, shallow_llama, tiny_llama, without_pictures
from tests.test_recipes import BASE, WithoutObjects, lightning_cli

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
SPLITS = ("train", "validation", "test")
FULL = os.environ.get("SPARSE_TRAIN_DOCS") == "full"


@dataclass(frozen=True)
class Block:
    page: str
    mark: str
    """What stands before it in a comment: "needs: hub", "file: NAME" or nothing."""
    language: str
    text: str

    @property
    def code(self) -> str:
        """Of a diff, what it leads to."""
        if self.language != "diff":
            return self.text
        return "".join(line[1:] or "\n" for line in self.text.splitlines(keepends=True) if not line.startswith("-"))


BLOCKS = [
    Block(page.name, mark, language, text.replace(" \\\n ", ""))  # commands over several lines
    for page in PAGES
    for mark, language, text in re.findall(
        r"(?:<!-- ((?:needs|file): \S+) -->\n)?```(\w+)\n(.*?)```", page.read_text(), re.S
    )
]
COMMAND_LINES = {command.example: "" for command in COMMANDS.values()} | {
    line: block.mark
    for block in BLOCKS
    if block.language == "bash"
    for line in block.text.splitlines()
    if line.startswith("sparse-train ")
}
"""Those of the pages and of every command's help, and their marks."""


def _lines_to_run():
    """Without those that only combine what others have: each word, in which numbers and folders of runs are alike."""
    found, seen = [], set()
    for line in sorted((line for line, mark in COMMAND_LINES.items() if not mark), key=lambda line: -len(line.split())):
        command, *words = shlex.split(line.removeprefix("sparse-train "))
        alike = {(command, re.sub(r"^[\d.]+$", "N", re.sub(r"runs/\S+", "runs/x", word))) for word in words}
        if FULL or not alike <= seen:
            found.append(line)
            seen |= alike
    return found


def named(blocks):
    return [pytest.param(block, id=f"{block.page}-{i}") for i, block in enumerate(blocks)]


@pytest.fixture
def elsewhere(monkeypatch, tmp_path):
    """A folder with the files that the pages tell the reader to write, and modules among them found."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.argv", ["sparse-train"])
    monkeypatch.setattr("sys.path", [str(tmp_path), *sys.path])
    for block in BLOCKS:
        if block.mark.startswith("file: "):
            Path(block.mark.removeprefix("file: ")).write_text(block.text)


class Trainer(lightning.Trainer):
    """A quiet one, of few steps."""

    def __init__(self, **arguments):
        quiet = {"accelerator": "cpu", "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
        super().__init__(**arguments | quiet | ({} if FULL else {"max_steps": 12}))


class Module(lightning.LightningModule):
    """The reader's own."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def training_step(self, batch):
        return self.model(input_ids=batch, labels=batch).loss

    test_step = training_step

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("block", named(block for block in BLOCKS if block.language in ("python", "diff")))
def test_python_blocks_run(block, elsewhere, monkeypatch, model_folder, text_file):
    monkeypatch.setattr(lightning, "Trainer", Trainer)
    model, code = tiny_llama(), block.code
    batches = list(torch.randint(3, VOCABULARY, (12, 2, 16)))
    names = {
        "L": lightning,
        "module": Module(model),
        "data": DataLoader(torch.cat(batches), batch_size=2),
        "model": model,
        "batches": batches,
        "optimizer": torch.optim.AdamW(model.parameters(), lr=1e-3),
        "Lit": type("Lit", (Module,), {"__init__": lambda self: Module.__init__(self, model)}),
        "make_model": lambda: model,
        "saved": _saved_loop() if "saved[" in code else None,
        "args": TrainingArguments("run", max_steps=4, report_to=[], use_cpu=True, disable_tqdm=True),
        "dataset": [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, VOCABULARY, (12, 16))],
    }
    if "best.ckpt" in code:
        _save_checkpoint()
    if "my_model" in code:
        shutil.copytree(model_folder, "my_model")
        shutil.copy(text_file, "my_text.txt")
    exec(compile(code, "block", "exec"), names)
    if any(word in code for word in ("squash(", "prune(", "fit(")):
        used = names["model"] if "my_model" in code else model
        weight = used.model.layers[0].mlp.up_proj.weight
        assert (weight == 0).float().mean() == 0.5
        assert ((weight.reshape(-1, 4) == 0).sum(1) == 2).all() != ('"unstructured"' in code)
    if "saved[" in code:
        assert names["updater"].steps == 7 and names["updater"].sparsity == 0.5
    if "(Criterion)" in code:
        own = next(v for v in names.values() if isinstance(v, type) and issubclass(v, Criterion) and v is not Criterion)
        prune(model, names["batches"], "2:4", criterion=own())


def _saved_loop():
    model = tiny_llama()
    updater = MaskUpdater(model, "2:4", update_freq=10, total_steps=100)
    for _ in range(7):  # the first mask, and two steps more
        model(input_ids=torch.randint(3, VOCABULARY, (2, 16)))
        updater.step()
    return {"model": model.state_dict(), "updater": updater.state_dict()}


def _save_checkpoint():
    module = Module(tiny_llama())
    prune(module, criterion=Magnitude(), squash=False)
    torch.save({"state_dict": module.state_dict(), "pytorch-lightning_version": lightning.__version__}, "best.ckpt")


@pytest.mark.parametrize("block", named(block for block in BLOCKS if block.language == "yaml" and not block.mark))
def test_yaml_blocks_are_overlays(block, elsewhere, tmp_path):
    (tmp_path / "overlay.yaml").write_text(block.text)
    lightning_cli.run(["fit", f"--config={BASE}", f"--config={tmp_path / 'overlay.yaml'}"], WithoutObjects)


def test_there_are_commands_and_few_are_not_run():
    assert {line.split()[1] for line in COMMAND_LINES} == set(COMMANDS)
    marked = [mark for mark in COMMAND_LINES.values() if mark]
    files = {"file: my_scores.py", "file: my_task.yaml"}
    assert {block.mark for block in BLOCKS} <= {"", "needs: hub", "needs: gpu", "needs: nodes", *files}
    assert 4 * len(marked) <= len(COMMAND_LINES)


def test_other_commands_are_known():
    """Lines of pages that no test runs: pip's and make's name what there is, and the rest is this."""
    bash = "\n".join(block.text for block in BLOCKS if block.language == "bash" and not block.mark)
    others = [line for line in bash.splitlines() if line and not line.startswith("sparse-train ")]
    known = r"(uv )?pip install|uv venv |make \w|export MALLOC_|\. \.v|python (-m pytest tests|examples)/|ruff check"
    known += r"|TASKS=|lm_eval "
    assert not [line for line in others if not re.match(known, line) and line not in BENCHMARKS]
    targets = re.findall(r"^make (\w+)", bash, re.M)
    assert targets and set(targets) <= set(re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M))
    extras = re.findall(r"pip install '\.\[(\w+)\]'", bash)
    assert extras and set(extras) <= set(re.findall(r"^(\w+) = \[", (ROOT / "pyproject.toml").read_text(), re.M))


@pytest.mark.parametrize("line", [line for line, mark in COMMAND_LINES.items() if mark])
def test_command_lines_that_cannot_run_here_parse(line, elsewhere, monkeypatch):
    for name in ("my_text.txt", "held_out.txt"):
        Path(name).write_text("")
    _, command, *options = shlex.split(line)
    if command in OF_RECIPES:
        options = [option for option in options if option != "--json"]  # which main reads
        lightning_cli.run([command, *options], WithoutObjects)
        return
    called, module = {}, import_module(f"sparse_train.cli.{command}")
    monkeypatch.setattr(module, command, _recording(getattr(module, command), called))
    run(command, options)
    assert called


BENCHMARKS = [
    line for block in BLOCKS if block.language == "bash" for line in block.text.splitlines() if "benchmarks/" in line
]


def test_there_are_benchmark_lines():
    assert len(BENCHMARKS) >= 5


@pytest.mark.parametrize("line", BENCHMARKS)
def test_benchmark_lines_parse(line, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    words = shlex.split(line, comments=True)
    script = next(word for word in words if word.startswith("benchmarks/"))
    options = words[words.index(script) + 1 :]
    module = runpy.run_path(str(ROOT / script))
    if options == ["--write"]:  # the scripts that put tables into pages
        assert module["tables"] and "--write" in module["__doc__"]
    else:
        auto_parser(module["main"], as_positional=False).parse_args(options)


def _recording(function, called):
    """The same signature, but it only notes its arguments."""

    @functools.wraps(function)
    def record(**arguments):
        called.update(arguments)

    return record


@pytest.fixture(scope="session")
def left_behind(tmp_path_factory, model_folder, text_file) -> Path:
    """What commands before the one on a page would have left: a pruned model, and a run with a checkpoint."""
    folder = tmp_path_factory.mktemp("left_behind")
    with pytest.MonkeyPatch.context() as patch, without_pictures():
        patch.chdir(folder)
        patch.setattr("sys.argv", ["sparse-train"])
        small = _small("fit", [], model_folder, text_file)
        main(["fit", "--config=recipes/smollm2_2of4.yaml", *small, "--export=model"])
    (folder / "runs" / "smollm2_2of4" / "version_0").rename(folder / "run")
    (folder / "run" / "report.html").unlink()  # for lines with "report" to write
    return folder


def _prepare(command, options, left_behind, text_file):
    """Put the files that a command reads where it looks for them."""
    positional = list(takewhile(lambda option: not option.startswith("-"), options))
    kind = {"evaluate": "model", "inspect": "model", "report": "run"}.get(command)
    for path in positional if kind else ():
        shutil.copytree(left_behind / kind, path)
    if command == "export" and not positional[0].endswith(".ckpt"):
        shutil.copytree(left_behind / "run", positional[0])
    checkpoints = [path for path in options if path.endswith(".ckpt")]
    for path in map(Path, checkpoints):
        path.parent.mkdir(parents=True)
        shutil.copy(next(left_behind.rglob("*.ckpt")), path)
    for name in ("my_text.txt", "held_out.txt"):
        shutil.copy(text_file, name)
    question = {"query": "Question: What measures length?", "choices": ["a scale", "a ruler"], "gold": 1}
    Path("my_items.jsonl").write_text(f"{json.dumps(question)}\n" * 3)


def _small(command, options, model_folder, text_file, pruned="") -> list[str]:
    """Options behind those of a page that leave its command as it is, on a tiny model and a few tokens."""
    text = json.dumps({"class_path": "TextFiles", "init_args": {split: [str(text_file)] for split in SPLITS}})
    short = ["--window=32", "--max_tokens=640"]
    if command in OF_RECIPES:
        measured = [f"--trainer.callbacks.text={text}", "--trainer.callbacks.window=32"]
        from_zeros = [f"--model.model={pruned}", f"--model.distillation.teacher={model_folder}"]
        return [
            *(from_zeros if "FromZeros" in options else [f"--model.model={model_folder}"]),
            f"--data.text={text}",
            "--data.block_size=32",
            "--trainer.max_steps=6",
            "--trainer.val_check_interval=3",
            "--trainer.enable_progress_bar=false",
            "--trainer.enable_model_summary=false",
            *(measured if "Evaluation" in options else ()),
        ]
    if command in ("prune", "permute"):
        own_text = () if "--text" in options else (f"--text={text}",)
        return [f"--model={model_folder}", *own_text, "--num_calibration_samples=4", "--max_seq_length=32"]
    if command == "evaluate" and "my_task.yaml" not in options:
        return [*short, *(() if "--text" in options else (f"--text={text}",))]
    return []


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("line", _lines_to_run())
def test_command_lines_run(line, elsewhere, left_behind, model_folder, text_file):
    _, command, *options = shlex.split(line)
    _prepare(command, options, left_behind, text_file)
    before = _files()
    with without_pictures() if command == "fit" and not FULL else nullcontext():
        small = () if FULL else _small(command, options, model_folder, text_file, left_behind / "model")
        main([command, *options, *small])
    places = {"prune": ("model", "out"), "permute": ("model", "out"), "export": ("checkpoint", "out")}.get(command, ())
    out = [folder for name, folder in pairwise(options) if name in ("--out", "--export")]
    out += [folder for name, folder in zip(places, options, strict=False) if name == "out" and options[0][0] != "-"]
    assert all(any(Path(folder) in path.parents for path in _files() - before) for folder in out)
    assert command in ("inspect", "evaluate", "validate", "test") or _files() - before


def _files() -> set[Path]:
    return {path for path in Path().rglob("*") if path.is_file()}


def test_a_criterion_in_ten_lines(elsewhere, model_folder, text_file):
    """The file of the page as it stands, found by its name, decides what is pruned."""
    block = next(block for block in BLOCKS if block.mark == "file: my_scores.py")
    lines = [line for line in block.text.splitlines() if line.strip()]
    assert len(lines) <= 10
    options = ["--criterion=my_scores.SoftWanda", "--criterion.power=0", "--out=out", "--mask_structure=2:4"]
    main(["prune", *options, *_small("prune", options, model_folder, text_file)])
    by_magnitude = shallow_llama()
    prune(by_magnitude, criterion=Magnitude())  # to the power of 0, inputs do not count
    found = AutoModelForCausalLM.from_pretrained("out")
    assert all(torch.equal(a, b) for a, b in zip(found.parameters(), by_magnitude.parameters(), strict=True))


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\((?!http)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name}: {target}"
