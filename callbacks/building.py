"""When the layers of a LightningModule get masks: once the module has built them, or when a checkpoint has masks."""

import functools
from collections.abc import Callable
from typing import Any

import lightning as L
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import nn

from sparse_train.layers.matrices import MASK_NAME
from sparse_train.layers.sparse_linear import sparse_layers
from sparse_train.layers.sparsify import fold, sparsify_like

_HOOKS = ("configure_model", "setup")  # the later one first; a callback's setup runs before both


def call_when_built(pl_module: L.LightningModule, act: Callable[[L.LightningModule], None]) -> None:
    """Call ``act`` after the last hook in which the module may create layers; now, if it has no such hook."""
    for hook in _HOOKS:
        if is_overridden(hook, pl_module):
            pl_module.__dict__[hook] = functools.partial(_call, hook, pl_module, act)
            return
    act(pl_module)


def forget(pl_module: L.LightningModule) -> None:
    """Cancel a call that has not happened yet."""
    for hook in _HOOKS:
        pl_module.__dict__.pop(hook, None)


def masks_as_loaded(pl_module: L.LightningModule) -> Callable[[], None]:
    """Mask the layers that have a mask in a state dict which the module loads. Returns a function that ends this.

    It makes a module that was dense dense again, with the zeros of the loaded masks.
    """
    was_dense = not sparse_layers(pl_module)
    drop_hooks(pl_module)
    hook = pl_module.register_load_state_dict_pre_hook(_sparsify_as_loaded)  # type: ignore[no-untyped-call]

    def end() -> None:
        hook.remove()
        if was_dense and sparse_layers(pl_module):
            fold(pl_module)

    return end


def refuse_other_masks(pl_module: L.LightningModule) -> Callable[[], None]:
    """Refuse state dicts with masks of other layers than the module's. Returns a function that ends this."""
    drop_hooks(pl_module)
    hook = pl_module.register_load_state_dict_pre_hook(_check_masks)  # type: ignore[no-untyped-call]
    return hook.remove  # type: ignore[no-any-return]


def drop_hooks(pl_module: L.LightningModule) -> None:
    """Remove hooks that a failed stage, of this callback or another one, has left."""
    hooks = pl_module._load_state_dict_pre_hooks
    for key in [
        key for key, each in hooks.items() if getattr(each, "hook", each) in (_check_masks, _sparsify_as_loaded)
    ]:
        del hooks[key]


def _check_masks(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    ending = f".{MASK_NAME}"
    theirs = {key.removeprefix(prefix) for key in state_dict if key.endswith(ending)}
    own = {key for key in module.state_dict() if key.endswith(ending)}
    if theirs and theirs != own:
        raise ValueError(
            f"The run of the checkpoint pruned {len(theirs)} layers, and this one prunes {len(own)}; "
            f"{min(theirs ^ own).removesuffix(ending)} is in only one of them. Resume with the same targets and "
            "ignore, or export the checkpoint and start a new run from that."
        )


def _call(
    hook: str, pl_module: L.LightningModule, act: Callable[[L.LightningModule], None], *args: Any, **arguments: Any
) -> None:
    del pl_module.__dict__[hook]
    getattr(pl_module, hook)(*args, **arguments)
    act(pl_module)


def _sparsify_as_loaded(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    sparsify_like(module, state_dict, prefix)
