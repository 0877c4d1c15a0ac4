"""``sparse-train prune``: one model to one folder, or the spread over calibration seeds."""

import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from sparse_train.allocation import Allocation
from sparse_train.card import ModelCard, oneshot_rows, perplexity_line, write_card
from sparse_train.criteria import Criterion, Wanda
from sparse_train.distributed import joined, rank, world_size
from sparse_train.export import export_model
from sparse_train.files import check_free
from sparse_train.inspection import LayerSparsity, layer_sparsities
from sparse_train.llm_compressor import Stage, read_recipe
from sparse_train.oneshot import Batch, OneshotReport, resolve
from sparse_train.oneshot import prune as prune_model
from sparse_train.oneshot.engine import statistics_of
from sparse_train.patterns import Pattern, group_label
from sparse_train.solvers import Solver
from sparse_train.sources import ModelSource, PackagedWikipedia, Pretrained, TextSource, as_model_source
from sparse_train.tables import show_pruning, show_seeds


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
    device: str = "cpu",
    streaming: bool = False,
    activations: Literal["memory", "disk"] = "memory",
) -> None:
    """Prune a model in one shot and write it as a Hugging Face folder with true zeros.

    Args:
        model: Hugging Face id, local folder, or a model source.
        out: folder to write; must not exist.
        text: calibration text; default: the packaged Wikipedia text.
        mask_structure: "unstructured", "N:M" with N kept of every M consecutive inputs, or a pattern class.
            Default: 2:4.
        sparsity: share of weights that are zero; implied by N:M.
        criterion: Wanda (default), WandaCumulative, RIA, Magnitude, Random, or SparseGPT.
        allocation: how the sparsity is divided among layers: Uniform (default), OWL, Explicit or PerBlock.
        targets: layers by name, class name or "re:" expression; default: the decoder blocks' linear layers.
        ignore: layers to leave dense.
        recipe: a recipe of llm-compressor, in place of the six arguments above. Their N:M counts N pruned.
        num_calibration_samples: samples of text.
        max_seq_length: tokens a sample.
        sampling: "packed" cuts joined documents into samples; "documents" takes a random part of one long document for
            each, as the Wanda paper does.
        batch_size: samples a forward.
        seed: of the choice of samples.
        seeds: prune once with each of these seeds, as in 0..4 or 0,2,7, and print mean and standard deviation of the
            perplexity; writes out/seeds.json and no model.
        perplexity: text to measure perplexity on afterwards (its test split); with seeds, default: text.
        window: tokens a forward sees in it.
        max_tokens: read only its first tokens.
        device: where the model computes, such as "cuda".
        streaming: never hold the whole model: walk its safetensors block by block, in the dtype they have. An
            interrupted run goes on where it was with the same command.
        activations: with streaming, where a block's outputs wait for the next one.

    Under ``torchrun`` each process takes its part of the calibration data, with one reduce a block; rank 0 writes.
    """
    stages, notes = _stages(recipe, mask_structure, sparsity, criterion, allocation, targets, ignore)
    for stage in stages:  # mistakes in the pattern should not wait for the model
        _resolve(stage)
    check_free(Path(out))
    _check_device(device)
    source, text = as_model_source(model), text or PackagedWikipedia()
    calibration = _Calibration(text, num_calibration_samples, max_seq_length, sampling, batch_size)
    test = perplexity or (text if seeds is not None else None)
    with joined(device) as own_device:
        if streaming and world_size() > 1:
            raise ValueError("streaming runs in one process. Start it without torchrun, or leave it out.")
        job = _Job(source, stages, calibration, own_device)
        measure = None if test is None else _perplexity_of(source, test, window, max_tokens, own_device)
        if seeds is not None:
            _over_seeds(job, _seeds(seeds), measure, Path(out), streaming, notes)
        else:
            _once(job, seed, measure, out, streaming, activations, notes)


def _once(
    job: "_Job",
    seed: int,
    measure: Any,
    out: str,
    streaming: bool,
    activations: Literal["memory", "disk"],
    notes: list[str],
) -> None:
    began = time.perf_counter()
    folder, loaded = Path(out), None
    if streaming:
        reports = [_stream(job, out, seed, activations)]
    else:
        loaded, reports = job.run(seed)
        if rank() != 0:  # they all have the same model
            return
    details = _details(job, seed, reports, notes) | {"streaming": streaming}
    card = ModelCard(job.source.name, job.source.hub_id, job.source.license, oneshot_rows(details))
    if loaded is None:
        # it may not fit in memory: what is shown of it was counted as its blocks passed
        shown: Sequence[LayerSparsity] = _counted(details, reports[-1])
        write_card(folder, card, shown)
    else:
        shown = layer_sparsities(loaded)
        export_model(loaded, job.source.tokenizer(), out, card)
    details["seconds"]["all"] = time.perf_counter() - began
    _write(folder / "pruning.json", details)
    if measure is not None:
        details["perplexity"] = measure((loaded or Pretrained(out, dtype="auto").load()).to(job.device))
        _write(folder / "pruning.json", details)
        write_card(folder, replace(card, perplexity=perplexity_line(details["perplexity"])), shown)
    show_pruning(details, shown, folder)


def _check_device(device: str) -> None:
    import torch

    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ValueError(f"device names a device of torch, such as cpu or cuda, got {device!r}.") from error
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"There is no GPU that this torch can use, so device={device!r} cannot be had. Use cpu.")


def _write(path: Path, details: dict[str, Any]) -> None:
    path.write_text(json.dumps(details, indent=2) + "\n")


def _counted(details: dict[str, Any], report: OneshotReport) -> list[LayerSparsity]:
    label = details["stages"][-1]["mask_structure"]
    return [LayerSparsity(name, (1, u.size), u.zeros, label) for name, u in report.layers.items()]


def _stages(recipe: str | None, *own: Any) -> tuple[list[Stage], list[str]]:
    mask_structure, sparsity, criterion, allocation, targets, ignore = own
    if recipe is None:
        structure = "2:4" if mask_structure is None else mask_structure
        return [Stage(criterion or Wanda(), structure, sparsity, allocation, targets, ignore)], []
    names = ("mask_structure", "sparsity", "criterion", "allocation", "targets", "ignore")
    given = [name for name, value in zip(names, own, strict=True) if value not in (None, [])]
    if given:
        raise ValueError(
            f"--recipe says what to prune and how, so {given[0]} cannot be given beside it. Leave one out."
        )
    found = read_recipe(recipe)
    return found.stages, found.notes


def _resolve(stage: Stage) -> tuple[Pattern, float | None]:
    from sparse_train.allocation import Uniform

    return resolve(stage.mask_structure, stage.sparsity, stage.criterion, stage.allocation or Uniform())


@dataclass(frozen=True)
class _Calibration:
    text: TextSource
    samples: int
    length: int
    sampling: Literal["packed", "documents"]
    batch_size: int

    def batches(self, tokenizer: Any, seed: int) -> list[Batch]:
        from sparse_train.data import calibration_batches

        return list(
            calibration_batches(
                self.text,
                tokenizer,
                num_calibration_samples=self.samples,
                max_seq_length=self.length,
                batch_size=self.batch_size,
                seed=seed,
                sampling=self.sampling,
            )
        )

    def as_dict(self, seed: int) -> dict[str, Any]:
        return {
            "text": self.text.name,
            "num_calibration_samples": self.samples,
            "max_seq_length": self.length,
            "sampling": self.sampling,
            "seed": seed,
            "processes": world_size(),
        }


@dataclass(frozen=True)
class _Job:
    """A model, and what is to be done to it."""

    source: ModelSource
    stages: list[Stage]
    calibration: _Calibration
    device: str

    @property
    def needs_data(self) -> bool:
        owl = any(stage.allocation is not None and stage.allocation.needs_outliers for stage in self.stages)
        return owl or any(statistics_of(stage.criterion) is not None for stage in self.stages)

    def run(self, seed: int) -> tuple[Any, list[OneshotReport]]:
        loaded, tokenizer = self.source.load().to(self.device), self.source.tokenizer()
        batches = self._own_batches(tokenizer, seed) if self.needs_data else None
        shown = rank() == 0 and (sys.stderr.isatty() or sys.stdout.isatty())
        reports = [prune_model(loaded, batches, **_arguments(stage), progress=shown) for stage in self.stages]
        return loaded, reports

    def _own_batches(self, tokenizer: Any, seed: int) -> list[Batch]:
        batches = self.calibration.batches(tokenizer, seed)
        if len(batches) < world_size():
            raise ValueError(
                f"There are {len(batches)} calibration batches for {world_size()} processes. Give a smaller batch_size "
                "or more num_calibration_samples, or start fewer processes."
            )
        return batches[rank() :: world_size()]


def _arguments(stage: Stage) -> dict[str, Any]:
    return {
        "mask_structure": stage.mask_structure,
        "sparsity": stage.sparsity,
        "criterion": stage.criterion,
        "allocation": stage.allocation,
        "targets": stage.targets,
        "ignore": stage.ignore,
    }


def _stream(job: _Job, out: str, seed: int, activations: Literal["memory", "disk"]) -> OneshotReport:
    from sparse_train.oneshot.streaming import prune_checkpoint

    if len(job.stages) != 1:
        raise ValueError(f"streaming prunes in one stage, and this recipe has {len(job.stages)}. Split it.")
    if not isinstance(job.source, Pretrained) or job.source.gguf_file:
        raise ValueError(f"streaming walks a folder or a hub model with safetensors, not {job.source.name}.")
    return prune_checkpoint(
        job.source.folder(),
        out,
        job.calibration.batches(job.source.tokenizer(), seed) if job.needs_data else None,
        **_arguments(job.stages[0]),
        device=job.device,
        activations=activations,
        progress=sys.stderr.isatty() or sys.stdout.isatty(),
    )


def _details(job: _Job, seed: int, reports: list[OneshotReport], notes: list[str]) -> dict[str, Any]:
    from importlib.metadata import version

    packages = ("torch", "transformers", "sparse-train")
    return {
        "model": job.source.name,
        "stages": [_described(stage, report) for stage, report in zip(job.stages, reports, strict=True)],
        "sparsity": reports[-1].sparsity,
        "calibration": job.calibration.as_dict(seed) if job.needs_data else None,
        "notes": notes,
        "seconds": {
            "forwards": sum(report.forward_seconds for report in reports),
            "pruning": sum(report.pruning_seconds for report in reports),
        },
        "layers": {name: update.zeros / update.size for report in reports for name, update in report.layers.items()},
        "versions": {name: version(name) for name in packages},
    }


def _described(stage: Stage, report: OneshotReport) -> dict[str, Any]:
    pattern, wanted = _resolve(stage)
    return {
        "criterion": repr(stage.criterion),
        "mask_structure": group_label(pattern),
        "wanted_sparsity": wanted,
        "sparsity": report.sparsity,
        "allocation": "Uniform()" if stage.allocation is None else repr(stage.allocation),
        "targets": stage.targets,
        "ignore": stage.ignore,
    }


def _perplexity_of(
    source: ModelSource, text: TextSource, window: int, max_tokens: int | None, device: str
) -> Callable[[Any], dict[str, Any]]:
    from sparse_train.evaluation import evaluate_perplexity, token_ids

    documents = text.documents("test")
    if not documents:
        raise ValueError(f"{text.name} has no text in its test split; give --perplexity a text that has one.")
    ids = token_ids(documents, source.tokenizer(), text.separator)

    def measure(model: Any) -> dict[str, Any]:
        found = evaluate_perplexity(
            model,
            ids,
            window=window,
            batch_size=1,
            max_tokens=max_tokens,
            model_name=source.name,
            data_name=text.name,
            progress=sys.stderr.isatty(),
        )
        return found.as_dict()

    return measure


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


def _over_seeds(job: _Job, seeds: list[int], measure: Any, out: Path, streaming: bool, notes: list[str]) -> None:
    if streaming:
        raise ValueError("seeds prune and measure in memory; for streaming call prune once with each --seed.")
    if not job.needs_data:
        raise ValueError("This method reads no calibration data, so seeds change nothing. Leave them out.")
    rows = []
    for seed in seeds:
        loaded, reports = job.run(seed)
        if rank() == 0:
            rows.append({"seed": seed, "sparsity": reports[-1].sparsity, **measure(loaded)})
        details = _details(job, seed, reports, notes)
        del loaded  # before the next one comes
    if rank() != 0:
        return
    values = [row["perplexity"] for row in rows]
    details["calibration"]["seed"] = seeds
    details |= {
        "seeds": rows,
        "mean": statistics.mean(values),
        "standard_deviation": statistics.stdev(values),  # of a sample: over n - 1
    }
    out.mkdir(parents=True, exist_ok=True)
    _write(out / "seeds.json", details)
    show_seeds(details, out)
