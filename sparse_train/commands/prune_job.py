"""The work of ``sparse-train prune``: its stages, its calibration data, and its record."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from sparse_train.allocation import Uniform
from sparse_train.commands.llm_compressor import Stage, read_recipe
from sparse_train.criteria import Wanda
from sparse_train.data.texts import TextSource
from sparse_train.description import describe
from sparse_train.distributed import rank, world_size
from sparse_train.models.sources import ModelSource, Pretrained
from sparse_train.oneshot import Batch, OneshotReport, resolve
from sparse_train.oneshot import prune as prune_model
from sparse_train.oneshot.engine import statistics_of
from sparse_train.patterns import Pattern, group_label


def stages_of(recipe: str | None, *own: Any) -> tuple[list[Stage], list[str]]:
    mask_structure, sparsity, criterion, allocation, targets, ignore = own
    if recipe is None:
        structure = "2:4" if mask_structure is None else mask_structure
        return [Stage(criterion or Wanda(), structure, sparsity, allocation, targets, ignore)], []
    names = ("mask_structure", "sparsity", "criterion", "allocation", "targets", "ignore")
    given = [name for name, value in zip(names, own, strict=True) if value not in (None, [])]
    if given:
        raise ValueError(f"--recipe says what to prune and how, so {given[0]} cannot be given with it. Leave one out.")
    found = read_recipe(recipe)
    return found.stages, found.notes


def resolve_stage(stage: Stage) -> tuple[Pattern, float | None]:
    return resolve(stage.mask_structure, stage.sparsity, stage.criterion, stage.allocation or Uniform())


@dataclass(frozen=True)
class Calibration:
    text: TextSource
    samples: int
    length: int
    sampling: Literal["packed", "documents"]
    batch_size: int

    def batches(self, tokenizer: Any, seed: int) -> list[Batch]:
        from sparse_train.data.text_blocks import calibration_batches

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
class Job:
    """A model, and how it is pruned."""

    source: ModelSource
    stages: list[Stage]
    calibration: Calibration
    device: str

    @property
    def needs_data(self) -> bool:
        owl = any(stage.allocation is not None and stage.allocation.needs_outliers for stage in self.stages)
        return owl or any(statistics_of(stage.criterion) is not None for stage in self.stages)

    def check(self, model: Any) -> None:
        """Raise ValueError if calibration samples are longer than the model's positions; weights are not looked at."""
        from sparse_train.evaluation.perplexity import check_window

        if self.needs_data:
            check_window(model, self.calibration.length, name="max_seq_length")

    def run(self, seed: int, check: Callable[[Any], None] = lambda model: None) -> tuple[Any, list[OneshotReport]]:
        """The pruned model, and a report of each stage. ``check`` is called with the model before it is pruned."""
        loaded, tokenizer = self.source.load().to(self.device), self.source.tokenizer()
        self.check(loaded)
        check(loaded)
        batches = self._own_batches(tokenizer, seed) if self.needs_data else None
        reports = [prune_model(loaded, batches, **arguments_of(stage), progress=rank() == 0) for stage in self.stages]
        return loaded, reports

    def _own_batches(self, tokenizer: Any, seed: int) -> list[Batch]:
        batches = self.calibration.batches(tokenizer, seed)
        if len(batches) < world_size():
            raise ValueError(
                f"There are {len(batches)} calibration batches for {world_size()} processes. Give a smaller batch_size "
                "or more num_calibration_samples, or start fewer processes."
            )
        return batches[rank() :: world_size()]


def arguments_of(stage: Stage) -> dict[str, Any]:
    return {
        "mask_structure": stage.mask_structure,
        "sparsity": stage.sparsity,
        "criterion": stage.criterion,
        "allocation": stage.allocation,
        "targets": stage.targets,
        "ignore": stage.ignore,
    }


def stream(
    job: Job,
    out: str,
    seed: int,
    activations: Literal["memory", "disk"],
    check: Callable[[Any], None] = lambda model: None,
) -> OneshotReport:
    """Prune a checkpoint block by block. ``check`` is called with a model without weights before."""
    from sparse_train.oneshot.shards import Checkpoint
    from sparse_train.oneshot.streamed_model import model_without_weights
    from sparse_train.oneshot.streaming import prune_checkpoint

    if len(job.stages) != 1:
        raise ValueError(f"streaming prunes in one stage, and this recipe has {len(job.stages)}. Split it.")
    if not isinstance(job.source, Pretrained) or job.source.gguf_file:
        raise ValueError(f"streaming walks a folder or a hub model with safetensors, not {job.source.name}.")
    folder = job.source.folder()
    empty = model_without_weights(folder, Checkpoint(folder))
    job.check(empty)
    check(empty)
    del empty
    return prune_checkpoint(
        folder,
        out,
        job.calibration.batches(job.source.tokenizer(), seed) if job.needs_data else None,
        **arguments_of(job.stages[0]),
        device=job.device,
        activations=activations,
        progress=True,
    )


def overall(reports: list[OneshotReport]) -> float:
    """The sparsity over the targets of all stages."""
    latest = {name: update for report in reports for name, update in report.layers.items()}
    return OneshotReport(latest, 0.0, 0.0).sparsity


def details_of(job: Job, seed: int, reports: list[OneshotReport], notes: list[str]) -> dict[str, Any]:
    from importlib.metadata import version

    packages = ("torch", "transformers", "sparse-train")
    return {
        "model": job.source.name,
        "stages": [_described(stage, report) for stage, report in zip(job.stages, reports, strict=True)],
        "sparsity": overall(reports),
        "calibration": job.calibration.as_dict(seed) if job.needs_data else None,
        "notes": notes,
        "device": job.device,
        "seconds": {
            "forwards": sum(report.forward_seconds for report in reports),
            "pruning": sum(report.pruning_seconds for report in reports),
        },
        "layers": {name: update.zeros / update.size for report in reports for name, update in report.layers.items()},
        "versions": {name: version(name) for name in packages},
    }


def _described(stage: Stage, report: OneshotReport) -> dict[str, Any]:
    pattern, wanted = resolve_stage(stage)
    return {
        "criterion": describe(stage.criterion),
        "mask_structure": group_label(pattern),
        "wanted_sparsity": wanted,
        "sparsity": report.sparsity,
        "allocation": "Uniform()" if stage.allocation is None else describe(stage.allocation),
        "targets": stage.targets,
        "ignore": stage.ignore,
    }
