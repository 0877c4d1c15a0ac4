"""``sparse-train prune``: one model to one folder."""

import functools
import time
from collections import defaultdict
from dataclasses import dataclass, replace
from importlib.metadata import version
from json import dumps
from pathlib import Path
from typing import Any, Literal

from sparse_train.arguments import describe
from sparse_train.cli.evaluate import chosen_device, perplexity_on
from sparse_train.cli.tables import show_pruning
from sparse_train.criteria import Criterion
from sparse_train.data.blocks import calibration_batches
from sparse_train.data.texts import PackagedWikipedia, TextSource
from sparse_train.distributed.collectives import joined, rank, world_size
from sparse_train.distributions import SparsityDistribution
from sparse_train.evaluation.perplexity import check_window
from sparse_train.export import export_model
from sparse_train.export.card import ModelCard, oneshot_rows, write_card
from sparse_train.files import check_free, check_space, replacing
from sparse_train.inspection import LayerSparsity, layer_sparsities
from sparse_train.models.sources import Autocast, Dtype, ModelSource, Pretrained, as_model_source, torch_dtype
from sparse_train.oneshot.disk import Checkpoint, copy_others, model_without_weights
from sparse_train.oneshot.forwards import Batch
from sparse_train.oneshot.prune import prune as prune_model
from sparse_train.oneshot.prune import prune_checkpoint
from sparse_train.oneshot.walk import OneshotReport, Plan
from sparse_train.patterns import Pattern, group_label
from sparse_train.solvers import Solver

Details = dict[str, Any]
"""The record of a pruning, as stored in pruning.json."""


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
    perplexity: TextSource | None = None,
    window: int = 2048,
    max_tokens: int | None = None,
    bos: bool = False,
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
        criterion: Wanda (default), RIA, Magnitude, or SparseGPT.
        distribution: how the sparsity is divided among layers: Uniform (default), OWL or Explicit.
        targets: layers by name, class name or "re:" expression; default: the linear layers of the decoder blocks.
        ignore: layers to leave dense.
        dtype: of the written weights; default: that of the model.
        num_calibration_samples: number of samples of text.
        max_seq_length: tokens per sample.
        sampling: "packed" cuts joined documents into samples; "documents" uses a random part of one long document for
            each sample, as in the Wanda paper.
        batch_size: samples per forward pass.
        seed: of the choice of samples.
        perplexity: text on which to measure perplexity afterwards (its test split).
        window: tokens per window of this text.
        max_tokens: use only the first tokens of this text.
        bos: put the tokens that the tokenizer puts in front of a text (such as <bos>) in front of every window of this
            text, and not only at its start. Models such as Gemma need this.
        autocast: compute calibration forwards in this dtype, such as "bfloat16"; the rest stays as it is.
        device: where the model computes, such as "cpu" or "cuda"; default: a GPU if there is one.
        streaming: never hold the whole model in memory: process its safetensors block by block, in their dtype. If a
            run is interrupted, the same command continues it.

    Under ``torchrun``, each process uses its part of the calibration data, with two reduces per block; rank 0 writes.
    """
    method: dict[str, Any] = {
        "mask_structure": mask_structure,
        "sparsity": sparsity,
        "criterion": criterion,
        "distribution": distribution,
        "targets": targets,
        "ignore": ignore,
        "autocast": torch_dtype(autocast),
    }
    calibration: dict[str, Any] = {
        "num_calibration_samples": num_calibration_samples,
        "max_seq_length": max_seq_length,
        "sampling": sampling,
        "batch_size": batch_size,
        "seed": seed,
    }
    plan = Plan.of(mask_structure, sparsity, criterion, distribution)  # mistakes are told before anything is loaded
    if dtype is not None and streaming:
        raise ValueError("streaming keeps the dtype of each file. Leave dtype out.")
    check_free(Path(out))
    source, measure = as_model_source(model, dtype="auto"), None
    with joined(chosen_device(device)) as own_device:
        if streaming and world_size() > 1:
            raise ValueError("streaming runs in one process. Start it without torchrun, or leave it out.")
        if perplexity is not None:
            options: dict[str, Any] = {"window": window, "max_tokens": max_tokens, "bos": bos, "batch_size": 1}
            measure = perplexity_on(source, source, perplexity, **options)
        job = _Job(source, plan, method, text or PackagedWikipedia(), calibration, own_device, measure)
        details, layers = _run(job, Path(out), streaming, dtype)
        if rank() != 0:  # asked in here, where there is a group
            return None
    show_pruning(details, layers, Path(out))
    return {"out": out, **details}


@dataclass(frozen=True)
class _Job:
    """A model, how it is pruned, and what is measured afterwards."""

    source: ModelSource
    plan: Plan
    method: dict[str, Any]
    """The same as arguments of ``sparse_train.prune``."""
    text: TextSource
    calibration: dict[str, Any]
    """Arguments of ``calibration_batches``."""
    device: str
    measure: functools.partial[Any] | None
    """``evaluate_perplexity`` on a text."""

    def check(self, model: Any, out: Path) -> None:
        """Raise ValueError for what would fail after the pruning or in it; weights of the model are not looked at."""
        if self.plan.needs_data:
            check_window(model, self.calibration["max_seq_length"], name="max_seq_length")
        if self.measure is not None:
            check_window(model, self.measure.keywords["window"], len(self.measure.keywords["prefix"]))
        check_space(out, sum(weight.numel() * weight.element_size() for weight in model.parameters()))

    def batches(self) -> list[Batch] | None:
        """Calibration data, of this process; None for a method without."""
        if not self.plan.needs_data:
            return None
        tokenizer = self.source.tokenizer()
        found: list[Batch] = list(calibration_batches(self.text, tokenizer, **self.calibration))
        if len(found) < world_size():
            given = f"There are {len(found)} calibration batches for {world_size()} processes."
            raise ValueError(f"{given} Give a smaller batch_size, or start fewer processes.")
        return found[rank() :: world_size()]

    def prune(self, out: Path) -> tuple[Any, OneshotReport]:
        """The pruned model in memory, and what was done."""
        model = self.source.load().to(self.device)
        self.check(model, out)
        return model, prune_model(model, self.batches(), **self.method, progress=rank() == 0)

    def stream(self, out: Path) -> OneshotReport:
        """Prune a checkpoint block by block, from folder to folder."""
        if not isinstance(self.source, Pretrained) or self.source.gguf_file:
            raise ValueError(f"streaming walks a folder or a hub model with safetensors, not {self.source.name}.")
        folder = self.source.folder()
        self.check(model_without_weights(folder, Checkpoint(folder)), out)
        return prune_checkpoint(folder, out, self.batches(), **self.method, device=self.device, progress=True)

    def details(self, report: OneshotReport) -> Details:
        stage = {
            "criterion": describe(self.plan.method),
            "mask_structure": group_label(self.plan.pattern),
            "wanted_sparsity": self.plan.sparsity,
            "sparsity": report.sparsity,
            "distribution": describe(self.plan.distribution),
            "targets": self.method["targets"],
            "ignore": self.method["ignore"],
        }
        casts = self.method["autocast"]
        computed = {"autocast": casts and str(casts).removeprefix("torch."), "processes": world_size()}
        calibration = {"text": self.text.name, **self.calibration, **computed}
        return {
            "model": self.source.name,
            "stages": [stage],
            "sparsity": report.sparsity,
            "calibration": calibration if self.plan.needs_data else None,
            "device": self.device,
            "seconds": {"forwards": report.forward_seconds, "pruning": report.pruning_seconds},
            "layers": {name: update.flips / update.size for name, update in report.layers.items()},
            "versions": {name: version(name) for name in ("torch", "transformers", "sparse-train")},
        }


def _run(job: _Job, out: Path, streaming: bool, dtype: Dtype | None) -> tuple[Details, list[LayerSparsity]]:
    """The record of the pruning, and the layers that were counted; rank 0 writes.

    Args:
        streaming: the model is never in memory, and only pruned layers are counted.
    """
    began, source = time.perf_counter(), job.source
    model, report = (None, job.stream(out)) if streaming else job.prune(out)
    details = job.details(report) | {"streaming": model is None}
    if rank() != 0:
        return details, []
    card = ModelCard(source.name, source.hub_id, source.license, oneshot_rows(details))
    if model is None:
        layers = _counted(details, report)
        write_card(out, card, layers)
    else:
        layers = layer_sparsities(model)
        export_model(model, source.tokenizer(), out, card, dtype=torch_dtype(dtype))
        if isinstance(source, Pretrained):
            copy_others(Path(source.path), out)
    details["seconds"]["all"] = time.perf_counter() - began
    _write(out / "pruning.json", details)
    if job.measure is not None:
        if model is None or dtype is not None:
            model = Pretrained(str(out), dtype="auto").load().to(job.device)
        perplexity = job.measure(model)
        details["perplexity"] = perplexity.as_dict()
        _write(out / "pruning.json", details)
        write_card(out, replace(card, perplexity=perplexity.line()), layers)
    return details, layers


def _write(path: Path, details: Details) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        beside.write_text(dumps(details, indent=2) + "\n")


def _counted(details: Details, report: OneshotReport) -> list[LayerSparsity]:
    counts: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for name, update in report.layers.items():  # fused experts, name[0], name[1], ..., are one row
        counts[name.partition("[")[0]].append((update.size, update.zeros))
    label = details["stages"][0]["mask_structure"]
    sums = {name: [sum(each) for each in zip(*counted, strict=True)] for name, counted in counts.items()}
    return [LayerSparsity(name, (1, size), zeros, label) for name, (size, zeros) in sums.items()]
