"""What arms try beside ``DynamicPruning``, and the package does not have, because these runs say whether it should.

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
    """The pipeline of the run's ``DynamicPruning``, which has begun."""
    (callback,) = [each for each in trainer.callbacks if isinstance(each, DynamicPruning)]  # type: ignore[attr-defined]
    assert callback.updater is not None
    return callback.updater


class CoupledDecay(L.Callback):
    """SR-STE's decay of pruned weights in the gradient (Zhou et al., arXiv 2102.04010).

    Added to the gradient of a whole optimizer step, once, ahead of clipping: Adam then scales it as it does the rest.

    Args:
        rate: what is added for a pruned weight, as a share of its shadow value; 2e-4 in the paper.
    """

    def __init__(self, rate: float = 2e-4) -> None:
        self.rate = rate

    def on_before_optimizer_step(self, trainer: L.Trainer, pl_module: L.LightningModule, optimizer: Any) -> None:
        for layer in updater_of(trainer).layers.values():
            gradient_OI = layer.weight_OI.grad
            assert gradient_OI is not None
            gradient_OI += self.rate * torch.where(layer.unpacked_mask(), 0, layer.weight_OI.detach())


class DenseNorms(L.Callback):
    """Norms of dense forwards: of all weights as they are, shadow values too, on the batches before an update.

    Stands behind ``DynamicPruning`` with ``window: 1``, so that activations are wanted in the one step before an
    update: there, all masks are taken off for a forward of each of the last batches, which is recorded in the place of
    the training forward. The first mask's norms, dense ones as well, count as ``memory`` says.

    Args:
        batches: to run dense before each update.
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
        # eager: compiled blocks would be compiled once more for this
        with torch.no_grad(), torch.compiler.set_stance("force_eager"), trainer.precision_plugin.forward_context():
            for each in self._last:
                recorder.token_mask = each["attention_mask"]
                pl_module(input_ids=each["input_ids"], attention_mask=each["attention_mask"])
        for name, layer in updater.layers.items():
            layer.weight_mask.copy_(before[name])
        recorder.when, recorder.token_mask = "never", batch["attention_mask"]
