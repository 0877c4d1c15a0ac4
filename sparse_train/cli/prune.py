"""``sparse-train prune``: one model to one folder."""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from time import perf_counter as now
from typing import Any, Literal

from sparse_train.arguments import describe
from sparse_train.criteria import Criterion
from sparse_train.data.packing import calibration_batches
from sparse_train.data.texts import PackagedWikipedia, TextSource
from sparse_train.distributed.collectives import joined, rank, world_size
from sparse_train.distributions import SparsityDistribution
from sparse_train.environment import versions
from sparse_train.evaluation.perplexity import check_window
from sparse_train.export import export_model
from sparse_train.export.card import ModelCard, write_card
from sparse_train.export.hf_folder import check_written, size_of
from sparse_train.files import check_free, check_space, write_json, written_whole
from sparse_train.inspection import LayerSparsity, by_projection, layer_sparsities, pruned_layers
from sparse_train.model_folders import PRUNING_FILE, WeightFiles, model_without_weights
from sparse_train.models.sources import (
    Autocast,
    Dtype,
    ModelSource,
    Pretrained,
    as_model_source,
    chosen_device,
    torch_dtype,
)
from sparse_train.oneshot.forwards import Batch
from sparse_train.oneshot.prune import prune as prune_model
from sparse_train.oneshot.prune import prune_checkpoint
from sparse_train.oneshot.walk import OneShotReport, Plan
from sparse_train.patterns import Pattern, group_label
from sparse_train.solvers import Solver
from sparse_train.terminal import print_table

Details = dict[str, Any]
"""Plain data about a pruning, in the end what pruning.json holds."""


def prune(
    model: ModelSource | str,
    out: str,
    text: TextSource | None = None,
    mask_structure: str | Pattern = "2:4",
    sparsity: float | None = None,
    criterion: Criterion | Solver | None = None,
    distribution: SparsityDistribution | None = None,
    targets: list[str] | None = None,
    ignore: list[str] = [],  # noqa: B006  (not changed)
    dtype: Dtype | None = None,
    num_calibration_samples: int = 32,
    max_seq_length: int = 512,
    sampling: Literal["packed", "documents"] = "packed",
    batch_size: int = 4,
    seed: int = 0,
    autocast: Autocast | None = None,
    device: str | None = None,
    streaming: bool = False,
) -> Details | None:
    """Prune a model in one shot and write it as a Hugging Face folder with true zeros.

    Args:
        model: Hugging Face id or local folder, whose weights keep their dtype; or a model source.
        out: folder to write; must not exist.
        text: calibration text: files or folders of .txt and .jsonl, or a text source; default: the packaged Wikipedia
            text.
        mask_structure: "unstructured", "N:M" with N kept of every M consecutive inputs, or a pattern class.
        sparsity: share of weights that are zero; implied by N:M.
        criterion: Wanda (default), WandaCumulative, RIA, Magnitude, SparseGPT, or IHT.
        distribution: how the sparsity is divided among layers: Uniform (default), OWL or Explicit.
        targets: layers by name, part of a name, class or "re:" expression; default: those of the decoder blocks.
        ignore: layers to leave dense.
        dtype: of the written weights; default: that of the model.
        num_calibration_samples: number of samples of text; all, with a warning, if there are fewer.
        max_seq_length: tokens per sample.
        sampling: "packed" cuts joined documents into samples; "documents" uses a random part of one long document for
            each sample, as in the Wanda paper.
        batch_size: samples per forward pass.
        seed: of the choice of samples.
        autocast: compute calibration forwards in this dtype, such as "bfloat16"; the rest stays as it is.
        device: where the model computes, such as "cpu" or "cuda"; default: a GPU if there is one.
        streaming: never hold the whole model in memory: process its safetensors block by block, in their dtype. If a
            run is interrupted, the same command continues it.

    Under ``torchrun``, each process uses its part of the calibration data, with two reduces per block; rank 0 writes.
    """
    method: Details = {
        "mask_structure": mask_structure,
        "sparsity": sparsity,
        "criterion": criterion,
        "distribution": distribution,
        "targets": targets,
        "ignore": ignore,
        "autocast": torch_dtype(autocast),
    }
    calibration: Details = {
        "num_calibration_samples": num_calibration_samples,
        "max_seq_length": max_seq_length,
        "sampling": sampling,
        "batch_size": batch_size,
        "seed": seed,
    }
    plan = Plan.of(mask_structure, sparsity, criterion, distribution)  # mistakes are told before anything is loaded
    if dtype is not None and streaming:
        raise ValueError("streaming keeps the dtype of each file. Leave dtype out.")
    folder, source, text, began = Path(out), as_model_source(model, dtype="auto"), text or PackagedWikipedia(), now()
    check_free(folder)
    with joined(chosen_device(device)) as own_device:
        if rank() == 0:
            print("reading", source.name, *(["and", text.name] if plan.needs_data else []), file=sys.stderr)
        if streaming:
            files = _files_of(source)
            loaded = model_without_weights(files, WeightFiles(files))
        else:
            loaded = source.load().to(own_device)
        # what would fail after the pruning or in it
        if plan.needs_data:
            check_window(loaded, max_seq_length, name="max_seq_length")
        check_space(folder, size_of(loaded, torch_dtype(dtype)))
        batches = _own_batches(source, text, calibration) if plan.needs_data else None
        details, layers = Details(), list[LayerSparsity]()

        def complete(written: Path, report: OneShotReport) -> None:
            """Write what is missing in the folder, before it gets its name."""
            data = {"text": text.name, **calibration, "autocast": autocast, "processes": world_size()}
            details.update(_details(source, plan, report, method, data, own_device), streaming=streaming)
            stage, calibrated = details["stages"][-1], {"calibration": details["calibration"]}
            made = {"method": "pruned in one shot, without training", **stage, **calibrated}
            card = ModelCard(source.name, source.hub_id, source.license, made, stages=source.stages)
            if streaming:
                layers.extend(_pruned_layers(report, group_label(plan.pattern)))
                check_written(written, layers, loaded)
                write_card(written, card, layers)
            else:
                layers.extend(layer_sparsities(loaded))
                export_model(loaded, source.tokenizer(), written, card, dtype=torch_dtype(dtype))
            details["seconds"]["all"] = now() - began
            write_json(written / PRUNING_FILE, details)

        if streaming:
            prune_checkpoint(files, folder, batches, **method, complete=complete, device=own_device, progress=True)
        else:
            report = prune_model(loaded, batches, **method, progress=rank() == 0)
            if rank() != 0:
                return None
            with written_whole(folder) as beside:
                complete(beside, report)
    show_pruning(details, layers, folder)
    return {"out": out, **details}


def _details(
    model: ModelSource, plan: Plan, report: OneShotReport, method: Details, calibration: Details, device: str
) -> Details:
    """What ``pruning.json`` says, but for the time of everything."""
    stage = {
        "criterion": describe(plan.method),
        "mask_structure": group_label(plan.pattern),
        "wanted_sparsity": plan.sparsity,
        "sparsity": report.sparsity,
        "distribution": describe(plan.distribution),
        "targets": method["targets"],
        "ignore": method["ignore"],
    }
    return {
        "model": model.name,
        "stages": [*model.stages, stage],
        "sparsity": report.sparsity,
        "calibration": calibration if plan.needs_data else None,
        "device": device,
        "seconds": {"forwards": report.forward_seconds, "pruning": report.pruning_seconds},
        # masks began full: what flipped is pruned
        "layers": {name: update.flips / update.size for name, update in report.layers.items()},
        "versions": versions(),
    }


def _files_of(source: ModelSource) -> Path:
    """The folder of a model that is pruned from folder to folder."""
    if world_size() > 1:
        raise ValueError("streaming runs in one process. Start it without torchrun, or leave it out.")
    if not isinstance(source, Pretrained) or source.gguf_file:
        raise ValueError(f"streaming walks a folder or a hub model with safetensors, not {source.name}.")
    return source.folder()


def _own_batches(source: ModelSource, text: TextSource, calibration: dict[str, Any]) -> Iterator[Batch]:
    """The calibration data of this process. Text is read when the first batch is asked for, after all checks; only then
    is ``calibration["num_calibration_samples"]`` set to the number that there was."""
    batches = calibration_batches(text, source.tokenizer(), **calibration)
    calibration["num_calibration_samples"] = sum(len(batch["input_ids"]) for batch in batches)  # there may be fewer
    if len(batches) < world_size():
        given = f"There are {len(batches)} calibration batches for {world_size()} processes."
        raise ValueError(f"{given} Give a smaller batch_size, or start fewer processes.")
    yield from batches[rank() :: world_size()]


def _pruned_layers(report: OneShotReport, label: str) -> list[LayerSparsity]:
    """The layers of a model that was never in memory; fused experts, name[0], name[1], ..., are one."""
    layers: dict[str, LayerSparsity] = {}
    for name, update in report.layers.items():
        whole = name.partition("[")[0]
        so_far = layers.get(whole, LayerSparsity(whole, (1, 0), 0, label))
        size, zeros = so_far.shape[1] + update.size, so_far.zeros + update.zeros
        layers[whole] = replace(so_far, shape=(1, size), zeros=zeros)
    return list(layers.values())


def show_pruning(details: Details, layers: Sequence[LayerSparsity], folder: Path) -> None:
    print(f"{details['model']} pruned to {folder}")
    stage = details["stages"][-1]
    divided = "" if stage["distribution"] == "Uniform()" else f", {stage['distribution']}"
    print(f"{stage['criterion']}, {stage['mask_structure']}{divided}")
    if data := details["calibration"]:
        size = f"{data['num_calibration_samples']} x {data['max_seq_length']} tokens"
        print(f"calibrated on {size} of {data['text']} ({data['sampling']}), seed {data['seed']}")
    seconds = ", ".join(f"{name} {value:.1f} s" for name, value in details["seconds"].items())
    print(f"sparsity of the targeted weights {details['sparsity']:.6f}; {seconds}, on {details['device']}")
    print_table(["projection", "layers", "sparsity", "pattern"], by_projection(pruned_layers(layers)), words=(0, 3))
