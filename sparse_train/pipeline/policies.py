"""What pruned weights do between mask updates: ``MaskPolicy``.

Shape suffixes: O out_features, I in_features.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from sparse_train.layers import sharding
from sparse_train.layers.matrices import MaskedLayer


class MaskPolicy:
    """What pruned weights do between updates, and how they come back. The base class acts as ``Fixed``."""

    straight_through: ClassVar[bool] = False
    """Whether pruned weights get the straight-through gradient."""
    comes_back: ClassVar[Literal["never", "by score", "by gradient"]] = "never"
    """How a pruned weight comes back at an update; by its gradient only under ``Regrow``."""

    def shadow_decay(self, progress: float, steps: int) -> float:
        """Factor on the values of pruned weights, for ``steps`` optimizer steps that end at ``progress`` in [0, 1]."""
        return 1.0


def only_kept(scores_OI: Tensor, mask_OI: Tensor) -> Tensor:
    """Scores (O, I) that place every pruned weight below every kept one, even a kept one with a score of -inf."""
    return torch.where(mask_OI, scores_OI.clamp_min(torch.finfo(scores_OI.dtype).min), -torch.inf)


@dataclass(frozen=True)
class Fixed(MaskPolicy):
    """Pruned weights get no gradient and stay pruned; masks change only when the schedule asks for more zeros."""


@dataclass(frozen=True)
class Dormant(MaskPolicy):
    """Pruned weights get no gradient. When their score is high, they come back with about the value that they had.

    The gradient is that of ``Fixed``. What optimizers do to weights without a gradient still happens: weight decay, and
    the momentum of weights that were just pruned, which under AdamW moves them by a few times the learning rate. Lion,
    which uses signs, and Muon, which mixes a matrix, move pruned weights as far as others.

    Under ``StraightThrough``, in contrast, a pruned weight keeps moving by a gradient that was computed without it. At
    a large learning rate it moves far, and comes back with a value that the model has never used.
    """

    comes_back: ClassVar[Literal["by score"]] = "by score"


@dataclass(frozen=True)
class StraightThrough(MaskPolicy):
    """Pruned weights keep learning from the gradient of their masked self, and come back when their score is high.

    The gradient is that of SR-STE (Zhou et al., arXiv 2102.04010). Its decay of pruned weights is decoupled here. It is
    not part of the backward pass, where it would scale with micro-batches and loss scale, be clipped, and be
    renormalised by Adam. Instead, shadow values are multiplied by ``(1 - rate) ** steps`` when the mask is updated. The
    rate rises linearly and then stays, as in AST (Huang et al., arXiv 2407.20584, section 3.2); with ``anneal`` it
    falls again.

    Args:
        srste_decay: share by which a shadow value shrinks per optimizer step after the ramp; 0 = none.
        ramp: share of the way from first to last update over which the rate grows from 0 to ``srste_decay``.
        anneal: share of the way at which the rate starts to fall, linearly, to 0 at the last update; 1 = never.
    """

    srste_decay: float = 0.0
    ramp: float = 0.5
    anneal: float = 1.0

    straight_through: ClassVar[bool] = True
    comes_back: ClassVar[Literal["by score"]] = "by score"

    def __post_init__(self) -> None:
        if not 0 <= self.srste_decay < 1:
            raise ValueError(f"srste_decay is a share per step, at least 0 and below 1, got {self.srste_decay}.")
        if not 0 <= self.ramp <= 1:
            raise ValueError(f"ramp is a share of the run, from 0 to 1, got {self.ramp}.")
        if not self.ramp <= self.anneal <= 1:
            raise ValueError(
                f"anneal is the share of the run at which the decay starts to fall, from ramp ({self.ramp}) to 1 "
                f"(never), got {self.anneal}."
            )

    def shadow_decay(self, progress: float, steps: int) -> float:
        rising = progress / self.ramp if self.ramp else 1.0
        falling = (1 - progress) / (1 - self.anneal) if self.anneal < 1 else 1.0
        rate = self.srste_decay * min(1.0, rising, falling)
        return float((1 - rate) ** steps)


def check_policy(layers: Mapping[str, MaskedLayer], policy: MaskPolicy, shadow_factor: float = 1.0) -> None:
    """Raise ValueError if a policy would write into weights that are frozen, or that an adapter keeps frozen."""
    shrinks = shadow_factor != 1 or (isinstance(policy, StraightThrough) and policy.srste_decay > 0)
    frozen = next((name for name, layer in layers.items() if not layer.weight_OI.requires_grad), None)
    if shrinks and frozen is not None and not layers[frozen].adapted:
        raise ValueError(
            f"{frozen} is frozen, and {policy} would shrink its pruned weights. Set srste_decay to 0, or leave the "
            "layer out (ignore)."
        )
    name = next((name for name, layer in layers.items() if layer.adapted), None)
    if name is None:
        return
    if policy.comes_back == "by gradient":
        raise ValueError(
            f"{name} has a mask_lora adapter, so its weight is frozen, and {policy} would write into it: weights come "
            "back from zero. Use Fixed() or StraightThrough(), or train without mask_lora."
        )
    if shrinks:
        raise ValueError(
            f"{name} has a mask_lora adapter, so its weight is frozen, and {policy} would shrink its pruned weights. "
            "Set srste_decay to 0, or train without mask_lora."
        )


def check_precision(layers: Mapping[str, MaskedLayer], policy: MaskPolicy, update_freq: int) -> None:
    """Raise ValueError if the dtype of a weight would lose the decay of a policy, at its full rate."""
    if not isinstance(policy, StraightThrough) or policy.srste_decay == 0:
        return
    shrinks_by = 1 - (1 - policy.srste_decay) ** update_freq
    for name, layer in layers.items():
        dtype = layer.weight_OI.dtype
        in_float32 = sharding.has_masters(layer) or sharding.is_zero3(layer.weight_OI)  # DeepSpeed's masters shrink
        if shrinks_by < torch.finfo(dtype).eps / 2 and not in_float32:
            raise ValueError(
                f"srste_decay={policy.srste_decay:g} shrinks pruned weights by {100 * shrinks_by:.2g} % per update, "
                f"which is lost when {name} is rounded to {dtype}. Train in mixed precision (weights in float32), "
                "update less often, or raise srste_decay."
            )
