"""Progress bars for whatever takes longer than a moment."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def bar(label: str, *, shown: bool) -> Iterator[tuple[Callable[[int], None], Callable[[], None]]]:
    """A progress bar with count and time left; yields functions to set its total and to advance it by one.

    Nothing is drawn, and rich is not imported, where ``shown`` is False.
    """
    if not shown:
        yield lambda total: None, lambda: None
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, transient=True) as progress:
        task = progress.add_task(label, total=None)
        yield lambda total: progress.update(task, total=total), lambda: progress.advance(task)
