"""``StreamedModel``: a model whose decoder blocks are in memory one at a time; the others are on disk.

transformers itself translates names, in both directions: checkpoints may use other names than the model, and store
experts separately that the model fuses.
"""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sparse_train.layers.blocks import block_lists
from sparse_train.oneshot.shards import Checkpoint, write_shard

_SHARD_BYTES = 1 << 28  # of files for tensors outside the blocks; a larger tensor gets its own file


class StreamedModel:
    """A causal language model of transformers, its checkpoint, and the folder for its pruned blocks.

    Args:
        model: from ``model_without_weights``.
        checkpoint: where its weights are.
        work: folder of finished shards.
        names: the targets; the list of blocks is the one that holds most of them.
        device: where a loaded block computes.

    Raises:
        ValueError: a model without blocks, or targets or weights that are not stored block by block.
    """

    def __init__(
        self, model: Any, checkpoint: Checkpoint, work: Path, names: Sequence[str], device: torch.device
    ) -> None:
        self.model, self.checkpoint, self.work, self.device = model, checkpoint, work, device
        _check_readable(model, checkpoint)
        self.disk_seconds = 0.0
        lists = block_lists(model)
        if not lists:
            raise ValueError(f"{type(model).__name__} has no decoder blocks to walk. Load it and use prune.")
        self.prefix = max(lists, key=lambda name: sum(target.startswith(f"{name}.") for target in names))
        self.blocks = list(lists[self.prefix])
        outside = [name for name in names if not name.startswith(f"{self.prefix}.")]
        if outside:
            raise ValueError(f"{outside[0]} is outside the decoder blocks {self.prefix}. Load the model and use prune.")
        full = {key: self._full_name(key) for key in checkpoint.bytes}
        self._block_keys = [
            [key for key, name in full.items() if name.startswith(f"{self.prefix}.{index}.")]
            for index in range(len(self.blocks))
        ]
        for index, keys in enumerate(self._block_keys):
            if not keys:
                raise ValueError(
                    f"{checkpoint.folder} has no weights that begin with {self.prefix}.{index}, so it is not kept "
                    "block by block. Load the model and use prune."
                )
        inside = {key for keys in self._block_keys for key in keys}
        self._rest = _in_parts([key for key in full if key not in inside], checkpoint.bytes)
        count = len(self._rest) + len(self.blocks)
        self.shards = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]

    def is_done(self, index: int) -> bool:
        """Whether the pruned block is on disk."""
        return self._shard(index).is_file()

    def load_block(self, index: int) -> None:
        """Load a block: the pruned one if it is done, otherwise that of the checkpoint."""
        began = time.perf_counter()
        done = self.is_done(index)
        tensors = load_file(self._shard(index)) if done else self.checkpoint.read(self._block_keys[index])
        self.disk_seconds += time.perf_counter() - began
        self._load(tensors)
        missing = [name for name, p in self.blocks[index].named_parameters() if p.is_meta]
        if missing:
            raise ValueError(
                f"{self.checkpoint.folder} has no weights for {self.prefix}.{index}.{missing[0]}. Complete the "
                "checkpoint first, or load the model and use prune."
            )

    def write_block(self, index: int) -> None:
        """Write a loaded block as a file."""
        self._write(self._shard(index), self._tensors(index))

    def free_block(self, index: int) -> None:
        """Free the memory of a loaded block."""
        for module in self.blocks[index].modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    def _shard(self, index: int) -> Path:
        return self.work / self.shards[len(self._rest) + index]

    def load_rest(self) -> None:
        """Copy what is outside the blocks, and load the part that a forward up to a block needs."""
        head = self.model.get_output_embeddings()
        skipped = {id(p) for p in head.parameters()} if head is not None else set()
        skipped -= {id(p) for p in self.model.get_input_embeddings().parameters()}
        unneeded = {name for name, p in self.model.named_parameters() if id(p) in skipped}
        for shard, keys in zip(self.shards, self._rest, strict=False):
            tensors = self._read(keys)
            if not (self.work / shard).is_file():
                self._write(self.work / shard, tensors)
            self._load({key: value for key, value in tensors.items() if self._full_name(key) not in unneeded})
        inside = {id(p) for block in self.blocks for p in block.parameters()}
        head_names = {name for name, p in self.model.named_parameters() if head is not None and p is head.weight}
        for name, parameter in self.model.named_parameters():
            if parameter.is_meta and id(parameter) not in inside and name not in unneeded | head_names:
                raise ValueError(f"{self.checkpoint.folder} has no weights for {name}. Complete the checkpoint first.")
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(self.device)

    def _load(self, tensors: dict[str, Tensor]) -> None:
        """Put tensors of the checkpoint into the model, through transformers' own renaming and fusing."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model
        from transformers.modeling_utils import LoadStateDictConfig
        from transformers.utils import logging

        if not tensors:
            return
        mapping = get_model_conversion_mapping(self.model)
        shown = logging.is_progress_bar_enabled()
        logging.disable_progress_bar()
        try:
            settings = LoadStateDictConfig(weight_mapping=mapping, dtype=self.model.dtype)
            convert_and_load_state_dict_in_model(self.model, tensors, settings)
        finally:
            if shown:
                logging.enable_progress_bar()
        for module in self.model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None and not parameter.is_meta and parameter.device != self.device:
                    module._parameters[name] = nn.Parameter(parameter.detach().to(self.device), requires_grad=False)

    def _tensors(self, index: int) -> dict[str, Tensor]:
        """A block's state with the keys that the checkpoint has."""
        from transformers.core_model_loading import revert_weight_conversion

        prefix = f"{self.prefix}.{index}."
        state = {prefix + name: value.detach() for name, value in self.blocks[index].state_dict().items()}
        reverted: dict[str, Tensor] = revert_weight_conversion(self.model, state)
        base = f"{self.model.base_model_prefix}."
        wanted = set(self._block_keys[index])
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
        return base + key if self.prefix.startswith(base) and not key.startswith((base, "lm_head")) else key

    def _read(self, keys: Sequence[str]) -> dict[str, Tensor]:
        began = time.perf_counter()
        tensors = self.checkpoint.read(keys)
        self.disk_seconds += time.perf_counter() - began
        return tensors

    def _write(self, shard: Path, tensors: Mapping[str, Tensor]) -> None:
        began = time.perf_counter()
        write_shard(shard, tensors)
        self.disk_seconds += time.perf_counter() - began


def _in_parts(keys: list[str], sizes: Mapping[str, int]) -> list[list[str]]:
    parts: list[list[str]] = []
    filled = 0
    for key in keys:
        if not parts or filled + sizes[key] > _SHARD_BYTES:
            parts.append([])
            filled = 0
        parts[-1].append(key)
        filled += sizes[key]
    return parts


def _check_readable(model: Any, checkpoint: Checkpoint) -> None:
    narrow = next((key for key, dtype in checkpoint.dtypes.items() if dtype.startswith("F8")), None)
    if getattr(model.config, "quantization_config", None) is not None or narrow:
        raise ValueError(
            f"{checkpoint.folder} is quantised, and scores need the weights themselves. Dequantise it first: load it, "
            "and save it in 16 or 32 bits."
        )


def model_without_weights(path: Path, checkpoint: Checkpoint) -> Any:
    """The model of a checkpoint, with its parameters on the meta device and real buffers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    original = nn.Module.register_parameter

    def register(self: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        original(self, name, parameter)
        if parameter is not None:
            self._parameters[name] = nn.Parameter(parameter.detach().to("meta"), requires_grad=False)

    config = AutoConfig.from_pretrained(path)
    nn.Module.register_parameter = register  # type: ignore[method-assign, assignment]
    try:
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype or _dtype_of(checkpoint))
        in_float32 = dict(AutoModelForCausalLM.from_config(config, dtype=torch.float32).named_buffers())
    finally:
        nn.Module.register_parameter = original  # type: ignore[method-assign]
    for name, buffer in model.named_buffers():
        if buffer.dtype == torch.float32:
            buffer.copy_(
                in_float32[name]
            )  # GPT-J computes its positions in the default dtype; from_pretrained does not
    return model.eval()


def _dtype_of(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype of most tensors, for configurations that do not say it."""
    names = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    found = [names[dtype] for dtype in checkpoint.dtypes.values() if dtype in names]
    return max(set(found), key=found.count, default=torch.float32)
