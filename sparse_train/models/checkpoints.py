"""Reads checkpoints of training runs in one process, from any engine, without starting that engine."""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

import torch
from torch import Tensor

from sparse_train.files import load_plain, reading, untrusted
from sparse_train.layers.masked_layer import sparse_layers
from sparse_train.layers.masks import MASK_NAME
from sparse_train.layers.sparsify import sparsify_like

_Module = TypeVar("_Module")
PRUNING_STATE = "DynamicPruning"
"""Key of the state of ``DynamicPruning``, and of its subclasses, in the callbacks of a checkpoint."""
_FSDP2_METADATA = ".metadata"  # file of torch.distributed.checkpoint
_LIGHTNING_METADATA = "meta.pt"  # file that Lightning puts next to it
_DEEPSPEED_TAG = "checkpoint"  # the tag that Lightning uses
_FORM: dict[str, Any] = {"pytorch-lightning_version": str, "state_dict": dict, "callbacks": (dict, type(None))}
"""What Lightning writes to each checkpoint; callbacks have no state in one of weights only."""


def read_checkpoint(checkpoint: str | Path) -> dict[str, Any]:
    """The content of a Lightning checkpoint, on the CPU, with whole float weights in ``["state_dict"]``.

    Args:
        checkpoint: a file (one process, DDP, FSDP2 consolidated), or a folder (FSDP2; DeepSpeed, any stage, whose
            float32 masters are read, and for which the package deepspeed is needed).
    """
    path = Path(checkpoint)
    if path.is_file():
        loaded = load_plain(path, mmap=True)
        if isinstance(loaded, dict) and "state_dict" in loaded:
            return loaded
        raise ValueError(
            f"{path} is not a checkpoint of a training run, which has a state_dict. If it is part of a checkpoint "
            "folder, give that folder."
        )
    with reading(path):
        if (path / _FSDP2_METADATA).is_file():
            content: dict[str, Any] = load_plain(path / _LIGHTNING_METADATA)
            return content | {"state_dict": _read_fsdp2(path)}
        if (path / _DEEPSPEED_TAG).is_dir():
            return _read_deepspeed(path)
    kind = "is a folder that neither FSDP2 nor DeepSpeed wrote" if path.is_dir() else "does not exist"
    beside = ", ".join(sorted(each.name for each in path.parent.glob("*.ckpt") if each != path)[:5])
    raise ValueError(f"There is no checkpoint at {path}: it {kind}." + (f" Beside it are {beside}." if beside else ""))


def load_from_checkpoint(cls: type[_Module], checkpoint: str | Path, **arguments: Any) -> _Module:
    """The module of a Lightning checkpoint that a sparse run wrote, with its masks; it needs no callback.

    ::

        module = sparse_train.load_from_checkpoint(Lit, "best.ckpt")
        trainer.test(module, data)  # or squash(module), for plain layers with true zeros

    Lightning's own ``Lit.load_from_checkpoint`` refuses the masks ("Unexpected key").

    Args:
        cls: a class of ``LightningModule``.
        checkpoint: a file; no code in it is run.
        arguments: those of Lightning's method: hyperparameters, ``strict``, ``map_location``.

    Raises:
        ValueError: the file holds more than tensors and plain values, is a folder, or lacks the masks of its run.
    """
    path = Path(checkpoint)
    if path.is_dir():
        raise ValueError(
            f"{path} is a folder. If FSDP2 wrote it, make a file of it: python -m "
            f"lightning.pytorch.utilities.consolidate_checkpoint {path}."
        )
    of_sparse_run = read_checkpoint(path).get("callbacks", {}).get(PRUNING_STATE)
    original: Any = cls.load_state_dict  # type: ignore[attr-defined]

    def load(module: Any, state_dict: Mapping[str, Any], *args: Any, **options: Any) -> Any:
        sparsify_like(module, state_dict)
        return original(module, state_dict, *args, **options)

    # Lightning creates the module and loads it in one call, and asks nobody in between
    with mock.patch.object(cls, "load_state_dict", load):
        loaded: Any = cls.load_from_checkpoint(path, weights_only=True, **arguments)  # type: ignore[attr-defined]
    if of_sparse_run and not sparse_layers(loaded):
        raise ValueError(f"{path} is of a sparse run and holds no masks, so the module would be dense.")
    return loaded


def newest_checkpoint(folder: str | Path) -> Path:
    """The checkpoint under a folder, a file or folder ``*.ckpt``, that was written last.

    Raises:
        ValueError: there is none.
    """
    checkpoints = list(Path(folder).rglob("*.ckpt"))
    if not checkpoints:
        raise ValueError(
            f"There is no last checkpoint: {folder} (trainer.default_root_dir) has no *.ckpt inside. To begin "
            "anew, leave out ckpt_path."
        )
    return max(checkpoints, key=lambda path: path.stat().st_mtime_ns)


def check_runs_no_code(checkpoint: str | Path) -> None:
    """Raise ValueError if resuming from a checkpoint of any engine would run code that is in it.

    The engines themselves unpickle what they find, even where tensors and numbers are all that they have written.
    """
    path = Path(checkpoint)
    if path.is_file():
        loaded = load_plain(path, mmap=True)
        if not isinstance(loaded, dict) or not all(isinstance(loaded.get(key), kind) for key, kind in _FORM.items()):
            raise ValueError(f"{path} is not a checkpoint of a training run: Lightning did not write it.")
    for file in sorted(path.rglob("*.pt")):
        with torch.serialization.safe_globals(_deepspeed_classes()):
            load_plain(file, mmap=True)
    if (path / _FSDP2_METADATA).is_file():
        _check_fsdp2_values(path)


def _read_fsdp2_metadata(path: Path) -> Any:
    """Reads a file that torch pickles and, unlike other files, unpickles freely."""
    file = path / _FSDP2_METADATA
    with reading(file), file.open("rb") as opened:
        return _MetadataUnpickler(opened).load()


class _MetadataUnpickler(pickle.Unpickler):
    """Refuses all but what torch writes to the metadata of a distributed checkpoint."""

    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if not is_dtype and name not in _IN_METADATA.get(module, ()):
            raise ValueError(untrusted(Path(_FSDP2_METADATA), f"{module}.{name}"))
        return super().find_class(module, name)


_IN_METADATA = {
    "torch.distributed.checkpoint.metadata": {
        *("Metadata", "MetadataIndex", "StorageMeta", "TensorStorageMetadata", "ChunkStorageMetadata"),
        *("BytesStorageMetadata", "TensorProperties", "_MEM_FORMAT_ENCODING"),
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "collections": {"OrderedDict"},
    "pathlib": {"PosixPath", "WindowsPath"},
    "pathlib._local": {"PosixPath", "WindowsPath"},  # Python 3.13
}
"""Names by module. Not whole modules: a name such as os.system would also be found in one that imports os."""


def _check_fsdp2_values(path: Path) -> None:
    """Check the values beside tensors, such as learning rates: each is a file of ``torch.save`` inside a larger one."""
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata

    metadata = _read_fsdp2_metadata(path)
    for index, where in metadata.storage_data.items():
        if isinstance(metadata.state_dict_metadata.get(index.fqn), BytesStorageMetadata):
            with (path / where.relative_path).open("rb") as opened:
                opened.seek(where.offset)
                load_plain(path / where.relative_path, part=opened.read(where.length))


def _deepspeed_classes() -> list[Any]:
    """What DeepSpeed stores besides tensors and plain values; nothing without DeepSpeed."""
    try:
        from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
        from deepspeed.runtime.zero.config import ZeroStageEnum
        from deepspeed.utils.tensor_fragment import fragment_address
    except ImportError:
        return []
    return [LossScaler, DynamicLossScaler, ZeroStageEnum, fragment_address]


def _read_fsdp2(path: Path) -> dict[str, Tensor]:
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    prefix = "state_dict."
    entries = _read_fsdp2_metadata(path).state_dict_metadata
    weights = {  # without the optimizer's state, which is twice as large
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in entries.items()
        if key.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    load(weights, storage_reader=FileSystemReader(path), no_dist=True)
    return {key.removeprefix(prefix): tensor for key, tensor in weights.items()}


def _read_deepspeed(path: Path) -> dict[str, Any]:
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    # every rank has written a file; apart from the model's state, they are the same
    states = sorted((path / _DEEPSPEED_TAG).glob("*model_states.pt"))[0]
    content = load_plain(states)
    check_runs_no_code(path)  # DeepSpeed would unpickle anything
    state = get_fp32_state_dict_from_zero_checkpoint(str(path), tag=_DEEPSPEED_TAG)
    for key in state:
        if key.endswith(MASK_NAME):  # some versions turn all buffers into floats
            state[key] = state[key].to(torch.uint8)
    return {key: value for key, value in content.items() if key != "module"} | {"state_dict": state}
