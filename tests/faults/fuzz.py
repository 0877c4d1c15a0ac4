"""Mistakes at random on the command line and in recipes: ``python -m tests.faults.fuzz 10000``, or fewer.

Each runs in this process up to where weights would be loaded or trained. It may end with exit status 0, if it is no
mistake, or with 1 or 2 and a message. All else, above all a traceback, is a fault, and is printed with its seed.
"""

import contextlib
import io
import json
import os
import random
import shlex
import sys
import tempfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import lightning as L
import yaml

from sparse_train.cli import prune
from sparse_train.cli.main import main
from sparse_train.models.sources import Pretrained
from tests.conftest import tiny_llama, tiny_tokenizer

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))
VALUES = [
    *("", "x", "null", "true", "nan", ".nan", ".inf", "-.inf", "inf", "-1", "0", "1", "0.5", "1.5", "1e-320", "1e400"),
    *("9" * 30, "-" + "9" * 30, "2:4", "4:2", "0:4", "2:0", "2:4:8", "[]", "{}", "[1, 2]", "[[]]", "{a: 1}", "{1: 2}"),
    *("{class_path: x}", "{class_path: Wanda, init_args: 3}", "{class_path: [Wanda]}", "Wanda", "Regrow", "OWL"),
    *(
        "FirstWindow",
        "torch.nn.Linear",
        "os.system",
        "!!python/object/apply:os.system [x]",
        "&a [*a]",
        "*a",
        "- -",
        ":",
    ),
    *("[", "{", '"', "\u00e9\u2603", "a" * 5000, "../x", "~", "/dev/null", "2020-01-01", "1_000", "0x10"),
]
OPTIONS = {
    "fit": [
        *(f"--trainer.{name}" for name in ("max_steps", "accumulate_grad_batches", "val_check_interval", "precision")),
        *(
            f"--trainer.{name}"
            for name in ("log_every_n_steps", "limit_val_batches", "devices", "strategy", "callbacks")
        ),
        "--pruning",
        *(f"--trainer.{name}" for name in ("max_epochs", "gradient_clip_val", "max_time", "check_val_every_n_epoch")),
        *(f"--pruning.{name}" for name in ("mask_structure", "sparsity", "update_freq", "policy")),
        *(f"--pruning.{name}" for name in ("schedule", "start_step", "end_step", "window")),
        *(f"--pruning.{name}" for name in ("norm_decay", "targets", "ignore", "first_mask")),
        *("--model.lr", "--model.warmup_steps", "--model.distillation", "--model.model", "--data.text", "--ckpt_path"),
        *("--data.block_size", "--data.batch_size", "--data.hold_out", "--seed_everything", "--export", "--config"),
    ],
    "prune": [
        *("--mask_structure", "--sparsity", "--criterion", "--distribution", "--targets", "--ignore", "--sampling"),
        *("--num_calibration_samples", "--max_seq_length", "--batch_size", "--seed", "--seeds", "--device"),
        *("--streaming", "--activations", "--text", "--config"),
    ],
    "evaluate": [
        "--tasks",
        "--limit",
        "--text",
        "--split",
        "--window",
        "--stride",
        "--bos",
        "--batch_size",
        "--device",
    ],
    "inspect": ["--model", "--config", "--json"],
    "export": ["--checkpoint", "--out", "--tokenizer"],
    "report": ["--runs", "--out"],
}


def mistake(chance: random.Random, model: Path, text: Path) -> list[str]:
    """A command line with one to three mistakes; a recipe with mistakes is written to the current folder."""
    command = chance.choice(["fit"] * 4 + ["prune"] * 3 + ["evaluate", "inspect", "export", "report"])
    places = {"prune": ["out"], "export": ["out"]}.get(command, [])
    if command == "fit":
        recipe = chance.choice([path for path in RECIPES if "\ntrainer:" in path.read_text()])
        written = broken(chance, recipe.read_text()) if chance.random() < 0.5 else recipe.read_text()
        Path("recipe.yaml").write_text(written)
        files = {"class_path": "TextFiles", "init_args": {"train": [str(text)], "validation": [str(text)]}}
        own = [f"--model.model={model}", f"--data.text={json.dumps(files)}", "--trainer.accelerator=cpu"]
        words = ["--config=recipe.yaml", *own]
    else:
        words = [str(model), *places]
        if command == "prune" and chance.random() < 0.3:
            recipe = chance.choice([path for path in RECIPES if "\ntrainer:" not in path.read_text()])
            Path("recipe.yaml").write_text(broken(chance, recipe.read_text()))
            words.append("--config=recipe.yaml")
        words += [f"--text={text}"] if command in ("prune", "evaluate") else []
    for _ in range(chance.randint(1, 3)):
        option, value = chance.choice(OPTIONS[command]), chance.choice(VALUES)
        if chance.random() < 0.1:
            option = option[: chance.randrange(2, len(option) + 1)] + chance.choice(["", "x", "+", ".a", "."])
        given = [f"{option}={value}"] if chance.random() < 0.8 else [option, value] if value else [option]
        at = chance.randrange(len(words) + 1) if chance.random() < 0.1 else len(words)
        words[at:at] = given
    return [command, *words]


def broken(chance: random.Random, recipe: str) -> str:
    """A recipe in which an entry is replaced, renamed, added or left out, or a line is."""
    if chance.random() < 0.3:
        lines = recipe.splitlines()
        at = chance.randrange(len(lines))
        lines[at] = chance.choice(
            ["", " " + lines[at], lines[at][2:], lines[at] + chance.choice(VALUES), "\t", lines[at][:-2]]
        )
        return "\n".join(lines)
    content = yaml.safe_load(recipe)
    inner, key = chance.choice(list(_entries(content)))
    with contextlib.suppress(yaml.YAMLError):  # a value that is no YAML by itself
        found = yaml.safe_load(chance.choice(VALUES))
        kind = chance.randrange(4)
        if kind == 0 and isinstance(inner, dict):
            inner[f"{key}x"] = inner.pop(key)
        elif kind == 1 and isinstance(inner, dict):
            inner[found if isinstance(found, str | int | float) else "x"] = found
        elif kind == 2:
            del inner[key]
        else:
            inner[key] = found
    return yaml.safe_dump(content)


def _entries(content: Any) -> Iterator[tuple[Any, Any]]:
    inner = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in inner:
        yield content, key
        yield from _entries(value)


def fault(words: list[str]) -> str | None:
    """What is wrong with the end of a command that may be a mistake; None if nothing is."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
            main(words)
    except SystemExit as end:
        code = 1 if isinstance(end.code, str) else end.code or 0
        if code not in (0, 1, 2):
            return f"exit status {code}"
    except BaseException as error:
        return f"{type(error).__name__}: {error}"[:300]
    return "it has printed a traceback" if "Traceback" in said.getvalue() else None


@contextlib.contextmanager
def without_work() -> Iterator[tuple[Path, Path]]:
    """Commands end where work would begin. Gives a model folder and a text, and a current folder of its own."""
    ends = mock.Mock(side_effect=SystemExit(0))
    patches = [mock.patch.object(L.Trainer, name, ends) for name in ("fit", "validate", "test")]
    patches += [mock.patch.object(Pretrained, "load", ends), mock.patch.object(prune, "model_without_weights", ends)]
    before = Path.cwd()
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for patch in patches:
            stack.enter_context(patch)
        stack.enter_context(mock.patch.object(sys, "argv", ["sparse-train"]))
        stack.enter_context(mock.patch.dict(os.environ))
        model, text = Path(folder) / "model", Path(folder) / "text.txt"
        tiny_llama(num_hidden_layers=1).save_pretrained(model)
        tiny_tokenizer().save_pretrained(model)
        text.write_text("One sentence after the other makes a text. " * 200)
        (Path(folder) / "here").mkdir()
        os.chdir(Path(folder) / "here")
        try:
            yield model, text
        finally:
            os.chdir(before)


def faults(seeds: range) -> Iterator[tuple[int, list[str], str]]:
    with without_work() as (model, text):
        for seed in seeds:
            words = mistake(random.Random(seed), model, text)
            if found := fault(words):
                yield seed, words, found


if __name__ == "__main__":
    first, last = ([0, *map(int, sys.argv[1:])])[-2:]
    number = 0
    for seed, words, found in faults(range(first, last)):
        number += 1
        print(f"seed {seed}: {shlex.join(words)[-400:]}\n    {found}", flush=True)
    print(f"{last - first} command lines, {number} faults")
