"""The collectives that masks need, at an update and never per step: one sum over ranks, one gather of bytes.

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

_DIGIT = 12  # bits: sums of digits over up to 4096 ranks are exact in float32
_DIGITS = 4
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
        raise ValueError(
            f"Each process uses its own GPU, so under torchrun device must be cpu or cuda, got {device!r}."
        )
    if device == "cuda":
        device = f"cuda:{os.environ['LOCAL_RANK']}"
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.startswith("cuda") else "gloo")
    try:
        yield device
    finally:
        dist.destroy_process_group()


def sum_over_ranks(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by its sum over all ranks, in place, with one reduce for all but very large ones.

    Args:
        tensors: float32, or int64 with values from 0 to 2^48 (sent as four float32 digits, so that they stay exact).
    """
    if world_size() == 1 or not tensors:
        return
    for large in (tensor for tensor in tensors if tensor.nbytes > _LARGE):
        dist.all_reduce(large)
    tensors = [tensor for tensor in tensors if tensor.nbytes <= _LARGE]
    if not tensors:
        return
    flat = torch.cat([_to_float(tensor) for tensor in tensors])
    dist.all_reduce(flat)
    start = 0
    for tensor in tensors:
        size = tensor.numel() * (1 if tensor.is_floating_point() else _DIGITS)
        part, start = flat[start : start + size], start + size
        tensor.copy_(part.view_as(tensor) if tensor.is_floating_point() else _to_integer(part, tensor))


def all_ranks(answer: bool, device: torch.device) -> bool:
    """Whether the answer is yes on every rank."""
    if world_size() == 1:
        return answer
    count = torch.tensor([float(answer)], device=device)
    sum_over_ranks([count])
    return int(count) == world_size()


def _to_float(tensor: Tensor) -> Tensor:
    if tensor.is_floating_point():
        assert tensor.dtype == torch.float32, tensor.dtype
        return tensor.reshape(-1)
    digits = [(tensor.reshape(-1) >> _DIGIT * place) & (2**_DIGIT - 1) for place in range(_DIGITS)]
    return torch.cat(digits).float()


def _to_integer(digits: Tensor, like: Tensor) -> Tensor:
    places = digits.view(_DIGITS, -1).to(like.dtype)
    return torch.stack([digit << _DIGIT * place for place, digit in enumerate(places)]).sum(0).view_as(like)


def take_from_rank_0(tensors: Sequence[Tensor]) -> None:
    """Replace each tensor by rank 0's, in place."""
    if world_size() > 1:
        for tensor in tensors:
            whole = tensor.contiguous()  # the tensor itself, unless it is a view such as Conv1D's weight
            dist.broadcast(whole, 0)
            tensor.copy_(whole)


def gather_bytes(own: Tensor, length: int) -> list[Tensor]:
    """The bytes of each rank, uint8 (<= length,), padded to ``length``; one gather."""
    if world_size() == 1:
        return [own]
    padded = own.new_zeros(length)
    padded[: len(own)] = own
    gathered = own.new_empty(world_size() * length)
    dist.all_gather_into_tensor(gathered, padded)
    return list(gathered.view(world_size(), length))


def gather_objects(own: T) -> list[T]:
    """The object of each rank, sent by pickle; for checkpoints."""
    gathered: list[Any] = [own] * world_size()
    if world_size() > 1:
        dist.all_gather_object(gathered, own)
    return gathered
