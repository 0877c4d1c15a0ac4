"""``prune_checkpoint``: one-shot pruning of a checkpoint that need not fit in memory, one decoder block at a time.

The model is built without weights; each block is loaded, calibrated, pruned, written to its own file, and freed.
Memory holds one block, the embeddings, and the activations between two blocks.
"""

import json
import logging
import shutil
import time
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparse_train.allocation import Allocation, LayerShape, Uniform, divide
from sparse_train.arguments import require_type
from sparse_train.description import describe
from sparse_train.files import check_free, replacing
from sparse_train.layers.blocks import expert_shape_OI
from sparse_train.layers.matrices import MaskedLayer, MaskedMatrix, Recorder, shape_OI
from sparse_train.layers.sparsify import fold, sparsify
from sparse_train.oneshot.block_walk import blocks_done, experts_of
from sparse_train.oneshot.calibration_pass import CalibrationPass
from sparse_train.oneshot.engine import Method, prune_group, release, statistics_of
from sparse_train.oneshot.experts import expert_matrices
from sparse_train.oneshot.forwards import Batch
from sparse_train.oneshot.pruning import OneshotReport, method_of, resolve
from sparse_train.oneshot.shards import Checkpoint, copy_companions, write_index
from sparse_train.oneshot.streamed_model import StreamedModel, model_without_weights
from sparse_train.patterns import Pattern
from sparse_train.pipeline.divided_sparsity import share_of_outliers
from sparse_train.pipeline.recording import attach, reduce_statistics, warn_of_padding
from sparse_train.pipeline.update_report import LayerUpdate
from sparse_train.statistics.activations import ActivationNorm, Statistics
from sparse_train.targets.selection import Selection, select
from sparse_train.terminal.progress import Bar, bar

_log = logging.getLogger(__name__)


def prune_checkpoint(
    path: str | Path,
    out: str | Path,
    batches: Iterable[Batch] | None = None,
    mask_structure: str | Pattern = "2:4",
    *,
    sparsity: float | None = None,
    criterion: Method | None = None,
    allocation: Allocation | None = None,
    targets: Sequence[str] | None = None,
    ignore: Sequence[str] = (),
    device: str | torch.device = "cpu",
    activations: Literal["memory", "disk"] = "memory",
    progress: bool = False,
) -> OneshotReport:
    """Prune a checkpoint of a decoder-only transformers model; the result is the same as that of ``prune``.

    Args:
        path: folder with config.json and safetensors; only read.
        out: folder to write, readable by ``from_pretrained``; must not exist. Until it is complete, finished blocks are
            in a folder next to it (``.NAME.partial``), and after an interruption the same call continues after them.
        batches: calibration data, see ``prune``; not needed by ``Magnitude``.
        mask_structure, sparsity, criterion, allocation, targets, ignore: see ``prune``; targets outside the decoder
            blocks and groups over the whole model need the whole model.
        device: where blocks compute, one at a time.
        activations: where the outputs of a block are kept for the next one, "memory" or "disk".
        progress: show a progress bar.

    Raises:
        ValueError: what ``prune`` refuses, an incomplete checkpoint, one that is not stored block by block, or an
            unfinished run with other settings at ``out``.
        OSError: a file cannot be written. Finished blocks are kept.
    """
    path, out = Path(path), Path(out)
    check_free(out)
    if activations not in ("memory", "disk"):
        raise ValueError(f'activations wait in "memory" or on "disk", got {activations!r}.')
    method = method_of(criterion)
    allocation = require_type("allocation", allocation, Uniform(), Allocation)
    pattern, target = resolve(mask_structure, sparsity, method, allocation)
    if pattern.model_wide:
        raise ValueError(f"{pattern} compares over the whole model, which is never in memory here. Use prune.")
    checkpoint = Checkpoint(path)
    if statistics_of(method) is None and not allocation.needs_outliers:
        batches = None
    elif batches is None:
        raise ValueError(f"{method} needs calibration data: pass batches. Magnitude() needs none.")
    batches = None if batches is None else list(batches)
    work = out.parent / f".{out.name}.partial"
    new = not work.exists()
    settings = [describe(each) for each in (pattern, target, method, allocation, targets, list(ignore or ()))]
    _open_work(work, [*settings, checkpoint.fingerprint, _hash(batches or [])])
    try:
        model = model_without_weights(path, checkpoint)
        selection = select(model, pattern, targets, ignore, experts=True)
        names = [*selection.layers, *selection.experts]
        streamed = StreamedModel(model, checkpoint, work, names, torch.device(device))
        run = _Run(streamed, selection, method, pattern)
        with bar("pruning", shown=progress) as drawn:
            calibration = None
            if batches is not None:
                keep = _room_for(activations, work)
                calibration = CalibrationPass(model, batches, run.recorder, drawn.advance, streamed.device, keep)
                walks = 2 if allocation.needs_outliers else 1  # the outputs of the last block are not needed
                drawn.set_total(len(calibration) * (2 * len(run.blocks) - 1) * walks)
            else:
                drawn.set_total(len(run.blocks))
            began = time.perf_counter()
            streamed.load_rest()
            updates = run.walk(calibration, run.divide(allocation, target, calibration), drawn)
            warn_of_padding(run.recorder)
        forwards = 0.0 if calibration is None else calibration.seconds
        seconds = time.perf_counter() - began - forwards - streamed.disk_seconds
    except Exception:
        if new and not _has_begun(work):
            shutil.rmtree(work)  # nothing was there before, and nothing has been done
        raise
    write_index(work, streamed.shards)
    copy_companions(path, work)
    shutil.rmtree(work / "activations", ignore_errors=True)
    if out.exists():
        out.rmdir()
    work.rename(out)
    (out / "progress.json").unlink()  # last, since it says which run a folder of shards belongs to
    return OneshotReport(updates, forwards, seconds)


class _Run:
    """One walk over a checkpoint."""

    def __init__(self, streamed: StreamedModel, selection: Selection, method: Method, pattern: Pattern) -> None:
        self.streamed, self.selection, self.method, self.pattern = streamed, selection, method, pattern
        self.blocks = streamed.blocks
        self.recorder = Recorder()

    def divide(
        self, allocation: Allocation, target: float | None, calibration: CalibrationPass | None
    ) -> dict[str, float]:
        """The sparsity of each layer; from a dense walk if the allocation needs one."""
        shapes: dict[str, LayerShape] = {}
        for index in range(len(self.blocks)):
            layers, experts = self._targets_of(index)
            shapes |= {name: LayerShape(index, *shape_OI(layer)) for name, layer in layers.items()}
            for name, fused in experts.items():
                for each in range(len(fused.parameter)):
                    shapes[f"{name}[{each}]"] = LayerShape(index, *expert_shape_OI(fused))
        outliers: dict[int, float] = {}
        if allocation.needs_outliers:
            progress = self._progress()
            outliers = {int(index): share for index, share in progress["outliers"].items()}
            if not outliers:
                assert calibration is not None
                outliers = self._outliers(allocation, calibration)
                self._save_progress({**progress, "outliers": outliers})
        return divide(allocation, self.pattern, shapes, target, outliers)

    def walk(
        self, calibration: CalibrationPass | None, sparsities: Mapping[str, float], drawn: Bar
    ) -> dict[str, LayerUpdate]:
        kind = statistics_of(self.method)
        done = sum(map(self.streamed.is_done, range(len(self.blocks))))
        if done:
            _log.warning("Continuing after %d finished blocks of %d; times are for the rest.", done, len(self.blocks))
        for index in range(len(self.blocks)):
            self.streamed.load_block(index)
            if not self.streamed.is_done(index):
                with self._recording(index, kind) as layers:
                    if layers and calibration is not None and kind is not None:
                        calibration.record_block(self.blocks, index, experts_of(layers))
                    updates = prune_group(layers, self.method, self.pattern, sparsities) if layers else {}
                progress = self._progress()
                progress["updates"] |= {name: asdict(update) for name, update in updates.items()}
                self._save_progress(progress)
                self.streamed.write_block(index)
                so_far = {name: LayerUpdate(**update) for name, update in progress["updates"].items()}
                drawn.note(blocks_done(index + 1, len(self.blocks), so_far))
            if calibration is None:
                drawn.advance()
            if calibration is not None and index < len(self.blocks) - 1 and kind is not None:
                calibration.pass_on(self.blocks, index)
            self.streamed.free_block(index)
        return {name: LayerUpdate(**update) for name, update in self._progress()["updates"].items()}

    def _outliers(self, allocation: Allocation, calibration: CalibrationPass) -> dict[int, float]:
        found = {}
        for index in range(len(self.blocks)):
            self.streamed.load_block(index)
            with self._recording(index, ActivationNorm) as layers:
                if layers:
                    calibration.record_block(self.blocks, index, experts_of(layers))
                    reduce_statistics(layers.values())
                    found[index] = share_of_outliers(layers.values(), allocation)
            if index < len(self.blocks) - 1:
                calibration.pass_on(self.blocks, index)
            self.streamed.free_block(index)
        return found

    @contextmanager
    def _recording(self, index: int, statistics: type[Statistics] | None) -> Iterator[dict[str, MaskedMatrix]]:
        """The targets of a loaded block with masks and statistics; afterwards plain layers with true zeros."""
        layers, experts = self._targets_of(index)
        sparsify(self.blocks[index], layers.values())
        matrices: dict[str, MaskedMatrix] = {n: m for n, m in layers.items() if isinstance(m, MaskedLayer)}
        matrices |= expert_matrices(experts)
        attach(matrices.values(), self.recorder, statistics)
        try:
            yield matrices
        finally:
            release(matrices.values())
            fold(self.blocks[index])

    def _targets_of(self, index: int) -> tuple[dict[str, nn.Module], dict[str, Any]]:
        start = f"{self.streamed.prefix}.{index}."
        layers = {name: layer for name, layer in self.selection.layers.items() if name.startswith(start)}
        experts = {}
        for name in self.selection.experts:
            if name.startswith(start):  # looked up again, since every load creates new parameter objects
                module, _, own = name.rpartition(".")
                parameter = getattr(self.streamed.model.get_submodule(module), own)
                experts[name] = type(self.selection.experts[name])(parameter, self.selection.experts[name].transposed)
        return layers, experts

    def _progress(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads((self.streamed.work / "progress.json").read_text())
        return found

    def _save_progress(self, progress: Mapping[str, Any]) -> None:
        _write_json(self.streamed.work / "progress.json", progress)


def _room_for(activations: str, work: Path) -> str | Path:
    if activations == "memory":
        return "host"
    (work / "activations").mkdir(exist_ok=True)
    return work / "activations"


def _open_work(work: Path, settings: list[str]) -> None:
    """Create the folder of an unfinished run, or check that an existing one is of these settings."""
    progress = work / "progress.json"
    if progress.is_file() and not _has_begun(work):
        shutil.rmtree(work)  # nothing in it is worth keeping, whatever its settings were
    if progress.is_file():
        before = json.loads(progress.read_text())["settings"]
        if before != settings:
            changed = next((pair for pair in zip(before, settings, strict=False) if pair[0] != pair[1]), ("", ""))
            raise ValueError(
                f"{work} holds an unfinished run with other settings ({changed[0]}, now {changed[1]}). Finish that one "
                "with its own settings, or remove the folder."
            )
        return
    if _finished(work):
        raise ValueError(f"{work} holds files of a run that is not known. Remove the folder.")
    work.mkdir(parents=True, exist_ok=True)
    _write_json(progress, {"settings": settings, "outliers": {}, "updates": {}})


def _has_begun(work: Path) -> bool:
    """Whether a block, or the walk for an allocation, is done, so that the next run can continue from it."""
    progress = json.loads((work / "progress.json").read_text())
    return bool(progress["updates"] or progress["outliers"])


def _finished(work: Path) -> list[Path]:
    return sorted(work.glob("model-*.safetensors"))


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    try:
        with replacing(path) as beside:
            beside.write_text(json.dumps(content, indent=1))
    except OSError as error:
        raise OSError(f"Cannot write {path}: {error}. Finished blocks are kept; run the same command again.") from error


def _hash(batches: Sequence[Batch]) -> str:
    found = 0
    for batch in batches:
        named = batch if isinstance(batch, Mapping) else {"": batch}
        for name, value in named.items():
            if isinstance(value, Tensor):
                found = zlib.crc32(f"{name} {tuple(value.shape)} {value.dtype}".encode(), found)
                flat = value.detach().cpu().reshape(-1).contiguous()
                found = zlib.crc32(flat.view(torch.uint8).numpy().tobytes(), found)
    return f"calibration data {found}"
