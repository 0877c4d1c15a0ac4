"""Where the callback's first mask gets its model and data from."""

import itertools
from collections.abc import Mapping

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, RandomSampler, SequentialSampler
from torchdata.stateful_dataloader.sampler import RandomSampler as StatefulRandomSampler

from sparse_train.matrices import MaskedLayer
from sparse_train.oneshot import Batch

_WHOLE_DATA_SAMPLERS = (SequentialSampler, RandomSampler, StatefulRandomSampler, DistributedSampler)


def causal_lm(pl_module: L.LightningModule, layers: Mapping[str, MaskedLayer]) -> nn.Module | None:
    """The transformers model in the module that holds all of ``layers``, if there is one."""
    wanted = set(layers.values())
    for module in pl_module.modules():
        if any(cls.__name__ == "PreTrainedModel" for cls in type(module).__mro__) and wanted <= set(module.modules()):
            return module
    return None


def peek(trainer: L.Trainer, count: int) -> list[Batch] | None:
    """Random training batches, leaving no trace in the loader; None where there are none that a model could take."""
    trainer.fit_loop.setup_data()
    loader = trainer.train_dataloader
    if not isinstance(loader, DataLoader) or isinstance(loader.dataset, IterableDataset):
        return None  # reading a stream would take its first batches away from training
    if not isinstance(loader.sampler, _WHOLE_DATA_SAMPLERS):
        return None  # another sampler may be what keeps validation data out
    # a loader of our own: another iterator of theirs would move its generators, and a stateful one's position
    own = DataLoader(
        loader.dataset,
        batch_size=loader.batch_size or 1,
        shuffle=True,
        generator=torch.Generator().manual_seed(0),
        collate_fn=loader.collate_fn,
    )
    with torch.random.fork_rng():  # a data set may draw random numbers
        batches = list(itertools.islice(own, count))
    usable = all(isinstance(b, Tensor) or (isinstance(b, Mapping) and "input_ids" in b) for b in batches)
    return batches if batches and usable else None
