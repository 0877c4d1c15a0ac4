"""``walk``: one-shot pruning, one decoder block after the other, from the ``BlockStore`` that holds the blocks."""

import time
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sparse_train.architecture import decoder_blocks, shape_OI
from sparse_train.arguments import require_type
from sparse_train.criteria import Criterion, Wanda
from sparse_train.distributions import (
    Division,
    LayerShape,
    Outliers,
    SparsityDistribution,
    Uniform,
    check_pattern,
)
from sparse_train.layers import masks
from sparse_train.layers.masked_layer import MaskedMatrix
from sparse_train.oneshot.asymmetric import AsymmetricGram, AsymmetricPass
from sparse_train.oneshot.calibration import WAY_OUT, CalibrationPass
from sparse_train.oneshot.experts import ExpertMatrix, fall_back
from sparse_train.oneshot.forwards import Batch, ForwardContext, TokenMask, inference
from sparse_train.patterns import Pattern, parse_pattern
from sparse_train.pruning.counts import LayerUpdate, sparsity_of
from sparse_train.pruning.norms import check_nothing_dropped, check_statistics, sum_statistics
from sparse_train.pruning.update import Rules, outlier_share, replace_mask, update_masks
from sparse_train.solvers import Solver
from sparse_train.statistics import ActivationGram, ActivationNorm, Statistics, in_float32
from sparse_train.terminal import with_bar

Method = Criterion | Solver
"""How to prune: by scores that select weights, or by a solver that also moves the weights it keeps."""


@dataclass(frozen=True)
class Plan:
    """How a model is pruned in one shot."""

    method: Method
    pattern: Pattern
    sparsity: float
    """The sparsity over all targets."""
    distribution: SparsityDistribution = field(default_factory=Uniform)
    final: float | None = None
    """The sparsity that ``distribution`` divides, if ``sparsity`` is on the way to it."""

    @classmethod
    def of(
        cls,
        mask_structure: str | Pattern,
        sparsity: float | None,
        criterion: Method | None,
        distribution: SparsityDistribution | None,
    ) -> "Plan":
        """The plan of what users write; Wanda and Uniform by default. Raises ValueError for what cannot be combined."""
        method: Any = require_type("criterion", criterion, Wanda(), (Criterion, Solver))
        distribution = require_type("distribution", distribution, Uniform(), SparsityDistribution)
        pattern, sparsity = parse_pattern(mask_structure, sparsity, method.group)
        check_pattern(distribution, pattern)
        if isinstance(method, Solver):
            method.check_pattern(pattern)
        return cls(method, pattern, sparsity, distribution)

    @property
    def statistics(self) -> type[Statistics] | None:
        """The statistics of inputs that the method needs; None = none."""
        if isinstance(self.method, Solver):
            return ActivationGram
        return ActivationNorm if self.method.needs_activations else None

    @property
    def needs_data(self) -> bool:
        return self.statistics is not None or self.distribution.outliers_above is not None


@dataclass(frozen=True)
class OneShotReport:
    """What one-shot pruning did."""

    layers: Mapping[str, LayerUpdate] = field(repr=False)
    forward_seconds: float
    """Time in forward passes of calibration data."""
    pruning_seconds: float
    """Time for the rest: scores, selection, masks, and, for a checkpoint, its files."""
    outliers: Outliers = field(default_factory=dict)
    """``outlier_share`` of each decoder block, by its index, if the distribution needs them."""

    @property
    def sparsity(self) -> float:
        """Share of zeros among the targeted weights, counted on the weights."""
        return sparsity_of(self.layers.values())


# --- stores ---------------------------------------------------------------------------------------------------------


class BlockStore(ABC):
    """Holds the decoder blocks of a model, in memory or on disk, and what is known of those that are done.

    If ``together``, all targets are calibrated in one pass of the model, as if it had no blocks.
    """

    def __init__(
        self, model: Any, targets: Mapping[str, nn.Module | ExpertMatrix], device: torch.device, together: bool = False
    ) -> None:
        self.model, self.device = model, device
        self.keep_on = device
        """Where the outputs of a block are kept for the next one."""
        self.shapes: dict[str, LayerShape] = {}
        self.updates: dict[str, LayerUpdate] = {}
        """What pruning did to the targets that are done."""
        self.outliers: dict[int, float] = {}
        parts = {n: each.experts.parameter if isinstance(each, ExpertMatrix) else each for n, each in targets.items()}
        self.blocks = [] if together else decoder_blocks(model, parts.values())
        places: dict[int, list[int]] = {}
        for index, block in enumerate(self.blocks):
            for part in (*block.modules(), *block.parameters()):
                places.setdefault(id(part), []).append(index)
        for name, each in targets.items():
            inside = places.get(id(parts[name]), [])
            if len(inside) > 1:
                raise ValueError(
                    f"{name} is part of blocks {inside[0]} and {inside[1]}, and each would prune it for itself. Leave "
                    f"it out with ignore=[{name!r}]. {WAY_OUT}"
                )
            size_OI = each.experts.shape_OI if isinstance(each, ExpertMatrix) else shape_OI(each)
            self.shapes[name] = LayerShape(inside[0] if inside else None, *size_OI)

    @property
    def last(self) -> int:
        """The last block with a target; -1 if there is none."""
        return max((shape.block for shape in self.shapes.values() if shape.block is not None), default=-1)

    def names(self, block: int | None) -> list[str]:
        """The targets in a block; None: those outside the blocks."""
        return [name for name, shape in self.shapes.items() if shape.block == block]

    @abstractmethod
    def load(self, block: int | None) -> dict[str, MaskedMatrix]:
        """Bring a block to memory, and give its targets masks that keep everything; returns those, by name."""

    def load_dense(self, block: int) -> None:
        """Bring a block that is done to memory, as it was before."""
        raise AssertionError(f"{type(self).__name__} goes on with no earlier run")

    def free(self, block: int) -> None:
        """Release the memory of a block."""

    def is_done(self, block: int) -> bool:
        """Whether an earlier run has pruned the block; ``load`` then brings it pruned, without masks."""
        return False

    def before_change(self, layer: MaskedMatrix) -> None:
        """Called before the weights of a layer change."""

    def finish(self, block: int | None, updates: Mapping[str, LayerUpdate]) -> None:
        """Called when the targets of a block are pruned."""
        self.updates |= updates


class MemoryStore(BlockStore):
    """A model in memory, and its masked layers and experts."""

    def __init__(self, model: nn.Module, layers: Mapping[str, Any], together: bool) -> None:
        super().__init__(model, layers, next(model.parameters()).device, together)
        self._layers: Mapping[str, MaskedMatrix] = layers
        self._weights: list[tuple[MaskedMatrix, Tensor]] = []

    @contextmanager
    def pruning_from_dense(self) -> Iterator[None]:
        """Begin with masks that keep everything; if anything inside fails, weights and masks are as before."""
        before = [(layer, layer.weight_mask.clone(), layer.calibration_norm) for layer in self._layers.values()]
        for layer in self._layers.values():
            layer.keep_all()
            layer.calibration_norm = None
        try:
            yield
        except BaseException:
            with torch.no_grad():
                for layer, weight_OI in self._weights:
                    layer.weight_OI.copy_(weight_OI)
            for layer, mask_OJ, norm in before:
                layer.weight_mask.copy_(mask_OJ)
                layer.calibration_norm = norm
            raise
        finally:
            _release(self._layers.values())

    def load(self, block: int | None) -> dict[str, MaskedMatrix]:
        return {name: self._layers[name] for name in self.names(block)}

    def before_change(self, layer: MaskedMatrix) -> None:
        self._weights.append((layer, layer.weight_OI.detach().to("cpu", copy=True)))


# --- the walk --------------------------------------------------------------------------------------------------------


def walk(
    store: BlockStore,
    plan: Plan,
    batches: Iterable[Batch] | None,
    progress: bool,
    context: ForwardContext,
    token_mask: TokenMask | None = None,
) -> OneShotReport:
    """Prune the targets of a store: those in blocks one block after the other, then the others, all together.

    A block is loaded, calibrated on the outputs of the block before it, pruned, run again for the next one, and freed.
    Masks are set; weights change only with a ``Solver``, and experts get their zeros. Only forwards run in ``context``.
    """
    calibration = None
    if plan.needs_data:
        if batches is None:
            raise ValueError(
                f"{plan.method} with {plan.distribution} needs calibration data: pass batches, an iterable of token "
                "tensors (B, L) or of dicts of model inputs (in a recipe: a data section). Magnitude() needs none."
            )
        # reads the batches, which the model itself may generate, as they are asked for: before its modes are set
        calibration = CalibrationPass(
            store.model, store.blocks, batches, store.device, store.keep_on, context, token_mask
        )
    asymmetric = None
    if calibration is not None and isinstance(plan.method, Solver) and plan.method.asymmetric:
        if not store.blocks:
            raise ValueError(
                f"{plan.method} makes up for what earlier blocks have lost, and here nothing is pruned block by block. "
                "Leave asymmetric out."
            )
        asymmetric = AsymmetricPass(calibration)
    began, experts = time.perf_counter(), {"_experts_implementation": "eager"}  # one by one
    with inference(store.model, use_cache=False, **experts):  # once, since it goes through all modules
        above = plan.distribution.outliers_above
        if calibration is not None and above is not None and not store.outliers:
            store.outliers = _walk_for_outliers(store, above, calibration, progress)
        final = plan.sparsity if plan.final is None else plan.final
        division = Division(plan.distribution, store.shapes, plan.pattern, final, store.outliers)
        sparsities = division.at(plan.sparsity)

        def prune_block(block: int | None) -> None:
            layers, updates = store.load(block), dict[str, LayerUpdate]()
            stages: Iterable[dict[str, MaskedMatrix]] = [layers] if layers else []
            if asymmetric is not None and block is not None:
                stages = asymmetric.stages(block, layers, keep=block < store.last)
            elif layers and calibration is not None and plan.statistics is not None:
                calibration.record(layers, plan.statistics, block)
            for stage in stages:
                updates |= _prune_layers(stage, plan, sparsities, store)
            store.finish(block, {name: updates[name] for name in layers})

        for block in with_bar(range(len(store.blocks)), "pruning", shown=progress and calibration is not None):
            if not store.is_done(block):
                prune_block(block)
            else:
                if asymmetric is not None and block < store.last:
                    store.load_dense(block)
                    asymmetric.keep_outputs(block)
                store.load(block)
            if calibration is not None and plan.statistics is not None and block < store.last:
                calibration.keep_outputs(block)
            store.free(block)
        if store.names(None):  # such as a named lm_head: calibrated with the blocks pruned
            prune_block(None)
        forwards = 0.0 if calibration is None else calibration.seconds
        forwards += 0.0 if asymmetric is None else asymmetric.seconds
        return OneShotReport(store.updates, forwards, time.perf_counter() - began - forwards, store.outliers)


def _walk_for_outliers(
    store: BlockStore, above: float, calibration: CalibrationPass, progress: bool
) -> dict[int, float]:
    """The share of outliers of each block, from a walk over dense blocks."""
    shares = {}
    for block in with_bar(range(store.last + 1), "measuring outliers", shown=progress):
        layers = store.load(block)
        calibration.record(layers, ActivationNorm, block, keep=block < store.last)
        if layers:
            sum_statistics(layers.values())
            shares[block] = outlier_share(layers.values(), above)
        _release(layers.values())
        store.free(block)
    return shares


@torch.no_grad()
def _prune_layers(
    layers: Mapping[str, MaskedMatrix], plan: Plan, sparsities: Mapping[str, float], store: BlockStore
) -> dict[str, LayerUpdate]:
    """Set the masks of calibrated layers, and their weights if the method is a ``Solver``, and write experts' zeros."""
    if plan.statistics is not None:
        sum_statistics(layers.values())
        check_nothing_dropped(layers)
        fall_back(layers)
    for layer in layers.values():
        if isinstance(plan.method, Solver) or isinstance(layer, ExpertMatrix):
            store.before_change(layer)
    if isinstance(plan.method, Solver):
        check_statistics(layers)
        updates = {n: _solve(n, each, plan.method, plan.pattern, sparsities[n]) for n, each in layers.items()}
    else:
        updates = update_masks(layers, Rules(plan.method, plan.pattern, sparsities))
    for layer in layers.values():
        if isinstance(layer, ExpertMatrix):
            layer.write_zeros()
        if layer.statistics is not None:
            layer.calibration_norm = layer.statistics.state_dict()
    _release(layers.values())
    return updates


def _solve(name: str, layer: MaskedMatrix, solver: Solver, pattern: Pattern, sparsity: float) -> LayerUpdate:
    seen, weight_OI = layer.statistics, layer.weight_OI
    assert isinstance(seen, ActivationGram)
    try:
        with in_float32(weight_OI.device.type):
            if isinstance(seen, AsymmetricGram):
                weight_OI = seen.target(weight_OI, solver.dampening_frac)
            weight_OI, mask_OI = solver.solve(weight_OI, seen.gram_II, pattern, sparsity)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error
    layer.weight_OI.copy_(weight_OI)
    if not bool(layer.weight_OI.isfinite().all()):  # as they are stored, in 16 bits perhaps
        raise ValueError(f"{name}: the solved weights are not finite; a larger dampening_frac makes it more stable.")
    keep_OJ = masks.pack(mask_OI)
    return replace_mask(layer, keep_OJ, masks.count(masks.pack(layer.weight_OI != 0) & keep_OJ))


def _release(layers: Iterable[MaskedMatrix]) -> None:
    """Stop recording."""
    for layer in layers:
        layer.statistics = layer.recorder = None
