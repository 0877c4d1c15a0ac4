"""``prune`` and its core, ``set_initial_masks``."""

import logging
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import nn

from sparse_train.allocation import Allocation, Outliers, Uniform, check_pattern
from sparse_train.arguments import require_type
from sparse_train.criteria import Criterion, Wanda
from sparse_train.distributed import rank
from sparse_train.layers import masks
from sparse_train.layers.matrices import MaskedLayer, MaskedMatrix, Recorder
from sparse_train.layers.sparsify import fold, sparsify
from sparse_train.oneshot.block_walk import BlockWalk
from sparse_train.oneshot.calibration_pass import CalibrationPass
from sparse_train.oneshot.engine import Method, Undo, release, statistics_of
from sparse_train.oneshot.experts import expert_matrices
from sparse_train.oneshot.forwards import Batch
from sparse_train.oneshot.training_data import causal_lm
from sparse_train.patterns import Pattern, parse_pattern, parse_word
from sparse_train.pipeline.recording import warn_of_padding
from sparse_train.pipeline.update_report import LayerUpdate
from sparse_train.solvers import Solver
from sparse_train.targets.selection import select
from sparse_train.terminal.progress import bar

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class OneshotReport:
    """What one-shot pruning did."""

    layers: Mapping[str, LayerUpdate] = field(repr=False)
    forward_seconds: float
    """Time in forward passes of calibration data."""
    pruning_seconds: float
    """Time for scores, selection and writing masks."""
    outliers: Outliers = field(default_factory=dict)
    """``outlier_share`` of each decoder block, by its index, if the allocation needs them."""

    @property
    def sparsity(self) -> float:
        """Share of zeros among the targeted weights, counted on the weights."""
        return sum(u.zeros for u in self.layers.values()) / sum(u.size for u in self.layers.values())


def prune(
    model: nn.Module,
    batches: Iterable[Batch] | None = None,
    mask_structure: str | Pattern = "2:4",
    sparsity: float | None = None,
    *,
    criterion: Method | None = None,
    allocation: Allocation | None = None,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    squash: bool = True,
    progress: bool = False,
) -> OneshotReport:
    """Prune a model in one shot, in place.

    Decoder blocks are calibrated one after the other, each on the outputs of the blocks before it, which are already
    pruned (arXiv 2306.11695, section 3; SparseGPT does the same). Other models, and ``Unstructured(group="model")``,
    are calibrated in one pass with dense activations. With a ``Solver`` or fused experts, weights change during the
    walk; the original values are kept in main memory until the end, so that a failure leaves the model unchanged
    (``prune_checkpoint`` needs no such copy).

    Args:
        model: any ``nn.Module`` with linear layers; on any device, of any float dtype. For a LightningModule without
            its own forward, the transformers model in it is called.
        batches: calibration data: token ids (B, L) or dicts of model inputs. Not needed by ``Magnitude``.
        mask_structure: "unstructured", "N:M" with N **kept** of every M consecutive inputs, or a ``Pattern``. With
            "unstructured", weights are compared in ``criterion.group``: an output row, or a layer for
            ``WandaCumulative`` and ``SparseGPT``.
        sparsity: share of zeros over all targeted weights; implied by N:M.
        criterion: a ``Criterion``, or a ``Solver`` such as ``SparseGPT()``; default ``Wanda()``.
        allocation: how the sparsity is divided among layers; default ``Uniform()``.
        targets, ignore: which layers, see ``sparse_train.targets.select``. Fused experts of Mixture-of-Experts blocks
            are pruned too.
        squash: leave plain linear layers with true zeros. False keeps masks and shadow values, for training; fused
            experts, which cannot be masked in training, then stay dense.
        progress: show a progress bar.

    Raises:
        ValueError: no calibration data for a method that needs it, non-finite activations, a layer that no token
            reached, or anything that ``select``, the pattern or the allocation refuse. The model is then unchanged.
    """
    method = method_of(criterion)
    allocation = require_type("allocation", allocation, Uniform(), Allocation)
    pattern, target = resolve(mask_structure, sparsity, method, allocation)
    selection = select(model, pattern, targets, ignore, experts=squash)
    dense = [layer for layer in selection.layers.values() if not isinstance(layer, MaskedLayer)]
    undo = Undo()
    try:
        sparsify(model, dense)
        matrices: dict[str, MaskedMatrix] = {n: m for n, m in selection.layers.items() if isinstance(m, MaskedLayer)}
        matrices |= expert_matrices(selection.experts)
        report = set_initial_masks(
            _called(model, matrices),
            matrices,
            batches,
            criterion=method,
            pattern=pattern,
            sparsity=target,
            allocation=allocation,
            progress=progress,
            save=undo.save,
        )
    except BaseException:
        undo.restore()
        # their masks keep everything again
        fold(model, [layer for layer in dense if isinstance(layer, MaskedLayer)])
        raise
    if rank() == 0:
        _warn_of_surprises(report, target)
    if squash:
        fold(model)
    return report


def _warn_of_surprises(report: OneshotReport, wanted: float | None) -> None:
    empty = [name for name, layer in report.layers.items() if layer.zeros == layer.size]
    if empty:
        _log.warning(
            "All weights of %s%s are zero, so no information passes there. If they were not zero before, compare "
            "weights within rows and not in larger groups.",
            empty[0],
            f" and of {len(empty) - 1} more layers" if len(empty) > 1 else "",
        )
    if wanted is not None and report.sparsity > wanted + 0.01:
        _log.warning(
            "The model has a sparsity of %.4f, more than the %g that was asked for: it had zeros before, and they "
            "stay zeros.",
            report.sparsity,
            wanted,
        )


def _called(model: nn.Module, matrices: Mapping[str, MaskedMatrix]) -> nn.Module:
    """The module that is called with calibration batches."""
    lightning = next((cls for cls in type(model).__mro__ if cls.__name__ == "LightningModule"), None)
    if lightning is None or type(model).forward is not vars(lightning).get("forward"):
        return model
    return causal_lm(model, {name: each for name, each in matrices.items() if isinstance(each, MaskedLayer)}) or model


def method_of(criterion: Method | None) -> Method:
    """The method, Wanda by default."""
    if isinstance(criterion, Solver):
        return criterion
    return require_type("criterion", criterion, Wanda(), Criterion)


def resolve(
    mask_structure: str | Pattern, sparsity: float | None, method: Method, allocation: Allocation
) -> tuple[Pattern, float | None]:
    """Pattern and model-wide sparsity from what users write; None if the allocation gives all sparsities."""
    if sparsity is None and not isinstance(allocation, Uniform):
        pattern, target = parse_word(mask_structure, method.group), None
    else:
        pattern, target = parse_pattern(mask_structure, sparsity, method.group)
    check_pattern(allocation, pattern)
    if isinstance(method, Solver):
        method.check_pattern(pattern)
    return pattern, target


def set_initial_masks(
    model: nn.Module,
    layers: Mapping[str, MaskedMatrix],
    batches: Iterable[Batch] | None,
    *,
    criterion: Method,
    pattern: Pattern,
    sparsity: float | Mapping[str, float] | None,
    allocation: Allocation | None = None,
    final: float | None = None,
    progress: bool = False,
    save: Callable[[MaskedMatrix], None] = lambda layer: None,
) -> OneshotReport:
    """Set the masks of sparsified ``layers`` of ``model``, see ``prune``; a ``Criterion`` does not change weights.

    Args:
        sparsity: over all layers, or of each.
        final: what ``allocation`` divides, if ``sparsity`` is on the way to it; default: ``sparsity``.
        save: called with a layer before its weights change.
    """
    if isinstance(criterion, Solver):
        adapted = next((name for name, layer in layers.items() if layer.adapted), None)
        if adapted is not None:
            raise ValueError(
                f"{adapted} has a mask_lora adapter, and {criterion} would write its frozen weight. Call "
                "merge_mask_lora(model) first."
            )
    before = {name: layer.weight_mask.clone() for name, layer in layers.items()}
    for layer in layers.values():  # each block is calibrated with all its weights, whatever masks there were
        masks.fill_full(layer.weight_mask, layer.in_features)
        layer.statistics = None
    began = time.perf_counter()
    recorder = Recorder()
    walk = BlockWalk(model, layers, criterion, pattern, sparsity, allocation or Uniform(), final, recorder, save)
    try:
        if statistics_of(criterion) is None and not walk.allocation.needs_outliers:
            updates, forward_seconds = walk.without_data(), 0.0
        elif batches is None:
            raise ValueError(
                f"{criterion} needs calibration data: pass batches, an iterable of token tensors (B, L) or of dicts "
                "of model inputs (in a recipe: a data section). Magnitude() needs none."
            )
        else:
            with bar("pruning", shown=progress) as drawn:
                calibration = CalibrationPass(model, batches, recorder, drawn.advance)
                updates = walk.with_data(calibration, drawn)
                forward_seconds = calibration.seconds
                warn_of_padding(recorder)
    except BaseException:
        for name, layer in layers.items():
            layer.weight_mask.copy_(before[name])
        raise
    finally:
        release(layers.values())
    return OneshotReport(updates, forward_seconds, time.perf_counter() - began - forward_seconds, walk.outliers)
