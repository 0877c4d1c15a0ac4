"""Checkpoints on disk, read and written a few tensors at a time; and ``DiskShelf``, which walks them.

transformers itself translates names, in both directions: checkpoints may use other names than the model, and store
experts separately that the model fuses.
"""

import fcntl
import json
import logging
import math
import os
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path, PurePath
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from sparse_train.blocks import fused_experts
from sparse_train.files import check_free, replacing
from sparse_train.layers.masked_layer import MaskedLayer, MaskedMatrix
from sparse_train.layers.sparsify import sparsify, unmask
from sparse_train.layers.targets import Selection
from sparse_train.oneshot.experts import expert_matrices
from sparse_train.oneshot.forwards import Batch
from sparse_train.oneshot.walk import Shelf
from sparse_train.pruning.update import LayerUpdate

_log = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
_TEMPLATES = "additional_chat_templates"  # transformers' folder for those besides chat_template.jinja
_SHARD_BYTES = 1 << 28  # of files for tensors outside the blocks; a larger tensor gets its own file
_PROGRESS, _LOCK, _ACTIVATIONS = "progress.json", ".lock", "activations"
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_DTYPES = _FLOATS | {"I64": torch.int64, "I32": torch.int32, "I16": torch.int16}
"""Of the names in safetensors; all others have one byte."""


# --- files -----------------------------------------------------------------------------------------------------------


class Stored(NamedTuple):
    """Where a tensor is, its size in bytes, and its dtype in the words of safetensors."""

    file: Path
    bytes: int
    dtype: str


class Checkpoint:
    """A folder with safetensors files, plain or with an index, opened for reading only.

    Attributes:
        tensors: by key, in the order of the files.
        fingerprint: identifies this checkpoint, so that another or a changed one is recognised.

    Raises:
        ValueError: no such folder, no safetensors in it, or a file that is damaged, missing, cut off or elsewhere.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        files = _weight_files(self.folder)
        self.tensors = {key: stored for file in files for key, stored in _contents(file).items()}
        self.fingerprint = repr([(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files])

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """These tensors, copied to memory, so that changes to them do not reach the files."""
        by_file: dict[Path, list[str]] = {}
        for key in keys:
            by_file.setdefault(self.tensors[key].file, []).append(key)
        found = {}
        for file, own in by_file.items():
            with safe_open(file, framework="pt") as opened:
                for key in own:
                    found[key] = opened.get_tensor(key).clone()
        return found

    def dtype(self) -> torch.dtype:
        """The float dtype of most tensors, for configurations that do not say it."""
        found = [_FLOATS[each.dtype] for each in self.tensors.values() if each.dtype in _FLOATS]
        return max(set(found), key=found.count, default=torch.float32)


def _weight_files(folder: Path) -> list[Path]:
    index, single = folder / INDEX, folder / "model.safetensors"
    if single.is_file():  # if there are both, transformers reads this one
        return [single]
    if not index.is_file():
        raise ValueError(
            f"{folder} is not a folder with model.safetensors or {INDEX}; only safetensors can be read block by "
            "block. Load the model in memory instead (streaming=False), or save it with save_pretrained first."
        )
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        strays = [name for name in names if PurePath(name).is_absolute() or ".." in PurePath(name).parts]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise ValueError(
            f'{index} is not the index of a checkpoint, which has a "weight_map" from tensors to files '
            f"({type(error).__name__}: {error}). Copy or download it again."
        ) from error
    if strays:
        raise ValueError(f"{index} names {strays[0]}, which is outside its folder. Download the checkpoint again.")
    missing = [name for name in names if not (folder / name).is_file()]
    if missing:
        raise ValueError(f"{index} names {missing[0]}, which is not there. Complete the checkpoint first.")
    return [folder / name for name in names]


def _contents(file: Path) -> dict[str, Stored]:
    found = {}
    try:
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118  (not a dict)
                part = opened.get_slice(key)
                dtype = part.get_dtype()
                width = _DTYPES[dtype].itemsize if dtype in _DTYPES else 1
                found[key] = Stored(file, width * math.prod(part.get_shape()), dtype)
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a complete safetensors file ({error}). Copy or download it again.") from error
    return found


@contextmanager
def _writing(path: Path) -> Iterator[Path]:
    """A file to write to, which replaces ``path`` when it is complete; OSError if it cannot be written."""
    try:
        with replacing(path) as beside:
            yield beside
    except (SafetensorError, OSError) as error:
        free = shutil.disk_usage(path.parent).free
        raise OSError(
            f"Cannot write {path}: {error}. {free / 2**20:.0f} MiB are free there. Blocks that were finished are kept; "
            "the same command continues after them."
        ) from error


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one file of a checkpoint, whole or not at all."""
    with _writing(path) as beside:
        save_file({key: value.contiguous().cpu() for key, value in tensors.items()}, beside, metadata={"format": "pt"})


def write_index(folder: Path, shards: Iterable[str]) -> None:
    """Write the index with which ``from_pretrained`` reads shards as one checkpoint."""
    weight_map, total = {}, 0
    for name in shards:
        for key, stored in _contents(folder / name).items():
            weight_map[key], total = name, total + stored.bytes
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
    (folder / INDEX).write_text(text + "\n")


def copy_others(source: Path, out: Path) -> None:
    """Copy what a model folder has beside the model and ``save_pretrained`` does not write: processors, licenses."""
    for pattern in ("*processor_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*"):
        for file in source.glob(pattern):
            if not (out / file.name).exists():
                _copy(file, source, out)


def copy_companions(source: Path, out: Path) -> None:
    """Copy the other files next to the weights: configuration and tokenizer."""
    for file in source.iterdir():
        weights = file.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
        if not weights and not file.name.startswith(".") and not file.name.endswith(".index.json"):
            _copy(file, source, out)
    for file in (source / _TEMPLATES).glob("*"):
        _copy(file, source, out)


def _copy(file: Path, source: Path, out: Path) -> None:
    """Copy a file of a model folder, unless it is a link out of the folder: the copy may be published."""
    folder, real = source.resolve(), file.resolve()
    own = [folder]
    if folder.parent.name == "snapshots":  # of the hub's cache, where all files are links to its blobs
        own.append(folder.parent.parent / "blobs")
    if not any(real.is_relative_to(each) for each in own):
        _log.warning("%s is a link to a file outside its folder, and is not copied.", file)
    elif real.is_file():
        target = out / file.relative_to(source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(real, target)


# --- a model without weights -----------------------------------------------------------------------------------------


def model_without_weights(path: Path, checkpoint: Checkpoint) -> Any:
    """The causal language model of a checkpoint, with its parameters on the meta device and real buffers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(path)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype or checkpoint.dtype())
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else torch.empty_like(buffer, device="cpu")
    # As in from_pretrained: buffers have the model's dtype or their own, and are computed in torch's default dtype.
    # Of parameters on the meta device it changes nothing.
    model.init_weights()
    return model.eval()


# --- the shelf -------------------------------------------------------------------------------------------------------


class DiskShelf(Shelf):
    """A model of which one decoder block at a time is in memory; pruned blocks are written as a file each.

    Args:
        model: from ``model_without_weights``.
        checkpoint: where its weights are.
        selection: the targets.
        work: folder of finished shards, from ``unfinished``.
        device: where a loaded block computes.
        on_disk: keep the activations between two blocks on disk, too, not in main memory.

    Raises:
        ValueError: a model without blocks, or targets or weights that are not stored block by block.
    """

    def __init__(
        self,
        model: Any,
        checkpoint: Checkpoint,
        selection: Selection,
        work: Path,
        device: torch.device,
        on_disk: bool = False,
    ) -> None:
        super().__init__(model, {**selection.layers, **expert_matrices(selection.experts)}, device)
        self.checkpoint, self.work = checkpoint, work
        self.keep = torch.device("cpu")
        if on_disk:
            self.keep = work / _ACTIVATIONS
            self.keep.mkdir(exist_ok=True)
        self._progress = json.loads((work / _PROGRESS).read_text())
        self.outliers = {int(block): share for block, share in self._progress["outliers"].items()}
        self.updates = {name: LayerUpdate(**each) for name, each in self._progress["updates"].items()}
        _check_readable(model, checkpoint)
        outside = self.names(None)
        if outside:
            raise ValueError(
                f"{outside[0]} is outside the decoder blocks, which are walked one by one. Load the model and use "
                "prune, or leave it dense with ignore."
            )
        names = {id(module): name for name, module in model.named_modules()}
        self._prefix = names[id(self.blocks[0])].rpartition(".")[0]
        full = {key: self._full_name(key) for key in checkpoint.tensors}
        self._keys = [
            [key for key, name in full.items() if name.startswith(f"{self._prefix}.{block}.")]
            for block in range(len(self.blocks))
        ]
        inside = {key for keys in self._keys for key in keys}
        self._rest = _in_parts({key: each.bytes for key, each in checkpoint.tensors.items() if key not in inside})
        count = len(self._rest) + len(self.blocks)
        self.shards = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
        done = sum(map(self.is_done, range(len(self.blocks))))
        if done:
            _log.warning("Continuing after %d finished blocks of %d; times are for the rest.", done, len(self.blocks))

    # --- one block ---------------------------------------------------------------------------------------------------

    def is_done(self, block: int) -> bool:
        return self._shard(block).is_file()

    def load(self, block: int | None) -> dict[str, MaskedMatrix]:
        assert block is not None
        done = self.is_done(block)
        self._put(load_file(self._shard(block)) if done else self.checkpoint.read(self._keys[block]))
        missing = [name for name, p in self.blocks[block].named_parameters() if p.is_meta]
        if missing:
            raise ValueError(
                f"{self.checkpoint.folder} has no weights for {self._prefix}.{block}.{missing[0]}. Complete the "
                "checkpoint first, or load the model and use prune."
            )
        if done:
            return {}
        own = [name.partition("[")[0] for name in self.names(block)]
        modules = dict(self.model.named_modules())
        layers = {name: modules[name] for name in own if name in modules}
        sparsify(self.blocks[block], layers.values())
        # looked up again, since every load creates new parameter objects
        experts = {name: each for name, each in fused_experts(self.model).items() if name in own}
        masked = {name: layer for name, layer in layers.items() if isinstance(layer, MaskedLayer)}
        return {**masked, **expert_matrices(experts)}

    def finish(self, block: int | None, updates: Mapping[str, LayerUpdate]) -> None:
        assert block is not None
        super().finish(block, updates)
        done = {name: asdict(update) for name, update in self.updates.items()}
        _write_json(self.work / _PROGRESS, {**self._progress, "outliers": self.outliers, "updates": done})
        unmask(self.blocks[block])
        write_shard(self._shard(block), self._tensors(block))

    def free(self, block: int) -> None:
        unmask(self.blocks[block])
        _move_weights(self.blocks[block], torch.device("meta"))

    # --- the rest of the model ---------------------------------------------------------------------------------------

    def load_rest(self) -> None:
        """Copy what is outside the blocks, and load the part that a forward up to a block needs."""
        head, embeddings = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        of_head = tuple(f"{name}." for name, module in self.model.named_modules() if module is head)
        unneeded = () if head is not None and head.weight is embeddings.weight else of_head
        for shard, keys in zip(self.shards, self._rest, strict=False):
            tensors = self.checkpoint.read(keys)
            if not (self.work / shard).is_file():
                write_shard(self.work / shard, tensors)
            self._put({key: value for key, value in tensors.items() if not self._full_name(key).startswith(unneeded)})
        for name, parameter in self.model.named_parameters():
            if parameter.is_meta and not name.startswith((f"{self._prefix}.", *of_head)):
                raise ValueError(f"{self.checkpoint.folder} has no weights for {name}. Complete the checkpoint first.")
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(self.device)

    # --- tensors under the names of the checkpoint -------------------------------------------------------------------

    def _put(self, tensors: dict[str, Tensor]) -> None:
        """Put tensors of the checkpoint into the model, through transformers' own renaming and fusing."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig
        from transformers.utils import logging as transformers_logging

        if not tensors:
            return
        mapping = get_model_conversion_mapping(self.model)
        shown = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        try:
            settings = LoadStateDictConfig(weight_mapping=mapping, dtype=self.model.dtype)
            convert_and_load_state_dict_in_model(self.model, tensors, settings)
        finally:
            if shown:
                transformers_logging.enable_progress_bar()
        _move_weights(self.model, self.device)

    def _tensors(self, block: int) -> dict[str, Tensor]:
        """A block's state with the keys that the checkpoint has."""
        from transformers.core_model_loading import revert_weight_conversion

        prefix = f"{self._prefix}.{block}."
        state = {prefix + name: value.detach() for name, value in self.blocks[block].state_dict().items()}
        reverted: dict[str, Tensor] = revert_weight_conversion(self.model, state)
        base = f"{self.model.base_model_prefix}."
        wanted = set(self._keys[block])
        named = {(k if k in wanted else k.removeprefix(base)): value for k, value in reverted.items()}
        stray, unknown = sorted(set(named) - wanted), sorted(wanted - set(named))
        if stray and unknown:
            raise ValueError(
                f"{self.checkpoint.folder} calls a weight {unknown[0]}, and transformers would write {stray[0]}, so "
                "the checkpoint cannot be written back under its own names. Load the model and use prune."
            )
        # Every weight of the block has its key; keys that the model does not know are old buffers, which are kept.
        return named | self.checkpoint.read(unknown)

    def _full_name(self, key: str) -> str:
        base = f"{self.model.base_model_prefix}."
        return base + key if self._prefix.startswith(base) and not key.startswith((base, "lm_head")) else key

    def _shard(self, block: int) -> Path:
        return self.work / self.shards[len(self._rest) + block]


def _move_weights(module: nn.Module, device: torch.device) -> None:
    """Move the parameters that are loaded."""
    for each in module.modules():
        for name, parameter in each._parameters.items():
            if parameter is not None and not parameter.is_meta and parameter.device != device:
                each._parameters[name] = nn.Parameter(parameter.detach().to(device), requires_grad=False)


def _in_parts(sizes: Mapping[str, int]) -> list[list[str]]:
    """Keys that go into one file each, together."""
    parts: list[list[str]] = []
    filled = 0
    for key, size in sizes.items():
        if not parts or filled + size > _SHARD_BYTES:
            parts.append([])
            filled = 0
        parts[-1].append(key)
        filled += size
    return parts


def _check_readable(model: Any, checkpoint: Checkpoint) -> None:
    narrow = any(stored.dtype.startswith("F8") for stored in checkpoint.tensors.values())
    if getattr(model.config, "quantization_config", None) is not None or narrow:
        raise ValueError(
            f"{checkpoint.folder} is quantised, and scores need the weights themselves. Dequantise it first: load it, "
            "and save it in 16 or 32 bits."
        )


# --- unfinished runs -------------------------------------------------------------------------------------------------


@contextmanager
def unfinished(out: Path, settings: Sequence[str]) -> Iterator[Path]:
    """The folder of an unfinished run next to ``out``, new or of the same settings; it becomes ``out`` at the end.

    Only one process can have it. After an error it is removed, unless there is something to continue from.

    Raises:
        ValueError: another process has it, it is of a run with other settings, or ``out`` exists.
    """
    check_free(out)
    work = out.parent / f".{out.name}.partial"
    work.mkdir(parents=True, exist_ok=True)
    with _locked(work):
        _open(work, list(settings))
        try:
            yield work
        except Exception:
            if not _has_begun(work):
                shutil.rmtree(work)
            raise
        shutil.rmtree(work / _ACTIVATIONS, ignore_errors=True)
        if out.exists():
            out.rmdir()
        work.rename(out)
        for name in (_LOCK, _PROGRESS):  # the latter last, since it says which run a folder of shards belongs to
            (out / name).unlink()


@contextmanager
def _locked(work: Path) -> Iterator[None]:
    """Hold the lock of a folder; the system releases it if the process dies."""
    path = work / _LOCK
    busy = ValueError(f"Another process is writing {work}. Wait until it has finished, or choose another folder.")
    with path.open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise busy from error
        if not path.exists() or not os.path.samestat(os.fstat(file.fileno()), path.stat()):
            raise busy  # the other one has finished, or failed, between the two lines above
        yield


def _open(work: Path, settings: list[str]) -> None:
    progress = work / _PROGRESS
    if progress.is_file() and _has_begun(work):
        before = json.loads(progress.read_text())["settings"]
        if before != settings:
            changed = next((pair for pair in zip(before, settings, strict=False) if pair[0] != pair[1]), ("", ""))
            raise ValueError(
                f"{work} holds an unfinished run with other settings ({changed[0]}, now {changed[1]}). Finish that one "
                "with its own settings, or remove the folder."
            )
        return
    shards = list(work.glob("model-*.safetensors"))
    if shards and not progress.is_file():
        raise ValueError(f"{work} holds files of a run that is not known. Remove the folder.")
    for shard in shards:  # of a run that had finished no block, whatever its settings were
        shard.unlink()
    _write_json(progress, {"settings": settings, "outliers": {}, "updates": {}})


def _has_begun(work: Path) -> bool:
    """Whether a block is done, so that the next run can continue after it."""
    return bool(json.loads((work / _PROGRESS).read_text())["updates"])


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    with _writing(path) as beside:
        beside.write_text(json.dumps(content, indent=1))


def fingerprint(batches: Iterable[Batch]) -> str:
    """Identifies calibration data, so that an unfinished run continues on the same."""
    found = 0
    for batch in batches:
        named = batch if isinstance(batch, Mapping) else {"": batch}
        for name, value in named.items():
            if isinstance(value, Tensor):
                found = zlib.crc32(f"{name} {tuple(value.shape)} {value.dtype}".encode(), found)
                flat = value.detach().cpu().reshape(-1).contiguous()
                found = zlib.crc32(flat.view(torch.uint8).numpy().tobytes(), found)
    return f"calibration data {found}"
