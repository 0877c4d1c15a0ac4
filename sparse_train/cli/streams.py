"""What commands write where: the result on stdout, as text or as one JSON object; messages of libraries not at all."""

import io
import json
import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any

from sparse_train.terminal import bars_are_seen


@contextmanager
def nothing_on_stdout() -> Iterator[None]:
    """Inside, text is dropped; what bypasses Python, such as the output of compilers, goes to stderr."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(io.StringIO()):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


def dumps(result: Any) -> str:
    """JSON on one line; NaN and infinity, which JSON does not have, become null."""
    return json.dumps(json.loads(json.dumps(result), parse_constant=lambda _: None))


_LOGGERS = ("lightning.pytorch.utilities.rank_zero", "DeepSpeed")
_WARNINGS = [
    "LightningCLI's args parameter",  # main has removed the command from sys.argv
    "The dirpath has changed from",  # of checkpoints: each command has a folder of its own
    # Lightning's model summary shows the size of 32-bit weights, which is correct
    r"Precision \S+ is not supported by the model summary",
    # jsonargparse from 4.49 on, about an argument name that Lightning and older versions use
    r"\s*By default only one JsonargparseDeprecationWarning per type",
    r"\s*skip_none parameter was deprecated",
    "'set_vital' is deprecated",  # from torchdata, Lightning and torch
    r"`isinstance\(treespec",
]


def _helps(record: logging.LogRecord) -> bool:
    """Whether a message says anything to the user of a command."""
    # at every start: advice to buy two other packages; what transformers imports, even if it is not used
    return not record.getMessage().startswith(("💡 Tip: ", "Setting accelerator to CPU"))


def quiet_libraries() -> None:
    """Leave out messages that help no user, and bars where they would fill a log; before libraries are imported."""
    for message in _WARNINGS:
        warnings.filterwarnings("ignore", message)
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_helps)
    if not bars_are_seen():
        for name in ("HF_HUB_DISABLE_PROGRESS_BARS", "HF_DATASETS_DISABLE_PROGRESS_BARS", "TQDM_DISABLE"):
            os.environ.setdefault(name, "1")
