"""Reads checkpoints of training runs in one process, from any engine, without starting that engine."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparse_train.layers.matrices import MASK_NAME

PRUNING_STATE = "DynamicPruning"
"""Key of the state of ``DynamicPruning``, and of its subclasses, in the callbacks of a checkpoint."""
_FSDP2_METADATA = ".metadata"  # file of torch.distributed.checkpoint
_LIGHTNING_METADATA = "meta.pt"  # file that Lightning puts next to it
_DEEPSPEED_TAG = "checkpoint"  # the tag that Lightning uses
_CLIENT_KEYS = (
    *("callbacks", "model_config", "generation_config", "adapter_config", "model_source", "global_step", "epoch"),
)


def read_checkpoint(checkpoint: str | Path) -> dict[str, Any]:
    """The content of a Lightning checkpoint, on the CPU, with whole float weights in ``["state_dict"]``.

    Args:
        checkpoint: a file (one process, DDP, FSDP2 consolidated), or a folder (FSDP2; DeepSpeed, any stage, whose
            float32 masters are read, and for which the package deepspeed is needed).

    Raises:
        ValueError: nothing there, or a folder of another kind.
    """
    path = Path(checkpoint)
    if path.is_file():
        try:
            found: Any = torch.load(path, map_location="cpu", weights_only=False)
        except (pickle.UnpicklingError, EOFError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and "PytorchStreamReader" not in str(error):
                raise  # memory, for example
            raise ValueError(f"{path} is not a checkpoint of a training run, or is not complete: {error}.") from error
        if isinstance(found, dict) and "state_dict" in found:
            return found
        raise ValueError(
            f"{path} is not a checkpoint of a training run, which has a state_dict. If it is part of a checkpoint "
            "folder, give that folder; a folder with a model is read by evaluate, inspect and prune."
        )
    if (path / _FSDP2_METADATA).is_file():
        content: dict[str, Any] = torch.load(path / _LIGHTNING_METADATA, map_location="cpu", weights_only=False)
        return content | {"state_dict": _read_fsdp2(path)}
    if (path / _DEEPSPEED_TAG).is_dir():
        return _read_deepspeed(path)
    kind = "is a folder that neither FSDP2 nor DeepSpeed wrote" if path.is_dir() else "does not exist"
    beside = [each.name for each in sorted(path.parent.glob("*.ckpt"))]
    there_are = f" There are {', '.join(beside[:5])} in {path.parent}." if beside and path.name not in beside else ""
    raise ValueError(f"There is no checkpoint at {path}: it {kind}.{there_are}")


def check_engine(checkpoint: str | Path, strategy: Any) -> None:
    """Raise ValueError if a Lightning strategy cannot resume from a checkpoint of another strategy."""
    path, name = Path(checkpoint), type(strategy).__name__
    engines = {"ModelParallelStrategy": path / _FSDP2_METADATA, "DeepSpeedStrategy": path / _DEEPSPEED_TAG}
    for engine, sign in engines.items():
        if sign.exists() and all(cls.__name__ != engine for cls in type(strategy).__mro__):
            raise ValueError(
                f"{path} was written under {engine}, and this run has {name}, which cannot resume from it. Use the "
                "same strategy, or export the checkpoint (sparse-train export) and start a run from that folder."
            )


def _read_fsdp2(path: Path) -> dict[str, Tensor]:
    from torch.distributed.checkpoint.filesystem import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata
    from torch.distributed.checkpoint.state_dict_loader import load

    reader, prefix = FileSystemReader(path), "state_dict."
    found = reader.read_metadata().state_dict_metadata
    weights = {  # without the optimizer's state, which is twice as large
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in found.items()
        if key.startswith(prefix) and isinstance(entry, TensorStorageMetadata)
    }
    load(weights, storage_reader=reader, no_dist=True)
    return {key.removeprefix(prefix): tensor for key, tensor in weights.items()}


def _read_deepspeed(path: Path) -> dict[str, Any]:
    try:
        from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint
    except ImportError as error:
        raise ValueError(
            f"{path} was written by DeepSpeed, and reading it needs the package: pip install 'sparse-train[deepspeed]'."
        ) from error
    # every rank has written a file; apart from the model's state, they are the same
    states = sorted((path / _DEEPSPEED_TAG).glob("*model_states.pt"))[0]
    content = torch.load(states, map_location="cpu", weights_only=False)
    client = {key: content[key] for key in _CLIENT_KEYS if key in content}
    state = get_fp32_state_dict_from_zero_checkpoint(str(path), tag=_DEEPSPEED_TAG)
    for key in state:
        if key.endswith(MASK_NAME):  # some versions turn all buffers into floats
            state[key] = state[key].to(torch.uint8)
    return client | {"state_dict": state}
