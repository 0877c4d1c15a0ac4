"""A criterion, policies of masks and a callback that some arms use.

They are not in the package: these runs show if they should be.

    --pruning.policy=variants.EvidenceSwaps

Shape suffixes: O out_features, I in_features, J packed mask bytes, G groups of weights that are compared, M weights of
a group, P pairs of a pruned and a kept weight of a group.
"""

import math
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from torch import Tensor
from torch.optim import Adam, AdamW, Optimizer

from sparse_train import LayerContext, MaskPolicy, StraightThrough, Wanda
from sparse_train.callbacks import DynamicPruning
from sparse_train.policies import only_kept

# --- which norms -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FirstNorms(Wanda):
    """Wanda with the norms that it has seen first, of each layer: those of the first mask."""

    rowwise: ClassVar[bool] = False  # it has state
    first: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    def scores(self, layer: LayerContext) -> Tensor:
        return layer.weight_OI.abs().float().mul_(self.first.setdefault(layer.name, layer.norm_I))


# --- what pruned weights do ------------------------------------------------------------------------------------------


@dataclass
class CoupledDecay(MaskPolicy):
    """``StraightThrough`` with SR-STE's decay of pruned weights in the gradient (Zhou et al., arXiv 2102.04010).

    Added once to the gradient of an optimizer step, before clipping, so that Adam scales it like the rest.

    Args:
        rate: share of its shadow value that is added to the gradient of a pruned weight; 2e-4 in the paper.
    """

    rate: float = 2e-4

    straight_through: ClassVar[bool] = True
    regrowth: ClassVar[Literal["by score"]] = "by score"

    def before_optimizer_step(self, optimizer: Optimizer) -> None:
        for layer in self.layers.values():
            gradient_OI = layer.weight_OI.grad
            assert gradient_OI is not None
            gradient_OI += self.rate * torch.where(layer.unpacked_mask(), 0, layer.weight_OI.detach())


@dataclass
class RisingDecay(StraightThrough):
    """``StraightThrough`` with a decay that rises linearly and then stays, as in AST (arXiv 2407.20584, section 3.2).

    Args:
        full_decay: share by which a shadow value shrinks per optimizer step after the rise.
        ramp: share of the way from the first to the last update over which the decay rises from 0.
    """

    full_decay: float = 0.01
    ramp: float = 0.25
    srste_decay: float = field(default=0.0, init=False)
    """That of the update after the running step."""

    def before_step(self, progress: float | None) -> None:
        if progress is not None:
            self.srste_decay = self.full_decay * min(1.0, progress / self.ramp)


@dataclass
class GrowingDecay(MaskPolicy):
    """Forwards are dense until the last update; pruned weights shrink by a growing L1 term, scaled as Adam scales.

    As in CAST (Huang et al., arXiv 2509.25996), without its scales of weights, and with a decay beside Adam's step and
    not in its gradient: the paper's text was not at hand, but its abstract and a review. For Adam or AdamW, magnitude
    and ``end_step=1.0``, so that the masks of the last update are those of the model.

    Args:
        rate: at the end, of the learning rate by which a weight with the layer's mean second moment shrinks in a step.
    """

    rate: float = 3.0
    _progress: float = field(default=0.0, init=False, repr=False, compare=False)  # of the last update
    _next: float = field(default=0.0, init=False, repr=False, compare=False)  # of the update after the running step
    _pruned: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)

    straight_through: ClassVar[bool] = True
    regrowth: ClassVar[Literal["by score"]] = "by score"

    def before_step(self, progress: float | None) -> None:
        self._next = self._next if progress is None else progress

    @torch.no_grad()
    def before_optimizer_step(self, optimizer: Optimizer) -> None:
        (lr,) = {group["lr"] for group in optimizer.param_groups}
        for name, pruned_OI in self._pruned.items():
            layer = self.layers[name]
            moments = self.optimizers.state_of(layer)
            if moments:  # from the second step on
                root_OI = moments["exp_avg_sq"].sqrt().clamp_min_(torch.finfo(torch.float32).tiny)
                shrunk_OI = lr * self.rate * self._progress * root_OI.mean() / root_OI
                smaller_OI = layer.weight_OI.sign() * (layer.weight_OI.abs() - shrunk_OI).clamp_min_(0)
                layer.weight_OI.copy_(torch.where(pruned_OI, smaller_OI, layer.weight_OI))

    def after_update(self) -> None:
        self._progress = self._next
        self._pruned = {name: ~layer.unpacked_mask() for name, layer in self.layers.items()}
        for layer in self.layers.values() if self._progress < 1 else ():
            layer.keep_all()


@dataclass
class EvidenceSwaps(MaskPolicy):
    """Pruned weights stay at zero, gather evidence in the optimizer's moments, and swap places with kept ones.

    For N:M or rows, whole weights in every process, and Adam or AdamW. Pruned weights get the straight-through
    gradient, but only in their moments m and v: it does not count when gradients are clipped, and does not move them.
    Until the first swap, kept weights train as with ``Fixed``.

    At an update, the pruned weights of a group, from the largest ``m^2 / v`` down, are paired with its kept weights,
    from the smallest ``v w^2`` up. With v for the curvature, the kept one costs about ``v w^2 / 2``, and the pruned one
    gains in proportion to ``m^2 / v``. Of all pairs of the model, those with the largest ratio of gain and cost are
    swapped. A weight comes back at zero, with its moments. The scores of the criterion decide nothing but what the
    schedule asks for.

    Args:
        share: of mask entries that flip in a first swap; falls along a cosine to 0 at the last update.
        group_size: M of the pattern N:M; 0 = a row.
    """

    share: float = 0.01
    group_size: int = 4
    _flips: float = field(default=0.0, init=False, repr=False, compare=False)  # share of the update after this step
    _least: float = field(default=math.inf, init=False, repr=False, compare=False)  # ratio of a pair that is swapped
    # gradients of pruned weights, from backward to the end of the step, and Adam's betas
    _pruned: dict[str, Tensor] = field(default_factory=dict, init=False, repr=False, compare=False)
    _betas: tuple[float, float] = field(default=(0.0, 0.0), init=False, repr=False, compare=False)

    straight_through: ClassVar[bool] = True
    regrowth: ClassVar[Literal["from zero"]] = "from zero"

    def check(self) -> None:
        for optimizer in self.optimizers.known:
            assert isinstance(optimizer, (Adam, AdamW)), "reads the moments of Adam"
        for name, layer in self.layers.items():
            assert not layer.layout.is_sharded, f"{name} is sharded"

    @torch.no_grad()
    def before_step(self, progress: float | None) -> None:
        self._flips = 0.0 if progress is None else self.share / 2 * (1 + math.cos(math.pi * progress))
        self._hold_still()

    @torch.no_grad()
    def before_optimizer_step(self, optimizer: Optimizer) -> None:
        (self._betas,) = {group["betas"] for group in optimizer.param_groups}
        for name, layer in self.layers.items():
            gradient_OI = layer.weight_OI.grad
            assert gradient_OI is not None
            self._pruned[name] = torch.where(layer.unpacked_mask(), 0, gradient_OI)
            gradient_OI -= self._pruned[name]

    def _hold_still(self) -> None:
        """Set pruned weights to zero; after a step, add their gradients to their moments, where Adam has seen 0."""
        for layer in self.layers.values():
            layer.write_zeros()
        beta1, beta2 = self._betas
        for name, pruned_OI in self._pruned.items():
            moments = self.optimizers.state_of(self.layers[name])
            moments["exp_avg"].add_(pruned_OI, alpha=1 - beta1)
            moments["exp_avg_sq"].addcmul_(pruned_OI, pruned_OI, value=1 - beta2)
        self._pruned = {}

    @torch.no_grad()
    def before_update(self, steps: int) -> None:
        self._hold_still()  # with the masks of the step; those that are chosen now follow in ``before_step``
        contexts = [
            LayerContext(
                layer.weight_OI.detach(),
                name=name,
                mask_OJ=layer.weight_mask,
                optimizer_state=self.optimizers.state_of(layer),
            )
            for name, layer in self.layers.items()
        ]
        wanted = int(self._flips * sum(layer.size for layer in self.layers.values()) / 2)
        self._least = least_ratio(contexts, self.group_size, wanted)

    def scores(self, scores_OI: Tensor, layer: LayerContext) -> Tensor:
        keep_OI = layer.keep_OI if self._least == math.inf else swapped(layer, self.group_size, self._least)
        return only_kept(scores_OI, keep_OI)


def least_ratio(layers: list[LayerContext], group_size: int, wanted: int) -> float:
    """The ratio of gain and cost from which on the best ``wanted`` pairs of all layers are swapped.

    At most one pair per eight weights of a group, or one pair, is looked at. Infinite if none is wanted.
    """
    if not wanted:
        return math.inf
    every_P = torch.cat([_pairs(layer, group_size)[0].flatten() for layer in layers])
    return float(every_P.kthvalue(max(1, len(every_P) - wanted + 1)).values)


def swapped(layer: LayerContext, group_size: int, least: float) -> Tensor:
    """The mask (O, I) after a swap of all pairs with at least this ratio."""
    ratio_GP, back_GP, gone_GP = _pairs(layer, group_size)
    chosen_GP = ratio_GP >= least
    keep_GM = layer.keep_OI.view(len(ratio_GP), -1)
    keep_GM.scatter_(1, back_GP, chosen_GP).scatter_(1, gone_GP, ~chosen_GP)
    return keep_GM.view(layer.weight_OI.shape)


def _pairs(layer: LayerContext, group_size: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gain over cost of each pair (G, P), and the places in the group of its pruned and its kept weight."""
    m_OI, v_OI = layer.optimizer_state["exp_avg"], layer.optimizer_state["exp_avg_sq"]
    tiny = torch.finfo(v_OI.dtype).tiny
    keep_OI = layer.keep_OI
    gain_OI = torch.where(keep_OI, -torch.inf, m_OI.square() / v_OI.clamp_min(tiny))
    cost_OI = torch.where(keep_OI, v_OI * layer.weight_OI.square(), torch.inf)
    size = group_size or keep_OI.shape[1]
    kept = int(keep_OI.view(-1, size)[0].sum())
    pairs = min(max(1, size // 8), kept, size - kept)
    gain_GP, back_GP = gain_OI.view(-1, size).topk(pairs)
    cost_GP, gone_GP = cost_OI.view(-1, size).topk(pairs, largest=False)
    return gain_GP / cost_GP.clamp_min(tiny), back_GP, gone_GP


# --- what a run does besides -----------------------------------------------------------------------------------------


class DenseNorms(L.Callback):
    """Norms of dense forwards, with all weights including shadow values, on the batches before an update.

    Must come after ``DynamicPruning`` with ``window: 1``, so that only the step before an update records activations.
    Before that step, all masks are opened for one forward per recent batch, which is recorded instead of the training
    forward. The norms of the first mask, which are also dense, count according to ``norm_decay``.

    Args:
        batches: number of batches to run dense before each update.
    """

    def __init__(self, batches: int = 5) -> None:
        self.batches = batches
        self._last: deque[Mapping[str, Tensor]] = deque(maxlen=batches)

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._last.append(batch)
        (pruning,) = [each for each in trainer.callbacks if isinstance(each, DynamicPruning)]  # type: ignore[attr-defined]
        assert pruning.updater is not None
        recorder, layers = pruning.updater.norms.recorder, pruning.updater.layers
        if recorder.when == "never":
            return
        before = {name: layer.weight_mask.clone() for name, layer in layers.items()}
        for layer in layers.values():
            layer.keep_all()
        # eager, because compiled blocks would be compiled again for this
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), trainer.precision_plugin.forward_context():
            for each in self._last:
                recorder.token_mask = each["attention_mask"]
                pl_module(input_ids=each["input_ids"], attention_mask=each["attention_mask"])
        for name, layer in layers.items():
            layer.weight_mask.copy_(before[name])
        recorder.when, recorder.token_mask = "never", batch["attention_mask"]
