"""A criterion, policies of masks and a callback that some arms use.

They are not in the package: these runs show if they should be.

    --pruning.policy=variants.GrowingDecay

Shape suffixes: O out_features, I in_features, J packed mask bytes, G groups of four weights.
"""

from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import lightning as L
import torch
from torch import Tensor
from torch.optim import Optimizer

from sparse_train import LayerContext, MaskPolicy, StraightThrough, Wanda
from sparse_train.callbacks import DynamicPruning
from sparse_train.layers import masks
from sparse_train.layers.masked_layer import MaskedLayer
from sparse_train.models.causal_lm import CausalLM
from sparse_train.pruning.updater import MaskUpdater

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
        updater = _updater(trainer)
        recorder, layers = updater.norms.recorder, updater.layers
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


class AcceptedByLoss(L.Callback):
    """Of the groups of four in which an update changes the mask, those are changed with which recent batches have the
    lowest loss.

    Must come after ``DynamicPruning`` with 2:4, cumulative norms and a teacher. In each layer, changed groups are
    ordered by the ratio of Wanda's scores that the new and the old mask keep. Tried are ``shares`` of them, the largest
    ratios first, and the share with the lowest loss of the run is what the update changes. The flip rates that the run
    logs are those of what was proposed.

    Args:
        batches: the last ones that the run has trained on.
        shares: of changed groups; with 0.0, an update may change nothing.
    """

    def __init__(self, batches: int = 2, shares: tuple[float, ...] = (0.0, 0.125, 0.25, 0.5, 1.0)) -> None:
        self.shares = shares
        self.accepted: list[float] = []
        """The share that each update has changed."""
        self._last: deque[Mapping[str, Tensor]] = deque(maxlen=batches)
        self._before: dict[str, Tensor] = {}

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        self._last.append(batch)
        self._before = {name: layer.weight_mask.clone() for name, layer in _updater(trainer).layers.items()}

    @torch.no_grad()
    def on_train_batch_end(
        self, trainer: L.Trainer, pl_module: L.LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        layers = _updater(trainer).layers
        if all(torch.equal(layer.weight_mask, self._before[name]) for name, layer in layers.items()):
            return
        proposed = {name: layer.weight_mask.clone() for name, layer in layers.items()}
        losses = {}
        # eager, because compiled blocks would be compiled again for this
        with torch.compiler.set_stance("force_eager"), trainer.precision_plugin.forward_context():
            for share in self.shares:
                for name, layer in layers.items():
                    layer.weight_mask.copy_(partly(layer, self._before[name], proposed[name], share))
                losses[share] = sum(float(_loss(pl_module, each)) for each in self._last)
        self.accepted.append(min(losses, key=losses.__getitem__))
        print(f"accepted {self.accepted[-1]} of", {share: round(loss, 4) for share, loss in losses.items()}, flush=True)
        for name, layer in layers.items():
            layer.weight_mask.copy_(partly(layer, self._before[name], proposed[name], self.accepted[-1]))


def partly(layer: MaskedLayer, before_OJ: Tensor, proposed_OJ: Tensor, share: float) -> Tensor:
    """The mask (O, J) before, and as proposed in this share of the groups of four that differ: those in which the
    proposed one keeps the most of Wanda's scores, relative to the one before."""
    before_OI, proposed_OI = (masks.unpack(each, layer.in_features) for each in (before_OJ, proposed_OJ))
    differs_G = (before_OI != proposed_OI).view(-1, 4).any(1)
    taken = int(share * int(differs_G.sum()))
    scores_OI = layer.weight_OI.abs() * layer.statistics.sum_squares_I.sqrt().float()  # type: ignore[union-attr]
    kept_now_G, kept_G = ((scores_OI * each).view(-1, 4).sum(1) for each in (before_OI, proposed_OI))
    ratio_G = torch.where(differs_G, kept_G / kept_now_G.clamp_min(torch.finfo(torch.float32).tiny), -torch.inf)
    chosen_G = torch.zeros_like(differs_G).scatter_(0, ratio_G.topk(taken).indices, True)
    return masks.pack(torch.where(chosen_G[:, None], proposed_OI.view(-1, 4), before_OI.view(-1, 4)).view_as(before_OI))


def _loss(module: L.LightningModule, batch: Mapping[str, Tensor]) -> Tensor:
    """The loss of a training step with a teacher, which is not logged."""
    assert isinstance(module, CausalLM)
    teacher, distillation = module._load_teacher(), module.distillation
    assert teacher is not None and distillation is not None
    inputs = {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}
    return distillation.loss(module(**inputs).logits, teacher(**inputs), batch["labels"])[0]


def _updater(trainer: L.Trainer) -> MaskUpdater:
    (pruning,) = [each for each in trainer.callbacks if isinstance(each, DynamicPruning)]  # type: ignore[attr-defined]
    assert pruning.updater is not None
    return pruning.updater
