"""Guards for adapters of peft on masked layers: they must not silently compute with weights that the mask prunes.

peft merges by writing ``W + BA`` into the base layer's weight. If that layer is masked, the mask would prune the sum,
and the model would no longer be the one that was trained, ``mask * W + BA``. If the mask has been squashed, the sum is
correct, but dense. DoRA computes with norms of all weights, and PiSSA and OLoRA write some when they are added. Rare
kinds of adapters that multiply the weight in their own forward (HRA, MiSS with "bat", PEANuT) are not found.
"""

import functools
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_module_registration_hook

from sparse_train.layers.matrices import MaskedLayer, is_linear

_SPARSE = 0.05  # a weight with a larger share of zeros was pruned: training leaves no zeros


def guard_adapters() -> None:
    """Make adapters refuse what a mask would make wrong, and warn of what fills zeros.

    The classes of adapters are guarded, those that exist and later ones. Each adapter looks at its base when it is
    added and when it merges.
    """
    tuners = sys.modules.get("peft.tuners.tuners_utils")
    for kind in () if tuners is None else _subclasses(tuners.BaseTunerLayer):
        _guard(kind)
    _watch()


def _subclasses(kind: Any) -> Iterator[Any]:
    for each in kind.__subclasses__():
        yield each
        yield from _subclasses(each)


@functools.cache
def _watch() -> None:
    # Classes may be imported after the mask, without a call of ours: torch reports modules that are put into others.
    register_module_module_registration_hook(_registered)


def _registered(owner: nn.Module, name: str, module: nn.Module | None) -> None:
    if name == "base_layer" and module is not None and is_linear(module):
        for kind in type(owner).__mro__:
            _guard(kind)


def _guard(adapter: Any) -> None:
    """Wrap two methods of an adapter's class; for an adapter around an ordinary layer, nothing changes."""
    if not hasattr(adapter, "get_base_layer"):
        return  # not an adapter of peft
    for name, guarded in (("merge", _guarded_merge), ("update_layer", _guarded_start)):
        method = adapter.__dict__.get(name)
        if method is not None and not getattr(method, "refuses_masked", False):
            wrapped: Any = functools.wraps(method)(guarded(method))
            wrapped.refuses_masked = True
            setattr(adapter, name, wrapped)


def _guarded_merge(merge: Any) -> Any:
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        base = self.get_base_layer()
        if isinstance(base, MaskedLayer):
            raise ValueError(
                f"Merging an adapter into a masked layer ({base}) would prune the sum, and lose what the adapter adds "
                "where the mask prunes. Keep the adapters separate: base and adapters can be saved separately. Or call "
                "sparse_train.squash(model) first: the merged model is then the one that was trained, and dense."
            )
        if is_linear(base) and _is_sparse(base.weight):
            warnings.warn(
                "Merging an adapter into a sparse layer: the result is the model that was trained, and dense. To keep "
                "the zeros, keep base and adapter separate, or train with mask_lora.",
                stacklevel=2,
            )
        return merge(self, *args, **kwargs)

    return guarded


def _guarded_start(update_layer: Any) -> Any:
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        base: Any = self.get_base_layer()
        masked = isinstance(base, MaskedLayer)
        if not is_linear(base) or not (masked or _is_sparse(base.weight)):
            return update_layer(self, *args, **kwargs)
        before = base.weight.detach().clone()
        result = update_layer(self, *args, **kwargs)
        writes = not before.is_meta and not torch.equal(base.weight, before)
        if masked and writes:
            base.weight.data = before
            raise ValueError(
                "This initialisation of an adapter moves a part of the weight into the adapter (as PiSSA and OLoRA "
                f"do), and the mask of the layer ({base}) would prune what is left, so that the model changes. Use "
                "init_lora_weights=True, or add the adapter before the masks."
            )
        if masked:
            check_reads(self)
        if writes:
            warnings.warn(
                "This initialisation of an adapter has written into a sparse layer and filled its zeros. To keep them, "
                "use init_lora_weights=True.",
                stacklevel=2,
            )
        return result

    return guarded


def check_reads(adapter: Any) -> None:
    """Raise ValueError for DoRA, which computes with all weights of its base, also those that a mask prunes."""
    if any(getattr(adapter, "use_dora", {}).values()):
        raise ValueError(
            "DoRA divides by the norms of the weights of its layer, which under a mask would include pruned weights, "
            "so that the model would change when the mask is folded in. Use LoRA without use_dora; add DoRA after the "
            "masks are folded in (its base is frozen, so zeros stay); merge it first; or leave its layers out (ignore)."
        )


def _is_sparse(weight: Tensor) -> bool:
    ordinary = type(weight) in (Tensor, nn.Parameter) and weight.is_floating_point() and weight.dtype.itemsize > 1
    if not ordinary or weight.is_meta or not weight.numel():
        return False
    return 1 - int(torch.count_nonzero(weight)) / weight.numel() > _SPARSE
