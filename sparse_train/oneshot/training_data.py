"""The model and the batches for a first mask in training, in any trainer."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from sparse_train.layers.matrices import MaskedLayer
from sparse_train.oneshot.forwards import Batch
from sparse_train.rng import isolated_rng


def causal_lm(root: nn.Module, layers: Mapping[str, MaskedLayer]) -> nn.Module | None:
    """The transformers model in ``root`` that holds all of ``layers``, if there is one."""
    wanted = set(layers.values())
    for module in root.modules():
        if any(cls.__name__ == "PreTrainedModel" for cls in type(module).__mro__) and wanted <= set(module.modules()):
            return module
    return None


def random_batches(
    dataset: Dataset[Any], batch_size: int, collate_fn: Callable[[list[Any]], Any] | None, count: int
) -> list[Batch] | None:
    """Random batches of a data set, always the same; None if a model could not use any.

    They come from a separate loader: another iterator of the training loader would advance its generators, and the
    position of a stateful one.
    """
    if isinstance(dataset, IterableDataset):
        return None  # reading a stream would take its first batches from training
    own = DataLoader(
        dataset,
        batch_size=batch_size,
        shuffle=True,
        generator=torch.Generator().manual_seed(0),
        collate_fn=collate_fn,
    )
    with isolated_rng():  # a data set may draw random numbers
        batches = list(itertools.islice(own, count))
    return batches if _usable(batches) else None


def first_batches(loader: Iterable[Any], count: int) -> list[Batch]:
    """The first batches of a loader for calibration, the same in each process; random states are restored.

    Raises:
        ValueError: it has no batches, or none that a model could use.
    """
    with isolated_rng():
        torch.manual_seed(0)
        batches = list(itertools.islice(loader, count))
    if not _usable(batches):
        given = f"a {type(batches[0]).__name__} with something else" if batches else "none at all"
        raise ValueError(
            'Batches for a first mask are tensors of token ids (B, L), or dicts of model inputs with "input_ids"; '
            f"calibration_dataloader gave {given}."
        )
    return batches


def _usable(batches: Sequence[Any]) -> bool:
    return bool(batches) and all(_are_ids(b.get("input_ids") if isinstance(b, Mapping) else b) for b in batches)


def _are_ids(batch: Any) -> bool:
    return isinstance(batch, Tensor) and not (batch.is_floating_point() or batch.is_complex())
