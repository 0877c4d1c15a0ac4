"""Pictures of a report: curves over steps; "" if there is nothing to draw."""

import html
import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.figure import Figure
from matplotlib.ticker import LogFormatter

from sparse_train.report.runs import Points

# Colours of Okabe and Ito, which colour-blind readers can also distinguish, on light and on dark pages.
_LINES = ("#2b8cc4", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")
_INK = "#123456"
"""Replaced by the colour of the page's text."""
_COLOURED = ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color", "grid.color")
_STYLE: Any = {**dict.fromkeys(_COLOURED, _INK), "font.size": 9, "axes.titlesize": 9.5, "svg.fonttype": "none"}
_STYLE["text.parse_math"] = False  # names of runs may have dollars


@rc_context(_STYLE)
def curves(
    caption: str,
    lines: Sequence[tuple[str, str, Points]],
    label: str,
    *,
    levels: Mapping[float, str] | None = None,
    log: bool = False,
) -> str:
    """Values over optimizer steps, a colour per run and a dash style per kind; ``lines`` are run, kind and points.

    With "%" in ``label``, values are shares, and the axis begins at 0. ``levels`` are dotted lines to compare with.
    """
    scale = 100 if "%" in label else 1
    names = list(dict.fromkeys(run for run, _, _ in lines))
    lines = [
        (run, kind, finite)
        for run, kind, points in lines
        if (finite := [(step, scale * value) for step, value in points if np.isfinite(value)])
    ]
    if not lines:
        return ""
    kinds = list(dict.fromkeys(kind for _, kind, _ in lines))
    figure = Figure(figsize=(7.4, 3.1), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.5, alpha=0.3)
    axes.set(xlabel="optimizer steps", ylabel=label)
    for run, kind, points in lines:
        index = names.index(run) if len(names) > 1 else kinds.index(kind)
        few = len(points) <= 30
        axes.plot(
            *zip(*points, strict=True),
            ("-", "--", ":", "-.")[kinds.index(kind) % 4],
            color=_LINES[index % len(_LINES)],
            label=", ".join(filter(None, (run if len(names) > 1 else "", kind))) or label,
            marker="o" if few else "",
            markersize=3.5,
            linewidth=1.5 if few else 0.8,
        )
    for value, name in (levels or {}).items():
        axes.axhline(value, color=_INK, linestyle=":", linewidth=1, label=name)
    axes.locator_params(axis="x", integer=True)
    if log:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter(LogFormatter())
        axes.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(2, 0.5)))  # losses often stay in one decade
    elif "%" in label:
        axes.set_ylim(bottom=0)
    if len(axes.lines) > 1:
        figure.legend(loc="outside upper left", ncols=2, frameon=False, fontsize=8.5)
    drawn = ", ".join(" ".join(filter(None, (run, kind, _ends(points)))) for run, kind, points in lines)
    return _html(figure, caption, f"{label} over optimizer steps; {drawn}.")


def _ends(points: Points) -> str:
    (start, first), (end, last) = points[0], points[-1]
    return f"{first:.4g} at step {start} to {last:.4g} at step {end}"


def _html(figure: Figure, caption: str, alt: str) -> str:
    """``alt`` is what the picture shows, for readers who cannot see it."""
    buffer = io.StringIO()
    about = dict.fromkeys(("Creator", "Date", "Format", "Type"))  # left out
    figure.savefig(buffer, format="svg", transparent=True, metadata=about)
    svg = buffer.getvalue().replace(_INK, "currentColor")
    return (
        f'<figure><div role="img" aria-label="{html.escape(alt)}">{svg[svg.index("<svg") :]}</div>'
        f"<figcaption>{html.escape(caption)}</figcaption></figure>"
    )
