"""Lightning's ``WeightAveraging`` next to ``DynamicPruning``: the averaged model has the masks of the model."""

import lightning as L
from lightning.pytorch.callbacks import WeightAveraging

from sparse_train.layers.sparse_linear import sparse_layers


def check_averaging(trainer: L.Trainer, pruning: L.Callback) -> None:
    """Raise ValueError if weights are averaged in a way that does not work with masks."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    for callback in _averaging(trainer):
        name = type(callback).__name__
        if callback._use_buffers:
            raise ValueError(
                f"{name} would average the bytes of the masks. Give it use_buffers=False: weights are averaged, and "
                "the averaged model has the masks of the model in training."
            )
        if callbacks.index(callback) < callbacks.index(pruning):
            raise ValueError(
                f"{name} copies the model before DynamicPruning has given it masks. Put DynamicPruning first in the "
                "trainer's callbacks."
            )


def mask_averages(trainer: L.Trainer, pl_module: L.LightningModule) -> None:
    """Give averaged models the masks of the module; call after masks have changed.

    They copy masks only together with weights, which may begin late and happen seldom. Until then they would be dense,
    or have the masks of an earlier update, in validation, in checkpoints, and at the end of training.
    """
    for callback in _averaging(trainer):
        if callback._average_model is not None:
            averaged = sparse_layers(callback._average_model.module)
            for name, layer in sparse_layers(pl_module).items():
                averaged[name].weight_mask.copy_(layer.weight_mask)


def _averaging(trainer: L.Trainer) -> list[WeightAveraging]:
    return [each for each in trainer.callbacks if isinstance(each, WeightAveraging)]  # type: ignore[attr-defined]
