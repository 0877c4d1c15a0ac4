"""What the scenarios use of sparse_train. Where its interface changes, this file follows; ``digests.json`` does not."""

from typing import Any

import torch
from torch import Tensor, nn

from sparse_train import (
    OWL,
    RIA,
    Cubic,
    Dormant,
    Explicit,
    FirstWindow,
    Fixed,
    FromZeros,
    Linear,
    Magnitude,
    MaskLoRA,
    MaskUpdater,
    OneShot,
    Regrow,
    SparseGPT,
    StraightThrough,
    Unstructured,
    Wanda,
    WandaCumulative,
    prune,
    sparse_layers,
    squash,
)
from sparse_train.callbacks import DynamicPruning
from sparse_train.distributed.collectives import rank
from sparse_train.distributed.engines import whole_state_dict
from sparse_train.integrations.transformers import SparseTrainerCallback
from sparse_train.oneshot.batches import random_batches
from sparse_train.oneshot.prune import prune_checkpoint

__all__ = [
    "OWL",
    "RIA",
    "Cubic",
    "Dormant",
    "DynamicPruning",
    "Explicit",
    "Fixed",
    "Linear",
    "Magnitude",
    "MaskLoRA",
    "MaskUpdater",
    "Regrow",
    "SparseGPT",
    "SparseTrainerCallback",
    "StraightThrough",
    "Unstructured",
    "Wanda",
    "WandaCumulative",
    "distribution",
    "existing_masks",
    "first_window",
    "from_zeros",
    "loop_existing_masks",
    "loop_first_window",
    "loop_from_zeros",
    "masks_of",
    "norm_decay",
    "one_shot",
    "prune",
    "prune_checkpoint",
    "random_batches",
    "rank",
    "squash",
    "srste",
    "whole_state_dict",
]

Arguments = dict[str, Any]


def one_shot(method: Any = None, samples: int = 16) -> Arguments:
    """Arguments of a callback: the first mask from one-shot pruning by ``method``; None = the criterion of the run."""
    return {"first_mask": OneShot(method, samples)}


def first_window() -> Arguments:
    """Arguments of a callback: the first mask from the activations of the first steps, which run dense."""
    return {"first_mask": FirstWindow()}


def from_zeros() -> Arguments:
    """Arguments of a callback: the first mask is where the model has zeros."""
    return {"first_mask": FromZeros()}


def existing_masks() -> Arguments:
    """Arguments of a callback: the model has masks already."""
    return {"first_mask": None}


def loop_first_window() -> Arguments:
    """``first_window`` for ``MaskUpdater``."""
    return first_window()


def loop_from_zeros() -> Arguments:
    """``from_zeros`` for ``MaskUpdater``."""
    return from_zeros()


def loop_existing_masks() -> Arguments:
    """``existing_masks`` for ``MaskUpdater``."""
    return existing_masks()


def norm_decay(factor: float) -> Arguments:
    """Arguments of a callback or of ``MaskUpdater``: how much the norms of earlier windows count."""
    return {"norm_decay": factor}


def distribution(of_layers: Any) -> Arguments:
    """Arguments of a callback, of ``MaskUpdater`` or of ``prune``: how the sparsity is divided among layers."""
    return {"distribution": of_layers}


def srste(rate: float) -> StraightThrough:
    """The straight-through policy whose pruned weights shrink by ``rate`` per step, from the first step on."""
    return StraightThrough(srste_decay=rate)


def masks_of(model: nn.Module) -> dict[str, Tensor]:
    """The masks of a model by the names of their layers, bool (out_features, in_features), True = kept."""
    return {name: layer.unpacked_mask().to(torch.bool).clone() for name, layer in sparse_layers(model).items()}
