"""Progress of work that takes longer than a moment: a bar in a terminal, a line a minute elsewhere."""

import sys
import time
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


class Lines(Bar):
    """The same as a line on stderr, when the last one is a minute old."""

    def __init__(self, label: str) -> None:
        self._label, self._note = label, ""
        self._total = self._done = 0
        self._last = time.monotonic()

    def set_total(self, total: int) -> None:
        self._total = total

    def advance(self) -> None:
        self._done += 1
        if time.monotonic() - self._last >= _SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            print(f"{self._label}: {self._done}/{self._total} forwards{self._note}", file=sys.stderr, flush=True)

    def note(self, text: str) -> None:
        self._note = f", {text}"


_SECONDS_BETWEEN_LINES = 60.0


@contextmanager
def bar(label: str, *, shown: bool) -> Iterator[Bar]:
    """A progress bar on stderr, which disappears when it is done, or ``Lines`` if stderr is not a terminal.

    Nothing is shown if ``shown`` is False. rich is only imported for a bar.
    """
    if not (shown and bars_are_seen()):
        yield Lines(label) if shown else Bar()
        return
    from sparse_train.terminal.drawn import DrawnBar, DrawnProgress

    with DrawnProgress() as progress:
        yield DrawnBar(progress, label)
