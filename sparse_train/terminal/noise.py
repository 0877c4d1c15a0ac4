"""Messages of libraries that do not help users of ``sparse-train``; only the command line suppresses them.

Each entry is one message, with the reason why it is suppressed. All other messages are shown.
"""

import functools
import logging
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

from tqdm import tqdm

from sparse_train.terminal.streams import bars_are_seen

_LINES = [
    # Lightning at every start, advertising two other packages
    ("lightning.pytorch.utilities.rank_zero", "💡 Tip: "),
    # DeepSpeed without a GPU, even if it is not used: transformers imports it if it is installed
    ("DeepSpeed", "Setting accelerator to CPU"),
]
"""Logger, and the beginning of the message."""

_WARNINGS = [
    # Lightning, for every mixed precision: its model summary shows the size of 32-bit weights, which is correct
    r"Precision \S+ is not supported by the model summary",
    # jsonargparse from 4.49 on, about an argument name that Lightning and we use and older versions also know
    r"\s*By default only one JsonargparseDeprecationWarning per type",
    r"\s*skip_none parameter was deprecated",
]
"""The beginning of the message."""

_BARS = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")
"""Turn off bars of downloads, transformers ("Loading weights") and datasets ("tokenising"), which fill logs without a
terminal. The libraries read these when they are imported."""


@contextmanager
def kept_back(quiet: bool = False) -> Iterator[None]:
    """Suppress these messages; with ``quiet``, also what Lightning logs about the machine at each start."""
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        for message in _WARNINGS:
            warnings.filterwarnings("ignore", message)
        for name, beginning in _LINES:
            stack.enter_context(_filtered(name, beginning))
        if quiet:
            for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.seed"):
                stack.enter_context(_from_warnings_on(name))
        if not bars_are_seen():
            for name in _BARS:
                stack.enter_context(_set(name, "1"))
            stack.enter_context(_without_tqdm())
        yield


@contextmanager
def _without_tqdm() -> Iterator[None]:
    """Turn off bars of tqdm that have no switch ("de-quantizing GGUF"), unless they are explicitly enabled."""
    own = tqdm.__init__
    tqdm.__init__ = functools.partialmethod(own, disable=True)
    try:
        yield
    finally:
        tqdm.__init__ = own


@contextmanager
def _filtered(name: str, beginning: str) -> Iterator[None]:
    logger, pattern = logging.getLogger(name), re.compile(re.escape(beginning))

    def passes(record: logging.LogRecord) -> bool:
        return pattern.match(record.getMessage()) is None

    logger.addFilter(passes)
    try:
        yield
    finally:
        logger.removeFilter(passes)


@contextmanager
def _from_warnings_on(name: str) -> Iterator[None]:
    logger = logging.getLogger(name)
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def _set(name: str, value: str) -> Iterator[None]:
    """Set an environment variable, unless the user has set it."""
    if name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)
