"""Facts about runs in tables: time and memory, settings, environment, and the recipe."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from sparse_train.report.collect import Run
from sparse_train.report.page import Block, Code, Table

NONE = "-"
"""In a table: not measured, or does not exist."""


def costs(runs: Sequence[Run]) -> list[Block]:
    """Time, tokens, memory."""

    def end(run: Run, key: str) -> Any:
        return None if run.end is None else run.end[key]

    def speed(run: Run) -> float | None:
        return end(run, "tokens") / run.seconds if end(run, "tokens") else None

    table = _side_by_side(
        runs,
        {
            "training, wall time": lambda run: f"{run.seconds:,.1f} s",
            "in training steps": lambda run: _share(run, run.seconds - _updating(run) - _validating(run)),
            "in validations": lambda run: _share(run, _validating(run)),
            "in mask updates": lambda run: _share(run, _updating(run)),
            "before: model, first mask, baselines": lambda run: f"{run.starts[0]['prepare_seconds']:,.1f} s",
            "tokens trained on": lambda run: number(end(run, "tokens") or None, ",d"),
            "tokens per second, all included": lambda run: number(speed(run), ",.0f"),
            "peak memory of the process": lambda run: _gib(end(run, "peak_bytes")),
            "peak memory of the accelerator": lambda run: _gib(end(run, "peak_device_bytes")),
        },
    )
    return [
        table,
        "An update scores weights, selects and replaces masks. Recording activations for it counts as part of the "
        "training steps. Tokens include padding; memory is that of rank 0.",
    ]


def _updating(run: Run) -> float:
    return sum(float(update["took"]) for update in run.updates if update["step"] > 0)


def _validating(run: Run) -> float:
    return sum(float(validation["took"]) for validation in run.validations)


def _share(run: Run, seconds: float) -> str:
    return f"{seconds:,.1f} s ({seconds / run.seconds:.1%})" if run.seconds else NONE


def evaluations(runs: Sequence[Run]) -> list[Block]:
    """The last measurements of ``Evaluation`` callbacks; nothing if there are none."""
    names = dict.fromkeys(name for run in runs for name in run.evaluated())
    if not names:
        return []

    def last(name: str) -> Callable[[Run], str]:
        def cell(run: Run) -> str:
            value, step = run.evaluated().get(name, (None, 0))
            return NONE if value is None else f"{value:.4f} at step {step:,}"

        return cell

    protocols = dict.fromkeys(record["protocol"] for run in runs for record in run.evaluations)
    return [_side_by_side(runs, {name: last(name) for name in names}, words=True), *protocols]


def settings(runs: Sequence[Run]) -> Table:
    """Settings of the pruning and the run."""

    def setting(name: str) -> Callable[[Run], str]:
        return lambda run: NONE if run.pruning is None else str(run.pruning.get(name, NONE))

    names = ["mask_structure", "schedule", "allocation", "criterion", "policy", "update_freq", "start_step", "end_step"]
    names += ["window", "memory", "margin", "flip_agreement", "mask_lora", "calibration_batches", "initial_criterion"]
    return _side_by_side(
        runs,
        {
            **{name: setting(name) for name in names},
            "targeted layers": lambda run: NONE if run.pruning is None else f"{len(run.pruning['layers']):,}",
            "targeted weights": lambda run: NONE if run.pruning is None else f"{sum(run.pruning['layers'].values()):,}",
            "updates after the first mask": lambda run: f"{len(run.changes()):,}",
            "steps": lambda run: f"{run.steps:,} of {or_unknown(run.start['total_steps'])}",
            "precision": lambda run: run.start["precision"],
            "ranks": lambda run: str(run.start["ranks"]),
            "seed": lambda run: or_unknown(run.start["seed"]),
        },
        words=True,
    )


def environment(runs: Sequence[Run]) -> Table:
    """Dates, machine, versions."""
    versions = dict.fromkeys(name for run in runs for name in run.start["versions"])

    def version(name: str) -> Callable[[Run], str]:
        return lambda run: run.start["versions"].get(name, NONE)

    return _side_by_side(
        runs,
        {
            "begun (UTC)": lambda run: run.starts[0]["date"].replace("T", " ").removesuffix("+00:00"),
            "resumed at steps": lambda run: ", ".join(f"{s['step']:,}" for s in run.starts[1:]) or NONE,
            "system": lambda run: run.start["machine"]["system"],
            "processor": lambda run: run.start["machine"]["processor"] or NONE,
            "cores, threads": lambda run: f"{run.start['machine']['cores']}, {run.start['machine']['threads']}",
            "memory": lambda run: _gib(run.start["machine"].get("memory_bytes")),
            "accelerators": lambda run: ", ".join(run.start["machine"].get("accelerators", [])) or "none",
            **{name: version(name) for name in versions},
        },
        words=True,
    )


def recipes(runs: Sequence[Run]) -> list[Block]:
    """Resolved YAML of each run."""
    blocks: list[Block] = []
    for run in runs:
        if run.recipe is None:
            blocks.append(of(run, runs) + "Not started by sparse-train fit, so there is no recipe.")
        else:
            blocks += [f"{run.name}:"] if len(runs) > 1 else []
            blocks.append(Code(run.recipe, "yaml"))
    return blocks


def _side_by_side(runs: Sequence[Run], rows: Mapping[str, Callable[[Run], str]], *, words: bool = False) -> Table:
    """One column per run, of words or of numbers; rows that are empty for all runs are left out."""
    filled = [[label, *map(value, runs)] for label, value in rows.items()]
    columns = ["", *(run.name for run in runs)] if len(runs) > 1 else ["", "value"]
    shown = [row for row in filled if set(row[1:]) != {NONE}]
    return Table(columns, shown, words=len(columns) if words else 1)


def of(run: Run, runs: Sequence[Run]) -> str:
    """The beginning of a caption about one of several runs."""
    return f"{run.name}. " if len(runs) > 1 else ""


def number(value: float | None, form: str) -> str:
    """``value`` formatted with ``form``."""
    return NONE if value is None else format(value, form)


def or_unknown(value: Any) -> str:
    """``value`` as text."""
    return "unknown" if value is None else f"{value}"


def _gib(size: int | None) -> str:
    return NONE if size is None else f"{size / 2**30:.2f} GiB"
