"""Checkpoints on disk, read and written a few tensors at a time: safetensors, plain or with an index."""

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from sparse_train.files import replacing

INDEX = "model.safetensors.index.json"
_TEMPLATES = "additional_chat_templates"  # transformers' folder for those besides chat_template.jinja


class Checkpoint:
    """A folder with safetensors files, opened for reading only.

    Raises:
        ValueError: no such folder, no safetensors in it, or a file that is missing or cut off.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.bytes: dict[str, int] = {}
        """Size of each tensor by its key, in the order of the files."""
        self.dtypes: dict[str, str] = {}
        """Their dtypes, under the names of safetensors."""
        self._files: dict[str, Path] = {}
        for file in self._find():
            for key, (size, dtype) in _contents(file).items():
                self._files[key], self.bytes[key], self.dtypes[key] = file, size, dtype
        stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in self._find()]
        self.fingerprint = repr(stats)
        """Identifies this checkpoint, so that another or a changed one is recognised."""

    def _find(self) -> list[Path]:
        index, single = self.folder / INDEX, self.folder / "model.safetensors"
        if single.is_file():  # if there are both, transformers reads this one
            return [single]
        if index.is_file():
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            missing = [name for name in names if not (self.folder / name).is_file()]
            if missing:
                raise ValueError(f"{index} names {missing[0]}, which is not there. Complete the checkpoint first.")
            return [self.folder / name for name in names]
        raise ValueError(
            f"{self.folder} is not a folder with model.safetensors or {INDEX}; only safetensors can be read block by "
            "block. Load the model in memory instead (streaming=False), or save it with save_pretrained first."
        )

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """These tensors, copied to memory, so that changes to them do not reach the files."""
        by_file: dict[Path, list[str]] = {}
        for key in keys:
            by_file.setdefault(self._files[key], []).append(key)
        found = {}
        for file, own in by_file.items():
            with safe_open(file, framework="pt") as opened:
                for key in own:
                    found[key] = opened.get_tensor(key).clone()
        return found


def _contents(file: Path) -> dict[str, tuple[int, str]]:
    widths = {"F64": 8, "I64": 8, "F32": 4, "I32": 4, "F16": 2, "BF16": 2, "I16": 2}
    try:
        with safe_open(file, framework="pt") as opened:
            sizes = {}
            for key in opened.keys():  # noqa: SIM118  (not a dict)
                part = opened.get_slice(key)
                size = widths.get(part.get_dtype(), 1)
                for length in part.get_shape():
                    size *= length
                sizes[key] = size, part.get_dtype()
            return sizes
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is not a complete safetensors file ({error}). Copy or download it again.") from error


def write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write one file next to ``path`` and rename it, so that ``path`` is complete or absent.

    Raises:
        OSError: it cannot be written, for example because the disk is full.
    """
    whole = {key: value.contiguous().cpu() for key, value in tensors.items()}
    try:
        with replacing(path) as beside:
            save_file(whole, beside, metadata={"format": "pt"})
    except (SafetensorError, OSError) as error:
        free = shutil.disk_usage(path.parent).free
        raise OSError(
            f"Cannot write {path}: {error}. {free / 2**20:.0f} MiB are free there. Blocks that were finished are kept; "
            "the same command continues after them."
        ) from error


def write_index(folder: Path, shards: Iterable[str]) -> None:
    """Write the index with which ``from_pretrained`` reads shards as one checkpoint."""
    weight_map, total = {}, 0
    for name in shards:
        for key, (size, _) in _contents(folder / name).items():
            weight_map[key], total = name, total + size
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
    (folder / INDEX).write_text(text + "\n")


def copy_others(source: Path, out: Path) -> None:
    """Copy what a model folder has beside the model and ``save_pretrained`` does not write: processors, licenses."""
    for pattern in ("*processor_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*"):
        for file in source.glob(pattern):
            if file.is_file() and not (out / file.name).exists():
                shutil.copyfile(file, out / file.name)


def copy_companions(source: Path, out: Path) -> None:
    """Copy the other files next to the weights: configuration and tokenizer."""
    for file in source.iterdir():
        weights = file.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
        if file.is_file() and not weights and not file.name.startswith(".") and not file.name.endswith(".index.json"):
            shutil.copyfile(file, out / file.name)
    if (source / _TEMPLATES).is_dir():
        shutil.copytree(source / _TEMPLATES, out / _TEMPLATES, dirs_exist_ok=True)
