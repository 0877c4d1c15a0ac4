"""Where the first mask of a ``Trainer``'s run gets its data from."""

from typing import Any

from torch.utils.data import DistributedSampler, RandomSampler, SequentialSampler
from transformers.trainer_pt_utils import LengthGroupedSampler

from sparse_train.oneshot import Batch
from sparse_train.oneshot.training_data import random_batches

_WHOLE_DATA_SAMPLERS = (SequentialSampler, RandomSampler, DistributedSampler, LengthGroupedSampler)


def peek(loader: Any, batch_size: int, count: int) -> list[Batch] | None:
    """Random training batches, leaving no trace in the loader; None where there are none that a model could take.

    Args:
        loader: the Trainer's, as accelerate has prepared it, or one of the user's own.
        batch_size: of a batch, where the loader does not say.
        count: how many.
    """
    batches = getattr(loader, "batch_sampler", None)
    batches = getattr(batches, "batch_sampler", batches)  # accelerate's, of one process, stands around it
    if not isinstance(getattr(batches, "sampler", None), _WHOLE_DATA_SAMPLERS):
        return None  # others may be what keeps validation data out
    return random_batches(loader.dataset, batch_size, loader.collate_fn, count)
