"""How callbacks count the steps of a run."""

import lightning as L


def steps_done(trainer: L.Trainer, *, in_batch: bool = True) -> int:
    """The step at which Lightning's own logs of this batch are, counted from 1.

    ``trainer.global_step``, unless the module optimizes by hand: it then counts the steps of every optimizer, and
    Lightning's loggers count batches.

    Args:
        in_batch: whether the caller is in ``on_train_batch_end``, before Lightning has counted the batch.
    """
    if trainer.lightning_module.automatic_optimization:
        return trainer.global_step
    return trainer.fit_loop.epoch_loop._batches_that_stepped + in_batch
