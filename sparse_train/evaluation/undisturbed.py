"""Evaluation during training, without an effect on it."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from sparse_train.environment import isolated_rng
from sparse_train.oneshot.forwards import inference


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
    with isolated_rng(), inference(model, use_cache=False):
        yield
