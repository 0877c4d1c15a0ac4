"""``LoRA``: peft's adapters on a frozen base, and the parts that such a model is exported in.

Imports peft only when it is used.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_train.inspection import LayerSparsity, layer_sparsities
from sparse_train.layers.state_dicts import folded_state_dict
from sparse_train.layers.targets import adapter_names

FOLDER = "adapter"
"""Subfolder of the adapter, in the folder of its base."""


@dataclass
class LoRA:
    """peft's low-rank adapters (Hu et al., arXiv 2106.09685) on a frozen model: ``CausalLM(model, lora=LoRA())``.

    As in Table 6 of Wanda (arXiv 2306.11695), whose settings are the defaults. The model is a sparse folder, or a dense
    one that ``DynamicPruning`` prunes at the start of the run. The kept weights of a frozen model do not change, and
    with ``policy: Fixed`` its first mask does not either.

    ``fit --export`` writes the model with its zeros to the folder, and the adapter to ``adapter/`` inside it:
    ``PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(folder), f"{folder}/adapter")``. **Merging them
    loses the zeros**. For an adapter that can be merged, train with ``DynamicPruning(mask_lora=MaskLoRA())``.

    Args:
        r: rank.
        lora_alpha: the product of the factors is multiplied by ``lora_alpha / r``.
        lora_dropout: share of an adapter's inputs that are dropped in training.
        target_modules: last parts of the names of layers that get an adapter.
        adapter: folder of a trained adapter to go on with, which has settings of its own.
    """

    r: int = 8
    lora_alpha: int = 16
    lora_dropout: float = 0.05
    target_modules: Sequence[str] = ("q_proj", "v_proj")
    adapter: str | None = None

    def added_to(self, model: Any) -> Any:
        """A ``PeftModel`` around a transformers model, which is frozen."""
        import peft

        if self.adapter is not None:
            if not (Path(self.adapter) / "adapter_config.json").is_file():  # peft would ask the hub
                raise ValueError(f"There is no adapter of peft in {self.adapter!r}: it has no adapter_config.json.")
            return peft.PeftModel.from_pretrained(model, self.adapter, is_trainable=True)
        own = {name: getattr(self, name) for name in ("r", "lora_alpha", "lora_dropout")}
        names = self.target_modules
        names = names if isinstance(names, str) else list(names)  # a text as peft reads it, such as "all-linear"
        config = peft.LoraConfig(**own, target_modules=names, task_type="CAUSAL_LM")
        return peft.get_peft_model(model, config)


def is_peft(model: Any) -> bool:
    return any(cls.__name__ == "PeftModel" and cls.__module__.startswith("peft.") for cls in type(model).__mro__)


def adapter_config(model: Any) -> str | None:
    """The settings of a peft model's adapter as JSON, for ``wrap``; None for other models."""
    return json.dumps(active_config(model).to_dict(), default=sorted) if is_peft(model) else None


def wrap(model: nn.Module, config: str) -> Any:
    """A model with a new adapter of these settings."""
    import peft

    return peft.get_peft_model(model, peft.PeftConfig.from_peft_type(**json.loads(config)))


def active_config(model: Any) -> Any:
    """The settings of the only adapter of a ``PeftModel``, a LoRA; ValueError if it has others, which would be lost."""
    config, *others = model.peft_config.values()
    if others or getattr(config, "r", None) is None:
        raise ValueError(
            f"The model has the adapters {', '.join(model.peft_config)}, and a single LoRA is what can be saved with "
            "its base. Delete the others (model.delete_adapter), or save it yourself: model.save_pretrained."
        )
    return config


def bare(name: str) -> str:
    """The name that a module or weight of a ``PeftModel`` has in the model that peft has put inside its own."""
    own = name.removeprefix("base_model.model.")
    return re.sub(r"\.(token_adapter\.base_layer|base_layer|original_module)\b", "", own)


def base_of(model: Any, state: Mapping[str, Tensor] | None = None) -> tuple[dict[str, Tensor], list[LayerSparsity]]:
    """The state dict of a peft model's base, masks folded in, with the names of the bare model; and its layers.

    ``state`` is the model's whole state dict, if it is sharded. Raises ValueError if an adapter of another kind holds a
    weight of the base under a name that is not known here.
    """
    base = model.get_base_model()
    own = None if state is None else {name.removeprefix("base_model.model."): value for name, value in state.items()}
    adapters = tuple(f"{name}." for name in adapter_names(base))
    folded = folded_state_dict(base, own)
    weights = {bare(name): value for name, value in folded.items() if not name.startswith(adapters)}
    if lost := sorted(_names_of_a_new(base) - weights.keys()):
        raise ValueError(
            f"The folder of the base would lack {lost[0]}: it has another name inside this adapter, or the model is no "
            "longer that of its configuration. Take the adapter away (model.unload()), squash the model, and save it."
        )
    return weights, [
        replace(layer, name=bare(layer.name))
        for layer in layer_sparsities(base, own)
        if not f"{layer.name}.".startswith(adapters)
    ]


def _names_of_a_new(base: Any) -> set[str]:
    """The weights of a model with this configuration; none if more than that is needed to make one."""
    try:
        with torch.device("meta"):
            return set(type(base)(base.config).state_dict())
    except Exception:  # code of a model that is not in transformers may do anything
        return set()


def card_row(model: Any) -> str:
    config, wanted = active_config(model), active_config(model).target_modules
    modules = f"{wanted!r}" if isinstance(wanted, str) else ", ".join(sorted(wanted))
    return (
        f"LoRA, r {config.r}, lora_alpha {config.lora_alpha}, on {modules}, in the folder `{FOLDER}`, for "
        f"`PeftModel.from_pretrained(model, '<this folder>/{FOLDER}')`; not included in the weights counted here, and "
        "merging it into them loses their zeros"
    )
