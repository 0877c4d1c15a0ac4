"""A guard for adapters on masked layers: merging one into its base must not lose most of it without a word.

peft merges by writing ``W + BA`` into the base layer's weight. Where that layer is masked, the mask would go on pruning
the sum, and the model would no longer be the one that was trained, ``mask * W + BA``. Where the mask has been squashed
the sum is right, and dense.
"""

import functools
import warnings
from typing import Any

from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from sparse_train.layers.matrices import MaskedLayer, is_linear

_SPARSE = 0.05  # share of zeros above which a weight was pruned: training leaves none


def guard_merges(model: nn.Module) -> None:
    """Make adapters of ``model``, and later ones, refuse to merge into masked layers, and warn where it fills zeros.

    What is guarded are the adapters' classes, so also those around other models; each looks at its base when it merges.
    """
    for module in model.modules():
        if _is_base(module._modules.get("base_layer")):
            _guard(type(module))
    _watch()


def _is_base(module: nn.Module | None) -> bool:
    return module is not None and is_linear(module)


@functools.cache
def _watch() -> None:
    # An adapter may come after the mask, and nothing of ours is called then: torch tells of modules put into others.
    register_module_module_registration_hook(_registered)


def _registered(owner: nn.Module, name: str, module: nn.Module | None) -> None:
    if name == "base_layer" and _is_base(module):
        _guard(type(owner))


def _guard(adapter: Any) -> None:
    """Wrap ``merge`` of an adapter's class; of one around an ordinary layer it does what it did."""
    merge = getattr(adapter, "merge", None)
    if merge is None or getattr(merge, "refuses_masked", False) or not hasattr(adapter, "get_base_layer"):
        return  # the last: no adapter of peft

    @functools.wraps(merge)
    def guarded(self: Any, *args: Any, **kwargs: Any) -> Any:
        base = self.get_base_layer()
        if isinstance(base, MaskedLayer):
            raise ValueError(
                f"Merging an adapter into a masked layer ({base}) would prune the sum, and lose what the adapter adds "
                "where the mask prunes. Keep the adapters apart: base and adapters can be saved by themselves. Or call "
                "sparse_train.squash(model) first: what is merged then is what was trained, and dense."
            )
        if base.weight.is_floating_point() and float((base.weight == 0).float().mean()) > _SPARSE:
            warnings.warn(
                "Merging an adapter into a sparse layer: what comes out is what was trained, and dense. To keep the "
                "zeros, keep base and adapter apart, or train with mask_lora.",
                stacklevel=2,
            )
        return merge(self, *args, **kwargs)

    guarded.refuses_masked = True  # type: ignore[attr-defined]
    adapter.merge = guarded
