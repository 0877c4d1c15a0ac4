"""A report of training runs: one self-contained HTML page, its Markdown twin, and the plots as files."""

import base64
import csv
import html
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sparse_train.inspection import LayerSparsity

Metrics = list[dict[str, float]]
"""Rows of a metrics file; each has "step" and what was logged then."""


@dataclass(frozen=True)
class Report:
    """What a report shows."""

    title: str
    notes: Sequence[str]
    """Paragraphs under the title: the protocol, and what the numbers may not be taken for."""
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    """The headline table."""
    runs: Mapping[str, Metrics]
    """Metrics of each run by its name."""
    layers: Sequence[LayerSparsity]
    """Layers of the exported model."""
    recipe: str
    """The resolved recipe."""


def read_metrics(path: Path) -> Metrics:
    """Read what Lightning's ``CSVLogger`` wrote."""
    with path.open() as file:
        rows = [
            {key: float(value) for key, value in row.items() if value not in ("", None)} for row in csv.DictReader(file)
        ]
    return sorted(rows, key=lambda row: row.get("step", 0))


def write_report(report: Report, folder: Path) -> Path:
    """Write ``report.html``, ``report.md`` and the plots to ``folder``; returns the page."""
    folder.mkdir(parents=True, exist_ok=True)
    plots = {
        "Perplexity over steps (validation)": _plot_perplexity(report, folder / "perplexity.png"),
        "Flip rate over steps": _plot_flips(report, folder / "flip_rate.png"),
        "Sparsity by layer of the exported model": _plot_layers(report.layers, folder / "sparsity.png"),
    }
    (folder / "report.md").write_text(_markdown(report, plots), encoding="utf-8")
    page = folder / "report.html"
    page.write_text(_html(report, plots), encoding="utf-8")
    return page


def markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _plot_perplexity(report: Report, path: Path) -> Path:
    figure, axes = _figure()
    for name, metrics in report.runs.items():
        # Lightning numbers steps from 0; as everywhere here, a step is one that has been completed
        points = [(row["step"] + 1, row["val/perplexity"]) for row in metrics if "val/perplexity" in row]
        if points:
            axes.plot(*zip(*points, strict=True), marker="o", markersize=4, label=name)
    axes.set(xlabel="optimizer steps", ylabel="token perplexity", yscale="log")
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter("{x:g}")
    axes.tick_params(axis="y", which="minor", labelsize=8)
    if axes.lines:
        axes.legend(fontsize=8)
    return _save(figure, path)


def _plot_flips(report: Report, path: Path) -> Path:
    figure, axes = _figure()
    for name, metrics in report.runs.items():
        for key, style in (("sparsity/flip_rate", "-"), ("sparsity/initial_flip_rate", ":")):
            points = [(row["step"], 100 * row[key]) for row in metrics if key in row]
            if points:
                label = f"{name}, {'since the update before' if style == '-' else 'since the first mask'}"
                axes.plot(*zip(*points, strict=True), style, marker="o", markersize=4, label=label)
    axes.set(xlabel="optimizer steps", ylabel="mask entries that changed, %")
    axes.set_ylim(bottom=0)
    if axes.lines:
        axes.legend(fontsize=8)
    return _save(figure, path)


def _plot_layers(layers: Sequence[LayerSparsity], path: Path) -> Path:
    import numpy as np

    cells: dict[tuple[str, int], float] = {}
    for layer in layers:
        if match := re.match(r"(.*?)\.(\d+)\.(.*)", layer.name):
            cells[match[3], int(match[2])] = layer.sparsity
    names = list(dict.fromkeys(name for name, _ in cells))
    blocks = sorted({block for _, block in cells})
    grid = np.array([[cells.get((name, block), np.nan) for block in blocks] for name in names])
    figure, axes = _figure(height=0.9 + 0.3 * max(1, len(names)))
    if grid.size:
        image = axes.imshow(100 * grid, aspect="auto", vmin=0, vmax=100, cmap="viridis")
        figure.colorbar(image, label="zeros, %")
        axes.set(yticks=range(len(names)), yticklabels=names, xlabel="block")
    return _save(figure, path)


def _figure(height: float = 3.4):  # type: ignore[no-untyped-def]
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    figure = Figure(figsize=(7.5, height), layout="constrained")
    FigureCanvasAgg(figure)  # draws without a screen, whatever the process has set
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    return figure, axes


def _save(figure, path: Path) -> Path:  # type: ignore[no-untyped-def]
    figure.savefig(path, dpi=130)
    return path


def _markdown(report: Report, plots: Mapping[str, Path]) -> str:
    parts = [f"# {report.title}", *report.notes, markdown_table(report.columns, report.rows)]
    parts += [f"## {caption}\n\n![{caption}]({path.name})" for caption, path in plots.items()]
    parts += [f"## Recipe\n\n```yaml\n{report.recipe.strip()}\n```"]
    return "\n\n".join(parts) + "\n"


def _html(report: Report, plots: Mapping[str, Path]) -> str:
    def cells(tag: str, row: Sequence[str]) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in row) + "</tr>"

    table = cells("th", report.columns) + "".join(cells("td", row) for row in report.rows)
    pictures = "".join(
        f'<h2>{html.escape(caption)}</h2><img alt="{html.escape(caption)}" src="data:image/png;base64,'
        f'{base64.b64encode(path.read_bytes()).decode()}">'
        for caption, path in plots.items()
    )
    notes = "".join(f"<p>{html.escape(note)}</p>" for note in report.notes)
    return f"""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{html.escape(report.title)}</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
table {{ border-collapse: collapse; font-variant-numeric: tabular-nums; }}
th, td {{ padding: .3rem .8rem; border-bottom: 1px solid #ddd; text-align: right; }}
th:first-child, td:first-child {{ text-align: left; }}
img {{ max-width: 100%; }} pre {{ background: #f6f6f6; padding: 1rem; overflow-x: auto; font-size: 13px; }}
</style></head><body>
<h1>{html.escape(report.title)}</h1>{notes}<table>{table}</table>{pictures}
<h2>Recipe</h2><pre>{html.escape(report.recipe.strip())}</pre>
</body></html>
"""
