"""Bars and tables: drawn in a terminal, plain lines of text in files and pipes."""

import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

if TYPE_CHECKING:
    from rich.console import Console

_SECONDS_BETWEEN_LINES = 60.0


def bars_are_seen() -> bool:
    """Whether stderr is a terminal that can redraw a line."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def bar(label: str, *, shown: bool) -> Any:
    """tqdm's bar on stderr, wiped away at its end; where that would fill a log, a line of text every minute.

    Its total is set by the work: ``bar.total = 120``.
    """
    if bars_are_seen():
        return tqdm(desc=label, disable=not shown, leave=False, dynamic_ncols=True)
    return _Lines(
        desc=label,
        disable=not shown,
        leave=False,
        delay=_SECONDS_BETWEEN_LINES,
        mininterval=_SECONDS_BETWEEN_LINES,
        miniters=1,
        bar_format="{desc}: {n_fmt}/{total_fmt}, {remaining} left{postfix}",
    )


class _Lines(tqdm):  # type: ignore[misc]
    """A bar whose every state is a line of its own, without carriage returns."""

    def display(self, msg: str | None = None, pos: int | None = None) -> bool:
        if msg is None:  # "" wipes the bar
            print(self, file=sys.stderr, flush=True)
        return False


def print_table(
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    *,
    words: Sequence[int] = (0,),
    console: "Console | None" = None,
) -> None:
    """A table on stdout, with frames only in a terminal. Columns whose index is in ``words`` are aligned left."""
    from rich.box import HEAVY_HEAD
    from rich.console import Console
    from rich.table import Table

    console = console or Console()
    framed = console.is_terminal
    if not framed:
        console = Console(width=1000)  # no line is broken in a file
    table = Table(box=HEAVY_HEAD if framed else None)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index in words else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table, markup=False, highlight=False)
