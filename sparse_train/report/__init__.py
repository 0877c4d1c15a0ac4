"""Reports of training runs: one self-contained HTML page, for one run or several side by side."""

from sparse_train.report.page import write_run_report
from sparse_train.report.runs import Run, closing, collect, headline, read_metrics

__all__ = ["Run", "closing", "collect", "headline", "read_metrics", "write_run_report"]
