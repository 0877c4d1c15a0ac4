"""The collectives that masks need, at an update and never per step.

Without several ranks (no process group, or a world of one) they do nothing.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")

_LARGE = 2**26  # bytes; such tensors (second moments of wide inputs) are reduced separately, without a copy


def world_size() -> int:
    """Number of ranks; 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """This process's rank; 0 without a process group."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


@contextmanager
def joined(device: str) -> Iterator[str]:
    """Join the process group if ``torchrun`` has started several processes, and leave it at the end.

    Yields the device of this process: for "cuda", its own GPU.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or world_size() > 1:
        yield device
        return
    if device not in ("cpu", "cuda"):
        raise ValueError(f"Each process uses its own GPU, so under torchrun device is cpu or cuda, got {device!r}.")
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def sum_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over all ranks, in place, with one reduce per dtype for all but large ones."""
    if world_size() == 1:
        return
    for large in (tensor for tensor in tensors if tensor.nbytes > _LARGE):
        dist.all_reduce(large)
    for dtype in sorted({tensor.dtype for tensor in tensors}, key=str):  # the same order on every rank
        small = [tensor for tensor in tensors if tensor.dtype == dtype and tensor.nbytes <= _LARGE]
        if small:
            flat = torch.cat([tensor.reshape(-1) for tensor in small])
            dist.all_reduce(flat)
            for tensor, total in zip(small, flat.split([each.numel() for each in small]), strict=True):
                tensor.copy_(total.view_as(tensor))


def take_from_rank_0(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by that of rank 0, in place."""
    for tensor in tensors if world_size() > 1 else ():
        whole = tensor.contiguous()
        dist.broadcast(whole, 0)
        tensor.copy_(whole)


def gather_rows(own: Tensor, rows: int) -> Tensor:
    """A whole matrix from the rows that each rank holds: equal chunks, the last ones shorter or empty; one gather."""
    padded = own.new_zeros(-(-rows // world_size()), own.shape[1])
    padded[: len(own)] = own
    whole = own.new_empty(world_size() * len(padded), own.shape[1])
    dist.all_gather_into_tensor(whole, padded)
    return whole[:rows]


def gather_objects(own: T) -> list[T]:
    """The object of each rank, sent by pickle; for checkpoints."""
    gathered: list[Any] = [own] * world_size()
    if world_size() > 1:
        dist.all_gather_object(gathered, own)
    return gathered
