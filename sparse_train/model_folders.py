"""Folders of models, as ``save_pretrained`` writes them: weights in safetensors, read in part, and what is beside them.

transformers itself translates names: checkpoints may use other names than the model, and store experts separately that
the model fuses.
"""

import json
import logging
import shutil
from collections import Counter
from collections.abc import Iterable
from pathlib import Path, PurePath
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from sparse_train.files import reading, replacing, write_json

_log = logging.getLogger(__name__)

INDEX = "model.safetensors.index.json"
PRUNING_FILE = "pruning.json"
"""How the model was pruned, in ``stages`` of which the last is the latest, see ``export.verify``."""
IN_MEMORY = "Load the model and use prune without streaming."
"""The way out where a folder cannot be processed block by block."""
_FLOATS = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


class WeightFiles:
    """A folder with safetensors files, plain or with an index, opened for reading only.

    Raises:
        ValueError: no such folder, no safetensors in it, or a file that is damaged, missing, cut off or elsewhere.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.files: dict[str, Path] = {}
        """Where each tensor is, in the order of the files."""
        self.dtypes: dict[str, str] = {}
        """Of each tensor, in the words of safetensors."""
        files = weight_files(self.folder)
        for file in files:
            with reading(file), safe_open(file, framework="pt") as opened:
                for key in opened.keys():  # noqa: SIM118  (not a dict)
                    self.files[key], self.dtypes[key] = file, opened.get_slice(key).get_dtype()
        # so that another checkpoint, or a changed one, is recognised
        self.fingerprint = repr([(str(f.resolve()), f.stat().st_size, f.stat().st_mtime_ns) for f in files])

    def read(self, keys: Iterable[str]) -> dict[str, Tensor]:
        """These tensors, copied to memory, so that changes to them do not reach the files."""
        wanted, tensors = set(keys), dict[str, Tensor]()
        for file in {self.files[key]: None for key in wanted}:
            with safe_open(file, framework="pt") as opened:
                tensors |= {k: opened.get_tensor(k).clone() for k in opened.keys() if k in wanted}  # noqa: SIM118
        return tensors

    def dtype(self) -> torch.dtype:
        """The float dtype of most tensors, for configurations that do not say it."""
        counts = Counter(_FLOATS[name] for name in self.dtypes.values() if name in _FLOATS)
        return counts.most_common(1)[0][0] if counts else torch.float32


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights; ValueError if there are none of safetensors, or if an index names others outside."""
    index, single = folder / INDEX, folder / "model.safetensors"
    if single.is_file():  # if there are both, transformers reads this one
        return [single]
    if not index.is_file():
        raise ValueError(
            f"{folder} has no model.safetensors or {INDEX}, and only safetensors can be read block by block. Load the "
            "model in memory instead (streaming=False), or save it with save_pretrained first."
        )
    with reading(index):
        names = json.loads(index.read_text())["weight_map"].values()
        strays = [name for name in names if PurePath(name).is_absolute() or ".." in PurePath(name).parts]
    if strays:
        raise ValueError(f"{index} names {strays[0]}, which is outside its folder.")
    return sorted({folder / name for name in names})


def stages_of(folder: Path) -> list[Any]:
    """How the model in a folder was permuted and pruned so far, as far as that is recorded."""
    file = folder / PRUNING_FILE
    with reading(file):
        content = json.loads(file.read_text()) if file.is_file() else {}
        # another tool's file may be of that name
        return list(content.get("stages") or []) if isinstance(content, dict) else []


def write_index(folder: Path, shards: Iterable[str]) -> None:
    """Write the index with which ``from_pretrained`` reads shards as one checkpoint."""
    weight_map: dict[str, str] = {}
    for name in shards:
        with safe_open(folder / name, framework="pt") as opened:
            own = dict.fromkeys(opened.keys(), name)
        if twice := sorted(weight_map.keys() & own.keys()):
            raise ValueError(f"{twice[0]} is in {weight_map[twice[0]]} and in {name} of {folder}. {IN_MEMORY}")
        weight_map |= own
    total = sum((folder / name).stat().st_size for name in set(weight_map.values()))
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map})


def copy_others(source: Path, out: Path) -> None:
    """Copy what a model folder has beside the model and ``save_pretrained`` does not write: processors, licenses."""
    for pattern in ("*processor_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*"):
        for file in source.glob(pattern):
            _copy(file, source, out)


def copy_companions(source: Path, out: Path) -> None:
    """Copy the other files next to the weights: configuration and tokenizer, with all its chat templates.

    Not ``PRUNING_FILE``: it says how the source was pruned, and the copy has other zeros.
    """
    for file in [*source.iterdir(), *source.glob("additional_chat_templates/*")]:
        weights = file.suffix in (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack")
        left_out = weights or file.name == PRUNING_FILE or file.name.endswith(".index.json")
        if not left_out and not file.name.startswith("."):
            _copy(file, source, out)


def _copy(file: Path, source: Path, out: Path) -> None:
    """Copy a file of a model folder, unless it is there, or a link out of the folder: the copy may be published."""
    own, target = [source.resolve()], out / file.relative_to(source)
    if own[0].parent.name == "snapshots":  # of the hub's cache, where all files are links to its blobs
        own.append(own[0].parent.parent / "blobs")
    if not any(file.resolve().is_relative_to(each) for each in own):
        _log.warning("%s is a link to a file outside its folder, and is not copied.", file)
    elif file.is_file() and not target.exists():
        target.parent.mkdir(exist_ok=True)
        with replacing(target) as beside:  # a part of it would be taken for the file when the run goes on
            shutil.copyfile(file, beside)


def model_without_weights(path: Path, checkpoint: WeightFiles) -> Any:
    """The causal language model of a checkpoint, with its parameters on the meta device and real buffers."""
    from transformers import AutoConfig, AutoModelForCausalLM

    with reading(path), torch.device("meta"):
        config = AutoConfig.from_pretrained(path)
        model = AutoModelForCausalLM.from_config(config, dtype=config.dtype or checkpoint.dtype())
    for module in model.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else torch.empty_like(buffer, device="cpu")
    # As in from_pretrained: buffers have the model's dtype or their own, and are computed in torch's default dtype.
    # Of parameters on the meta device it changes nothing.
    model.init_weights()
    return model.eval()


def names_in_model(model: Any, keys: Iterable[str], *, converted: bool = True) -> dict[str, str]:
    """For each key of a checkpoint, the name of that tensor in a transformers model.

    A tensor that transformers splits or fuses in loading has several names, of which the first is given; without
    ``converted``, it is left out.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    mapping, state = get_model_conversion_mapping(model), model.state_dict()
    parts = [[each for each in mapping if isinstance(each, kind)] for kind in (WeightRenaming, WeightConverter)]
    names = {}
    for key in sorted(keys, key=dot_natural_key):  # as in loading: some renamings apply after others only
        name, converter = rename_source_key(key, *parts, model.base_model_prefix, state)
        if name not in state and key in state:  # stored under its name already
            name, converter = key, None
        if converted or converter is None:
            names[key] = name
    return names
