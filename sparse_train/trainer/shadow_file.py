"""A file with what a checkpoint with true zeros lacks: masks, and the shadow values of pruned weights.

Shape suffixes: O out_features, I in_features, J packed mask bytes.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_train.files import replacing
from sparse_train.layers import masks
from sparse_train.layers.matrices import MaskedLayer

FILE_NAME = "sparse_training_state.pt"


def save(path: Path, layers: Mapping[str, MaskedLayer], updater: Mapping[str, Any]) -> None:
    """Write masks, shadow values and the updater's state, first under another name, then renamed."""
    content = {"layers": {name: _saved(layer) for name, layer in layers.items()}, "updater": dict(updater)}
    with replacing(path) as temporary:
        torch.save(content, temporary)


@torch.no_grad()
def restore(path: Path, layers: Mapping[str, MaskedLayer], step: int) -> dict[str, Any]:
    """Restore the masks and shadow values of layers whose kept weights come from a checkpoint.

    Args:
        path: of the file.
        layers: by name.
        step: of the checkpoint.

    Returns:
        The updater's state.

    Raises:
        ValueError: the kept weights or the step are not those of the checkpoint that the file was written for. Then
            nothing is changed.
    """
    content: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    saved: dict[str, dict[str, Tensor]] = content["layers"]
    if saved.keys() != layers.keys():
        name = sorted(saved.keys() ^ layers.keys())[0]
        raise ValueError(
            f"{path} is of a run that pruned {len(saved)} layers, and this one prunes {len(layers)}; {name} is only in "
            "one of them. Resume with the same targets and ignore."
        )
    if content["updater"]["steps"] != step:
        raise ValueError(
            f"{path} was written after {content['updater']['steps']} steps, and the checkpoint after {step}: they do "
            "not belong together."
        )
    for name, layer in layers.items():
        mask_OJ = saved[name]["mask"].to(layer.weight_mask.device)
        kept_OI = masks.apply(layer.weight_OI.detach(), mask_OJ)
        if not torch.equal(_fingerprint(kept_OI).cpu(), saved[name]["fingerprint"]):
            raise ValueError(
                f"{path} does not belong to the weights that were loaded: {name} differs. Resume from an unchanged "
                "checkpoint folder."
            )
    for name, layer in layers.items():
        layer.weight_mask.copy_(saved[name]["mask"])
        pruned_OI = ~layer.unpacked_mask()
        layer.weight_OI[pruned_OI] = saved[name]["shadow"].to(layer.weight_OI)
    state: dict[str, Any] = content["updater"]
    return state


def _saved(layer: MaskedLayer) -> dict[str, Tensor]:
    return {
        "mask": layer.weight_mask.cpu(),
        "shadow": layer.weight_OI.detach()[~layer.unpacked_mask()].cpu(),
        "fingerprint": _fingerprint(layer.masked_weight()).cpu(),
    }


def _fingerprint(weight_OI: Tensor) -> Tensor:
    return masks.fingerprint(weight_OI.view(torch.uint8))
