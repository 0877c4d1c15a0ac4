"""What commands write where: the result on stdout, as text or as one JSON object; messages of libraries not at all."""

import functools
import json
import logging
import math
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from typing import Any

from sparse_train.terminal import bars_are_seen

# --- JSON ------------------------------------------------------------------------------------------------------------


def take_json(options: Sequence[str]) -> tuple[bool, list[str]]:
    """Whether options ask for JSON, and all options but ``--json``."""
    return "--json" in options, [option for option in options if option != "--json"]


@contextmanager
def stdout_for_json(asked: bool) -> Iterator[Callable[[Mapping[str, Any]], None]]:
    """Yields a function that keeps the JSON object for stdout. All other output to stdout goes to stderr meanwhile.

    This includes output that bypasses Python, such as that of compilers that libraries start. If ``asked`` is False,
    nothing happens.
    """
    if not asked:
        yield lambda found: None
        return
    lines: list[str] = []
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield lambda found: lines.append(dumps(found))
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)
    for line in lines:
        print(line)


def dumps(found: Any) -> str:
    """JSON on one line; NaN and infinity, which JSON does not have, become null."""

    def finite(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: finite(inner) for key, inner in value.items()}
        if isinstance(value, list | tuple):
            return [finite(inner) for inner in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return json.dumps(finite(found), allow_nan=False)


# --- messages of libraries -------------------------------------------------------------------------------------------

_LINES = {
    "lightning.pytorch.utilities.rank_zero": "💡 Tip: ",  # at every start, for two other packages
    "DeepSpeed": "Setting accelerator to CPU",  # even if it is not used: transformers imports it
}
"""Beginnings of messages that help no user of a command, by logger."""

_WARNINGS = [
    # Lightning's model summary shows the size of 32-bit weights, which is correct
    r"Precision \S+ is not supported by the model summary",
    # jsonargparse from 4.49 on, about an argument name that Lightning and older versions use
    r"\s*By default only one JsonargparseDeprecationWarning per type",
    r"\s*skip_none parameter was deprecated",
]


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Inside, these messages are left out, and so are the bars of libraries where they would fill a log."""
    filters = {
        logging.getLogger(name): lambda record, beginning=beginning: not record.getMessage().startswith(beginning)
        for name, beginning in _LINES.items()
    }
    from tqdm import tqdm

    bars = tqdm.__init__
    with warnings.catch_warnings():
        for message in _WARNINGS:
            warnings.filterwarnings("ignore", message)
        for logger, passes in filters.items():
            logger.addFilter(passes)
        if not bars_are_seen():
            # read when the libraries are imported, which is later
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # transformers reads it too
            os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")
            # as TQDM_DISABLE=1 would, which comes too late: torch has imported tqdm
            tqdm.__init__ = functools.partialmethod(bars, disable=True)
        try:
            yield
        finally:
            tqdm.__init__ = bars
            for logger, passes in filters.items():
                logger.removeFilter(passes)
