"""``sparse-train report``: a page about training runs."""

from typing import Any


def report(runs: list[str], out: str | None = None) -> dict[str, Any]:
    """Write one page about training runs, report.html; several runs are compared.

    Args:
        runs: folders of runs, which contain a run.json.
        out: folder to write to; default: that of the run; for several runs, "report" in the current folder.
    """
    from sparse_train.report import collect, headline, write_run_report

    page = write_run_report(runs, out)
    print(f"report: {page}")
    return {"report": str(page), "runs": [headline(run) for run in collect(runs)]}
