"""``prune``, for a model in memory, and ``prune_checkpoint``, for one that need not fit in memory."""

import logging
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import nn

from sparse_train.arguments import describe
from sparse_train.distributed.collectives import rank
from sparse_train.distributions import SparsityDistribution
from sparse_train.layers.masked_layer import MaskedLayer
from sparse_train.layers.sparsify import sparsify, squash_layers
from sparse_train.layers.targets import find_targets
from sparse_train.oneshot.experts import expert_matrices
from sparse_train.oneshot.forwards import Batch, check_not_rescaled, under_autocast
from sparse_train.oneshot.walk import MemoryStore, Method, OneShotReport, Plan, walk
from sparse_train.patterns import Pattern
from sparse_train.solvers import Solver

_log = logging.getLogger(__name__)


def prune(
    model: nn.Module,
    batches: Iterable[Batch] | None = None,
    mask_structure: str | Pattern = "2:4",
    sparsity: float | None = None,
    *,
    criterion: Method | None = None,
    distribution: SparsityDistribution | None = None,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    autocast: torch.dtype | None = None,
    squash: bool = True,
    progress: bool = False,
) -> OneShotReport:
    """Prune a model in one shot, in place.

    Decoder blocks are calibrated one after the other, each on the outputs of the blocks before it, which are already
    pruned (arXiv 2306.11695, section 3; SparseGPT does the same). Modules without a list of blocks, and
    ``Unstructured(group="model")``, are calibrated in one pass with dense activations. A failure leaves the model
    unchanged; for that, a ``Solver`` and fused experts keep the original values in main memory until the end
    (``prune_checkpoint`` does not).

    Args:
        model: any ``nn.Module`` with linear layers, which is called with the batches.
        batches: calibration data: token ids (B, L) or dicts of model inputs. Not needed by ``Magnitude``.
        mask_structure, sparsity, distribution, targets, ignore: as in ``PruningConfig``; fused experts of
            Mixture-of-Experts blocks are pruned too. With "unstructured", weights are compared in ``criterion.group``:
            an output row, or a layer for ``WandaCumulative`` and ``SparseGPT``.
        criterion: a ``Criterion``, or a ``Solver`` such as ``SparseGPT()``; default ``Wanda()``.
        autocast: compute calibration forwards in this dtype, such as ``torch.bfloat16``; the rest stays in float32.
        squash: leave plain linear layers with true zeros. False keeps masks and shadow values, for training; fused
            experts, which cannot be masked in training, then stay dense. The shadow values of a solver make no dense
            model: to prune again, squash first.
        progress: show a progress bar.
    """
    plan = Plan.of(mask_structure, sparsity, criterion, distribution)
    if plan.needs_data:
        check_not_rescaled(model)
    chosen = find_targets(model, plan.pattern, targets, ignore, experts=squash)
    dense = [layer for layer in chosen.layers.values() if not isinstance(layer, MaskedLayer)]
    try:
        sparsify(model, dense)
        masked = {name: layer for name, layer in chosen.layers.items() if isinstance(layer, MaskedLayer)}
        adapted = next((name for name, layer in masked.items() if layer.has_factors), None)
        if adapted is not None and isinstance(plan.method, Solver):
            raise ValueError(
                f"{adapted} has a mask_lora adapter, and {plan.method} would write its frozen weight. Call "
                "merge_mask_lora(model) first."
            )
        layers = {**masked, **expert_matrices(chosen.experts)}
        store = MemoryStore(model, layers, together=plan.pattern.model_wide)
        with store.pruning_from_dense():
            report = walk(store, plan, batches, progress, under_autocast(autocast, store.device))
    except BaseException:
        # their masks keep everything again
        squash_layers(model, [layer for layer in dense if isinstance(layer, MaskedLayer)])
        raise
    if rank() == 0 and (empty := [name for name, layer in report.layers.items() if layer.zeros == layer.size]):
        _log.warning(
            "All weights of %d layers, such as %s, are zero, so no information passes there. If they were not zero "
            "before, compare weights within rows and not in larger groups.",
            *(len(empty), empty[0]),
        )
    if squash:
        squash_layers(model, masked.values())
    return report


def prune_checkpoint(
    path: str | Path,
    out: str | Path,
    batches: Iterable[Batch] | None = None,
    mask_structure: str | Pattern = "2:4",
    sparsity: float | None = None,
    *,
    criterion: Method | None = None,
    distribution: SparsityDistribution | None = None,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    autocast: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    progress: bool = False,
    complete: Callable[[Path, OneShotReport], None] | None = None,
) -> OneShotReport:
    """Prune a checkpoint of a decoder-only transformers model; the result is the same as that of ``prune``.

    Memory holds one decoder block, the embeddings, and the activations between two blocks.

    Args:
        path: folder with config.json and safetensors; only read.
        out: folder to write, readable by ``from_pretrained``; must not exist. Until it is complete, finished blocks are
            in a folder next to it (``.NAME.partial``), and after an interruption the same call continues after them.
        batches: calibration data, see ``prune``; not needed by ``Magnitude``.
        mask_structure, sparsity, criterion, distribution, targets, ignore, autocast, progress: see ``prune``; targets
            outside the decoder blocks and groups over the whole model need the whole model.
        device: where blocks compute, one at a time.
        complete: called with the folder before it gets its name, to add files to it.
    """
    from sparse_train import model_folders  # needs safetensors
    from sparse_train.oneshot import disk

    path, out = Path(path), Path(out)
    plan = Plan.of(mask_structure, sparsity, criterion, distribution)
    if plan.pattern.model_wide:
        raise ValueError(f"{plan.pattern} compares over the whole model, which is never in memory here. Use prune.")
    checkpoint = model_folders.WeightFiles(path)
    model = model_folders.model_without_weights(path, checkpoint)
    if plan.needs_data:
        check_not_rescaled(model)
    chosen = find_targets(model, plan.pattern, targets, ignore, experts=True)
    batches = list(batches) if plan.needs_data and batches is not None else None
    parts = (plan.pattern, plan.sparsity, plan.method, plan.distribution, targets, list(ignore))
    data = f"autocast={autocast}", checkpoint.fingerprint, disk.data_checksum(batches or [])
    settings = [*map(describe, parts), *data]
    with disk.unfinished(out, settings) as work:
        store = disk.DiskStore(model, checkpoint, chosen, work, torch.device(device))
        store.load_rest()
        report = walk(store, plan, batches, progress, under_autocast(autocast, store.device))
        model_folders.write_index(work, store.shards)
        model_folders.copy_companions(path, work)
        if complete is not None:
            complete(work, report)
    return report
