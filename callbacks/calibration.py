"""Where the data for the callback's first mask comes from."""

from typing import Any

import lightning as L
from torch.utils.data import BatchSampler, DataLoader, DistributedSampler, RandomSampler, SequentialSampler
from torchdata.stateful_dataloader.sampler import BatchSampler as StatefulBatchSampler
from torchdata.stateful_dataloader.sampler import RandomSampler as StatefulRandomSampler

from sparse_train.oneshot import Batch
from sparse_train.oneshot.training_data import first_batches, random_batches

_PLAIN = (BatchSampler, StatefulBatchSampler)
_WHOLE_DATA_SAMPLERS = (SequentialSampler, RandomSampler, StatefulRandomSampler, DistributedSampler)


def peek(trainer: L.Trainer, count: int) -> list[Batch] | None:
    """Random training batches, without changing the state of the loader; None if a model could not use any.

    If the data module has a method ``calibration_dataloader`` that returns a loader, its first batches are used.

    Raises:
        ValueError: the loader of ``calibration_dataloader`` has no batches that a model could use.
    """
    trainer.fit_loop.setup_data()
    ask = getattr(getattr(trainer, "datamodule", None), "calibration_dataloader", None)
    own = ask() if ask is not None else None
    if own is not None:
        return first_batches(own, count)
    loader: Any = trainer.train_dataloader
    batches: Any = loader.batch_sampler if isinstance(loader, DataLoader) else None
    # another sampler may be there to keep validation data out
    if type(batches) not in _PLAIN or not isinstance(batches.sampler, _WHOLE_DATA_SAMPLERS):
        return None
    return random_batches(loader.dataset, batches.batch_size, loader.collate_fn, count)
