"""Where the data for the first mask of a ``Trainer``'s run comes from."""

import logging
from typing import Any

from torch.utils.data import IterableDataset

from sparse_train.layers.matrices import class_path
from sparse_train.oneshot import Batch
from sparse_train.oneshot.training_data import random_batches

_log = logging.getLogger(__name__)
_WHOLE_DATA_SAMPLERS = {
    "torch.utils.data.sampler.SequentialSampler",
    "torch.utils.data.sampler.RandomSampler",
    "torch.utils.data.distributed.DistributedSampler",
    "accelerate.data_loader.SeedableRandomSampler",
    "transformers.trainer_pt_utils.LengthGroupedSampler",
    "transformers.trainer_pt_utils.BatchRebalanceSampler",
}
"""By name, because not all versions have all of them; and exact classes, because a subclass may leave data out."""
_SHARE_OF_A_PROCESS = "accelerate.data_loader.BatchSamplerShard"
_PLAIN_BATCHES = "torch.utils.data.sampler.BatchSampler"


def peek(loader: Any, batch_size: int, count: int) -> list[Batch] | None:
    """Random training batches, without changing the state of the loader; None if a model could not use any.

    Args:
        loader: that of the Trainer, as prepared by accelerate, or a custom one.
        batch_size: samples per batch.
        count: number of batches.
    """
    if isinstance(getattr(loader, "dataset", None), IterableDataset):
        return None
    sampler = _sampler_of(loader)
    if class_path(type(sampler)) not in _WHOLE_DATA_SAMPLERS:
        _log.warning(
            "Training data is read by a %s, which may leave some of it out, so none is read for calibration.",
            type(loader if sampler is None else sampler).__name__,
        )
        return None
    return random_batches(loader.dataset, batch_size, loader.collate_fn, count)


def _sampler_of(loader: Any) -> Any:
    """What chooses the indices that a loader reads: the sampler inside known wrappers, or an unknown wrapper."""
    sampler: Any = getattr(loader, "batch_sampler", None)
    if class_path(type(sampler)) == _SHARE_OF_A_PROCESS:
        sampler = sampler.batch_sampler
    if class_path(type(sampler)) == _PLAIN_BATCHES:
        sampler = sampler.sampler
    return sampler
