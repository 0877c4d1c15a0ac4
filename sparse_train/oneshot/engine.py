"""The pipeline for one group of layers: statistics, scores, masks, and new weights if the method gives them."""

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor

from sparse_train.criteria import Criterion
from sparse_train.layers import masks
from sparse_train.layers.matrices import MaskedMatrix
from sparse_train.oneshot.experts import ExpertMatrix, fall_back
from sparse_train.patterns import Pattern
from sparse_train.pipeline.choice import Rules
from sparse_train.pipeline.policies import StraightThrough
from sparse_train.pipeline.pruner import replace_mask, update_masks
from sparse_train.pipeline.recording import check_nothing_dropped, check_statistics, reduce_statistics
from sparse_train.pipeline.update_report import LayerUpdate
from sparse_train.solvers import Solver
from sparse_train.statistics.activations import ActivationGram, ActivationNorm, Statistics, in_float32

Method = Criterion | Solver
"""How to prune: by scores that select weights, or by a solver that also moves the weights it keeps."""


def statistics_of(method: Method) -> type[Statistics] | None:
    """The statistics of inputs that a method needs; None = none."""
    if isinstance(method, Solver):
        return ActivationGram
    return ActivationNorm if method.needs_activations else None


class Undo:
    """Saves original weights, to restore the model if something fails half way."""

    def __init__(self) -> None:
        self._saved: list[tuple[MaskedMatrix, Tensor]] = []

    def save(self, layer: MaskedMatrix) -> None:
        self._saved.append((layer, layer.weight_OI.detach().to("cpu", copy=True)))

    @torch.no_grad()
    def restore(self) -> None:
        for layer, weight_OI in self._saved:
            layer.weight_OI.copy_(weight_OI)


@torch.no_grad()
def prune_group(
    layers: Mapping[str, MaskedMatrix],
    method: Method,
    pattern: Pattern,
    sparsity: float | Mapping[str, float],
    save: Callable[[MaskedMatrix], None] = lambda layer: None,
) -> dict[str, LayerUpdate]:
    """Set the masks of calibrated layers, and their weights if the method is a ``Solver``, and write experts' zeros.

    Args:
        layers: with statistics, if the method needs them.
        method, pattern: how to prune, and where zeros may be.
        sparsity: over each group; a mapping by layer if layers differ.
        save: called with a layer before its weights change.
    """
    if statistics_of(method) is not None:
        reduce_statistics(layers.values())
        check_nothing_dropped(layers)
        fall_back(layers)
    if isinstance(method, Solver):
        updates = _solve(layers, method, pattern, sparsity, save)
    else:
        updates = update_masks(layers, Rules(method, pattern, sparsity, StraightThrough()))
    for layer in layers.values():
        if isinstance(layer, ExpertMatrix):
            if not isinstance(method, Solver):
                save(layer)
            layer.squash()
    return updates


def _solve(
    layers: Mapping[str, MaskedMatrix],
    solver: Solver,
    pattern: Pattern,
    sparsity: float | Mapping[str, float],
    save: Callable[[MaskedMatrix], None],
) -> dict[str, LayerUpdate]:
    check_statistics(layers)
    updates = {}
    for name, layer in layers.items():
        assert isinstance(layer.statistics, ActivationGram)
        own = sparsity[name] if isinstance(sparsity, Mapping) else sparsity
        try:
            with in_float32(layer.weight_OI.device.type):
                weight_OI, mask_OI = solver.solve(layer.weight_OI, layer.statistics.gram_II, pattern, own)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from error
        if not bool(weight_OI.isfinite().all()):
            raise ValueError(
                f"{name}: the solved weights are not finite; a larger dampening_frac makes it more stable."
            )
        save(layer)
        layer.weight_OI.copy_(weight_OI)
        keep_OJ = masks.pack(mask_OI)
        updates[name] = replace_mask(layer, keep_OJ, masks.count(masks.pack(weight_OI != 0) & keep_OJ))
    return updates


def release(layers: Iterable[MaskedMatrix]) -> None:
    """Stop recording, and drop statistics except norms, which are small and remembered in training."""
    for layer in layers:
        if isinstance(layer.statistics, ActivationGram):
            layer.statistics = layer.statistics.norm()
        if hasattr(layer, "recorder"):
            layer.recorder = None
