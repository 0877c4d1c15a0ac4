"""``Activations``: the outputs of a decoder block, one entry per batch, in memory or on disk."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor


class Activations:
    """Outputs of one block for every calibration batch; those of the next block replace them one by one.

    Args:
        batches: number of batches.
        keep: where entries are kept between uses: "device" (where they were computed), "host" (main memory), or an
            existing folder on disk.
    """

    def __init__(self, batches: int, keep: str | Path = "device") -> None:
        self._entries: list[Any] = [None] * batches
        self._keep = keep

    def __getitem__(self, batch: int) -> Any:
        if isinstance(self._keep, Path):
            return torch.load(self._keep / f"{batch}.pt", map_location="cpu", weights_only=True)
        return self._entries[batch]

    def __setitem__(self, batch: int, output: Any) -> None:
        if isinstance(self._keep, Path):
            try:
                torch.save(moved(output, torch.device("cpu")), self._keep / f"{batch}.pt")
            except RuntimeError as error:  # torch raises this for a failed write
                raise OSError(f"Cannot write activations to {self._keep}: {error}. Is the disk full?") from error
        else:
            self._entries[batch] = output if self._keep == "device" else moved(output, torch.device("cpu"))


def moved(value: Any, device: torch.device) -> Any:
    """Moves tensors in nested tuples, lists and dicts to another device; other values stay unchanged."""
    return changed(value, lambda tensor: tensor.detach().to(device))


def copied(value: Any) -> Any:
    """Copies tensors in nested tuples, lists and dicts; other values stay unchanged."""
    return changed(value, Tensor.clone)


def changed(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Nested tuples, lists and dicts with ``change`` of each tensor in them; other values stay unchanged."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(changed(part, change) for part in value))
    if isinstance(value, (tuple, list)):
        return type(value)(changed(part, change) for part in value)
    if isinstance(value, dict):
        return type(value)(**{key: changed(part, change) for key, part in value.items()})
    return value


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list, dict)):
        for part in value.values() if isinstance(value, dict) else value:
            yield from tensors_in(part)
