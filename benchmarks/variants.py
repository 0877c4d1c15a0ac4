"""A criterion, policies of masks and a callback that some arms use.

They are not in the package: these runs show if they should be.

    --pruning.policy=variants.GrowingDecay

Shape suffixes: O out_features, I in_features.
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
        (pruning,) = [each for each in trainer.callbacks if isinstance(each, DynamicPruning)]  # type: ignore[attr-defined]
        assert pruning.updater is not None
        recorder, layers = pruning.updater.norms.recorder, pruning.updater.layers
        if recorder.when == "never":
            return
        before = {name: layer.weight_mask.clone() for name, layer in layers.items()}
        for layer in layers.values():
            layer.keep_all()
        recorder.when = "always"  # also with autograd off
        # eager, because compiled blocks would be compiled again for this
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), trainer.precision_plugin.forward_context():
            for each in self._last:
                recorder.token_mask = each["attention_mask"]
                pl_module(input_ids=each["input_ids"], attention_mask=each["attention_mask"])
        for name, layer in layers.items():
            layer.weight_mask.copy_(before[name])
        recorder.when, recorder.token_mask = "never", batch["attention_mask"]
