"""The main results of a run, in a few numbers."""

from typing import Any

from sparse_train.report.collect import Record, Run


def headline(run: Run) -> dict[str, Any]:
    """The main results of one run, for JSON; docs/terminal.md explains them. None = not measured."""
    last = run.updates[-1] if run.updates else None
    opened = run.baselines.get("dense")
    if opened is not None and (opened.get("sparsity") or 0) > 0.01:
        opened = None  # the model was pruned before the run
    return {
        "name": run.name,
        "folder": str(run.folder),
        "finished": run.end is not None,
        "steps": run.steps,
        "seconds": run.seconds,
        "tokens": None if run.end is None else run.end["tokens"],
        "sparsity": run.sparsity,
        "flip_rate": run.changes()[-1]["flip_rate"] if run.changes() else None,
        "initial_flip_rate": None if last is None else last["initial_flip_rate"],
        "perplexity": _perplexity(run.validations[-1] if run.validations else None),
        "perplexity_first_mask": _perplexity(run.baselines.get("first mask")),
        "perplexity_dense": _perplexity(opened),
        "evaluation": {name: value for name, (value, _) in run.evaluated().items()},
    }


def _perplexity(record: Record | None) -> float | None:
    metrics = {} if record is None else record["metrics"]
    return next((float(value) for name, value in metrics.items() if "perplexity" in name), None)
