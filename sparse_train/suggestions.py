"""Suggestions in error messages: for a mistyped word, and for layers to leave out."""

import difflib
import re
from collections.abc import Iterable


def did_you_mean(word: str, candidates: Iterable[str], prefix: str = "") -> str:
    """ " Did you mean ...?" or nothing, to append to an error; ``prefix`` is put before each candidate."""
    close = difflib.get_close_matches(word, list(candidates), n=3, cutoff=0.5)
    return f" Did you mean {' or '.join(repr(prefix + name) for name in close)}?" if close else ""


def leave_out(names: Iterable[str]) -> str:
    """How to leave out layers, and all others with the same last names."""
    kinds = "|".join(re.escape(kind) for kind in dict.fromkeys(name.rpartition(".")[2] for name in names))
    return rf"One expression leaves out all that are named alike: ignore=['re:(.*\.)?({kinds})$']."
