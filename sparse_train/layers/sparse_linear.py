"""The masked layer: an ``nn.Linear`` that keeps its dense parameter and computes with ``where(mask, weight, 0)``.

Shape suffixes: O out_features, I in_features, J packed mask bytes = ceil(I / 8).
"""

import functools
import inspect
import logging
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sparse_train.layers import masks, sharding
from sparse_train.layers.adapters import guard_merges
from sparse_train.layers.matrices import (
    CONV1D,
    FACTOR_NAMES,
    FALCON_LINEAR,
    MASK_NAME,
    REACHED_NAMES,
    MaskedLayer,
    class_path,
    is_conv1d,
)

_log = logging.getLogger(__name__)
SPARSE_CONV1D = "sparse_train.layers.conv1d.SparseConv1D"


class SparseLinear(MaskedLayer, nn.Linear):
    """A linear layer whose forward uses only kept weights.

    ``sparsify`` makes it from an ``nn.Linear`` in place. The parameter objects and their names stay, so optimizers,
    sharding engines and checkpoints are not affected. ``weight`` (O, I) holds kept and shadow values together;
    ``weight_mask`` (O, ceil(I / 8)) uint8 is the packed mask, see ``sparse_train.layers.masks``.
    """

    @property
    def weight_OI(self) -> Tensor:
        return self.weight

    def reset_parameters(self) -> None:
        # Also called after ``to_empty`` of a layer created on the meta device, when the buffer's bytes are garbage.
        super().reset_parameters()
        if MASK_NAME in self._buffers:
            masks.fill_full(self.weight_mask, self.in_features)


# --- Whole models ----------------------------------------------------------------------------------------------------


def sparse_layers(model: nn.Module) -> dict[str, MaskedLayer]:
    """The masked layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MaskedLayer)}


def sparsify(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Turn linear layers of ``model`` into masked ones in place, keeping every weight; idempotent.

    An ``nn.Linear`` becomes a ``SparseLinear``, transformers' ``Conv1D`` a ``SparseConv1D``.

    Afterwards the state dict holds the masks too, a state dict without them is refused, and ``save_pretrained`` of a
    transformers model writes pruned weights as zeros.
    """
    for layer in layers:
        if isinstance(layer, MaskedLayer):
            continue
        layer.__class__ = _sparse_class(type(layer))  # type: ignore[arg-type]
        assert isinstance(layer, MaskedLayer) and isinstance(layer, nn.Module)
        device = layer.weight_OI.device
        layer.register_buffer(MASK_NAME, masks.full(layer.out_features, layer.in_features, device))
        layer.straight_through, layer.statistics, layer.records, layer.recorder = True, None, True, None
        layer.reached = False
    if not _refusals(model):
        model.register_load_state_dict_pre_hook(_refuse_dense)
    _keep_from_ddp(model)
    _teach_save_pretrained()
    guard_merges(model)


def squash(model: nn.Module) -> None:
    """Fold masks into weights: pruned weights become exact zeros, and plain linear layers remain.

    Adapters inside masks (``layers.mask_lora``) are folded in as well. Warns if no mask prunes anything, for example
    because a loop ended before ``MaskUpdater`` had recorded enough for a first mask.

    Args:
        model: with masked layers anywhere in it.
    """
    layers = sparse_layers(model)
    if layers and all(layer.keeps_all() for layer in layers.values()):
        _log.warning(
            "None of the %d masked layers has a pruned weight, so squash leaves a dense model: there was no mask "
            "update before it. MaskUpdater makes its first mask half an interval into a run, or starts from the one "
            "that prune(..., squash=False) has set.",
            len(layers),
        )
    fold(model)


@torch.no_grad()
def fold(model: nn.Module, only: Iterable[MaskedLayer] | None = None) -> None:
    """``squash`` without the warning about masks that prune nothing, and for some layers only (default: all)."""
    sharding.reshard(model)
    for layer in sparse_layers(model).values() if only is None else list(only):
        assert isinstance(layer, MaskedLayer)
        assert isinstance(layer, nn.Module)
        layer.merge()
        sharding.write_zeros(layer)
        for name in (MASK_NAME, "straight_through", "statistics", "records", "recorder", *REACHED_NAMES):
            delattr(layer, name)
        layer.__class__ = _dense_class(type(layer))  # type: ignore[arg-type]
    if sparse_layers(model):
        return
    _keep_from_ddp(model)
    for module in model.modules():
        for key in _refusals(module):
            del module._load_state_dict_pre_hooks[key]


def _keep_from_ddp(model: nn.Module) -> None:
    """Tell a later ``DistributedDataParallel(model)`` to ignore masks.

    Otherwise it would send rank 0's masks to all ranks in every forward, which costs time and hides disagreement.
    """
    names = [".".join(filter(None, (name, MASK_NAME))) for name in sparse_layers(model)]
    others = [name for name in getattr(model, _DDP_IGNORES, ()) if not _is_mask(name)]
    if names or others or hasattr(model, _DDP_IGNORES):
        setattr(model, _DDP_IGNORES, [*others, *names])


_DDP_IGNORES = "_ddp_params_and_buffers_to_ignore"  # torch's name; its setter would drop earlier entries


def squashed_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict that ``squash`` would leave, without changing the model."""
    return folded_state_dict(model, model.state_dict())


def folded_state_dict(
    model: nn.Module, state: Mapping[str, Tensor], device: torch.device | str | None = None
) -> dict[str, Tensor]:
    """A state dict of ``model`` with its masks, and adapters inside them, folded into its weights.

    Args:
        model: the model that the state belongs to.
        state: with masks.
        device: where to put folded weights, one after the other. Together they need as much memory as the targets,
            which a GPU may not have free in the middle of a run. Default: the device where they were.
    """
    folded = {key: value for key, value in state.items() if not _is_mask(key)}
    for key, mask_OJ in state.items():
        if _is_mask(key):
            name = key.removesuffix(MASK_NAME)
            weight = state[f"{name}weight"].detach()
            layer: Any = model.get_submodule(name.removesuffix("."))
            if getattr(layer, "adapted", False):
                weight = layer.summed(weight, *(folded.pop(name + factor).detach() for factor in FACTOR_NAMES))
                folded.pop(name + _EXTRA_STATE, None)
            if is_conv1d(layer):
                weight = masks.apply(weight.t(), mask_OJ).t().contiguous()
            else:
                weight = masks.apply(weight, mask_OJ)
            folded[f"{name}weight"] = weight if device is None else weight.to(device)
    return folded


_EXTRA_STATE = "_extra_state"  # torch's


def _is_mask(key: str) -> bool:
    return key == MASK_NAME or key.endswith(f".{MASK_NAME}")


def _teach_save_pretrained() -> None:
    """Make ``PreTrainedModel.save_pretrained`` fold masks; done once, for all models.

    The class is patched and not the model, because the saved model may be one around the sparsified model, or a copy,
    and trainers pass their own state dict.
    """
    modeling = sys.modules.get("transformers.modeling_utils")
    if modeling is None or getattr(modeling.PreTrainedModel.save_pretrained, "folds_masks", False):
        return
    original = modeling.PreTrainedModel.save_pretrained
    signature = inspect.signature(original)

    @functools.wraps(original)
    def save_pretrained(self: Any, *args: Any, **kwargs: Any) -> Any:
        layers = sparse_layers(self)
        if not layers:
            return original(self, *args, **kwargs)
        bound = signature.bind(self, *args, **kwargs)
        state = bound.arguments.get("state_dict")
        if state is None and any(map(sharding.is_sharded, layers.values())):
            raise ValueError(
                "The weights of this model are divided among processes, so save_pretrained would not write it whole. "
                "Call sparse_train.export.export_model(model, tokenizer, folder) in every process."
            )
        bound.arguments["state_dict"] = folded_state_dict(self, self.state_dict() if state is None else state, "cpu")
        return original(*bound.args, **bound.kwargs)

    save_pretrained.folds_masks = True  # type: ignore[attr-defined]
    modeling.PreTrainedModel.save_pretrained = save_pretrained


def sparsify_like(module: nn.Module, state_dict: Mapping[str, Any], prefix: str = "") -> None:
    """Sparsify the layers of ``module`` whose masks are in ``state_dict``, so that the state can be loaded.

    To load the checkpoint of a sparse run into a dense module: ``sparsify_like(module, state)``, then
    ``module.load_state_dict(state)``, and ``squash(module)`` for true zeros.
    """
    names = [key.removeprefix(prefix).removesuffix(f".{MASK_NAME}") for key in state_dict if _is_mask(key)]
    layers = [module.get_submodule(name) for name in names]
    new = [layer for layer in layers if not isinstance(layer, MaskedLayer)]
    if new:
        sparsify(module, new)
    for name, layer in zip(names, layers, strict=True):
        factor = state_dict.get(f"{prefix}{name}.{FACTOR_NAMES[0]}")
        if factor is not None and not layer.adapted:
            from sparse_train.layers.mask_lora import attach_factors

            assert isinstance(layer, MaskedLayer)
            settings = state_dict[f"{prefix}{name}.{_EXTRA_STATE}"]
            attach_factors(layer, factor.shape[0], **settings)


def _refuse_dense(module: nn.Module, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
    found = [f"{prefix}{name}." if name else prefix for name in sparse_layers(module)]
    # a state dict without the weights of these layers, such as a file of adapters, needs no masks either
    keys = [name + MASK_NAME for name in found if f"{name}weight" in state_dict]
    if keys and not any(key in state_dict for key in keys):
        raise ValueError(
            f"The model is sparsified, but this checkpoint holds no masks (no {keys[0]}): it "
            "was saved from a dense or a squashed model. To start sparse training from it, load it into the model "
            "before sparsifying, and leave ckpt_path out; to continue a sparse run, use a checkpoint that it wrote."
        )
    for name, layer in sparse_layers(module).items():
        here = f"{prefix}{name}." if name else prefix
        in_file = here + FACTOR_NAMES[0] in state_dict
        if f"{here}weight" in state_dict and in_file != layer.adapted:
            with_adapters, without = ("checkpoint", "model") if in_file else ("model", "checkpoint")
            raise ValueError(
                f"{name}: the {with_adapters} has a mask_lora adapter, and the {without} has none. Resume with the "
                "mask_lora that the checkpoint was written with; to start a new run from it, export it (squash merges)."
            )


def _refusals(module: nn.Module) -> list[int]:
    hooks = module._load_state_dict_pre_hooks.items()
    return [key for key, hook in hooks if getattr(hook, "hook", hook) is _refuse_dense]


@functools.cache
def _sparse_class(cls: Any) -> type:
    if cls is nn.Linear or class_path(cls) == FALCON_LINEAR:  # FalconLinear becomes an nn.Linear after squash
        return SparseLinear
    if class_path(cls) == CONV1D:
        from sparse_train.layers.conv1d import SparseConv1D

        return SparseConv1D
    # fully_shard has created a class FSDPLinear(FSDPModule, Linear) for this module; it must stay an FSDPModule.
    assert cls.__bases__[-1] is nn.Linear and len(cls.__bases__) == 2, cls
    return type(f"{cls.__name__}Sparse", (cls.__bases__[0], SparseLinear), dict(cls.__dict__))


@functools.cache
def _dense_class(cls: Any) -> type:
    if cls is SparseLinear:
        return nn.Linear
    if class_path(cls) == SPARSE_CONV1D:
        return next(base for base in cls.__bases__ if base is not MaskedLayer)  # type: ignore[no-any-return]
    return type(cls.__name__.removesuffix("Sparse"), (cls.__bases__[0], nn.Linear), dict(cls.__dict__))
