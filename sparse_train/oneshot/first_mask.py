"""The first mask of a training run, in any trainer: one-shot pruning that keeps pruned weights as shadow values."""

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from sparse_train.distributed.collectives import rank, take_from_rank_0, world_size
from sparse_train.distributed.fsdp2 import reshard
from sparse_train.distributions import Outliers
from sparse_train.environment import isolated_rng
from sparse_train.layers.masked_layer import MaskedLayer
from sparse_train.oneshot.forwards import Batch, Context
from sparse_train.oneshot.walk import MemoryShelf, Plan, walk
from sparse_train.pruning.config import OneShot, PruningConfig
from sparse_train.pruning.zeros import warn_of_filled_zeros

_log = logging.getLogger(__name__)


def set_first_mask(
    root: nn.Module,
    layers: Mapping[str, MaskedLayer],
    config: PruningConfig,
    batches: Callable[[int], Sequence[Batch] | None],
    context: Context,
    progress: bool,
) -> Outliers | None:
    """Set the masks that a run starts with, if ``first_mask`` is ``OneShot()``; ``MaskUpdater`` makes all others.

    ``root`` holds the model. ``layers`` are those of the run and not all masked ones, since a copy of the model, as a
    reference for a loss, may have masks that keep everything. ``batches(samples)`` returns ``first_samples``, the same
    on each rank, or None if there are none that a model can read. Returns the outliers, if it has measured some. After
    an error, the model is unchanged.
    """
    first = config.first_mask
    if not isinstance(first, OneShot):
        return None
    dense = all(layer.is_dense() for layer in layers.values())
    if first.criterion is not None and not dense:
        raise ValueError(
            f"first_mask is {first}, and the model has masks already, with which the run would start. Leave the "
            "criterion out of OneShot, or squash the model to begin with new masks."
        )
    # without activations, the first update makes the same mask
    needed = first.criterion is not None or config.criterion.needs_activations
    wanted = dense and needed and config.sparsity_at_step_0 > 0
    if wanted and (found := _to_calibrate(root, layers, first.samples, batches)) is not None:
        model, own_batches = found
        if config.first_solver is not None:
            _check_movable(layers)
            warn_of_filled_zeros(layers)  # now: a solver fills them before there is a mask
        plan = Plan(
            method=first.criterion or config.criterion,
            pattern=config.pattern,
            sparsity=config.sparsity_at_step_0,
            distribution=config.distribution,
            final=config.sparsity_at(1.0),
        )
        shelf = MemoryShelf(model, layers, together=plan.pattern.model_wide)
        try:
            with shelf.pruning_from_dense():
                outliers = walk(shelf, plan, own_batches, progress, context).outliers or None
        except Exception as error:
            error.add_note(
                "This happened while one-shot pruning made the first mask from batches of the training data. With "
                "first_mask=FirstWindow(), it comes from the first steps; a calibration_dataloader gives others."
            )
            raise
        if config.first_solver is not None:  # linear algebra may round differently on other hardware
            take_from_rank_0([t for each in layers.values() for t in (each.weight.detach(), each.weight_mask)])
        return outliers
    if wanted and first.criterion is None and rank() == 0:  # with a criterion, MaskUpdater raises an error
        why = f"one-shot pruning needs {OneShot.needs}"
        _log.warning("The first steps run dense, and their activations give the first mask: %s.", why)
    return None


def _check_movable(layers: Mapping[str, MaskedLayer]) -> None:
    for name, layer in layers.items():
        if layer.layout.has_masters or not layer.weight.requires_grad:
            raise ValueError(
                f"The first mask comes with other values of the kept weights, and those of {name} are frozen, or "
                "DeepSpeed would bring the old ones back from its float32 masters. Prune the model before the run "
                "(sparse-train prune), and begin with first_mask=FromZeros(); or use a criterion."
            )


def _to_calibrate(
    root: nn.Module, layers: Mapping[str, MaskedLayer], samples: int, batches: Callable[[int], Sequence[Batch] | None]
) -> tuple[nn.Module, Sequence[Batch]] | None:
    """The model to prune, and this process's part of the batches; None if it cannot be pruned in one shot."""
    reshard(root)
    model, ranks = transformers_model(root, layers.values()), world_size()
    if model is None or any(layer.layout.is_sharded for layer in layers.values()):
        return None
    found = batches(samples)
    if found is None or len(found) < ranks:
        return None
    if (there := sum(map(_samples_in, found))) < samples and rank() == 0:
        _log.warning("The first mask reads %d of %d samples: the data has no more.", there, samples)
    return model, found[rank() :: ranks]


def transformers_model(root: nn.Module, layers: Iterable[MaskedLayer]) -> nn.Module | None:
    """The transformers model in ``root`` that holds all of ``layers``, if there is one."""
    wanted = set(layers)
    for module in root.modules():
        if any(cls.__name__ == "PreTrainedModel" for cls in type(module).__mro__) and wanted <= set(module.modules()):
            return module
    return None


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
    if not _is(sampler, *_READ_ALL):
        return None
    return random_batches(loader.dataset, batch_size or 1, loader.collate_fn, samples)


def random_batches(
    dataset: Dataset[Any], batch_size: int, collate_fn: Callable[[list[Any]], Any] | None, samples: int
) -> list[Batch] | None:
    """Random batches of a data set, of so many samples, always the same; None if a model could not use any.

    They come from a separate loader: another iterator of the training loader would advance its generators, and the
    position of a stateful one.
    """
    if isinstance(dataset, IterableDataset):
        return None  # reading a stream would take its first batches from training
    generator = torch.Generator().manual_seed(0)
    own = DataLoader(dataset, batch_size=batch_size, shuffle=True, generator=generator, collate_fn=collate_fn)
    with isolated_rng():  # a data set may draw random numbers
        batches = first_samples(own, samples)
    return batches if batches and all(map(_is_usable, batches)) else None


def first_samples(loader: Iterable[Batch], samples: int) -> list[Batch]:
    """The first batches, until there are so many samples, and a batch for each process."""
    found: list[Batch] = []
    for batch in loader:
        found.append(batch)
        if len(found) >= world_size() and sum(map(_samples_in, found)) >= samples:
            break
    return found


def _ids(batch: Any) -> Any:
    return batch.get("input_ids") if isinstance(batch, Mapping) else batch


def _samples_in(batch: Any) -> int:
    ids = _ids(batch)
    return len(ids) if isinstance(ids, Tensor) and ids.dim() > 1 else 1


def _is_usable(batch: Any) -> bool:
    ids = _ids(batch)
    return isinstance(ids, Tensor) and not (ids.is_floating_point() or ids.is_complex())
