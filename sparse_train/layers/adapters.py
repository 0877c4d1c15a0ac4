"""A guard for adapters on masked layers: merging one into its base must not silently lose most of it.

peft merges by writing ``W + BA`` into the base layer's weight. If that layer is masked, the mask would prune the sum,
and the model would no longer be the one that was trained, ``mask * W + BA``. If the mask has been squashed, the sum is
correct, but dense.
"""

import functools
import warnings
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from sparse_train.layers.matrices import MaskedLayer, is_linear

_SPARSE = 0.05  # a weight with a larger share of zeros was pruned: training leaves no zeros


def guard_merges(model: nn.Module) -> None:
    """Make adapters of ``model``, and later ones, refuse to merge into masked layers, and warn if a merge fills zeros.

    The classes of the adapters are guarded, so adapters around other models are too. Each checks its base when it
    merges.
    """
    for module in model.modules():
        if _is_base(module._modules.get("base_layer")):
            _guard(type(module))
    _watch()


def _is_base(module: nn.Module | None) -> bool:
    return module is not None and is_linear(module)


@functools.cache
def _watch() -> None:
    # An adapter may be added after the mask, without a call of ours: torch reports modules that are put into others.
    register_module_module_registration_hook(_registered)


def _registered(owner: nn.Module, name: str, module: nn.Module | None) -> None:
    if name == "base_layer" and _is_base(module):
        _guard(type(owner))


def _guard(adapter: Any) -> None:
    """Wrap ``merge`` of an adapter's class; for an adapter around an ordinary layer, nothing changes."""
    merge = getattr(adapter, "merge", None)
    if merge is None or getattr(merge, "refuses_masked", False) or not hasattr(adapter, "get_base_layer"):
        return  # not an adapter of peft

    @functools.wraps(merge)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        base = self.get_base_layer()
        if isinstance(base, MaskedLayer):
            raise ValueError(
                f"Merging an adapter into a masked layer ({base}) would prune the sum, and lose what the adapter adds "
                "where the mask prunes. Keep the adapters separate: base and adapters can be saved separately. Or call "
                "sparse_train.squash(model) first: the merged model is then the one that was trained, and dense."
            )
        if base.weight.is_floating_point() and float((base.weight == 0).float().mean()) > _SPARSE:
            warnings.warn(
                "Merging an adapter into a sparse layer: the result is the model that was trained, and dense. To keep "
                "the zeros, keep base and adapter separate, or train with mask_lora.",
                stacklevel=2,
            )
        return merge(self, *args, **kwargs)

    guarded.refuses_masked = True  # type: ignore[attr-defined]
    adapter.merge = guarded
