"""Models: where they come from, what recipes train, and what that learns from.

``from sparse_train.models import CausalLM``: a name is imported from its module when it is asked for, because Lightning
takes seconds and only ``CausalLM`` needs it.
"""

from importlib import import_module
from typing import Any

_HOME = {
    "CausalLM": "causal_lm",
    "Distillation": "distillation",
    "FromScratch": "sources",
    "LoRA": "lora",
    "ModelSource": "sources",
    "PackagedSmolLM2": "sources",
    "Pretrained": "sources",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOME[name]}"), name)
