"""``DiskStore``: one-shot pruning from folder to folder, with one block in memory; and runs that go on after a stop."""

import fcntl
import json
import logging
import shutil
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save, save_file
from torch import Tensor, nn

from sparse_train.architecture import fused_experts
from sparse_train.files import check_free, replacing, write_json
from sparse_train.layers.masked_layer import MaskedLayer, MaskedMatrix
from sparse_train.layers.sparsify import sparsify, squash_layers
from sparse_train.layers.targets import Targets
from sparse_train.model_folders import IN_MEMORY, WeightFiles, names_in_model
from sparse_train.oneshot.experts import expert_matrices
from sparse_train.oneshot.forwards import Batch
from sparse_train.oneshot.walk import BlockStore
from sparse_train.pruning.counts import LayerUpdate

_log = logging.getLogger(__name__)

_PROGRESS, _LOCK = "progress.json", ".lock"


# --- the store -------------------------------------------------------------------------------------------------------


class DiskStore(BlockStore):
    """A model of which one decoder block at a time is in memory; pruned blocks are written as a file each, to ``work``.

    ``model`` is from ``model_without_weights``, ``work`` from ``unfinished``; ``chosen`` are the targets.
    """

    def __init__(self, model: Any, checkpoint: WeightFiles, chosen: Targets, work: Path, device: torch.device) -> None:
        super().__init__(model, {**chosen.layers, **expert_matrices(chosen.experts)}, device)
        self.checkpoint, self.work = checkpoint, work
        self.keep_on = torch.device("cpu")
        self._done = _read_record(work)
        self.outliers = {int(block): share for block, share in self._done["outliers"].items()}
        self.updates = {name: LayerUpdate(**each) for name, each in self._done["updates"].items()}
        narrow = any(dtype.startswith("F8") for dtype in checkpoint.dtypes.values())
        if narrow or getattr(model.config, "quantization_config", None) is not None:
            raise ValueError(
                f"{checkpoint.folder} is quantised, and scores need the weights themselves. Dequantise it first: load "
                "it, and save it in 16 or 32 bits."
            )
        if outside := self.names(None):
            raise ValueError(
                f"{outside[0]} is outside the decoder blocks, which are walked one by one. Load the model and use "
                "prune, or leave it dense with ignore."
            )
        names = {id(module): name for name, module in model.named_modules()}
        self._prefix = names[id(self.blocks[0])].rpartition(".")[0]
        inside = [f"{self._prefix}.{block}." for block in range(len(self.blocks))]
        self._names = names_in_model(model, checkpoint.files)
        self._keys = [[key for key, name in self._names.items() if name.startswith(prefix)] for prefix in inside]
        self._rest = [key for key, name in self._names.items() if not name.startswith(tuple(inside))]
        if missing := [prefix for prefix, keys in zip(inside, self._keys, strict=True) if not keys]:
            raise ValueError(f"No tensor of {checkpoint.folder} is known as {missing[0]}*. {IN_MEMORY}")
        count = len(self.blocks) + 1
        self.shards = [f"model-{number:05}-of-{count:05}.safetensors" for number in range(1, count + 1)]
        """Of each block, and of the rest."""
        if done := sum(map(self.is_done, range(len(self.blocks)))):
            _log.warning("Continuing after %d finished blocks of %d; times are for the rest.", done, len(self.blocks))

    def is_done(self, block: int) -> bool:
        return self._shard(block).is_file()

    def load(self, block: int | None) -> dict[str, MaskedMatrix]:
        assert block is not None
        if self.is_done(block):
            self._put(load_file(self._shard(block)))
            return {}
        self.load_dense(block)
        own = [name.partition("[")[0] for name in self.names(block)]
        modules = dict(self.model.named_modules())
        sparsify(self.blocks[block], [modules[name] for name in own if name in modules])
        # looked up again, since every load creates new parameter objects
        experts = {name: each for name, each in fused_experts(self.model).items() if name in own}
        masked = {name: layer for name in own if isinstance(layer := modules.get(name), MaskedLayer)}
        return {**masked, **expert_matrices(experts)}

    def load_dense(self, block: int) -> None:
        self._put(self.checkpoint.read(self._keys[block]))
        self._check_loaded((f"{self._prefix}.{block}.{n}", p) for n, p in self.blocks[block].named_parameters())

    def finish(self, block: int | None, updates: Mapping[str, LayerUpdate]) -> None:
        assert block is not None
        super().finish(block, updates)
        done = {name: asdict(update) for name, update in self.updates.items()}
        write_json(self.work / _PROGRESS, {**self._done, "outliers": self.outliers, "updates": done})
        squash_layers(self.blocks[block])
        _write_shard(self._shard(block), self._tensors(block))

    def free(self, block: int) -> None:
        squash_layers(self.blocks[block])
        _move_weights(self.blocks[block], torch.device("meta"))

    def load_rest(self) -> None:
        """Copy what is outside the blocks, and load the part that a forward up to a block needs."""
        head, embeddings = self.model.get_output_embeddings(), self.model.get_input_embeddings()
        of_head = tuple(f"{name}." for name, module in self.model.named_modules() if module is head)
        unneeded = () if head is not None and head.weight is embeddings.weight else of_head
        tensors = self.checkpoint.read(self._rest)
        _write_shard(self._shard(-1), tensors)
        self._put({key: value for key, value in tensors.items() if not self._names[key].startswith(unneeded)})
        others = (f"{self._prefix}.", *of_head)
        self._check_loaded((n, p) for n, p in self.model.named_parameters() if not n.startswith(others))
        for module in self.model.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.to(self.device)

    def _check_loaded(self, parameters: Iterable[tuple[str, nn.Parameter]]) -> None:
        if missing := next((name for name, parameter in parameters if parameter.is_meta), None):
            raise ValueError(f"{self.checkpoint.folder} has no weights for {missing}. Complete the checkpoint first.")

    # --- tensors under the names of the checkpoint -------------------------------------------------------------------

    def _put(self, tensors: dict[str, Tensor]) -> None:
        """Put tensors of the checkpoint into the model, through transformers' own renaming and fusing."""
        from transformers.conversion_mapping import get_model_conversion_mapping
        from transformers.core_model_loading import convert_and_load_state_dict_in_model as load
        from transformers.modeling_utils import LoadStateDictConfig
        from transformers.utils import logging as transformers_logging

        shown = transformers_logging.is_progress_bar_enabled()
        transformers_logging.disable_progress_bar()
        try:
            mapping = get_model_conversion_mapping(self.model)
            settings = LoadStateDictConfig(weight_mapping=mapping, dtype=self.model.dtype)
            plan = {"tp_plan": None} if "tp_plan" in signature(load).parameters else {}  # in 5.15, not in 5.18
            load(self.model, tensors, settings, **plan)
        finally:
            if shown:
                transformers_logging.enable_progress_bar()
        _move_weights(self.model, self.device)

    def _tensors(self, block: int) -> dict[str, Tensor]:
        """A block's state with the keys that the checkpoint has."""
        from transformers.core_model_loading import revert_weight_conversion

        prefix, base = f"{self._prefix}.{block}.", f"{self.model.base_model_prefix}."
        state = {prefix + name: value.detach() for name, value in self.blocks[block].state_dict().items()}
        reverted: dict[str, Tensor] = revert_weight_conversion(self.model, state)
        wanted = set(self._keys[block])
        named = {(k if k in wanted else k.removeprefix(base)): value for k, value in reverted.items()}
        stray, unknown = sorted(set(named) - wanted), sorted(wanted - set(named))
        if stray and unknown:
            raise ValueError(
                f"{self.checkpoint.folder} calls a weight {unknown[0]}, and transformers would write {stray[0]}, so "
                f"the checkpoint cannot be written back under its own names. {IN_MEMORY}"
            )
        # Every weight of the block has its key; keys that the model does not know are old buffers, which are kept.
        return named | self.checkpoint.read(unknown)

    def _shard(self, block: int) -> Path:
        return self.work / self.shards[block]


def _move_weights(module: nn.Module, device: torch.device) -> None:
    for each in module.modules():
        for name, parameter in each._parameters.items():
            if parameter is not None and not parameter.is_meta and parameter.device != device:
                each._parameters[name] = nn.Parameter(parameter.detach().to(device), requires_grad=False)


def _write_shard(path: Path, tensors: Mapping[str, Tensor]) -> None:
    with replacing(path) as beside:
        save_file({key: value.contiguous().cpu() for key, value in tensors.items()}, beside, metadata={"format": "pt"})


# --- unfinished runs -------------------------------------------------------------------------------------------------


@contextmanager
def unfinished(out: Path, settings: Sequence[str]) -> Iterator[Path]:
    """The folder of an unfinished run next to ``out``, new or of the same settings; it becomes ``out`` at the end.

    Only one process can have it. After an error it is removed, unless a block is done, from which to continue.
    """
    check_free(out)
    work = out.parent / f".{out.name}.partial"
    work.mkdir(parents=True, exist_ok=True)
    with (work / _LOCK).open("a") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # the system releases it if the process dies
        except BlockingIOError as error:
            raise ValueError(
                f"Another process is writing {work}. Wait until it has finished, or choose another folder."
            ) from error
        progress = _read_record(work)
        if not progress["updates"]:  # of any run that finished no block
            for shard in work.glob("model-*.safetensors"):
                shard.unlink()
            write_json(work / _PROGRESS, {"settings": list(settings), "outliers": {}, "updates": {}})
        elif progress["settings"] != list(settings):
            raise ValueError(
                f"{work} holds an unfinished run with other settings "
                f"({', '.join(set(progress['settings']) - set(settings))}). Finish that one with its own settings, or "
                "remove the folder."
            )
        try:
            yield work
        except BaseException:  # Ctrl-C too
            if not _read_record(work)["updates"]:
                shutil.rmtree(work)
            raise
        if out.exists():
            out.rmdir()
        work.rename(out)
        for name in (_LOCK, _PROGRESS):  # the latter last, since it says which run a folder of shards belongs to
            (out / name).unlink()


def _read_record(work: Path) -> dict[str, Any]:
    path = work / _PROGRESS
    return json.loads(path.read_text()) if path.is_file() else {"settings": [], "updates": {}}


def data_checksum(batches: Iterable[Batch]) -> str:
    """Identifies calibration data, so that an unfinished run continues on the same."""
    crc = 0
    for batch in batches:
        named = batch if isinstance(batch, Mapping) else {"input_ids": batch}
        tensors = {name: each.cpu().contiguous().clone() for name, each in named.items() if isinstance(each, Tensor)}
        crc = zlib.crc32(save(tensors), crc)
    return f"calibration data {crc}"
