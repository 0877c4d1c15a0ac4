"""What libraries say that is of no use to those who run ``sparse-train``: it is kept back, by the command line alone.

Each entry is one message and says why it goes. All else comes through.
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
    # Lightning at every start, of two further packages of its makers
    ("lightning.pytorch.utilities.rank_zero", "💡 Tip: "),
    # DeepSpeed where there is no GPU, whether or not it is used: transformers imports it where it is installed
    ("DeepSpeed", "Setting accelerator to CPU"),
]
"""Logger, and how a message begins."""

_WARNINGS = [
    # Lightning, of every mixed precision: its table of the model gives the size of 32 bit weights, which is true
    r"Precision \S+ is not supported by the model summary",
    # jsonargparse from 4.49 on, of the argument's name that Lightning and we use, which older versions know, too
    r"\s*By default only one JsonargparseDeprecationWarning per type",
    r"\s*skip_none parameter was deprecated",
]
"""How a message begins."""

_BARS = ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS")
"""Bars of downloads, transformers ("Loading weights") and datasets ("tokenising"): they fill the logs of whoever has no
terminal. The libraries read these when they are imported."""


@contextmanager
def kept_back(quiet: bool = False) -> Iterator[None]:
    """Without these messages; ``quiet`` also without what Lightning tells of the machine at each start."""
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
    """Bars of tqdm that ask nobody ("de-quantizing GGUF") are off, unless their makers say that they are on."""
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
    """An environment variable, unless the user has set it."""
    if name in os.environ:
        yield
        return
    os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)
