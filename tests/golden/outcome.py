"""What a scenario ends with, and the hash of it."""

import hashlib
import logging
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from transformers.utils.logging import disable_progress_bar


class Outcome(NamedTuple):
    """Masks before the squash, True = kept, and weights after it, by name."""

    masks: dict[str, Tensor]
    weights: dict[str, Tensor]


def digests(outcome: Outcome) -> dict[str, str]:
    """SHA-256 of an outcome's masks and of its weights."""
    return {"masks": _digest(outcome.masks), "weights": _digest(outcome.weights)}


def _digest(tensors: Mapping[str, Tensor]) -> str:
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        found.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return found.hexdigest()


@contextmanager
def one_thread() -> Iterator[None]:
    """One thread, as several add in another order, and the same seed whatever ran before."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            yield
    finally:
        torch.set_num_threads(threads)


def quiet() -> None:
    """Say only what went wrong: scenarios stop runs early and leave out what users would be warned of."""
    warnings.simplefilter("ignore")
    for name in ("lightning.pytorch", "sparse_train", "transformers", "deepspeed", "DeepSpeed"):
        logging.getLogger(name).setLevel(logging.ERROR)
    disable_progress_bar()
