"""Which layers one-shot pruning calibrates together, and in which order: ``BlockWalk``, for a model in memory."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from sparse_train.allocation import Allocation, LayerShape, divide
from sparse_train.layers.blocks import block_lists
from sparse_train.layers.matrices import MaskedMatrix, Recorder
from sparse_train.oneshot.block_order import WAY_OUT
from sparse_train.oneshot.calibration_pass import CalibrationPass
from sparse_train.oneshot.engine import Method, prune_group, release, statistics_of
from sparse_train.oneshot.experts import ExpertMatrix
from sparse_train.patterns import Pattern
from sparse_train.pipeline.divided_sparsity import share_of_outliers
from sparse_train.pipeline.recording import attach, reduce_statistics
from sparse_train.pipeline.update_report import LayerUpdate
from sparse_train.statistics.activations import ActivationNorm
from sparse_train.terminal.progress import Bar


@dataclass
class BlockWalk:
    """Which layers are calibrated together, and in which order."""

    model: nn.Module
    layers: Mapping[str, MaskedMatrix]
    method: Method
    pattern: Pattern
    sparsity: float | Mapping[str, float] | None
    """Over all layers, or of each."""
    allocation: Allocation
    final: float | None
    """The sparsity that ``allocation`` divides, if these masks are on the way to it."""
    recorder: Recorder
    save: Callable[[MaskedMatrix], None]

    def __post_init__(self) -> None:
        self.blocks: list[nn.Module] = []
        candidates = [list(found) for found in block_lists(self.model).values()]
        counts = [sum(len(inside(self.layers, block)) for block in found) for found in candidates]
        if any(counts):
            self.blocks = candidates[counts.index(max(counts))]
        self.groups = [inside(self.layers, block) for block in self.blocks]
        self._check_shared()
        self.outliers: dict[int, float] = {}
        in_blocks = {name for group in self.groups for name in group}
        self.rest = {name: layer for name, layer in self.layers.items() if name not in in_blocks}
        self.last = max((index for index, group in enumerate(self.groups) if group), default=-1)

    def _check_shared(self) -> None:
        used_by: dict[str, int] = {}
        for index, group in enumerate(self.groups):
            for name in group:
                if used_by.setdefault(name, index) != index:
                    raise ValueError(
                        f"{name} is part of blocks {used_by[name]} and {index}, which are calibrated one after the "
                        f"other: each would prune it for itself. Leave it out with ignore=[{name!r}]. {WAY_OUT}"
                    )

    def without_data(self) -> dict[str, LayerUpdate]:
        return prune_group(self.layers, self.method, self.pattern, self._divide(), self.save)

    def with_data(self, calibration: CalibrationPass, drawn: Bar) -> dict[str, LayerUpdate]:
        # a threshold over the whole model is not known before the last block
        if self.pattern.model_wide:
            drawn.set_total(len(calibration))
            return self._together(self.layers, calibration, self._divide())
        calibrated = sum(map(bool, self.groups)) + max(self.last, 0) + bool(self.rest)
        drawn.set_total(len(calibration) * (calibrated + self._measures_outliers))
        if self._measures_outliers:
            self.outliers = self._outliers(calibration)
        sparsities = self._divide()
        updates: dict[str, LayerUpdate] = {}
        for index in range(self.last + 1):
            if group := self.groups[index]:
                self._attach(group, statistics_of(self.method))
                calibration.record_block(self.blocks, index, experts_of(group))
                updates |= prune_group(group, self.method, self.pattern, sparsities, self.save)
                release(group.values())
                drawn.note(blocks_done(index + 1, self.last + 1, updates))
            if index < self.last:
                calibration.pass_on(self.blocks, index)
        if self.rest:  # targets outside the blocks, such as a named lm_head: calibrated with the blocks pruned
            updates |= self._together(self.rest, calibration, sparsities)
        return updates

    def _together(
        self, layers: Mapping[str, MaskedMatrix], calibration: CalibrationPass, sparsity: float | Mapping[str, float]
    ) -> dict[str, LayerUpdate]:
        self._attach(layers, statistics_of(self.method))
        calibration.whole(experts_of(layers))
        return prune_group(layers, self.method, self.pattern, sparsity, self.save)

    @property
    def _measures_outliers(self) -> bool:
        return self.allocation.needs_outliers and not isinstance(self.sparsity, Mapping)

    def _outliers(self, calibration: CalibrationPass) -> dict[int, float]:
        """Share of outliers of each block, from one dense pass."""
        self._attach(self.layers, ActivationNorm)
        calibration.whole(experts_of(self.layers))
        reduce_statistics(self.layers.values())
        groups = {index: group.values() for index, group in enumerate(self.groups) if group}
        found = {index: share_of_outliers(group, self.allocation) for index, group in groups.items()}
        release(self.layers.values())
        return found

    def _divide(self) -> float | dict[str, float]:
        if isinstance(self.sparsity, Mapping):
            return dict(self.sparsity)
        if self.pattern.model_wide:
            assert self.sparsity is not None
            return self.sparsity
        block_of = {name: index for index, group in enumerate(self.groups) for name in group}
        shapes = {n: LayerShape(block_of.get(n), m.out_features, m.in_features) for n, m in self.layers.items()}
        return divide(self.allocation, self.pattern, shapes, self.sparsity, self.outliers, self.final)

    def _attach(self, layers: Mapping[str, MaskedMatrix], statistics: Any) -> None:
        attach(layers.values(), self.recorder, statistics)


def blocks_done(done: int, blocks: int, updates: Mapping[str, LayerUpdate]) -> str:
    """For a progress bar: how far the walk is, and the sparsity of the layers pruned so far."""
    size = sum(update.size for update in updates.values())
    sparsity = sum(update.zeros for update in updates.values()) / size if size else 0.0
    return f"block {done}/{blocks}, sparsity {sparsity:.4f}"


def inside(layers: Mapping[str, MaskedMatrix], block: nn.Module) -> dict[str, MaskedMatrix]:
    """Those of ``layers`` that are part of ``block``."""
    modules, parameters = set(map(id, block.modules())), set(map(id, block.parameters()))
    return {
        name: layer
        for name, layer in layers.items()
        if id(layer) in modules or (isinstance(layer, ExpertMatrix) and id(layer.experts.parameter) in parameters)
    }


def experts_of(layers: Mapping[str, MaskedMatrix]) -> list[ExpertMatrix]:
    """The experts among ``layers``."""
    return [layer for layer in layers.values() if isinstance(layer, ExpertMatrix)]
