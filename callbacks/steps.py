"""How callbacks count the steps of a run."""

import lightning as L


def steps_done(trainer: L.Trainer, *, in_batch: bool = True) -> int:
    """How many batches have stepped an optimizer, as Lightning's loggers count.

    ``trainer.global_step`` counts the steps of every optimizer. That is the same unless the module optimizes by hand,
    with several optimizers, or several steps per batch.

    Args:
        in_batch: whether the caller is in ``on_train_batch_end``, before Lightning has counted the batch.
    """
    if trainer.lightning_module.automatic_optimization:
        return trainer.global_step
    return trainer.fit_loop.epoch_loop._batches_that_stepped + in_batch
