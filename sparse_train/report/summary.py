"""A report of arms that a script has run and evaluated, as ``make demo`` does."""

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparse_train.inspection import LayerSparsity
from sparse_train.report import figures
from sparse_train.report.page import Block, Code, Page, Section, Table, write_page

Metrics = list[dict[str, float]]
"""Rows of a metrics file; each has "step" and the metrics logged at it."""


@dataclass(frozen=True)
class Report:
    """The content of a report."""

    title: str
    notes: Sequence[str]
    """Paragraphs under the title: the protocol, and what the numbers do not show."""
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    """The headline table."""
    runs: Mapping[str, Metrics]
    """Metrics of each run, by name."""
    layers: Sequence[LayerSparsity]
    """Layers of the exported model."""
    recipe: str
    """The resolved recipe."""


def read_metrics(path: Path) -> Metrics:
    """Read a file of Lightning's ``CSVLogger``."""
    with path.open() as file:
        rows = [
            {key: float(value) for key, value in row.items() if value not in ("", None)} for row in csv.DictReader(file)
        ]
    return sorted(rows, key=lambda row: row.get("step", 0))


def write_report(report: Report, folder: Path) -> Path:
    """Write ``report.html``, ``report.md`` and the pictures to ``folder``; returns the page."""
    # Lightning numbers steps from 0; here, as everywhere in this package, steps are completed steps
    perplexity = {name: {"": _points(metrics, "val/perplexity", shift=1)} for name, metrics in report.runs.items()}
    flips = {
        name: {
            "since the update before": _points(metrics, "sparsity/flip_rate", scale=100),
            "since the first mask": _points(metrics, "sparsity/initial_flip_rate", scale=100),
        }
        for name, metrics in report.runs.items()
    }
    layers = {layer.name: layer.sparsity for layer in report.layers}
    pictures = {
        "Perplexity": figures.curves(
            "perplexity", "Perplexity of the validation text.", perplexity, "token perplexity", log=True
        ),
        "Flips": figures.curves("flip_rate", "Mask entries that an update changed.", flips, "flip rate, %"),
        "Sparsity by layer": figures.heat_maps(
            "sparsity", "Zeros of the exported model, counted on its weights.", {"zeros, %": layers}
        ),
    }
    sections = [
        Section(title, [picture] if picture else ["Nothing was recorded."]) for title, picture in pictures.items()
    ]
    lead: list[Block] = [*report.notes, Table(report.columns, report.rows)]
    page = Page(report.title, lead, [*sections, Section("Recipe", [Code(report.recipe, "yaml")])])
    return write_page(page, folder)


def _points(metrics: Metrics, key: str, *, scale: float = 1, shift: int = 0) -> list[tuple[float, float]]:
    return [(row["step"] + shift, scale * row[key]) for row in metrics if key in row]
