"""How the command line uses stdout and stderr.

Results go to stdout: tables, or with ``--json`` only one JSON object. Progress goes to stderr: bars in a terminal,
lines of text elsewhere. Errors are one line on stderr.
"""

import json
import math
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any


def bars_are_seen() -> bool:
    """Whether stderr is a terminal that can redraw a line."""
    return sys.stderr.isatty() and os.environ.get("TERM") != "dumb"


def take_json(options: Sequence[str]) -> tuple[bool, list[str]]:
    """Whether options ask for JSON, by ``--json``, ``--json=true`` or ``--json true``; and all other options."""
    asked, others = False, []
    rest = list(options)
    while rest:
        option = rest.pop(0)
        name, _, value = option.partition("=")
        if name != "--json" or value not in ("", "true", "false"):
            others.append(option)
            continue
        if option == "--json" and rest and rest[0] in ("true", "false"):
            value = rest.pop(0)
        asked = value != "false"
    return asked, others


@contextmanager
def stdout_for_json(asked: bool) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yields a function that writes the JSON object. All other output to stdout goes to stderr meanwhile.

    This includes output that bypasses Python, such as that of compilers started by libraries; what a C library has
    buffered in this process may come at its end. If ``asked`` is False, nothing happens.
    """
    if not asked:
        yield lambda found: None
        return
    stdout, stderr = sys.stdout, sys.stderr
    stdout.flush()
    # a test or a surrounding program may have replaced them
    real = stdout is sys.__stdout__ and stderr is sys.__stderr__
    own = stdout.fileno() if real else None
    kept = None if own is None else os.dup(own)
    try:
        if own is not None:
            os.dup2(stderr.fileno(), own)
        found: list[str] = []
        with redirect_stdout(stderr):
            yield lambda values: found.append(dumps(values))
    finally:
        if own is not None and kept is not None:
            stdout.flush()  # output of code that kept a reference to it
            os.dup2(kept, own)
            os.close(kept)
    stdout.write("".join(f"{line}\n" for line in found))


def dumps(found: Mapping[str, Any]) -> str:
    """JSON on one line; NaN and infinity, which JSON does not have, become null."""
    return json.dumps(_finite(found), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
