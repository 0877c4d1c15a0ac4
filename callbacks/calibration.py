"""Where the callback's first mask gets its data from."""

import lightning as L
from torch.utils.data import DataLoader, DistributedSampler, RandomSampler, SequentialSampler
from torchdata.stateful_dataloader.sampler import RandomSampler as StatefulRandomSampler

from sparse_train.oneshot import Batch
from sparse_train.oneshot.training_data import random_batches

_WHOLE_DATA_SAMPLERS = (SequentialSampler, RandomSampler, StatefulRandomSampler, DistributedSampler)


def peek(trainer: L.Trainer, count: int) -> list[Batch] | None:
    """Random training batches, leaving no trace in the loader; None where there are none that a model could take.

    A data module with a method ``calibration_dataloader`` that returns a loader has them from that.
    """
    trainer.fit_loop.setup_data()
    ask = getattr(getattr(trainer, "datamodule", None), "calibration_dataloader", None)
    own = ask() if ask is not None else None
    if own is not None:
        return random_batches(own.dataset, own.batch_size or 1, own.collate_fn, count)
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader) or not isinstance(loader.sampler, _WHOLE_DATA_SAMPLERS):
        return None  # another sampler may be what keeps validation data out
    return random_batches(loader.dataset, loader.batch_size or 1, loader.collate_fn, count)
