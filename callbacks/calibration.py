"""Where the callback's first mask gets its data from."""

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
    """Random training batches, leaving no trace in the loader; None where there are none that a model could take.

    A data module with a method ``calibration_dataloader`` that returns a loader has the first of that instead.

    Raises:
        ValueError: the loader of ``calibration_dataloader`` has no batches that a model could take.
    """
    trainer.fit_loop.setup_data()
    ask = getattr(getattr(trainer, "datamodule", None), "calibration_dataloader", None)
    own = ask() if ask is not None else None
    if own is not None:
        return first_batches(own, count)
    loader: Any = trainer.train_dataloader
    batches: Any = loader.batch_sampler if isinstance(loader, DataLoader) else None
    # others may be what keeps validation data out
    if type(batches) not in _PLAIN or not isinstance(batches.sampler, _WHOLE_DATA_SAMPLERS):
        return None
    return random_batches(loader.dataset, batches.batch_size, loader.collate_fn, count)
