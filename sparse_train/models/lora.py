"""``LoRA``: a model source that puts peft's adapters on a frozen base, and the export of such a model.

Imports peft only when it is used.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sparse_train.inspection import InspectedLayer, layer_sparsities
from sparse_train.layers.adapters import guard_adapters
from sparse_train.layers.state_dicts import folded_state_dict
from sparse_train.models.sources import ModelSource, as_model_source
from sparse_train.targets.maskable import adapter_names

FOLDER = "adapter"
"""Subfolder of the adapter, in the folder of its base."""
_BASE_LAYER = "base_layer."  # peft's name for the layer that an adapter wraps
_WRAPPED = "base_model.model."  # peft's prefix for names of the wrapped model


@dataclass
class LoRA(ModelSource):
    """A frozen model with peft's low-rank adapters (Hu et al., arXiv 2106.09685); only the adapters are trained.

    As in Table 6 of Wanda (arXiv 2306.11695), whose settings are the defaults. The base is a sparse folder, or a dense
    model that ``DynamicPruning`` prunes at the start of the run. The kept weights of a frozen base do not change, and
    with ``policy: Fixed`` its first mask does not either.

    ``fit --export`` writes the base with its zeros to the folder, and the adapter to ``adapter/`` inside it:
    ``PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), f"{folder}/adapter")``. They stay
    separate, because **merging them loses the zeros**: the product of two dense factors has none. For an adapter that
    can be merged, train with ``DynamicPruning(mask_lora=MaskLoRA())`` and without ``LoRA``.

    Args:
        base: a model source, or a Hugging Face id or local folder.
        r: rank.
        lora_alpha: the product of the factors is multiplied by ``lora_alpha / r``.
        lora_dropout: share of an adapter's inputs that are dropped in training.
        target_modules: last parts of the names of layers that get an adapter.
        adapter: folder of a trained adapter, which is loaded with its own settings, to continue training it or for
            ``sparse-train evaluate``.
    """

    base: ModelSource | str
    r: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    target_modules: Sequence[str] = ("q_proj", "v_proj")
    adapter: str | None = None

    def __post_init__(self) -> None:
        self.base = as_model_source(self.base)
        if self.r < 1 or not 0 <= self.lora_dropout < 1:
            raise ValueError(
                f"r must be at least 1, and lora_dropout at least 0 and below 1, got {self.r} and {self.lora_dropout}."
            )

    @property
    def _base(self) -> ModelSource:
        return as_model_source(self.base)

    @property
    def name(self) -> str:
        return f"{self._base.name} with {self.adapter or f'LoRA of rank {self.r}'}"

    @property
    def hub_id(self) -> str | None:
        return self._base.hub_id

    @property
    def license(self) -> str | None:
        return self._base.license

    def load(self) -> Any:
        model = self._wrapped()
        guard_adapters()  # needed here because the base may be a sparse folder, without masks
        return model

    def _wrapped(self) -> Any:
        peft = _peft()
        if self.adapter is not None:
            if not (Path(self.adapter) / "adapter_config.json").is_file():
                raise ValueError(f"There is no adapter of peft in {self.adapter!r}: it has no adapter_config.json.")
            return peft.PeftModel.from_pretrained(self._base.load(), self.adapter, is_trainable=True)
        config = peft.LoraConfig(
            r=self.r,
            lora_alpha=self.lora_alpha,
            lora_dropout=self.lora_dropout,
            target_modules=list(self.target_modules),
            task_type="CAUSAL_LM",
        )
        return peft.get_peft_model(self._base.load(), config)

    def tokenizer(self) -> Any:
        return self._base.tokenizer()


def is_peft(model: Any) -> bool:
    """Whether this is a ``PeftModel``, without importing peft."""
    return any(cls.__name__ == "PeftModel" and cls.__module__.startswith("peft.") for cls in type(model).__mro__)


def adapter_config(model: Any) -> str | None:
    """The settings of a peft model's adapter as JSON, for ``wrap``; None for other models."""
    return json.dumps(active_config(model).to_dict(), default=sorted) if is_peft(model) else None


def active_config(model: Any) -> Any:
    """The settings of the only adapter of a ``PeftModel``, which must be a LoRA.

    Raises:
        ValueError: it has several adapters, or one of another type.
    """
    names = list(model.peft_config)
    if len(names) > 1:
        raise ValueError(
            f"The model has several adapters ({', '.join(names)}), and only one can be saved with its base. Delete the "
            "others (model.delete_adapter), or save the model yourself: model.save_pretrained."
        )
    config = model.peft_config[names[0]]
    if getattr(config, "r", None) is None:
        raise ValueError(
            f"The adapter is {type(config).__name__}, and only LoRA is exported. Save the model yourself: "
            "model.save_pretrained."
        )
    return config


def wrap(model: nn.Module, config: str) -> Any:
    """A model with a new adapter of these settings."""
    peft = _peft()
    return peft.get_peft_model(model, peft.PeftConfig.from_peft_type(**json.loads(config)))


def base_of(model: Any, state: Mapping[str, Tensor] | None = None) -> tuple[dict[str, Tensor], list[InspectedLayer]]:
    """The state dict of a peft model's base, masks folded in, with the names of the bare model; and its layers.

    Args:
        model: a ``PeftModel``.
        state: its whole state dict, if it is sharded.

    Raises:
        ValueError: peft keeps copies of whole modules (``modules_to_save``), so that the base is not one model.
    """
    base = model.get_base_model()
    own = base.state_dict() if state is None else {k.removeprefix(_WRAPPED): value for k, value in state.items()}
    copied = next((name for name in own if ".modules_to_save." in name), None)
    if copied is not None:
        raise ValueError(
            f"The adapter holds a copy of a whole module ({copied}, peft's modules_to_save), which is not "
            "exported. Leave modules_to_save out, or save the model yourself: model.save_pretrained, model.unload."
        )
    adapters = tuple(f"{name}." for name in adapter_names(base))
    folded = {_plain(k): v for k, v in folded_state_dict(base, own).items() if not k.startswith(adapters)}
    layers = layer_sparsities(base, None if state is None else own)
    return folded, [
        replace(layer, name=_plain(layer.name + ".").rstrip("."))
        for layer in layers
        if not f"{layer.name}.".startswith(adapters)
    ]


def card_row(model: Any) -> str:
    """What a model card says about the adapter."""
    config, wanted = active_config(model), active_config(model).target_modules
    modules = f"{wanted!r}" if isinstance(wanted, str) else ", ".join(sorted(wanted))
    return (
        f"LoRA, r {config.r}, lora_alpha {config.lora_alpha}, on {modules}, in the folder `{FOLDER}`, for "
        f"`PeftModel.from_pretrained(model, '<this folder>/{FOLDER}')`; not included in the weights counted here, and "
        "merging it into them loses their zeros"
    )


def _plain(name: str) -> str:
    return name.replace(_BASE_LAYER, "")


def _peft() -> Any:
    try:
        import peft
    except ImportError as error:
        raise ValueError("LoRA needs the package peft: pip install 'sparse-train[peft]'.") from error
    return peft
