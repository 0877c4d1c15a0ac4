"""One-shot pruning: ``prune`` leaves true zeros; ``set_initial_masks`` is its core, which training starts from."""

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from sparse_train import layers as _layers
from sparse_train import masks
from sparse_train.criteria import Criterion, Wanda
from sparse_train.layers import Recorder, SparseLinear, sparsify
from sparse_train.oneshot.walk import Batch, CalibrationPass, layers_inside
from sparse_train.patterns import Pattern, parse_pattern
from sparse_train.policies import StraightThrough
from sparse_train.progress import bar
from sparse_train.pruner import LayerUpdate, attach, expect, reduce_statistics, update_masks, warn_of_padding
from sparse_train.targets import block_lists, select

__all__ = ["Batch", "OneshotReport", "prune", "set_initial_masks"]


@dataclass(frozen=True)
class OneshotReport:
    """What one-shot pruning did."""

    layers: Mapping[str, LayerUpdate]
    forward_seconds: float
    """Time in forwards of calibration data."""
    pruning_seconds: float
    """Time in scores, selection and writing masks."""

    @property
    def sparsity(self) -> float:
        """Share of zeros among the targeted weights, counted on the weights."""
        return sum(u.zeros for u in self.layers.values()) / sum(u.size for u in self.layers.values())


def prune(
    model: nn.Module,
    batches: Iterable[Batch] | None = None,
    mask_structure: str | Pattern = "2:4",
    *,
    sparsity: float | None = None,
    criterion: Criterion | None = None,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    squash: bool = True,
    progress: bool = False,
) -> OneshotReport:
    """Prune a model in one shot, in place.

    Decoder blocks are calibrated one after the other, each on the outputs of the already pruned ones before it
    (arXiv 2306.11695, section 3; SparseGPT does the same); other models, and ``Unstructured(group="model")``, in one
    pass with dense activations.

    Args:
        model: any ``nn.Module`` with linear layers; on any device, of any float dtype.
        batches: calibration data: token ids (B, L) or dicts of model inputs. Not needed by ``Magnitude``.
        mask_structure: "unstructured", "N:M" with N **kept** of every M consecutive inputs, or a ``Pattern``.
        sparsity: share of zeros; implied by N:M.
        criterion: default ``Wanda()``.
        targets, ignore: which layers, see ``sparse_train.targets.select``.
        squash: leave plain linear layers with true zeros. False keeps masks and shadow values, for training.
        progress: show a progress bar.

    Raises:
        ValueError: no calibration data for a criterion that needs it, non-finite activations, a layer that no token
            reached, or anything that ``select`` or the pattern refuse. The model is then as it was.
    """
    pattern, target = parse_pattern(mask_structure, sparsity)
    criterion = expect("criterion", criterion, Wanda(), Criterion)
    layers = select(model, pattern, targets, ignore).layers
    fresh = not any(isinstance(layer, SparseLinear) for layer in layers.values())
    sparsify(model, layers.values())
    sparse = {name: layer for name, layer in layers.items() if isinstance(layer, SparseLinear)}
    try:
        report = set_initial_masks(
            model, sparse, batches, criterion=criterion, pattern=pattern, sparsity=target, progress=progress
        )
    except BaseException:
        if fresh:
            _layers.squash(model)  # the masks are back to keeping everything
        raise
    if squash:
        _layers.squash(model)
    return report


def set_initial_masks(
    model: nn.Module,
    layers: Mapping[str, SparseLinear],
    batches: Iterable[Batch] | None,
    *,
    criterion: Criterion,
    pattern: Pattern,
    sparsity: float,
    progress: bool = False,
) -> OneshotReport:
    """Set the masks of sparsified ``layers`` of ``model``; weights stay as they are. See ``prune``."""
    before = {name: layer.weight_mask.clone() for name, layer in layers.items()}
    for layer in layers.values():  # whatever masks there were, each block is calibrated with all its weights
        masks.fill_full(layer.weight_mask, layer.in_features)
    attach(layers.values(), recorder := Recorder(), criterion)
    settings: dict[str, Any] = {
        "criterion": criterion,
        "pattern": pattern,
        "sparsity": sparsity,
        "policy": StraightThrough(),
    }
    began = time.perf_counter()
    try:
        if not criterion.needs_activations:
            updates, forward_seconds = update_masks(layers, **settings), 0.0
        elif batches is None:
            raise ValueError(
                f"{criterion} needs calibration data: pass batches, an iterable of token tensors (B, L) or of dicts "
                "of model inputs (in a recipe: a data section). Magnitude() needs none."
            )
        else:
            with bar("calibrating", shown=progress) as (set_total, advance):
                calibration = CalibrationPass(model, batches, recorder, advance)
                updates = _calibrated_masks(model, layers, calibration, settings, set_total)
                forward_seconds = calibration.seconds
                warn_of_padding(recorder)
    except BaseException:
        for name, layer in layers.items():
            layer.weight_mask.copy_(before[name])
        raise
    finally:
        for layer in layers.values():
            layer.statistics = layer.recorder = None
    return OneshotReport(updates, forward_seconds, time.perf_counter() - began - forward_seconds)


def _inside_any(layers: Mapping[str, SparseLinear], blocks: list[nn.Module]) -> set[str]:
    return {name for block in blocks for name in layers_inside(layers, block)}


def _calibrated_masks(
    model: nn.Module,
    layers: Mapping[str, SparseLinear],
    calibration: CalibrationPass,
    settings: dict[str, Any],
    set_total: Callable[[int], None],
) -> dict[str, LayerUpdate]:
    blocks: list[nn.Module] = []
    if not settings["pattern"].model_wide:  # one threshold over the whole model is not known before its last block
        candidates = [list(found) for found in block_lists(model).values()]
        blocks = max(candidates, key=lambda found: len(_inside_any(layers, found)), default=[])
    groups = [layers_inside(layers, block) for block in blocks]
    in_blocks = _inside_any(layers, blocks)
    rest = {name: layer for name, layer in layers.items() if name not in in_blocks}
    last = max((index for index, group in enumerate(groups) if group), default=-1)
    set_total(len(calibration) * (sum(map(bool, groups)) + max(last, 0) + bool(rest)))
    updates: dict[str, LayerUpdate] = {}
    outputs: list[Any] = []
    for index in range(last + 1):
        if group := groups[index]:
            calibration.record_block(blocks, index, outputs)
            reduce_statistics(group.values())
            updates |= update_masks(group, **settings)
        if index < last:
            outputs = calibration.outputs(blocks, index, outputs)
    if rest:  # targets outside the blocks, such as a named lm_head: with the blocks pruned
        calibration.whole()
        reduce_statistics(rest.values())
        updates |= update_masks(rest, **settings)
    return updates
