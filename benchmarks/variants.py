"""Callbacks that some arms add to ``DynamicPruning``. They are not in the package: these runs show if they should be.

    --trainer.callbacks+=variants.CoupledDecay

Shape suffixes: O out_features, I in_features.
"""

from collections import deque
from collections.abc import Mapping
from typing import Any

import lightning as L
import torch
from torch import Tensor

from sparse_train import MaskUpdater
from sparse_train.callbacks import DynamicPruning
from sparse_train.layers import masks


def updater_of(trainer: L.Trainer) -> MaskUpdater:
    """The pipeline of the run's ``DynamicPruning``, after the run has begun."""
    (callback,) = [each for each in trainer.callbacks if isinstance(each, DynamicPruning)]  # type: ignore[attr-defined]
    assert callback.updater is not None
    return callback.updater


class CoupledDecay(L.Callback):
    """SR-STE's decay of pruned weights in the gradient (Zhou et al., arXiv 2102.04010).

    Added once to the gradient of an optimizer step, before clipping, so that Adam scales it like the rest.

    Args:
        rate: share of its shadow value that is added to the gradient of a pruned weight; 2e-4 in the paper.
    """

    def __init__(self, rate: float = 2e-4) -> None:
        self.rate = rate

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        for layer in updater_of(trainer).layers.values():
            gradient_OI = layer.weight_OI.grad
            assert gradient_OI is not None
            gradient_OI += self.rate * torch.where(layer.unpacked_mask(), 0, layer.weight_OI.detach())


class SlowShadows(L.Callback):
    """Pruned weights move by a share of what the optimizer moves them, kept weights by all of it.

    Between ``StraightThrough`` (a share of 1) and ``Dormant`` (0). A scaled gradient would not do it, because Adam
    divides its scale out.

    Args:
        share: of an optimizer's change of a pruned weight that stays.
    """

    def __init__(self, share: float = 0.4) -> None:
        self.share = share
        self._before: dict[str, Tensor] = {}

    def on_train_start(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        layers = updater_of(trainer).layers

        def remember(*_: Any) -> None:
            self._before = {name: layer.weight_OI.detach().clone() for name, layer in layers.items()}

        def shorten(*_: Any) -> None:
            for name, layer in layers.items():
                weight_OI = layer.weight_OI.detach()
                slow_OI = torch.lerp(self._before.pop(name), weight_OI, self.share)
                weight_OI.copy_(torch.where(layer.unpacked_mask(), weight_OI, slow_OI))

        for optimizer in trainer.optimizers:
            optimizer.register_step_pre_hook(remember)
            optimizer.register_step_post_hook(shorten)


class DenseNorms(L.Callback):
    """Norms of dense forwards, with all weights including shadow values, on the batches before an update.

    Must come after ``DynamicPruning`` with ``window: 1``, so that only the step before an update records activations.
    Before that step, all masks are opened for one forward per recent batch, which is recorded instead of the training
    forward. The norms of the first mask, which are also dense, count according to ``memory``.

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
        updater = updater_of(trainer)
        recorder = updater.window.recorder
        if recorder.when == "never":
            return
        before = {name: layer.weight_mask.clone() for name, layer in updater.layers.items()}
        for layer in updater.layers.values():
            masks.fill_full(layer.weight_mask, layer.in_features)
        # eager, because compiled blocks would be compiled again for this
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), trainer.precision_plugin.forward_context():
            for each in self._last:
                recorder.token_mask = each["attention_mask"]
                pl_module(input_ids=each["input_ids"], attention_mask=each["attention_mask"])
        for name, layer in updater.layers.items():
            layer.weight_mask.copy_(before[name])
        recorder.when, recorder.token_mask = "never", batch["attention_mask"]
