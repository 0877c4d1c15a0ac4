"""A device that is not the CPU, and computes on it: what is true of a GPU, that tensors must be moved, is true here.

Tensors say that they are on "other:0" and hold one of the CPU. An operator that is given both kinds raises, as it
would on a GPU; code that asks for the device's type takes the branch of other devices; ``numpy()`` is refused. Results
are those of the CPU. It does not find what needs a real GPU: kernels, streams, memory.

``install`` changes what torch takes for the accelerator of this process for good: call it in a process of its own.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._pytree import tree_leaves, tree_map

NAME = "other"
SUPPORTED = hasattr(backend_registration, "_setup_privateuseone_for_python_backend")

_aten = torch.ops.aten
_MOVES = (_aten.copy_, _aten._to_copy)
_INDEXES = (_aten.index, _aten.index_put, _aten.index_put_)
_library = torch.library.Library("aten", "IMPL")


class OtherTensor(Tensor):
    """Looks like ``held``, on the other device."""

    @staticmethod
    def __new__(cls, held: Tensor) -> "OtherTensor":
        return Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            held.shape,
            strides=held.stride(),
            storage_offset=held.storage_offset(),
            dtype=held.dtype,
            device=torch.device(NAME, 0),
        )

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def __repr__(self) -> str:  # type: ignore[override]
        return f"OtherTensor({self.held!r})"

    def tolist(self) -> Any:  # which torch refuses subclasses
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(function, args, kwargs or {})


def install() -> None:
    """Make "other" a device of torch."""
    backend_registration._setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())
    _library.impl("empty.memory_format", _empty, "PrivateUse1")
    _library.impl("empty_strided", _empty_strided, "PrivateUse1")
    _library.impl("_copy_from", _copy, "PrivateUse1")
    torch.__future__.set_swap_module_params_on_conversion(True)  # Module.to would untie tied weights of a subclass


class _Backend(backend_registration._DummyBackendModule):
    """What torch, and libraries, ask of an accelerator's module."""

    def is_available(self) -> bool:
        return True

    def is_initialized(self) -> bool:
        return True

    def _is_in_bad_fork(self) -> bool:
        return False

    def device_count(self) -> int:
        return 1

    def current_device(self) -> int:
        return 0

    def synchronize(self, device: Any = None) -> None:
        pass

    def manual_seed_all(self, seed: int) -> None:
        pass

    def get_rng_state(self, device: Any = 0) -> Tensor:
        return torch.zeros(8, dtype=torch.uint8)

    def set_rng_state(self, state: Tensor, device: Any = 0) -> None:
        pass

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16, torch.float16]


def _compute(function: Any, args: Any, kwargs: Any) -> Any:
    tensors = [each for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]
    others = [each for each in tensors if isinstance(each, OtherTensor)]
    indexed = function.overloadpacket in _INDEXES and isinstance(args[0], OtherTensor)  # an index may be on CPU
    compared = tree_leaves((args[0], args[2:])) if indexed else tensors
    foreign = [each for each in compared if isinstance(each, Tensor) and not isinstance(each, OtherTensor)]
    foreign = [each for each in foreign if each.dim()]  # scalars may be anywhere
    if others and foreign and function.overloadpacket not in _MOVES:
        raise RuntimeError(
            f"Expected all tensors to be on the same device, but {function} got {tuple(foreign[0].shape)} on "
            f"{foreign[0].device} and {tuple(others[0].shape)} on {NAME}"
        )
    target = kwargs.get("device")
    moves = {} if target is None else {"device": torch.device("cpu")}
    found = function(*tree_map(_held, args), **tree_map(_held, kwargs | moves))
    if target is not None and torch.device(target).type == "cpu":
        return found
    if function is _aten.copy_.default and not isinstance(args[0], OtherTensor):
        return found
    given = {id(each.held): each for each in others}  # in-place operators give back what they were given

    def wrapped(each: Any) -> Any:
        if not isinstance(each, Tensor):
            return each
        return given[id(each)] if id(each) in given else OtherTensor(each)

    return tree_map(wrapped, found)


def _held(each: Any) -> Any:
    return each.held if isinstance(each, OtherTensor) else each


def _copy(source: Tensor, target: Tensor, non_blocking: bool = False) -> Tensor:
    _held(target).copy_(_held(source))
    return target


def _empty(size: Any, dtype: Any = None, **others: Any) -> Tensor:
    return OtherTensor(torch.empty(size, dtype=dtype))


def _empty_strided(size: Any, stride: Any, dtype: Any = None, **others: Any) -> Tensor:
    return OtherTensor(torch.empty_strided(size, stride, dtype=dtype))
