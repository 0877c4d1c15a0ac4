"""The report of one training run, or of several side by side, from their records."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sparse_train.report import facts, figures
from sparse_train.report.collect import Record, Run, collect
from sparse_train.report.page import Block, Page, Section, Table, write_page


def write_run_report(folders: Sequence[str | Path], out: str | Path | None = None) -> Path:
    """Write ``report.html``, ``report.md`` and its pictures; returns the HTML file.

    Args:
        folders: of the runs, see ``collect``.
        out: folder to write to; default: that of the run; for several runs, ``report`` in the current folder.

    Raises:
        ValueError: a folder without the records of a run, see ``collect``.
    """
    runs = collect(folders)
    if out is None:
        out = runs[0].folder if len(runs) == 1 else "report"
    return write_page(run_page(runs), Path(out))


def run_page(runs: Sequence[Run]) -> Page:
    """The page about ``runs``."""
    title = f"Sparse training: {runs[0].name}" if len(runs) == 1 else f"Sparse training: {len(runs)} runs"
    sections = [
        Section("Perplexity and loss", _curves(runs)),
        *([Section("Evaluation", evaluated)] if (evaluated := facts.evaluations(runs)) else []),
        Section("Masks", _masks(runs)),
        Section("Sparsity by layer", _layers(runs)),
        Section("One mask before and after", _crops(runs)),
        Section("Time and memory", facts.costs(runs)),
        Section("Settings", [facts.settings(runs)]),
        Section("Environment", [facts.environment(runs)]),
        Section("Recipe", facts.recipes(runs)),
    ]
    return Page(title, _lead(runs), sections)


# --- results ---------------------------------------------------------------------------------------------------------


def _lead(runs: Sequence[Run]) -> list[Block]:
    rows = [row for run in runs for row in _states(run)]
    columns = ["run", "state", "step", "sparsity", "perplexity", "loss"]
    several = len(runs) > 1
    notes = [
        "Perplexity and loss are those on the run's validation text, as its module logs them; sparsity is the "
        "share of zeros among the targeted weights, counted on the weights."
    ]
    for run in runs:
        of = f" of {run.name}" if several else ""
        partial = [b for b in run.baselines.values() if b["batches"] != b["of_batches"]]
        if partial:
            notes.append(
                f"The rows before training{of} were measured on {partial[0]['batches']} of "
                f"{facts.or_unknown(partial[0]['of_batches'])} validation batches, and cannot be compared with the "
                "others. trainer.num_sanity_val_steps=-1 uses all batches."
            )
        if not run.baselines:
            notes.append(
                f"The model{of} was not evaluated before training: num_sanity_val_steps is 0, or there is no "
                "validation text."
            )
        if run.updates and run.updates[0]["step"] > 0:
            notes.append(
                f"The first mask{of} came at step {run.updates[0]['step']:,}, so there is no row for it untrained."
            )
        if run.end is None:
            notes.append(f"The run{of} has not ended, or was cut off: its last record is of step {run.steps:,}.")
    table = Table(columns, rows, words=2) if several else Table(columns[1:], [row[1:] for row in rows])
    return [table, *notes]


def _states(run: Run) -> list[list[str]]:
    """Rows of the headline table: dense, one-shot, trained."""
    rows = []
    dense, masked = run.baselines.get("dense"), run.baselines.get("first mask")
    if dense:
        zeros = dense.get("sparsity")
        # a model that was pruned before the run is not dense, whatever its masks
        state = "untrained, without masks" if zeros and zeros > 0.01 else "dense, untrained"
        rows.append(_state(run, state, dense, zeros))
    if masked:
        rows.append(_state(run, "one-shot mask, untrained", masked, masked.get("sparsity")))
    last: Record = run.validations[-1] if run.validations else {"step": run.steps, "metrics": {}}
    now = "trained" if run.end is not None and last["step"] == run.steps else "latest validation"
    return [*rows, _state(run, now, last, _sparsity_at(run, last["step"]))]


def _state(run: Run, state: str, record: Record, sparsity: float | None) -> list[str]:
    perplexity, loss = (_pick(record["metrics"], word) for word in ("perplexity", "loss"))
    return [
        run.name,
        state,
        f"{record['step']:,}",
        facts.number(sparsity, ".4f"),
        facts.number(perplexity, ".2f"),
        facts.number(loss, ".4f"),
    ]


def _sparsity_at(run: Run, step: int) -> float | None:
    if step >= run.steps and run.sparsity is not None:
        return run.sparsity
    before = [update for update in run.updates if update["step"] <= step]
    return float(before[-1]["sparsity"]) if before else None


def _curves(runs: Sequence[Run]) -> list[Block]:
    end = _end(runs)
    perplexity = {run.name: {"": _validated(run, "perplexity")} for run in runs}
    loss = {
        run.name: {
            "training": [(r["step"], v) for r in run.losses if (v := _pick(r["metrics"], "loss")) is not None],
            "validation": _validated(run, "loss"),
        }
        for run in runs
    }
    pictures = [
        figures.curves(
            "perplexity",
            "Perplexity on the validation text; at step 0, that of the first mask, or of the dense model if the run "
            "began without a mask.",
            perplexity,
            "perplexity",
            levels=_dense_levels(runs),
            log=True,
            end=end,
        ),
        figures.curves("loss", "Loss in training (one batch each) and in validation.", loss, "loss", end=end),
    ]
    return _shown(pictures, "No loss and no perplexity were recorded.")


def _validated(run: Run, word: str) -> list[tuple[float, float]]:
    start = run.baselines.get("first mask", run.baselines.get("dense"))
    whole = [start] if start and start["batches"] == start["of_batches"] else []
    records = [*whole, *run.validations]
    return [(r["step"], value) for r in records if (value := _pick(r["metrics"], word)) is not None]


def _dense_levels(runs: Sequence[Run]) -> dict[str, float]:
    """Perplexity of the models that the runs began with; one line if it is the same for all, otherwise by run."""
    levels = {}
    for run in runs:
        dense = run.baselines.get("dense")
        if dense and dense["batches"] == dense["of_batches"]:
            value = _pick(dense["metrics"], "perplexity")
            if value is not None:
                levels[run.name] = value
    if len(set(levels.values())) == 1:
        return {"untrained, without masks": next(iter(levels.values()))}
    return {f"{name}, untrained, without masks": value for name, value in levels.items()}


def _masks(runs: Sequence[Run]) -> list[Block]:
    sparse = [run for run in runs if run.updates]
    flips = {run.name: {"": [(u["step"], 100 * u["flip_rate"]) for u in run.changes()]} for run in sparse}
    since = {run.name: {"": [(u["step"], 100 * u["initial_flip_rate"]) for u in run.updates]} for run in sparse}
    sparsity = {
        run.name: {
            "target": [(u["step"], 100 * u["target"]) for u in run.updates],
            "counted on the weights": [(u["step"], 100 * u["sparsity"]) for u in run.updates],
        }
        for run in sparse
    }
    gradual = any(len({update["target"] for update in run.updates}) > 1 for run in sparse)
    end = _end(runs)
    pictures = [
        figures.curves(
            "flip_rate",
            "Flip rate: share of mask entries that an update changed. The first mask is left out.",
            flips,
            "flip rate, %",
            end=end,
        ),
        figures.curves(
            "initial_flip_rate",
            "Initial flip rate: share of mask entries that differ from the first mask (measured on every 128th row).",
            since,
            "initial flip rate, %",
            end=end,
        ),
        figures.curves("sparsity", "Sparsity over the run.", sparsity, "sparsity, %", end=end) if gradual else None,
    ]
    dense = [run.name for run in runs if not run.updates]
    notes: list[Block] = [f"No mask was recorded in {', '.join(dense)}."] if dense else []
    single = [run.name for run in sparse if not run.changes()]
    if single:
        notes.append(f"No update followed the first mask of {', '.join(single)}, so there is no flip rate.")
    return [*(picture for picture in pictures if picture), *notes]


def _layers(runs: Sequence[Run]) -> list[Block]:
    pictures = [
        figures.heat_maps(
            f"layers_{number}",
            facts.of(run, runs)
            + "Zeros of each layer, counted on the weights, at the end; and mask entries that changed, "
            "summed over all updates after the first mask, as a share of the layer's weights.",
            {"zeros, %": run.sparsity_by_layer(), "flips over the run, %": run.flips_by_layer()},
        )
        for number, run in enumerate(runs, 1)
    ]
    return _shown(pictures, "No layer was masked.")


def _crops(runs: Sequence[Run]) -> list[Block]:
    pictures = []
    for number, run in enumerate(runs, 1):
        if run.pruning is not None and run.changes():
            first, last = run.updates[0], run.updates[-1]
            shape = run.pruning["crop"]
            pictures.append(
                figures.mask_change(
                    f"mask_{number}",
                    facts.of(run, runs) + f"{shape['layer']}, first {shape['outputs']} outputs and {shape['inputs']} "
                    "inputs. The layer is the middle one of the model.",
                    run.crop(first),
                    run.crop(last),
                    (first["step"], last["step"]),
                )
            )
    return _shown(pictures, "No mask was updated after the first.")


# --- parts -----------------------------------------------------------------------------------------------------------


def _shown(pictures: Sequence[Any], otherwise: str) -> list[Block]:
    return [picture for picture in pictures if picture is not None] or [otherwise]


def _end(runs: Sequence[Run]) -> int:
    return max(run.steps for run in runs)


def _pick(metrics: Mapping[str, float], word: str) -> float | None:
    found = {name: value for name, value in metrics.items() if word in name}
    own = [value for name, value in found.items() if name.rpartition("/")[2] == word]  # not one of its terms
    return next(iter([*own, *found.values()]), None)
