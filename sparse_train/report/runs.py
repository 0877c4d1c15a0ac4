"""Reads runs: ``run.json`` of the callback ``RunRecord``, and beside it ``metrics.csv`` of Lightning's CSVLogger."""

import csv
import json
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sparse_train.files import reading

RUN_FILE, METRICS = "run.json", "metrics.csv"

Points = list[tuple[int, float]]
"""(optimizer steps done, value), in the order of steps."""

_OWN = ("sparsity/", "layers/", "evaluation/", "zero_shot/")
"""Metrics that this package logs, at the number of steps done."""


@dataclass(frozen=True)
class State:
    """The model at one point of a run. None = not measured."""

    name: str
    """One of "dense" ("without masks", if it had been pruned before), "after the first mask", "at the end", latest."""
    step: int
    perplexity: float | None = None
    loss: float | None = None
    sparsity: float | None = None
    """Share of zeros among the targeted weights, counted on the weights."""


@dataclass(frozen=True)
class Run:
    """One training run."""

    name: str
    folder: Path
    facts: Mapping[str, Any]
    """What is not a metric; ``RunRecord`` lists it."""
    curves: Mapping[str, Points]
    """What ``metrics.csv`` holds of each metric."""
    recipe: str | None
    """Resolved YAML; None if there is none beside the metrics."""

    @property
    def before(self) -> list[State]:
        """The model before training: dense, after the first mask."""
        return [State(**state) for state in self.facts["states"]]

    @property
    def now(self) -> State:
        """The model at the end, or at the latest validation of a run that has not ended."""
        return State(**self.facts["now"])

    def curve(self, name: str | None) -> Points:
        return self.curves.get(name or "", [])

    def training_loss(self) -> Points:
        return self.curve(metric_named("loss", [n for n in self.curves if not n.startswith(("val", "test", *_OWN))]))

    def validation(self, word: str) -> Points:
        """Perplexity or loss in validation, from the first mask on."""
        before = [(state.step, value) for state in self.before if (value := getattr(state, word)) is not None]
        return [*before[-1:], *self.curve(metric_named(word, [name for name in self.curves if name.startswith("val")]))]

    def evaluations(self) -> dict[str, tuple[int, float]]:
        """The last step and value of what ``Evaluation`` callbacks measured, by metric."""
        return {name: self.curves[name][-1] for name in self.curves if name.startswith(("evaluation/", "zero_shot/"))}

    def flips(self) -> Points:
        """Flip rates of the updates after the first mask."""
        return self.curve("sparsity/flip_rate")[1:]


def closing(runs: Sequence[Run]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the summary of runs: dense, after the first mask, at the end; without empty columns."""
    columns: dict[str, list[str]] = defaultdict(list)
    for run in runs:
        for state in [*run.before, run.now]:
            flips = sum(value for step, value in run.flips() if step <= state.step)
            columns["run"].append(run.name if len(runs) > 1 else "")
            columns["state"].append(state.name)
            columns["step"].append(f"{state.step:,}")
            columns["perplexity"].append(_number(state.perplexity, ".2f"))
            columns["loss"].append(_number(state.loss, ".4f"))
            columns["sparsity"].append(_number(state.sparsity, ".4f"))
            columns["flips so far"].append("" if run.now.sparsity is None else f"{flips:.2%}")
    known = {name: cells for name, cells in columns.items() if any(cells)}
    return list(known), [list(row) for row in zip(*known.values(), strict=True)]


def headline(run: Run) -> dict[str, Any]:
    """The main results of one run, for JSON; docs/terminal.md explains them. None = not measured."""
    before = {state.name: state.perplexity for state in run.before}
    updates, since_first = run.flips(), run.curve("sparsity/initial_flip_rate")
    return {
        "name": run.name,
        "folder": str(run.folder),
        "finished": run.facts["finished"],
        "steps": run.facts["step"],
        "seconds": run.facts["seconds"],
        "tokens": run.facts["tokens"],
        "sparsity": run.now.sparsity,
        "flip_rate": updates[-1][1] if updates else None,
        "initial_flip_rate": since_first[-1][1] if since_first else None,
        "perplexity": run.now.perplexity,
        "perplexity_first_mask": before.get("after the first mask"),
        "perplexity_dense": before.get("dense"),
        "evaluation": {name: value for name, (_, value) in run.evaluations().items()},
    }


def metric_named(word: str, names: Sequence[str]) -> str | None:
    """The first name that is ``word`` after its stage ("val/loss"); if there is none, the first that contains it
    ("val/loss_ce")."""
    having = [name for name in names if word in name]
    return next((name for name in having if name.rpartition("/")[2] == word), having[0] if having else None)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


# --- files -----------------------------------------------------------------------------------------------------------


def collect(folders: Sequence[str | Path]) -> list[Run]:
    """Read runs: each from the folder with its ``run.json``, or one above it. ValueError for none or several there.

    A run that was resumed has a folder of each part; the latest holds all of it.
    """
    if not folders:
        raise ValueError("There is no run to report. Name the folder of one, such as runs/smollm2_2of4/version_0.")
    parts = [_find(Path(folder)) for folder in folders]
    paths = [folder.resolve() for folder in parts]
    names = [(path.parent if path.name.startswith("version_") else path).name for path in paths]
    if len(set(names)) < len(names):
        names = [str(folder) for folder in parts]
    return [_read(folder, name) for folder, name in zip(parts, names, strict=True)]


def _find(folder: Path) -> Path:
    records = [folder / RUN_FILE] if (folder / RUN_FILE).exists() else sorted(folder.glob(f"**/{RUN_FILE}"))
    parts = {record.parent: _history(record) for record in records}
    runs = [part for part, own in parts.items() if not any(_continues(each, own) for each in parts.values())]
    if len(runs) > 1:
        raise ValueError(f"{folder} holds {len(runs)} runs: {', '.join(map(str, runs))}. Name those to report.")
    if not runs:
        raise ValueError(
            f"{folder} has no {RUN_FILE}: no run was recorded there. sparse-train fit writes one into the folder of "
            "its logger (such as version_0); your own trainer does with the callback sparse_train.callbacks.RunRecord."
        )
    return runs[0]


def _history(record: Path) -> tuple[Path, str, list[int]]:
    """Of a folder: the one above it, when the run began, and the steps at which it was resumed."""
    with reading(record):
        about = json.loads(record.read_text(encoding="utf-8"))["about"]
        return record.parent.parent, about["begun"], about["resumed at steps"]


def _continues(later: tuple[Path, str, list[int]], own: tuple[Path, str, list[int]]) -> bool:
    """Whether a folder has all of a run that was resumed, and so all of the other one."""
    steps = own[2]
    return later[:2] == own[:2] and len(later[2]) > len(steps) and later[2][: len(steps)] == steps


def _read(folder: Path, name: str) -> Run:
    recipe = folder / "config.yaml"
    curves: dict[str, Points] = defaultdict(list)
    with reading(folder):
        for row in read_metrics(folder / METRICS):
            for metric, value in row.items():
                if metric not in ("step", "epoch"):  # steps of Lightning's are those done, minus 1
                    curves[metric].append((int(row["step"]) + (not metric.startswith(_OWN)), value))
        run = Run(
            name=name,
            folder=folder,
            facts=json.loads((folder / RUN_FILE).read_text(encoding="utf-8")),
            curves=dict(curves),
            recipe=without_homes(recipe.read_text(encoding="utf-8")) if recipe.exists() else None,
        )
        headline(run)  # needs what a record holds
    return run


def read_metrics(path: Path) -> list[dict[str, float]]:
    """Rows of a file of Lightning's CSVLogger in the order of its steps, without empty cells; none without a file."""
    if not path.exists():
        return []
    with path.open(newline="") as file:
        rows = [{name: float(cell) for name, cell in row.items() if cell} for row in csv.DictReader(file)]
    return sorted(rows, key=lambda row: row["step"])


def without_homes(text: str) -> str:
    """``text`` with "~" in place of home folders, which contain user names."""
    own = re.escape(str(Path.home()))
    return re.sub(rf"(?<![\w.~])(?:{own}|/(?:home|Users)/[^/\s'\"]+)(?![\w.-])", "~", text)
