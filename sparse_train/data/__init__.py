"""Where text and conversations come from, and how they become batches.

``from sparse_train.data import TextBlocks``: a name is imported from its module when it is asked for, because Lightning
takes seconds and only ``TextBlocks`` needs it.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "HubText": "texts",
    "PackagedQuestions": "texts",
    "PackagedWikipedia": "texts",
    "PythonStandardLibrary": "texts",
    "TextBlocks": "text_blocks",
    "TextFiles": "texts",
    "TextSource": "texts",
    "blocks_of": "blocks",
    "calibration_batches": "blocks",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
