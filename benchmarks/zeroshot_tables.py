"""The tables of docs/results.md on zero-shot accuracy, made from benchmarks/zeroshot.csv.

python benchmarks/zeroshot_tables.py             # print them
python benchmarks/zeroshot_tables.py --write     # put them into docs/results.md

A paired difference compares two models on the same items: it is the mean change per item, and has a smaller standard
error than the difference of two accuracies. Errors are over items, for fixed models: another training seed is another
model, with its own row.
"""

import math
import statistics
from collections import defaultdict
from pathlib import Path

import rows

ROOT = Path(__file__).parent.parent
CSV, PAGE = ROOT / "benchmarks" / "zeroshot.csv", ROOT / "docs" / "results.md"
BEGIN, END = "<!-- zeroshot -->", "<!-- /zeroshot -->"
ARMS = {
    "dense": "dense, untrained",
    "magnitude": "magnitude, one-shot",
    "sparsegpt": "SparseGPT, one-shot",
    "wanda": "Wanda, one-shot",
    "static": "static Wanda mask",
    "dynamic": "re-pruned",
}
TASKS = {
    "boolq": "BoolQ",
    "rte": "RTE",
    "hellaswag": "HellaSwag",
    "winogrande": "WinoGrande",
    "arc_easy": "ARC-e",
    "arc_challenge": "ARC-c",
    "openbookqa": "OBQA",
}
GUESSING = {**dict.fromkeys(TASKS, 25.0), "boolq": 50.0, "rte": 50.0, "winogrande": 50.0}
"""Accuracy of random choices, in percent; a few questions of ARC have three or five choices instead of four."""

Model = dict[str, dict[str, str]]
"""The rows of one model, by task."""
Value = tuple[float, float | None]
"""A number and its standard error."""


def tables(path: Path = CSV) -> str:
    """All tables, as Markdown: one for each way of measuring that has rows."""
    found: dict[tuple[str, ...], dict[tuple[str, ...], Model]] = defaultdict(lambda: defaultdict(dict))
    data: dict[tuple[str, ...], dict[str, str]] = defaultdict(dict)
    for row in rows.read(path):
        way = tuple(row[name] for name in ("model", "limit", "metric", "num_fewshot", "protocol"))
        way += (str(".jsonl" in row["data"]),)  # files, or the hub's
        run = tuple(row[name] for name in ("arm", "seed", "steps", "lr", "calibration"))
        found[way][run][row["task"]] = row
        if data[way].setdefault(row["task"], row["data"]) != row["data"]:
            raise ValueError(
                f"{path} has {row['task']} from {row['data']} and {data[way][row['task']]}: not one table."
            )
    parts = [_table(way, models, data[way]) for way, models in found.items()]
    return "\n".join(parts or ["Not measured yet.\n"])


def paired(first: Model, second: Model) -> dict[str, Value]:
    """First minus second, item by item, for each task, and their "mean", in points."""
    differences: dict[str, Value] = {}
    for task in TASKS:
        ours, theirs = first[task]["items"], second[task]["items"]
        changes = [100.0 * (int(a) - int(b)) for a, b in zip(ours, theirs, strict=True)]
        error = statistics.stdev(changes) / math.sqrt(len(changes)) if len(changes) > 1 else None
        differences[task] = statistics.fmean(changes), error
    return differences | {"mean": _mean(list(differences.values()))}


def accuracies(model: Model) -> dict[str, Value]:
    """Accuracy on each task, and their "mean", in percent."""
    found: dict[str, Value] = {}
    for task in TASKS:
        row = model[task]
        found[task] = 100 * float(row["accuracy"]), 100 * float(row["stderr"]) if row["stderr"] else None
    return found | {"mean": _mean(list(found.values()))}


def _mean(values: list[Value]) -> Value:
    """Mean in which each task has the same weight, whatever its number of items."""
    errors = [error for _, error in values if error is not None]
    error = math.hypot(*errors) / len(values) if len(errors) == len(values) else None
    return statistics.fmean(value for value, _ in values), error


def _table(way: tuple[str, ...], models: dict[tuple[str, ...], Model], data: dict[str, str]) -> str:
    model, limit, metric, shots, protocol, _ = way
    whole = {run: rows_of for run, rows_of in models.items() if rows_of.keys() == TASKS.keys()}
    ordered = sorted(whole, key=lambda run: (list(ARMS).index(run[0]), run[1:]))
    asked = f"the first {limit} items of each task" if limit else "all items"
    head = (
        f"{model}; {asked}; {shots} examples in the prompt; `{metric}`, percent ± standard error over items; items: "
        f"{'; '.join(dict.fromkeys(data.values()))}; {protocol}. Pruned models are 2:4, unless a sparsity is given."
    )
    lines = [_line("random choice", {**{t: (v, None) for t, v in GUESSING.items()}, **_chance()})]
    lines += [_line(_label(run, whole[run]["boolq"]["sparsity"]), accuracies(whole[run])) for run in ordered]
    for run in ordered:
        for other in ordered:
            if run[0] == "dynamic" and other[0].startswith("static") and run[1:3] == other[1:3]:
                label = (
                    f"{ARMS[run[0]]} minus {ARMS[other[0]]}, seed {run[1]}, {run[2]} steps, learning rates {run[3]} "
                )
                label += f"and {other[3]}, paired"
                lines.append(_line(label, paired(whole[run], whole[other]), signed=True))
    return f"{head}\n\n" + rows.table(["model", *TASKS.values(), "mean"], lines)


def _chance() -> dict[str, Value]:
    return {"mean": (statistics.fmean(GUESSING.values()), None)}


def _label(run: tuple[str, ...], sparsity: str) -> str:
    arm, seed, steps, lr, calibration = run
    trained = f", {steps} steps, learning rate {lr}, seed {seed}" if steps != "0" else ""
    calibrated = f", {calibration}, seed {seed}" if calibration else ""
    expected = 0.0 if arm.startswith("dense") else 0.5
    sparse = "" if abs(float(sparsity) - expected) < 0.01 else f", sparsity {float(sparsity):.2f}"
    return f"{ARMS[arm]}{trained}{calibrated}{sparse}"


def _line(label: str, values: dict[str, Value], *, signed: bool = False) -> list[str]:
    return [label, *(_cell(values[name], signed) for name in (*TASKS, "mean"))]


def _cell(value: Value, signed: bool) -> str:
    number, error = value
    shown = f"{number:+.1f}" if signed else f"{number:.1f}"
    return shown if error is None else f"{shown} ± {error:.1f}"


if __name__ == "__main__":
    rows.print_or_write(tables(), PAGE, BEGIN, END)
