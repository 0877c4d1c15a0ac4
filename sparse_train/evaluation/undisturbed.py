"""Evaluation during training, without an effect on it."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from sparse_train.environment import isolated_rng


def check_autocast(dtype: torch.dtype | None) -> None:
    """Raise ValueError for a dtype in which autocast would not compute, but in that of the weights."""
    if dtype not in (None, torch.bfloat16, torch.float16):
        raise ValueError(
            f"autocast computes in bfloat16 or float16, got {str(dtype).removeprefix('torch.')}: the weights decide "
            "about others. Load them in it: --model Pretrained --model.path FOLDER --model.dtype float32."
        )


def computed_in(model: nn.Module, autocast: torch.dtype | None) -> str:
    """The dtype of a forward, from autocast or the weights."""
    return str(autocast or next(model.parameters()).dtype).removeprefix("torch.")


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """Inside, evaluation mode without gradients; afterwards, model and random numbers are as they were.

    Activation statistics record nothing inside. Keys and values are only cached by forwards that ask for it, such as
    ``generate``.
    """
    training = [module for module in model.modules() if module.training]
    configs: dict[int, Any] = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    caching = [config for config in configs.values() if getattr(config, "use_cache", False)]
    with torch.no_grad(), isolated_rng():
        try:
            model.eval()
            for config in caching:
                config.use_cache = False
            yield
        finally:
            for module in training:
                module.training = True
            for config in caching:
                config.use_cache = True
