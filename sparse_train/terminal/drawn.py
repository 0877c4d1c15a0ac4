"""Progress drawn by rich: one line for each task, and a line of text below."""

from collections.abc import Iterable

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from sparse_train.terminal.progress import Bar


class DrawnProgress(Progress):
    """On stderr; each task with a bar, its count and the time left. Disappears at the end unless it ``stays``."""

    def __init__(self, stays: bool = False) -> None:
        self.note = ""
        """The line of text below the bars."""
        columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
        # prints go above the bar if both are in the terminal, and into the file if stdout is redirected to one
        console = Console(stderr=True)
        super().__init__(
            *columns,
            TextColumn("left"),
            console=console,
            transient=not stays,
            refresh_per_second=4,
            speed_estimate_period=3600,  # a step may take minutes
            redirect_stdout=Console().is_terminal,
        )

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        if self.note:
            yield Text(self.note, no_wrap=True, overflow="ellipsis")


class DrawnBar(Bar):
    """One task of a ``DrawnProgress``."""

    def __init__(self, progress: DrawnProgress, label: str) -> None:
        self._progress, self._task = progress, progress.add_task(label, total=None)

    def set_total(self, total: int) -> None:
        self._progress.update(self._task, total=total)

    def advance(self) -> None:
        self._progress.advance(self._task)

    def note(self, text: str) -> None:
        self._progress.note = text
