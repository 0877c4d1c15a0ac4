"""Reports: ``write_run_report`` from the records of runs, ``write_report`` from data that a script passes.

One self-contained HTML page, a Markdown version of it, and the pictures of the latter as files.
"""

from sparse_train.report.collect import Run, collect
from sparse_train.report.headline import headline
from sparse_train.report.page import markdown_table
from sparse_train.report.runs import run_page, write_run_report
from sparse_train.report.summary import Metrics, Report, read_metrics, write_report

__all__ = [
    "Metrics",
    "Report",
    "Run",
    "collect",
    "headline",
    "markdown_table",
    "read_metrics",
    "run_page",
    "write_report",
    "write_run_report",
]
