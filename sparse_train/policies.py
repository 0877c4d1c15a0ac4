"""What pruned weights do between mask updates, and how they come back: ``MaskPolicy``.

Shape suffixes: O out_features, I in_features, J packed mask bytes.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from sparse_train.architecture import class_path
from sparse_train.criteria import LayerContext
from sparse_train.layers import masks
from sparse_train.layers.masked_layer import MaskedLayer
from sparse_train.patterns import Pattern, Unstructured


class Optimizers:
    """The optimizers that train the layers of a run, and what they hold for each weight."""

    def __init__(self) -> None:
        self.known: list[Optimizer] = []

    def add(self, optimizer: Any) -> Optimizer:
        """Remember an optimizer, and return it without accelerate's wrapper."""
        wrapped = class_path(type(optimizer)) == "accelerate.optimizer.AcceleratedOptimizer"
        own: Optimizer = optimizer.optimizer if wrapped else optimizer
        if all(own is not known for known in self.known):
            self.known.append(own)
        return own

    def state_of(self, layer: MaskedLayer, by_rows: bool = False) -> dict[str, Tensor]:
        """What is held for a layer's weights, such as Adam's moments (O, I); of a sharded one, only ``by_rows``."""
        layout, held = layer.layout, {}
        if not layout.is_sharded or (by_rows and not layer.is_transposed):
            for optimizer in self.known:
                for name, value in optimizer.state.get(layer.weight, {}).items():
                    if isinstance(value, Tensor) and value.shape == layer.weight.shape:
                        rows = layout.state_rows(value)
                        if rows is not None:
                            held[name] = layer.turned(rows)
        return held


def only_kept(scores: Tensor, keep: Tensor) -> Tensor:
    """Scores that place every pruned weight below every kept one, even a kept one with a score of -inf."""
    return torch.where(keep, scores.clamp_min(torch.finfo(scores.dtype).min), -torch.inf)


class MaskPolicy:  # no dataclass itself: jsonargparse would take that for a group of fields, and not for a base class
    """What pruned weights do between updates, and how they come back. The base class acts as ``Fixed``.

    A run works on its own copy, which may keep state, and calls the methods below in their order.
    """

    straight_through: ClassVar[bool] = False
    """Whether pruned weights get the straight-through gradient."""
    regrowth: ClassVar[Literal["never", "by score", "from zero"]] = "never"
    """Whether pruned weights come back at an update: never, with their shadow value if their score is high, or from
    zero, as ``select`` says."""

    @property
    def rowwise(self) -> bool:
        """Whether it scores and selects each row without the others, as the base class does."""
        return (type(self).scores, type(self).select) == (MaskPolicy.scores, MaskPolicy.select)

    def begin(self, layers: Mapping[str, MaskedLayer], optimizers: Optimizers, update_freq: int) -> None:
        """Called once, before the first mask."""
        self.layers, self.optimizers, self.update_freq = layers, optimizers, update_freq

    def check(self) -> None:
        """Raise ValueError if the policy does not work with the layers as they are: after ``begin``, at each update."""

    def before_step(self, progress: float | None) -> None:
        """Before the forwards of a step; ``progress`` of the update that follows the step, None if none does."""

    def before_optimizer_step(self, optimizer: Optimizer) -> None:
        """After backward, before clipping and the optimizer's step."""

    def before_update(self, steps: int) -> None:
        """Before weights are scored, ``steps`` optimizer steps after the last update."""

    def scores(self, scores_OI: Tensor, layer: LayerContext) -> Tensor:
        """By what weights are selected, from the criterion's scores (O, I); -inf = pruned first."""
        return scores_OI if self.regrowth == "by score" else only_kept(scores_OI, layer.keep_OI)

    def select(self, scores: Tensor, names: Iterable[str], pattern: Pattern, sparsity: float) -> Tensor:
        """The new mask, with the pattern's exact counts, from the scores of a layer (O, I), or of all as one row."""
        return pattern.mask(scores, sparsity)

    def after_update(self) -> None:
        """After masks have changed."""

    def state_dict(self) -> dict[str, Any]:
        """What has to survive a checkpoint; on every rank."""
        return {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from ``state_dict``."""


@dataclass
class Fixed(MaskPolicy):
    """Pruned weights get no gradient and stay pruned; masks change only when the schedule asks for more zeros."""


@dataclass
class Dormant(MaskPolicy):
    """Pruned weights get no gradient. When their score is high, they come back with about the value that they had.

    What optimizers do to weights without a gradient still happens: weight decay, and the momentum of weights that were
    just pruned, under AdamW a few times the learning rate. Lion and Muon move pruned weights as far as others. Under
    ``StraightThrough``, in contrast, a pruned weight keeps moving by a gradient that was computed without it. At a
    large learning rate it moves far, and comes back with a value that the model has never used.
    """

    regrowth: ClassVar[Literal["by score"]] = "by score"


@dataclass
class StraightThrough(MaskPolicy):
    """Pruned weights keep learning from the gradient of their masked self, and come back when their score is high.

    The gradient is that of SR-STE (Zhou et al., arXiv 2102.04010). Its decay of pruned weights is decoupled here: in
    the backward pass it would scale with micro-batches and loss scale, be clipped, and be renormalised by Adam.
    Instead, shadow values are multiplied by ``(1 - srste_decay) ** steps`` before an update.

    Args:
        srste_decay: share by which a shadow value shrinks per optimizer step; 0 = none.
    """

    srste_decay: float = 0.0

    straight_through: ClassVar[bool] = True
    regrowth: ClassVar[Literal["by score"]] = "by score"

    def __post_init__(self) -> None:
        if not 0 <= self.srste_decay < 1:
            raise ValueError(f"srste_decay is a share per step, at least 0 and below 1, got {self.srste_decay}.")

    def check(self) -> None:
        if not self.srste_decay:
            return
        shrunk = 1 - (1 - self.srste_decay) ** self.update_freq
        for name, layer in self.layers.items():
            if layer.has_factors or not layer.weight.requires_grad:
                raise ValueError(
                    f"{name} is frozen{' by mask_lora' if layer.has_factors else ''}, and {self} would shrink its "
                    "pruned weights. Set srste_decay to 0, or leave the layer out (ignore)."
                )
            # masters shrink in float32
            if shrunk < torch.finfo(layer.weight.dtype).eps / 2 and not layer.layout.has_masters:
                raise ValueError(
                    f"srste_decay={self.srste_decay:g} shrinks pruned weights by {100 * shrunk:.2g} % per update, "
                    f"which is lost when {name} is rounded to {layer.weight.dtype}. Train in mixed precision, update "
                    "less often, or raise srste_decay."
                )

    def before_update(self, steps: int) -> None:
        factor = (1 - self.srste_decay) ** steps
        if factor == 1:
            return
        for layer in self.layers.values():
            layer.rewrite(lambda weight, keep: torch.where(keep, weight, weight * factor))


@dataclass
class Regrow(MaskPolicy):
    """Pruned weights get no gradient between updates. At an update, some kept weights are dropped, and as many grown.

    The kept weights with the lowest scores are dropped. Of all weights that are then pruned, those with the largest
    gradients are grown, from zero. This is RigL (Evci et al., arXiv 1911.11134, section 3), with the criterion's score
    instead of magnitude. A dropped weight with a large enough gradient is grown again and keeps its value. The moments
    that the optimizer has for weights that were dropped or grown are cleared.

    Weights are dropped and grown within the pattern's group; N:M drops within rows, and grows in each group of M as
    many as that group has lost. Only the step before an update computes gradients of pruned weights; until the update
    they are held in addition to ``grad``.

    Needs whole weights in every process (one process, DDP), and torch's ``AdamW``, ``Adam`` or ``SGD``. In a custom
    training loop, call ``MaskUpdater.before_optimizer_step``. A layer without a gradient in that step, or with one that
    is not finite (a step that a loss scaler skips), keeps its mask, except for what the schedule asks.

    Args:
        drop_fraction: share of kept weights that are dropped at the first update; falls along a cosine to 0 at the
            last.
    """

    drop_fraction: float = 0.3
    regrowth: ClassVar[Literal["from zero"]] = "from zero"

    def __post_init__(self) -> None:
        if not 0 < self.drop_fraction <= 1:
            raise ValueError(f"drop_fraction is the share of kept weights to change, in (0, 1]: {self.drop_fraction}.")
        self.fraction = 0.0
        """Share of kept weights that the update after the running step will drop; 0 = no gradients are needed."""
        self.gradients: dict[str, Tensor | None] = {}
        """Gradients of the running step, in the layout of the parameter; None = there was none, or not finite."""

    def check(self) -> None:
        for name, layer in self.layers.items():
            if layer.layout.is_sharded or layer.layout.has_masters:
                raise ValueError(
                    f"{name} is divided among processes, or DeepSpeed holds copies of it. {self} needs whole gradients "
                    "and an optimizer that it can clear: train with DDP, or use StraightThrough()."
                )
            if layer.has_factors:
                raise ValueError(
                    f"{name} is frozen by mask_lora, and {self} would write into it: weights come back from zero. Use "
                    "Fixed() or StraightThrough(), or train without mask_lora."
                )
        for optimizer in self.optimizers.known:
            _moments(optimizer)

    def before_step(self, progress: float | None) -> None:
        # arXiv 1911.11134, section 3, update schedule
        self.fraction = 0.0 if progress is None else self.drop_fraction / 2 * (1 + math.cos(math.pi * progress))
        for layer in self.layers.values():
            layer.straight_through = self.fraction > 0

    @torch.no_grad()
    def before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Store the gradients of the optimizer's weights, and leave it only those of kept weights."""
        _moments(optimizer)
        if not self.fraction:
            return
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, layer in self.layers.items():
            gradient = layer.weight.grad
            if id(layer.weight) in held:
                finite = gradient is not None and bool(gradient.isfinite().all())
                self.gradients[name] = gradient.clone() if gradient is not None and finite else None
                if gradient is not None:
                    gradient.masked_fill_(layer.turned(~layer.unpacked_mask()), 0)

    def before_update(self, steps: int) -> None:
        self.before = {name: layer.weight_mask.clone() for name, layer in self.layers.items()}
        missing = next((name for name in self.layers if name not in self.gradients), None)
        if self.fraction and missing is not None:
            raise ValueError(
                f"{missing}: {self} grows weights by their gradient, but none was seen in the step before this update. "
                "Leave layers that are frozen, or that no optimizer holds, out with ignore. In a custom loop, call "
                "updater.before_optimizer_step(optimizer) between backward and clipping, in every step."
            )

    def select(self, scores: Tensor, names: Iterable[str], pattern: Pattern, sparsity: float) -> Tensor:
        known = [(self.layers[name], gradient) for name in names if (gradient := self.gradients.get(name)) is not None]
        gains = [layer.turned(gradient).float().abs().reshape(-1) for layer, gradient in known]
        if not self.fraction or sum(map(len, gains)) < scores.numel():  # of one of the compared layers none is known
            return pattern.mask(scores, sparsity)
        return regrow(scores, torch.cat(gains).view_as(scores), pattern, sparsity, self.fraction)

    @torch.no_grad()
    def after_update(self) -> None:
        """Set grown weights to zero, clear the moments of changed weights, and drop the gradients."""
        for name, layer in self.layers.items():
            old_OI, new_OI = masks.unpack(self.before.pop(name), layer.in_features), layer.unpacked_mask()
            layer.weight_OI.masked_fill_(new_OI & ~old_OI, 0)
            changed = layer.turned(old_OI ^ new_OI)
            for optimizer in self.optimizers.known:
                state = optimizer.state.get(layer.weight, {})
                for moment in _moments(optimizer):
                    if state.get(moment) is not None:
                        state[moment].masked_fill_(changed, 0)
        self.gradients.clear()

    def state_dict(self) -> dict[str, Any]:
        """Gradients, if the state is taken between the optimizer's step and the update; otherwise nothing."""
        return {name: None if each is None else each.cpu() for name, each in self.gradients.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.gradients = {
            name: None if each is None else each.to(self.layers[name].weight.device, copy=True)
            for name, each in state.items()
        }


def regrow(scores_OI: Tensor, gain_OI: Tensor, pattern: Pattern, sparsity: float, fraction: float) -> Tensor:
    """The next mask (O, I), with the pattern's exact counts, from scores of kept weights (-inf = pruned) and the gain
    of growing each weight (at least 0, finite). ``fraction`` of the weights that the pattern keeps are dropped."""
    kept_OI = pattern.mask(scores_OI, sparsity)
    group = pattern if isinstance(pattern, Unstructured) else Unstructured("row")
    density = float(kept_OI.double().mean()) * (1 - fraction)  # from the count that is kept, which N:M rounds up
    ranked_OI = torch.where(kept_OI, scores_OI, -torch.inf)
    survivors_OI = kept_OI & group.mask(ranked_OI, 1 - density + 1e-9)  # 1 - 0.4 * 0.5 is a little below 0.8
    return pattern.mask(torch.where(survivors_OI, torch.inf, gain_OI), sparsity)


def _moments(optimizer: Optimizer) -> tuple[str, ...]:
    """Names of the values that an optimizer stores per weight."""
    if isinstance(optimizer, (Adam, AdamW)):
        return "exp_avg", "exp_avg_sq", "max_exp_avg_sq"
    if isinstance(optimizer, SGD):
        return ("momentum_buffer",)
    raise ValueError(
        f"{type(optimizer).__name__}: Regrow clears what the optimizer remembers of changed weights, and can do that "
        "for torch's AdamW, Adam and SGD. Use one of these, or StraightThrough()."
    )
