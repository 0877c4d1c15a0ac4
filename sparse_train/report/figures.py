"""Pictures of a report: curves over steps, sparsity by layer as a heat map, a mask before and after.

Shape suffixes: O out_features, I in_features; R rows and C columns of a heat map.
"""

import io
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sparse_train.report.page import Picture

Points = Sequence[tuple[float, float]]
"""(step, value), in the order of steps."""

_MOST_NUMBERS = 40 * 9
"""Heat maps with at most this many cells show a number in each cell."""

_MOST_CLEAR = 300
"""Curves with at most this many points are drawn in full colour; longer ones are noisy, and would hide others."""

_MOST_BLOCKS, _MOST_COLUMNS = 40, 20
"""Number of labels that fit next to a heat map."""


@dataclass(frozen=True)
class _Theme:
    ink: str
    soft: str
    paper: str
    lines: tuple[str, ...]
    mask: tuple[str, str, str, str]
    """Colours of pruned, kept, newly pruned and returned entries."""
    cells: str


# Colours of Okabe and Ito, which colour-blind readers can also distinguish; lighter ones for dark pages.
_LIGHT = _Theme(
    "#1d1d1f",
    "#d9dbde",
    "#ffffff",
    ("#0072b2", "#d55e00", "#009e73", "#aa4499", "#b8860b", "#555555"),
    ("#f1f2f3", "#a9b0b8", "#d55e00", "#0072b2"),
    "Blues",
)
_DARK = _Theme(
    "#e4e4e6",
    "#3a3d41",
    "#16181b",
    ("#56b4e9", "#ff9a52", "#35c79a", "#e39bd0", "#e6c229", "#bbbbbb"),
    ("#24272b", "#6b727a", "#ff9a52", "#56b4e9"),
    "Blues_r",
)


def curves(
    name: str,
    caption: str,
    runs: Mapping[str, Mapping[str, Points]],
    label: str,
    *,
    levels: Mapping[str, float] | None = None,
    log: bool = False,
    end: int | None = None,
) -> Picture | None:
    """Values over optimizer steps, with one colour per run and one dash style per kind; None if there are no points.

    Args:
        name: of the picture.
        caption: under it.
        runs: points by kind of value, by run.
        label: of the vertical axis, with the unit.
        levels: values to compare with, drawn as dotted horizontal lines with their names.
        log: logarithmic vertical axis; values that are not positive are left out.
        end: last step of the horizontal axis.
    """
    shown = {
        run: {
            kind: [(step, value) for step, value in points if np.isfinite(value) and (value > 0 or not log)]
            for kind, points in kinds.items()
        }
        for run, kinds in runs.items()
    }
    names = list(dict.fromkeys(kind for kinds in shown.values() for kind, points in kinds.items() if points))
    if not names:
        return None

    def draw(figure: Any, theme: _Theme) -> None:
        axes = _axes(figure)
        for colour, (run, kinds) in zip(_cycle(theme.lines), shown.items(), strict=False):
            for kind, points in kinds.items():
                if points:
                    text = ", ".join(part for part in (run if len(shown) > 1 else "", kind) if part) or label
                    style = ("-", "--", ":", "-.")[names.index(kind) % 4]
                    own = colour if len(shown) > 1 else theme.lines[names.index(kind) % len(theme.lines)]
                    few = len(points) <= 30
                    line = {"marker": "o" if few else "", "markersize": 3.5, "linewidth": 1.5 if few else 0.8}
                    line["alpha"] = 1 if len(points) <= _MOST_CLEAR else 0.5
                    axes.plot(*zip(*points, strict=True), style, color=own, label=text, **line)
        for text, value in (levels or {}).items():
            axes.axhline(value, color=theme.ink, linestyle=":", linewidth=1, label=text)
        _horizontal_axis(axes, end)
        axes.set_ylabel(label)
        if log:
            _log_axis(axes)
        else:
            axes.set_ylim(bottom=min(0.0, axes.get_ylim()[0]) if _starts_at_zero(shown) else None)
        if len(axes.lines) > 1:
            longest = max(len(str(each.get_label())) for each in axes.lines)
            axes.legend(
                loc="lower left",
                bbox_to_anchor=(0, 1),
                ncols=max(1, min(4, 110 // (longest + 8))),  # about 110 characters fit in a line
                frameon=False,
                fontsize=8.5,
                borderaxespad=0.2,
            )

    drawn = ", ".join(
        f"{' '.join(part for part in (run, kind) if part)}: {_ends(points)}"
        for run, kinds in shown.items()
        for kind, points in kinds.items()
        if points
    )
    return _picture(name, caption, f"{label} over optimizer steps; {drawn}.", draw, height=3.1)


def heat_maps(name: str, caption: str, panels: Mapping[str, Mapping[str, float]]) -> Picture | None:
    """Values in percent by layer, one row per block and one column per projection; None without layers.

    Args:
        name: of the picture.
        caption: under it.
        panels: by title, the share of each layer by name; panels are drawn side by side.
    """
    grids = {title: grid(values) for title, values in panels.items() if values}
    if not grids:
        return None
    rows = max(len(labels) for labels, _, _ in grids.values())
    cells = max(values_RC.size for _, _, values_RC in grids.values())

    def draw(figure: Any, theme: _Theme) -> None:
        all_axes = figure.subplots(1, len(grids), squeeze=False)[0]
        for axes, (title, (blocks, columns, values_RC)) in zip(all_axes, grids.items(), strict=True):
            percent_RC = 100 * values_RC
            low, high = _colour_range(percent_RC)
            image = axes.imshow(percent_RC, aspect="auto", cmap=theme.cells, vmin=low, vmax=high)
            figure.colorbar(image, ax=axes, fraction=0.05, pad=0.02).ax.tick_params(labelsize=7.5)
            axes.set_title(title, fontsize=9.5)
            every = -(-len(columns) // _MOST_COLUMNS)
            turned = 90 if len(columns) > 4 else 0
            axes.set_xticks(range(0, len(columns), every), columns[::every], rotation=turned, fontsize=8)
            every = -(-len(blocks) // _MOST_BLOCKS)
            axes.set_yticks(range(0, len(blocks), every), blocks[::every], fontsize=7.5)
            axes.set_ylabel("block")
            axes.tick_params(length=0)
            axes.spines[:].set_visible(False)
            if cells <= _MOST_NUMBERS:
                _write_numbers(axes, percent_RC, low, high, theme)

    spread = "; ".join(
        f"{title}: {100 * np.nanmin(values_RC):.2f} to {100 * np.nanmax(values_RC):.2f}"
        for title, (_, _, values_RC) in grids.items()
    )
    height = min(9.0, 1.7 + 0.2 * rows)
    return _picture(name, caption, f"Heat map by block and projection. {spread}.", draw, height=height)


def grid(values: Mapping[str, float]) -> tuple[list[str], list[str], NDArray[np.float64]]:
    """Values by layer name as (labels of blocks, names of projections, values_RC), NaN if there is no value.

    The block is the first number in a name; layers outside any block get a separate row.
    """
    cells: dict[tuple[int, str], float] = {}
    for name, value in values.items():
        match = re.match(r"(?:.*?\.)?(\d+)\.(.+)", name)
        cells[(int(match[1]), match[2]) if match else (-1, name)] = value
    columns = list(dict.fromkeys(column for _, column in cells))
    blocks = sorted({block for block, _ in cells})
    values_RC = np.array([[cells.get((block, column), np.nan) for column in columns] for block in blocks])
    short = [column.rsplit(".", 1)[-1] for column in columns]
    labels = short if len(set(short)) == len(short) else columns
    return ["-" if block < 0 else str(block) for block in blocks], labels, values_RC


def mask_change(
    name: str, caption: str, first_OI: NDArray[np.bool_], last_OI: NDArray[np.bool_], steps: tuple[int, int]
) -> Picture:
    """A corner of one layer's mask, before and after; True = kept.

    Args:
        name: of the picture.
        caption: under it.
        first_OI, last_OI: the two masks, of equal shape.
        steps: optimizer steps at which the masks were these.
    """
    went, came = int((first_OI & ~last_OI).sum()), int((last_OI & ~first_OI).sum())
    changed_OI = last_OI.astype(int) + 2 * (first_OI & ~last_OI) + 2 * (last_OI & ~first_OI)
    # 0 pruned, 1 kept, 2 went, 3 came back

    def draw(figure: Any, theme: _Theme) -> None:
        from matplotlib.colors import ListedColormap
        from matplotlib.patches import Patch

        titles = f"first mask (step {steps[0]})", f"latest mask (step {steps[1]})"
        for axes, title, shown_OI in zip(figure.subplots(1, 2), titles, (first_OI, changed_OI), strict=True):
            axes.imshow(shown_OI, cmap=ListedColormap(theme.mask), vmin=0, vmax=3, interpolation="nearest")
            axes.set_title(title, fontsize=9.5)
            axes.set(xlabel="input", ylabel="output")
            axes.tick_params(length=0, labelsize=7.5)
        names = "pruned", "kept", f"went ({went})", f"came back ({came})"
        patches = [
            Patch(facecolor=colour, edgecolor=theme.ink, linewidth=0.4, label=text)
            for colour, text in zip(theme.mask, names, strict=True)
        ]
        figure.legend(handles=patches, loc="outside lower center", ncols=4, frameon=False, fontsize=8.5)

    alt = f"{first_OI.shape[0]} x {first_OI.shape[1]} mask entries before and after: {went} went, {came} came back."
    return _picture(name, caption, alt, draw, height=1.05 + 3.2 * first_OI.shape[0] / first_OI.shape[1])


# --- parts -----------------------------------------------------------------------------------------------------------


def _picture(name: str, caption: str, alt: str, draw: Callable[[Any, _Theme], None], height: float) -> Picture:
    return Picture(name, caption, alt, _png(draw, _LIGHT, height), _png(draw, _DARK, height))


def _png(draw: Callable[[Any, _Theme], None], theme: _Theme, height: float) -> bytes:
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    colours = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.titlecolor", "xtick.color", "ytick.color", "axes.edgecolor"), theme.ink
    )
    papers = dict.fromkeys(("figure.facecolor", "axes.facecolor", "savefig.facecolor"), theme.paper)
    style: Any = {**colours, **papers, "grid.color": theme.soft, "font.size": 9, "axes.axisbelow": True}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(7.4, height), layout="constrained")
        FigureCanvasAgg(figure)  # draws without a screen, whatever backend is set
        draw(figure, theme)
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=150)
    return buffer.getvalue()


def _axes(figure: Any) -> Any:
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", linewidth=0.7)
    return axes


def _horizontal_axis(axes: Any, end: int | None) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("optimizer steps")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    last = end or max(max(line.get_xdata()) for line in axes.lines) or 1
    axes.set_xlim(-0.02 * last, 1.02 * last)


def _log_axis(axes: Any) -> None:
    from matplotlib.ticker import LogLocator, NullLocator

    low, high = axes.dataLim.y0, axes.dataLim.y1
    if high < 1.1 * low:  # nearly constant values, within one decade
        axes.set_ylim(low / 1.2, high * 1.2)
    axes.set_yscale("log")
    few = high < 10 * low
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.5, 2, 3, 5, 7) if few else (1, 2, 5), numticks=12))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_locator(NullLocator())


def _cycle(colours: Sequence[str]) -> Sequence[str]:
    return list(colours) * 8


def _starts_at_zero(shown: Mapping[str, Mapping[str, Points]]) -> bool:
    """Whether values are near enough to zero, compared with their spread, to start the axis at zero."""
    values = [value for kinds in shown.values() for points in kinds.values() for _, value in points]
    return min(values) < 0.5 * max(values) or min(values) == max(values)


def _ends(points: Points) -> str:
    (first, a), (last, b) = points[0], points[-1]
    return f"{a:.4g} at step {first:g}" + (f" to {b:.4g} at step {last:g}" if len(points) > 1 else "")


def _colour_range(percent_RC: NDArray[np.float64]) -> tuple[float, float]:
    """From 0 if values are small; otherwise around them, at least ten points wide, so that noise stays pale."""
    low, high = float(np.nanmin(percent_RC)), float(np.nanmax(percent_RC))
    if low < 10:
        return 0.0, max(high, 1e-3)
    middle, half = (low + high) / 2, max((high - low) / 2, 5.0)
    return middle - half, middle + half


def _write_numbers(axes: Any, percent_RC: NDArray[np.float64], low: float, high: float, theme: _Theme) -> None:
    from matplotlib.colors import to_rgb

    cmap = axes.images[0].get_cmap()
    digits = 0 if high > 20 and high - low > 12 else 1
    for (row, column), value in np.ndenumerate(percent_RC):
        if np.isfinite(value):
            bright = float(np.dot(to_rgb(cmap((value - low) / (high - low))), (0.299, 0.587, 0.114))) > 0.55
            colour = "#111111" if bright else "#f5f5f5"
            axes.text(column, row, f"{value:.{digits}f}", ha="center", va="center", fontsize=6, color=colour)
