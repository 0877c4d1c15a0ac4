"""State dicts of models with masked layers: folded, for saving; and which ones may be loaded.

This module knows masks by their names in state dicts and in modules, and not the masked layer, which is built on it.
"""

import functools
import inspect
import sys
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparse_train.architecture import is_conv1d
from sparse_train.distributed.engines import layout_of
from sparse_train.layers import masks
from sparse_train.layers.adapters import check_adapters
from sparse_train.layers.masks import FACTOR_NAMES, MASK_NAME, masked_modules

EXTRA_STATE = "_extra_state"  # torch's


def is_mask(key: str) -> bool:
    return key == MASK_NAME or key.endswith(f".{MASK_NAME}")


# --- saving ----------------------------------------------------------------------------------------------------------


def folded_state_dict(
    model: nn.Module, state: Mapping[str, Tensor] | None = None, device: torch.device | str | None = None
) -> dict[str, Tensor]:
    """A state dict of ``model`` (default: its own) with its masks, and adapters inside them, folded into its weights.

    Args:
        model: the model that the state belongs to.
        state: with masks; where it has none, such as a dict of averaged parameters, those of the model count.
        device: where to put folded weights, one after the other. Together they need as much memory as the targets,
            which a GPU may not have free in the middle of a run. Default: the device where they were.
    """
    if state is None:
        if any(layout_of(layer.weight).is_sharded for layer in masked_modules(model).values()):
            raise ValueError(
                "The weights of this model are divided among processes, and its state dict has only parts of them. "
                "Call sparse_train.export.export_model(model, tokenizer, folder) in every process."
            )
        state = model.state_dict()
    folded = {key: value for key, value in state.items() if not is_mask(key)}
    for key, mask_OJ in _masks_for(model, state).items():
        name = key.removesuffix(MASK_NAME)
        weight = state[f"{name}weight"].detach()
        layer: Any = model.get_submodule(name.removesuffix("."))
        if getattr(layer, "has_factors", False) and name + FACTOR_NAMES[0] in folded:  # or the state is folded already
            weight = layer.summed(weight, *(folded.pop(name + factor).detach() for factor in FACTOR_NAMES))
            folded.pop(name + EXTRA_STATE, None)
        is_stored_OI = not is_conv1d(layer)
        weight = masks.apply(weight, mask_OJ) if is_stored_OI else masks.apply(weight.t(), mask_OJ).t().contiguous()
        folded[f"{name}weight"] = weight if device is None else weight.to(device)
    return folded


def _masks_for(model: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    by_key = {key: value for key, value in state.items() if is_mask(key)}
    for name, layer in masked_modules(model).items():
        weight, mask = f"{name}weight", f"{name}{MASK_NAME}"
        if weight not in state or mask in by_key:
            continue
        if state[weight].shape != layer.weight.shape or layout_of(layer.weight).is_sharded:
            raise ValueError(
                f"The state dict has {weight} and not {mask}, and the model's own mask does not fit it, so pruned "
                "weights cannot be told from kept ones. Use a state dict with masks, such as model.state_dict()."
            )
        by_key[mask] = layer.weight_mask.to(state[weight].device)
    return by_key


def teach_save_pretrained() -> None:
    """Make ``PreTrainedModel.save_pretrained`` fold masks; done once, for all models.

    The class is patched and not the model, because the saved model may be one around the sparsified model, or a copy,
    and trainers pass their own state dict. There is no public way to be asked by it.
    """
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None or getattr(modeling.PreTrainedModel.save_pretrained, "folds_masks", False):
        return
    original = modeling.PreTrainedModel.save_pretrained
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        if not masked_modules(self):
            return original(self, *args, **kwargs)
        check_adapters(self)
        bound = signature.bind(self, *args, **kwargs)
        bound.arguments["state_dict"] = folded_state_dict(self, bound.arguments.get("state_dict"), "cpu")
        return original(*bound.args, **bound.kwargs)

    save_pretrained.folds_masks = True  # type: ignore[attr-defined]
    modeling.PreTrainedModel.save_pretrained = save_pretrained


# --- loading ---------------------------------------------------------------------------------------------------------


def refuse_dense(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    """A hook that refuses weights without masks, unless they are zero wherever the model's masks prune."""
    # a state dict without the weights of these layers, such as a file of adapters, needs no masks either
    layers = {name: each for name, each in masked_modules(module, prefix).items() if f"{name}weight" in state_dict}
    for name, layer in layers.items():
        in_file = name + FACTOR_NAMES[0] in state_dict
        if in_file != layer.has_factors:
            with_adapters, without = ("checkpoint", "model") if in_file else ("model", "checkpoint")
            raise ValueError(
                f"{name.removesuffix('.')}: the {with_adapters} has a mask_lora adapter, and the {without} has none. "
                "Resume with the mask_lora that the checkpoint was written with; to start a new run from it, export it "
                "(squash merges)."
            )
    bare = {name: each for name, each in layers.items() if name + MASK_NAME not in state_dict}
    prunes = any(not each.weight_mask.is_meta and not each.is_dense() for each in bare.values())
    if prunes and all(_has_zeros_of(each, state_dict[f"{name}weight"]) for name, each in bare.items()):
        # ``save_pretrained`` has written them from this model, or from one with the same masks
        state_dict.update({name + MASK_NAME: each.weight_mask for name, each in bare.items()})
    elif bare:
        raise ValueError(
            f"The model is sparsified, but this checkpoint holds no masks (no {next(iter(bare))}{MASK_NAME}), as if it "
            "was saved from a dense or a squashed model, or by a run with other targets. To start sparse training from "
            "it, load it into the model before sparsifying, and leave ckpt_path out; to continue a sparse run, use a "
            "checkpoint that it wrote."
        )


def _has_zeros_of(layer: Any, weight: Any) -> bool:
    """Whether a stored weight is zero wherever the layer's mask prunes; False with an adapter, or if sharded."""
    if layer.has_factors or layer.layout.is_sharded or weight.shape != layer.weight.shape:
        return False
    if layer.weight_mask.is_meta or weight.is_meta:  # there is nothing to compare
        return False
    pruned_OI = ~layer.unpacked_mask().to(weight.device)
    return not bool((layer.turned(weight)[pruned_OI] != 0).any())


def refusals(module: nn.Module) -> list[int]:
    hooks = module._load_state_dict_pre_hooks.items()
    return [key for key, hook in hooks if getattr(hook, "hook", hook) is refuse_dense]
