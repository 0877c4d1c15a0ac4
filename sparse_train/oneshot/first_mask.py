"""The first mask of a training run, in any trainer: one-shot pruning that keeps pruned weights as shadow values."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import nn

from sparse_train.allocation import Outliers
from sparse_train.arguments import require_type
from sparse_train.criteria import Criterion, Wanda
from sparse_train.distributed import rank, take_from_rank_0, world_size
from sparse_train.layers import masks
from sparse_train.layers.mask_lora import MaskLoRA
from sparse_train.layers.matrices import MaskedLayer
from sparse_train.layers.sharding import has_masters, is_sharded, reshard
from sparse_train.layers.sparse_linear import sparse_layers
from sparse_train.oneshot.engine import Method, Undo
from sparse_train.oneshot.forwards import Batch, raised_in_forward
from sparse_train.oneshot.pruning import set_initial_masks
from sparse_train.oneshot.training_data import causal_lm
from sparse_train.patterns import Pattern
from sparse_train.pipeline.existing_zeros import read_division, warn_of_filled_zeros
from sparse_train.pipeline.pruner import check_masks
from sparse_train.pipeline.run_settings import RunSettings
from sparse_train.solvers import Solver, SparseGPT

_log = logging.getLogger(__name__)
_OF_BATCHES = (LookupError, AttributeError, TypeError, RuntimeError)
_OUT_OF_MEMORY = (
    "out of memory",  # CUDA, ROCm, XPU, MPS
    "can't allocate memory",  # CPU
    "Allocation failed",  # HPU
    "STATUS_ALLOC_FAILED",  # cuBLAS, cuDNN
    "CUDNN_STATUS_NOT_SUPPORTED",  # cuDNN also says this if its workspace does not fit
)
"""Parts of error messages, because not every backend raises ``torch.OutOfMemoryError``."""
_NO_MODEL = "the targets are not in one transformers model, whose blocks could be calibrated one by one"
_NO_BATCHES = (
    "no batches could be taken from the training data for calibration, because it is a stream, has a sampler of its "
    "own, or its batches are neither tensors of token ids nor dicts with input_ids. To start with a mask, prune the "
    "model before the run: sparse_train.prune(model, batches, ..., squash=False)"
)


def check_initial(method: Method | None, pattern: Pattern, mask_lora: MaskLoRA | None = None) -> None:
    """Raise ValueError unless an ``initial_criterion`` can make a first mask; None can."""
    require_type("initial_criterion", method, Wanda(), (Criterion, Solver))
    if not isinstance(method, Solver):
        return
    method.check_pattern(pattern)
    if isinstance(method, SparseGPT) and method.preserve_sparsity_mask:
        raise ValueError(
            "SparseGPT(preserve_sparsity_mask=True) keeps fewer weights than the pattern if there are more "
            "zeros already, and masks in training keep its count exactly. Leave preserve_sparsity_mask out."
        )
    if mask_lora is not None:
        raise ValueError(
            f"initial_criterion is {method}, which moves weights, and mask_lora trains adapters of weights that do not "
            f"change. Prune the model before the run (sparse_train.prune with criterion={type(method).__name__}()), or "
            "use a criterion."
        )


def set_first_mask(
    root: nn.Module,
    settings: RunSettings,
    method: Method | None,
    count: int,
    batches: Callable[[int], Sequence[Batch] | None],
    autocast: AbstractContextManager[Any],
    progress: bool,
) -> Outliers | None:
    """Set the masks that a run starts with; does nothing if they have to come from the first window of steps.

    Args:
        root: holds the model; sparsified.
        settings: of the run.
        method: ``initial_criterion``: scores for these masks, or a solver of weights and masks; None = the criterion
            of the run.
        count: batches of training data to calibrate on, over all ranks.
        batches: returns this many batches, the same ones on each rank; None if a model could not use any.
        autocast: the context under which the run's forwards are computed.
        progress: show a progress bar.

    Returns:
        The outliers that one-shot pruning has measured, for ``MaskUpdater``; None if it has measured none.

    Raises:
        ValueError: there is a ``method``, but one-shot pruning makes no first mask here; a solver would move weights
            that must not move or would be moved back; the errors of ``set_initial_masks``; or masks that do not follow
            the pattern. The model is then unchanged.
    """
    # not all masked layers: a copy of the model, as a reference for a loss, has masks that keep everything
    layers, pattern, sparsity = settings.sparsify(root), settings.mask_structure, settings.first_sparsity
    if isinstance(method, Solver):
        _check_movable(method, layers)
    found = None
    if _is_one_shot_wanted(method, settings.criterion, layers, sparsity):
        reshard(root)
        if any(map(is_sharded, layers.values())):
            _say_dense_start("the model is sharded, so its blocks cannot be calibrated one by one")
        elif not count:
            _say_dense_start("calibration_batches is 0")
        else:
            found = _model_and_batches(root, layers, count, batches)
    if found is not None:
        model, own = found
        with autocast:
            outliers = _prune(root, layers, model, own, method or settings.criterion, settings, progress)
        warn_of_filled_zeros(layers, pattern, sparsity)
        if isinstance(method, Solver):  # linear algebra may round differently on other hardware
            take_from_rank_0([t for each in layers.values() for t in (each.weight_OI.detach(), each.weight_mask)])
        return outliers
    if method is not None:
        raise ValueError(
            f"initial_criterion is {method}, but no one-shot pruning makes the first mask here: it does at start_step "
            "0, with calibration_batches above 0, for a transformers model that is not sharded and has no masks yet, "
            "from data that is not a stream and has no custom sampler, and if there is something to prune. Leave "
            "initial_criterion out, or prune the model before the run (sparse_train.prune)."
        )
    return None


def _is_one_shot_wanted(
    method: Method | None, criterion: Criterion, layers: Mapping[str, MaskedLayer], sparsity: float
) -> bool:
    """Whether layers that should be sparse keep everything, and one-shot pruning does better than the first update.

    Args:
        method: ``initial_criterion``; None = ``criterion``.
        criterion: that of updates.
        layers: of the model.
        sparsity: at step 0.
    """
    updates_do = method is None and not criterion.needs_activations
    return not updates_do and sparsity > 0 and all(layer.keeps_all() for layer in layers.values())


def _say_dense_start(reason: str, level: int = logging.INFO) -> None:
    if rank() == 0:
        _log.log(
            level,
            "The first steps run dense, and their activations give the first mask: %s. (A model that was pruned before "
            "starts with its zeros, if they follow the pattern.)",
            reason,
        )


def _model_and_batches(
    root: nn.Module,
    layers: Mapping[str, MaskedLayer],
    count: int,
    batches: Callable[[int], Sequence[Batch] | None],
) -> tuple[nn.Module, Sequence[Batch]] | None:
    """The model to calibrate, and this rank's batches for it; None if there is no such model, or too few batches."""
    model, ranks = causal_lm(root, layers), world_size()
    found = None if model is None else batches(-(-count // ranks) * ranks)  # the same number for each rank
    if model is None or found is None or len(found) < ranks:
        if model is None:
            _say_dense_start(_NO_MODEL)
        else:  # which is a surprise
            _say_dense_start(_NO_BATCHES, logging.WARNING)
        return None
    return model, found[rank() :: ranks]


def _prune(
    root: nn.Module,
    named: Mapping[str, MaskedLayer],
    model: nn.Module,
    batches: Sequence[Batch],
    method: Method,
    settings: RunSettings,
    progress: bool,
) -> Outliers | None:
    """Set the masks of a model whose masks keep everything; restores the model if that fails.

    Args:
        root: holds the model.
        named: the targets, which are in the model, by their names in ``root``.
        model: takes batches.
        batches, method, settings, progress: see ``set_first_mask``.
    """
    targets, undo, sparsity = set(named.values()), Undo(), settings.first_sparsity
    layers = {name: layer for name, layer in sparse_layers(model).items() if layer in targets}
    division = settings.divided_sparsity(root, named)
    read_division(named, settings.mask_structure, sparsity, division)
    wanted = _renamed(division.at(sparsity), named, layers) if division.known else sparsity
    try:
        report = set_initial_masks(
            model,
            layers,
            batches,
            criterion=method,
            pattern=settings.mask_structure,
            sparsity=wanted,
            allocation=settings.allocation,
            final=settings.sparsity_at(1.0),
            progress=progress,
            save=undo.save,
        )
        if not division.known:
            division = settings.divided_sparsity(root, named, report.outliers)
        check_masks(named, settings.mask_structure, division.at(sparsity))  # of a user-defined solver
    except BaseException as error:
        undo.restore()
        for layer in layers.values():
            masks.fill_full(layer.weight_mask, layer.in_features)
        if _is_of_batches(error):
            raise ValueError(
                f"One-shot pruning makes the first mask from batches of the training data, and {type(model).__name__} "
                f"did not accept one of them: {error}. With calibration_batches=0 the first mask comes from the "
                "first steps of training instead, which run dense; a calibration_dataloader of the data module gives "
                "other batches."
            ) from error
        raise
    return report.outliers or None


def _renamed(
    sparsities: float | Mapping[str, float], named: Mapping[str, MaskedLayer], layers: Mapping[str, MaskedLayer]
) -> float | Mapping[str, float]:
    """Sparsities by the names that layers have in a part of the model."""
    if not isinstance(sparsities, Mapping):
        return sparsities
    own = {layer: sparsities[name] for name, layer in named.items()}
    return {name: own[layer] for name, layer in layers.items()}


def _is_of_batches(error: BaseException) -> bool:
    """Whether a model has raised this because of the content of its batches.

    Not if memory ran out: a Trainer that searches for a batch size has to see that error unchanged.
    """
    return isinstance(error, _OF_BATCHES) and raised_in_forward(error) and not _is_out_of_memory(error)


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in _OUT_OF_MEMORY)


def _check_movable(solver: Solver, layers: Mapping[str, MaskedLayer]) -> None:
    if any(map(has_masters, layers.values())):
        raise ValueError(
            f"initial_criterion is {solver}, which moves weights, and DeepSpeed would bring the old ones back: it "
            "holds float32 masters of them. Use strategy='ddp', or prune before the run (sparse-train prune)."
        )
    frozen = next((name for name, layer in layers.items() if not layer.weight_OI.requires_grad), None)
    if frozen is not None:
        raise ValueError(
            f"initial_criterion is {solver}, which moves weights, and {frozen} is frozen. Prune the model before it "
            "gets adapters (sparse-train prune), or use a criterion."
        )
