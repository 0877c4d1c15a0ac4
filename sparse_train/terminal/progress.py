"""Progress bars for whatever takes longer than a moment."""

from collections.abc import Iterator
from contextlib import contextmanager

from sparse_train.terminal.streams import bars_are_seen


class Bar:
    """Count, time left, and a note; this one draws nothing."""

    def set_total(self, total: int) -> None:
        """How many times ``advance`` will be called."""

    def advance(self) -> None:
        """One more is done."""

    def note(self, text: str) -> None:
        """What stands below the bar, such as "block 3/30, sparsity 0.5000"."""


@contextmanager
def bar(label: str, *, shown: bool) -> Iterator[Bar]:
    """A progress bar on stderr, which disappears when it is done.

    Nothing is drawn, and rich is not imported, where ``shown`` is False or stderr is no terminal.
    """
    if not (shown and bars_are_seen()):
        yield Bar()
        return
    from sparse_train.terminal.drawn import DrawnBar, DrawnProgress

    with DrawnProgress() as progress:
        yield DrawnBar(progress, label)
