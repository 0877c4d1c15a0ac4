"""``Regrow``: weights are dropped by their score and come back by their gradient, as in RigL.

Shape suffixes: O out_features, I in_features, J packed mask bytes.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor
from torch.optim import SGD, Adam, AdamW, Optimizer

from sparse_train.criteria import Criterion
from sparse_train.layers import masks, sharding
from sparse_train.layers.matrices import MaskedLayer, class_path
from sparse_train.patterns import Pattern, Unstructured
from sparse_train.pipeline.policies import MaskPolicy


@dataclass(frozen=True)
class Regrow(MaskPolicy):
    """Pruned weights get no gradient between updates. At an update, some kept weights are dropped, and as many grown.

    The kept weights with the lowest scores are dropped. Of all weights that are then pruned, those with the largest
    gradients are grown, from zero. This is RigL (Evci et al., arXiv 1911.11134, section 3), with the criterion's score
    instead of magnitude. A dropped weight with a large enough gradient is grown again and keeps its value. The moments
    that the optimizer has for weights that were dropped or grown are cleared.

    Weights are dropped and grown within the pattern's group: a row, a layer or the model. N:M drops within rows, and
    grows in each group of M as many as that group has lost. Only the backward of the step before an update computes
    gradients of pruned weights; until the update they are held in addition to ``grad``.

    Needs whole weights in every process (one process, DDP), and torch's ``AdamW``, ``Adam`` or ``SGD``. In a custom
    training loop, call ``MaskUpdater.before_optimizer_step``. A layer without a gradient in that step, or with one that
    is not finite (a step that a loss scaler skips), keeps its mask, except for what the schedule asks.

    Args:
        drop_fraction: share of kept weights that are dropped at the first update; falls along a cosine to 0 at the
            last.
        times_norm: multiply a gradient by the norm of its input feature, as Wanda multiplies a weight.
    """

    drop_fraction: float = 0.3
    times_norm: bool = False

    comes_back: ClassVar[Literal["by gradient"]] = "by gradient"

    def __post_init__(self) -> None:
        if not 0 < self.drop_fraction <= 1:
            raise ValueError(
                f"drop_fraction is the share of kept weights that an update replaces, above 0 and at most 1, got "
                f"{self.drop_fraction}. Masks that lose weights only: Fixed()."
            )

    def fraction(self, progress: float) -> float:
        """Share of kept weights to drop at ``progress`` in [0, 1] (arXiv 1911.11134, section 3, update schedule)."""
        return self.drop_fraction / 2 * (1 + math.cos(math.pi * progress))


def regrow(scores_OI: Tensor, gradients_OI: Tensor, pattern: Pattern, sparsity: float, fraction: float) -> Tensor:
    """The next mask (O, I), with the pattern's exact counts.

    Args:
        scores_OI: of kept weights; -inf = pruned.
        gradients_OI: gain of growing each weight, at least 0 and finite.
        pattern, sparsity: where zeros may be, and how many.
        fraction: share to drop of the weights that the pattern keeps at this sparsity.
    """
    kept_OI = pattern.mask(scores_OI, sparsity)
    group = pattern if isinstance(pattern, Unstructured) else Unstructured("row")
    density = float(kept_OI.double().mean()) * (1 - fraction)  # from the count that is kept, which N:M rounds up
    ranked_OI = torch.where(kept_OI, scores_OI, -torch.inf)
    survivors_OI = kept_OI & group.mask(ranked_OI, 1 - density + 1e-9)  # 1 - 0.4 * 0.5 is a little below 0.8
    return pattern.mask(torch.where(survivors_OI, torch.inf, gradients_OI), sparsity)


class Growth:
    """What ``Regrow`` needs from a training run: gradients of pruned weights in an update's step, and the optimizer.

    Args:
        layers: masked layers by name.
        policy: how weights are regrown.
        criterion: gives the scores by which weights are dropped.

    Raises:
        ValueError: the policy needs norms that the criterion does not gather, no process holds the whole weights, or
            their optimizer holds its own copies.
    """

    def __init__(self, layers: Mapping[str, MaskedLayer], policy: Regrow, criterion: Criterion) -> None:
        if policy.times_norm and not criterion.needs_activations:
            raise ValueError(f"{policy} multiplies gradients by activation norms, and {criterion} gathers none.")
        for name, layer in layers.items():
            if sharding.is_sharded(layer) or sharding.has_masters(layer):
                raise ValueError(
                    f"{name} is divided among processes, or DeepSpeed's optimizer holds copies of it. {policy} needs "
                    "whole gradients and an optimizer that it can clear, in every process: train with DDP, or use "
                    "StraightThrough()."
                )
        self._layers, self._policy = layers, policy
        self._optimizers: list[Optimizer] = []
        self.fraction = 0.0
        """Share of kept weights that the update after the running step will drop; 0 = no gradients are needed."""
        self.gradients: dict[str, Tensor | None] = {}
        """Gradients of the running step, in the layout of the parameter; None = there was none, or not finite."""

    def request_gradients(self, progress: float | None) -> None:
        """Before the forwards of a step: let pruned weights get gradients if an update follows the step.

        ``progress`` is that of the update; None = no update follows.
        """
        self.fraction = 0.0 if progress is None else self._policy.fraction(progress)
        for layer in self._layers.values():
            layer.straight_through = self.fraction > 0

    def watch(self, optimizers: Iterable[Optimizer]) -> None:
        """Remember optimizers, so that their moments can be cleared; ValueError for one of an unknown kind."""
        for optimizer in map(_without_wrapper, optimizers):
            _moments(optimizer)
            if all(optimizer is not known for known in self._optimizers):
                self._optimizers.append(optimizer)

    @torch.no_grad()
    def capture_gradients(self, optimizer: Optimizer) -> None:
        """Before ``optimizer`` steps: store the gradients of its weights, and leave it only those of kept weights."""
        self.watch([optimizer])
        if not self.fraction:
            return
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        for name, layer in self._layers.items():
            gradient = _parameter(layer).grad
            if id(_parameter(layer)) in held:
                finite = gradient is not None and bool(gradient.isfinite().all())
                self.gradients[name] = gradient.clone() if finite else None
                if gradient is not None:
                    gradient.masked_fill_(sharding.stored(layer, ~layer.unpacked_mask()), 0)

    def require_gradients(self) -> None:
        """Raise ValueError if gradients were requested and never captured."""
        missing = [name for name in self._layers if name not in self.gradients]
        if self.fraction and missing:
            frozen = not _parameter(self._layers[missing[0]]).requires_grad
            raise ValueError(
                f"{missing[0]}: {self._policy} grows weights by their gradient, but none was seen in the step before "
                "this update. "
                + (
                    "It is frozen: leave layers that do not train out with ignore, or use another policy."
                    if frozen
                    else "Call updater.before_optimizer_step(optimizer) after loss.backward(), before clipping and "
                    "optimizer.step(), in every step (DynamicPruning does); leave layers that no optimizer holds out "
                    "with ignore."
                )
            )

    def scores(self, names: Iterable[str]) -> Tensor | None:
        """Gain of growing each weight of layers that are compared, float32, flat and concatenated.

        None if nothing is known about one of the layers; then nothing grows.
        """
        found = []
        for name in names:
            scores_OI = self._scores(name)
            if scores_OI is None:
                return None
            found.append(scores_OI.reshape(-1))
        return torch.cat(found)

    def _scores(self, name: str) -> Tensor | None:
        gradient = self.gradients.get(name) if self.fraction else None
        if gradient is None:
            return None
        scores_OI = sharding.stored(self._layers[name], gradient).float().abs()
        if self._policy.times_norm:
            statistics = self._layers[name].statistics
            assert statistics is not None
            scores_OI = scores_OI * statistics.norm_I
        return scores_OI

    @torch.no_grad()
    def reset_changed(self, before: Mapping[str, Tensor]) -> None:
        """After an update: set grown weights to zero, clear the moments of changed weights, and drop the gradients.

        Args:
            before: the packed masks that were replaced.
        """
        for name, layer in self._layers.items():
            old_OI, new_OI = masks.unpack(before[name], layer.in_features), layer.unpacked_mask()
            layer.weight_OI.masked_fill_(new_OI & ~old_OI, 0)
            changed = sharding.stored(layer, old_OI ^ new_OI)
            for optimizer in self._optimizers:
                state = optimizer.state.get(_parameter(layer), {})
                for moment in _moments(optimizer):
                    if state.get(moment) is not None:
                        state[moment].masked_fill_(changed, 0)
        self.gradients.clear()

    def state_dict(self) -> dict[str, Tensor | None]:
        """Gradients, if the state is taken between the optimizer's step and the update; otherwise nothing."""
        return {name: None if each is None else each.cpu() for name, each in self.gradients.items()}

    def load_state_dict(self, state: Mapping[str, Tensor | None]) -> None:
        self.gradients = {
            name: None if each is None else each.to(_parameter(self._layers[name]).device, copy=True)
            for name, each in state.items()
        }


def _without_wrapper(optimizer: Any) -> Optimizer:
    accelerated = class_path(type(optimizer)) == "accelerate.optimizer.AcceleratedOptimizer"
    return optimizer.optimizer if accelerated else optimizer  # type: ignore[no-any-return]


def _moments(optimizer: Optimizer) -> tuple[str, ...]:
    """Names of the values that an optimizer stores per weight."""
    if isinstance(optimizer, (Adam, AdamW)):
        return "exp_avg", "exp_avg_sq", "max_exp_avg_sq"
    if isinstance(optimizer, SGD):
        return ("momentum_buffer",)
    raise ValueError(
        f"{type(optimizer).__name__}: Regrow clears what the optimizer remembers of weights that are dropped or grown, "
        "and can do that for torch's AdamW, Adam and SGD. Use one of these, or StraightThrough()."
    )


def _parameter(layer: Any) -> Any:
    return layer.weight
