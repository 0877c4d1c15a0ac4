"""What a resumed run must have in common with the one that is resumed; each check raises ValueError."""

from collections.abc import Iterable, Mapping
from typing import Any

from sparse_train.arguments import as_call
from sparse_train.layers import masks
from sparse_train.layers.masked_layer import MaskedLayer

_FREE = ("targets", "ignore", "first_mask")
"""What a resumed run may write in other words: the layers themselves are compared, and the first mask is made."""


def check_same_settings(saved: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise ValueError if a saved run had other settings (``as_data``) than these."""
    for name, now in own.items():
        if name not in _FREE and saved.get(name) != now:
            raise ValueError(
                f"The checkpoint was written with {name} = {as_call(saved.get(name))}, and this run has "
                f"{as_call(now)}. Resume with the same setting, or start a new run (docs/faq.md)."
            )


def check_same_layers(saved: Iterable[str], layers: Iterable[str]) -> None:
    """Raise ValueError if the run of a checkpoint pruned other layers than this one."""
    differing = sorted({*saved} ^ {*layers})
    if differing:
        raise ValueError(
            f"The run of the checkpoint did not prune the same layers as this one; {differing[0]} is in only one of "
            "them. Resume with the same targets and ignore, or export the checkpoint and start a new run from that."
        )


def check_restored_masks(saved: Mapping[str, int], layers: Mapping[str, MaskedLayer], sparsity: float | None) -> None:
    """Raise ValueError if the masks of layers are not those of a state, given as fingerprints (``state["masks"]``)."""
    check_same_layers(saved, layers)
    own = {name: masks.fingerprint_number(layer.weight_mask) for name, layer in layers.items()}
    wrong = next((name for name, number in saved.items() if own[name] != number), None)
    if wrong is not None:
        dense = sum(layer.is_dense() for layer in layers.values())
        raise ValueError(
            f"The resumed run was at a sparsity of {sparsity}, and the mask of {wrong} is not the one it had "
            f"({dense} of {len(layers)} layers are dense). The masks are in the model's state dict, as "
            "buffers named weight_mask: load the model of the same checkpoint (strict_loading=False and "
            "on_save_checkpoint may leave them out), or start a new run."
        )
