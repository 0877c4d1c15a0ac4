"""Bars and tables: drawn in a terminal, plain lines of text in files and pipes."""

import io
import os
import sys
from collections.abc import Collection, Iterable, Sequence
from typing import Any, TypeVar, cast

T = TypeVar("T")
SECONDS_BETWEEN_LINES = 60.0


def bars_are_seen() -> bool:
    """Whether stderr is a terminal that can redraw a line."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def with_bar(items: Collection[T], label: str, *, shown: bool) -> Iterable[T]:
    """The items, with tqdm's bar on stderr while they are gone through, which is wiped away at the end.

    Where a bar would fill a log, there is a line of text every minute.
    """
    if not shown:  # tqdm is not needed
        return items
    if bars_are_seen():
        from tqdm import tqdm

        return cast(Iterable[T], tqdm(items, label, leave=False, dynamic_ncols=True))
    return cast(Iterable[T], lines(label, iterable=items))


def lines(label: str, *, disable: bool = False, **arguments: Any) -> Any:
    """A bar of tqdm that is a line of text on stderr: every minute when it moves, and when it is refreshed."""
    from tqdm import tqdm

    form = "{desc}: {n_fmt}/{total_fmt}, {remaining} left{postfix}"
    often = {"delay": SECONDS_BETWEEN_LINES, "mininterval": SECONDS_BETWEEN_LINES, "miniters": 1}
    # disable is given even if False, because the commands set TQDM_DISABLE against the bars of other libraries
    own = {"file": _Lines(), "bar_format": form, "disable": disable, "leave": False, "position": 0}
    return tqdm(desc=label, **own, **often, **arguments)


class _Lines(io.StringIO):
    """A file that makes a line on stderr of every state of a bar."""

    def write(self, text: str) -> int:
        if text.strip():  # without carriage returns, and not what wipes the bar
            print(text.strip(), file=sys.stderr, flush=True)
        return len(text)


def print_table(columns: Sequence[str], rows: Sequence[Sequence[str]], *, words: Sequence[int] = (0,)) -> None:
    """A table on stdout, with frames only in a terminal. Columns whose index is in ``words`` are aligned left."""
    from rich import get_console
    from rich.box import HEAVY_HEAD
    from rich.console import Console
    from rich.table import Table

    console = get_console()
    framed = console.is_terminal
    if not framed:
        console = Console(width=1000)  # no line is broken in a file
    table = Table(box=HEAVY_HEAD if framed else None)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index in words else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table, markup=False, highlight=False)
