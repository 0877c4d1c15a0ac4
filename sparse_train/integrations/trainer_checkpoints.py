"""Checkpoint folders of transformers' ``Trainer``: a sparse model with true zeros, and beside it what it then lacks.

That is ``sparse_training_state.pt``: masks, shadow values of pruned weights, and the state of the ``MaskUpdater``.

Shape suffixes: O out_features, I in_features, J packed mask bytes.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.trainer import TRAINER_STATE_NAME

from sparse_train.files import load_plain, replacing
from sparse_train.layers import masks
from sparse_train.layers.masked_layer import MaskedLayer, sparse_layers
from sparse_train.layers.masks import MASK_NAME
from sparse_train.pruning.resuming import check_same_layers

STATE_FILE = "sparse_training_state.pt"


def zeros_to_masks(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """Add the masks to a state dict that ``save_pretrained`` has written, or to a shard of it."""
    for name, layer in sparse_layers(module).items():
        weight, mask = (f"{prefix}{name}.{suffix}" for suffix in ("weight", MASK_NAME))
        if weight in state_dict and mask not in state_dict:
            state_dict[mask] = masks.pack(layer.turned(state_dict[weight]) != 0)


def write_state(folder: Path, layers: Mapping[str, MaskedLayer], updater_state: Mapping[str, Any]) -> None:
    """Write what the model in this folder will lack."""
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / STATE_FILE) as temporary:
        torch.save({"layers": {n: _shadow(layer) for n, layer in layers.items()}, "updater": updater_state}, temporary)


def _shadow(layer: MaskedLayer) -> dict[str, Tensor]:
    return {
        "mask": layer.weight_mask.cpu(),
        "shadow": layer.weight_OI.detach()[~layer.unpacked_mask()].cpu(),
        "fingerprint": _fingerprint(layer.masked_weight()).cpu(),
    }


def _fingerprint(weight_OI: Tensor) -> Tensor:
    return masks.fingerprint(weight_OI.view(torch.uint8))


def check_complete(folder: Path) -> None:
    """Raise ValueError for a checkpoint folder that was not written to its end, or has lost files since.

    Without the files of optimizer, schedule or random numbers, the Trainer would go on to another result.
    """
    if (folder / TRAINER_STATE_NAME).is_file() and not (folder / STATE_FILE).is_file():
        raise ValueError(
            f"There is no {STATE_FILE} in {folder}, so there is no sparse run to resume: the checkpoint was "
            "written without SparseTrainerCallback, or with save_only_model. Load it as a model and start a new run."
        )
    missing = [name for name in ("optimizer.*", "scheduler.pt", "rng_state*.pth") if not any(folder.glob(name))]
    try:
        json.loads((folder / TRAINER_STATE_NAME).read_text())  # which the Trainer writes last
    except (OSError, ValueError):
        missing.append(TRAINER_STATE_NAME)
    if missing:
        raise ValueError(
            f"{folder} is not complete: {', '.join(missing)} missing or cut off. The run was stopped while it wrote, "
            "or files were lost. Resume from an earlier checkpoint."
        )


@torch.no_grad()
def restore_state(folder: Path, layers: Mapping[str, MaskedLayer], step: int) -> dict[str, Any]:
    """Restore the masks and shadow values of layers whose kept weights come from a checkpoint at this step.

    Returns the updater's state. Raises ValueError, and changes nothing, if the kept weights or the step are not those
    of the checkpoint that it was written for.
    """
    path = folder / STATE_FILE
    content: dict[str, Any] = load_plain(path)
    saved: dict[str, dict[str, Tensor]] = content["layers"]
    check_same_layers(saved, layers)
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
        layer.weight_OI[~layer.unpacked_mask()] = saved[name]["shadow"].to(layer.weight_OI)
    return dict(content["updater"])
