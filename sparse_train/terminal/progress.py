"""Progress bars for work that takes longer than a moment."""

from collections.abc import Iterator
from contextlib import contextmanager

from sparse_train.terminal.streams import bars_are_seen


class Bar:
    """Count, time left, and a note; this base class draws nothing."""

    def set_total(self, total: int) -> None:
        """Set how many times ``advance`` will be called."""

    def advance(self) -> None:
        """Count one more as done."""

    def note(self, text: str) -> None:
        """Set the text below the bar, such as "block 3/30, sparsity 0.5000"."""


@contextmanager
def bar(label: str, *, shown: bool) -> Iterator[Bar]:
    """A progress bar on stderr, which disappears when it is done.

    Nothing is drawn, and rich is not imported, if ``shown`` is False or stderr is not a terminal.
    """
    if not (shown and bars_are_seen()):
        yield Bar()
        return
    from sparse_train.terminal.drawn import DrawnBar, DrawnProgress

    with DrawnProgress() as progress:
        yield DrawnBar(progress, label)
