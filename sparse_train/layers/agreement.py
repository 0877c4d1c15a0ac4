"""Whether all processes hold the same masks: fingerprints, summed over ranks."""

from collections.abc import Mapping

import torch
from torch import Tensor

from sparse_train.distributed import sum_over_ranks, world_size
from sparse_train.layers import masks
from sparse_train.layers.matrices import MaskedMatrix


def check_agreement(layers: Mapping[str, MaskedMatrix]) -> None:
    """Raise ValueError, on every rank, if ranks hold different masks; costs one small reduce."""
    if world_size() > 1:
        bits = fingerprints(layers)
        sum_over_ranks([bits])
        compare(layers, bits)


def fingerprints(layers: Mapping[str, MaskedMatrix]) -> Tensor:
    """Fingerprint of each mask as float32 zeros and ones, one row per layer, to be summed over ranks."""
    return torch.stack([masks.fingerprint(layer.weight_mask) for layer in layers.values()]).float()


def compare(layers: Mapping[str, MaskedMatrix], bits: Tensor) -> None:
    """``check_agreement`` on ``fingerprints`` that were summed over ranks."""
    differing = ((bits > 0) & (bits < world_size())).any(1).tolist()  # ranks agree on a bit if its sum is 0 or all
    for name, differs in zip(layers, differing, strict=True):
        if differs:
            raise ValueError(
                f"{name}: the masks of the {world_size()} processes are not the same, so they have been training "
                "different models since the last update. Masks were changed in one of them, or its memory is faulty; "
                "resume from a checkpoint, and leave masks to the updates."
            )
