"""Batches of training data for calibration, read without a trace in the training."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, Subset

from sparse_train.distributed.collectives import world_size
from sparse_train.environment import isolated_rng
from sparse_train.oneshot.forwards import Batch, ids_of

_LIBRARIES = ("torch", "torchdata", "accelerate", "transformers")  # by name, because they may be absent
_READ_ALL = {"SequentialSampler", "RandomSampler", "DistributedSampler", "StatefulDistributedSampler"}
_READ_ALL |= {"SeedableRandomSampler", "LengthGroupedSampler", "BatchRebalanceSampler"}


def _is(sampler: Any, *names: str) -> bool:
    """Whether the class is exactly one of these: a subclass may leave validation data out."""
    return type(sampler).__module__.partition(".")[0] in _LIBRARIES and type(sampler).__name__ in names


def training_batches(loader: Any, samples: int, batch_size: int | None = None) -> list[Batch] | None:
    """Random batches of what a training loader reads, without changing its state; None if that is not known, as of
    any but a ``DataLoader``, which accelerate may have prepared. ``batch_size`` is by default that of the loader."""
    sampler: Any = getattr(loader, "batch_sampler", None)
    if _is(sampler, "BatchSamplerShard"):
        sampler = sampler.batch_sampler
    if _is(sampler, "BatchSampler"):
        batch_size, sampler = batch_size or sampler.batch_size, sampler.sampler
    if _is(sampler, "SubsetRandomSampler") and world_size() == 1:  # each process may have another subset
        return random_batches(
            Subset(loader.dataset, sampler.indices), batch_size or 1, loader.collate_fn, samples, loader
        )
    source = getattr(sampler, "data_source", getattr(sampler, "dataset", getattr(loader, "dataset", ())))
    if not _is(sampler, *_READ_ALL) or len(source) != len(loader.dataset):
        return None
    return random_batches(loader.dataset, batch_size or 1, loader.collate_fn, samples, loader)


def random_batches(
    dataset: Dataset[Any],
    batch_size: int,
    collate_fn: Callable[[list[Any]], Any] | None,
    samples: int,
    like: DataLoader[Any] | None = None,
) -> list[Batch] | None:
    """Random batches of a data set, with at least ``samples`` samples, the same at each call; None if a model could not
    use them.

    They come from a separate loader: another iterator of the training loader would advance its generators, and the
    position of a stateful one. If a loader that it is ``like`` has workers, one of these reads the data set here, too:
    it may open its files, and be filled, in workers alone.
    """
    if isinstance(dataset, IterableDataset):
        return None  # reading a stream would take its first batches from training
    generator = torch.Generator().manual_seed(0)
    workers: dict[str, Any] = {}
    if like is not None and like.num_workers:
        workers["num_workers"], workers["worker_init_fn"] = 1, like.worker_init_fn
        workers["multiprocessing_context"] = like.multiprocessing_context
    own = DataLoader(dataset, batch_size, shuffle=True, generator=generator, collate_fn=collate_fn, **workers)
    with isolated_rng():  # a data set may draw random numbers
        batches = first_samples(own, samples)
    return batches if batches and all(map(_is_usable, batches)) else None


def first_samples(loader: Iterable[Batch], samples: int) -> list[Batch]:
    """The first batches, as many as hold ``samples`` samples, and at least one for each process."""
    batches: list[Batch] = []
    for batch in loader:
        batches.append(batch)
        if len(batches) >= world_size() and sum(map(samples_in, batches)) >= samples:
            break
    return batches


def samples_in(batch: Any) -> int:
    ids = ids_of(batch)
    return len(ids) if isinstance(ids, Tensor) and ids.dim() > 1 else 1


def _is_usable(batch: Any) -> bool:
    ids = ids_of(batch)
    return isinstance(ids, Tensor) and not (ids.is_floating_point() or ids.is_complex())
