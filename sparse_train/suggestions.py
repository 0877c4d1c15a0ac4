"""``did_you_mean``: what a mistyped word may have meant."""

import difflib
from collections.abc import Iterable


def did_you_mean(word: str, candidates: Iterable[str], prefix: str = "") -> str:
    """ " Did you mean ...?" or nothing, to put behind an error; ``prefix`` stands before each candidate."""
    close = difflib.get_close_matches(word, list(candidates), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(prefix + name) for name in close)}?" if close else ""
