"""``sparse-train prune``: one model to one folder, or the spread over calibration seeds."""

import re
import statistics
import time
from collections.abc import Sequence
from dataclasses import replace
from json import dumps
from pathlib import Path
from typing import Any, Literal

from sparse_train.allocation import Allocation
from sparse_train.commands.devices import chosen_device
from sparse_train.commands.prune_job import Calibration, Job, details_of, overall, resolve_stage, stages_of, stream
from sparse_train.criteria import Criterion
from sparse_train.data.texts import PackagedWikipedia, TextSource
from sparse_train.distributed import joined, rank, world_size
from sparse_train.export import export_model
from sparse_train.export.card import ModelCard, oneshot_rows, perplexity_line, write_card
from sparse_train.files import check_free, check_space
from sparse_train.inspection import LayerSparsity, layer_sparsities
from sparse_train.models.sources import ModelSource, Pretrained, as_model_source
from sparse_train.oneshot import OneshotReport
from sparse_train.oneshot.shards import copy_others
from sparse_train.patterns import Pattern
from sparse_train.solvers import Solver
from sparse_train.terminal.tables import show_pruning, show_seeds

Details = dict[str, Any]
"""The record of a pruning, as stored in pruning.json or seeds.json."""


def prune(
    model: ModelSource | str,
    out: str,
    text: TextSource | None = None,
    mask_structure: str | Pattern | None = None,
    sparsity: float | None = None,
    criterion: Criterion | Solver | None = None,
    allocation: Allocation | None = None,
    targets: list[str] | None = None,
    ignore: list[str] = [],  # noqa: B006  (not changed)
    recipe: str | None = None,
    num_calibration_samples: int = 32,
    max_seq_length: int = 512,
    sampling: Literal["packed", "documents"] = "packed",
    batch_size: int = 4,
    seed: int = 0,
    seeds: str | None = None,
    perplexity: TextSource | None = None,
    window: int = 2048,
    max_tokens: int | None = None,
    bos: bool = False,
    device: str | None = None,
    streaming: bool = False,
    activations: Literal["memory", "disk"] = "memory",
    json: bool = False,
) -> dict[str, Any] | None:
    """Prune a model in one shot and write it as a Hugging Face folder with true zeros.

    Args:
        model: Hugging Face id or local folder, whose weights keep their dtype; or a model source.
        out: folder to write; must not exist.
        text: calibration text; default: the packaged Wikipedia text.
        mask_structure: "unstructured", "N:M" with N kept of every M consecutive inputs, or a pattern class.
            Default: 2:4.
        sparsity: share of weights that are zero; implied by N:M.
        criterion: Wanda (default), WandaCumulative, RIA, Magnitude, Random, or SparseGPT.
        allocation: how the sparsity is divided among layers: Uniform (default), OWL, Explicit or PerBlock.
        targets: layers by name, class name or "re:" expression; default: the linear layers of the decoder blocks.
        ignore: layers to leave dense.
        recipe: a recipe of llm-compressor, instead of the six arguments above. N:M in it counts N pruned.
        num_calibration_samples: number of samples of text.
        max_seq_length: tokens per sample.
        sampling: "packed" cuts joined documents into samples; "documents" uses a random part of one long document for
            each sample, as in the Wanda paper.
        batch_size: samples per forward pass.
        seed: of the choice of samples.
        seeds: prune once with each of these seeds, as in 0..4 or 0,2,7, and print mean and standard deviation of the
            perplexity; writes out/seeds.json and no model.
        perplexity: text on which to measure perplexity afterwards (its test split); default with seeds: text.
        window: tokens per window of this text.
        max_tokens: use only the first tokens of this text.
        bos: put the tokens that the tokenizer puts in front of a text (such as <bos>) in front of every window of this
            text, and not only at its start. Models such as Gemma need this.
        device: where the model computes, such as "cpu" or "cuda"; default: a GPU if there is one.
        streaming: never hold the whole model in memory: process its safetensors block by block, in their dtype. If a
            run is interrupted, the same command continues it.
        activations: with streaming, where the outputs of a block are kept for the next one.
        json: print one JSON object instead of tables.

    Under ``torchrun``, each process uses its part of the calibration data, with two reduces per block; rank 0 writes.
    """
    stages, notes = stages_of(recipe, mask_structure, sparsity, criterion, allocation, targets, ignore)
    for stage in stages:  # report mistakes in the pattern before the model is loaded
        resolve_stage(stage)
    if (max_tokens is not None or bos) and perplexity is None and seeds is None:
        name = "bos" if bos else "max_tokens"
        raise ValueError(f"--{name} is for the perplexity afterwards. Give --perplexity a text, or leave it out.")
    check_free(Path(out))
    device = chosen_device(device)
    source, text = as_model_source(model, dtype="auto"), text or PackagedWikipedia()
    calibration = Calibration(text, num_calibration_samples, max_seq_length, sampling, batch_size)
    test = perplexity or (text if seeds is not None else None)
    with joined(device) as own_device:
        if streaming and world_size() > 1:
            raise ValueError("streaming runs in one process. Start it without torchrun, or leave it out.")
        job = Job(source, stages, calibration, own_device)
        measure = None if test is None else _measurement(source, test, window, max_tokens, bos)
        details: Details | None
        layers: Sequence[LayerSparsity]
        if seeds is not None:
            details, layers = _over_seeds(job, _seeds(seeds), measure, Path(out), streaming, notes), []
        else:
            details, layers = _once(job, seed, measure, out, streaming, activations, notes)
    if details is None:  # in all processes except the first
        return None
    if not json:
        if seeds is not None:
            show_seeds(details, Path(out))
        else:
            show_pruning(details, layers, Path(out))
    return {"out": out, **details}


def _once(
    job: "Job",
    seed: int,
    measure: Any,
    out: str,
    streaming: bool,
    activations: Literal["memory", "disk"],
    notes: list[str],
) -> tuple[Details | None, Sequence[LayerSparsity]]:
    """The record of the pruning, and the model's layers."""
    began = time.perf_counter()
    folder, loaded = Path(out), None
    check = _no_check if measure is None else measure.check

    def check_both(model: Any) -> None:
        check(model)
        check_space(folder, sum(weight.numel() * weight.element_size() for weight in model.parameters()))

    if streaming:
        reports = [stream(job, out, seed, activations, check)]
    else:
        loaded, reports = job.run(seed, check_both)
        if rank() != 0:  # all ranks have the same model
            return None, []
    details = details_of(job, seed, reports, notes) | {"streaming": streaming}
    made = oneshot_rows(details)
    card = ModelCard(job.source.name, job.source.hub_id, job.source.license, made, pruned_alone=streaming)
    if loaded is None:
        # the model may not fit in memory, so its layers were counted block by block
        shown: Sequence[LayerSparsity] = _counted(details, reports[-1])
        write_card(folder, card, shown)
    else:
        shown = layer_sparsities(loaded)
        export_model(loaded, job.source.tokenizer(), out, card)
        if isinstance(job.source, Pretrained):
            copy_others(Path(job.source.path), folder)
    details["seconds"]["all"] = time.perf_counter() - began
    _write(folder / "pruning.json", details)
    if measure is not None:
        details["perplexity"] = measure((loaded or Pretrained(out, dtype="auto").load()).to(job.device))
        _write(folder / "pruning.json", details)
        write_card(folder, replace(card, perplexity=perplexity_line(details["perplexity"])), shown)
    return details, shown


def _no_check(model: Any) -> None: ...


def _write(path: Path, details: dict[str, Any]) -> None:
    path.write_text(dumps(details, indent=2) + "\n")


def _counted(details: dict[str, Any], report: OneshotReport) -> list[LayerSparsity]:
    label = details["stages"][-1]["mask_structure"]
    counts: dict[str, tuple[int, int]] = {}
    for name, update in report.layers.items():  # fused experts, name[0], name[1], ..., are one row
        size, zeros = counts.get(name.partition("[")[0], (0, 0))
        counts[name.partition("[")[0]] = size + update.size, zeros + update.zeros
    return [LayerSparsity(name, (1, size), zeros, label) for name, (size, zeros) in counts.items()]


def _measurement(*arguments: Any) -> Any:
    from sparse_train.commands.measurement import Perplexity  # which takes a second to import

    return Perplexity(*arguments)


def _seeds(text: str) -> list[int]:
    if match := re.fullmatch(r"(\d+)\.\.(\d+)", text):
        found = list(range(int(match[1]), int(match[2]) + 1))
    elif re.fullmatch(r"\d+(,\d+)*", text):
        found = [int(part) for part in text.split(",")]
    else:
        raise ValueError(f"seeds are written 0..4 or 0,2,7, got {text!r}.")
    if len(found) < 2:
        raise ValueError(f"seeds names {len(found)} seed, and a spread needs two. For one seed there is --seed.")
    return found


def _over_seeds(
    job: Job, seeds: list[int], measure: Any, out: Path, streaming: bool, notes: list[str]
) -> Details | None:
    if streaming:
        raise ValueError("seeds needs the model in memory; with streaming, call prune once with each --seed.")
    if not job.needs_data:
        raise ValueError("This method reads no calibration data, so seeds change nothing. Leave them out.")
    rows = []
    for seed in seeds:
        loaded, reports = job.run(seed, measure.check)
        if rank() == 0:
            rows.append({"seed": seed, "sparsity": overall(reports), **measure(loaded)})
        details = details_of(job, seed, reports, notes)
        del loaded  # before the next one is loaded
    if rank() != 0:
        return None
    values = [row["perplexity"] for row in rows]
    details["calibration"]["seed"] = seeds
    details |= {
        "seeds": rows,
        "mean": statistics.mean(values),
        "standard_deviation": statistics.stdev(values),  # of a sample: divided by n - 1
    }
    out.mkdir(parents=True, exist_ok=True)
    _write(out / "seeds.json", details)
    return details
