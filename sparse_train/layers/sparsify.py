"""Whole models: linear layers become masked ones and, at the end, plain ones with zeros."""

import functools
import logging
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import nn

from sparse_train.architecture import CONV1D, class_path
from sparse_train.distributed.fsdp2 import reshard
from sparse_train.layers.adapters import check_adapters, note_adapters
from sparse_train.layers.mask_lora import attach_factors
from sparse_train.layers.masked_layer import MaskedLayer, SparseLinear, sparse_layers
from sparse_train.layers.masks import FACTOR_NAMES, MASK_NAME
from sparse_train.layers.state_dicts import EXTRA_STATE, is_mask, refusals, refuse_dense, teach_save_pretrained

_log = logging.getLogger(__name__)

FALCON_LINEAR = "transformers.models.falcon.modeling_falcon.FalconLinear"
"""A subclass of ``nn.Linear`` that computes what ``nn.Linear`` does."""
_FAST_PATH = {nn.TransformerEncoderLayer: "activation_relu_or_gelu", nn.TransformerEncoder: "use_nested_tensor"}
"""What lets torch read the weights of these modules' layers itself, kept and pruned alike, in eval mode."""
_DDP_IGNORES = "_ddp_params_and_buffers_to_ignore"  # torch's name; its setter would drop earlier entries


def sparsify(model: nn.Module, layers: Iterable[nn.Module]) -> None:
    """Turn linear layers of ``model`` into masked ones in place, keeping every weight; idempotent.

    An ``nn.Linear`` becomes a ``SparseLinear``, transformers' ``Conv1D`` a ``SparseConv1D``.

    Afterwards the state dict holds the masks too, a state dict without them is refused, and ``save_pretrained`` of a
    transformers model writes pruned weights as zeros.
    """
    for layer in layers:
        if not isinstance(layer, MaskedLayer):
            layer.__class__ = sparse_class(type(layer))  # type: ignore[arg-type,assignment]
            assert isinstance(layer, MaskedLayer)
            layer.start_masking()
    if not refusals(model):
        model.register_load_state_dict_pre_hook(refuse_dense)
    _keep_from_ddp(model)
    _leave_fast_path(model)
    note_adapters(model)
    teach_save_pretrained()


def squash(model: nn.Module) -> None:
    """Fold masks into weights: pruned weights become exact zeros, and plain linear layers remain.

    Adapters inside masks (``layers.mask_lora``) are folded in as well. Warns if no mask prunes anything. Raises
    ValueError if an adapter of peft was merged into a masked layer, or reads the weights it prunes.
    """
    layers = sparse_layers(model)
    if layers and all(layer.is_dense() for layer in layers.values()):
        _log.warning(
            "None of the %d masked layers has a pruned weight, so squash leaves a dense model: there was no mask "
            "update before it. MaskUpdater makes its first mask half an interval into a run, or starts from the one "
            "that prune(..., squash=False) has set.",
            len(layers),
        )
    check_adapters(model)
    squash_layers(model)


@torch.no_grad()
def squash_layers(model: nn.Module, only: Iterable[MaskedLayer] | None = None) -> None:
    """``squash`` without its checks, and for some layers only (default: all)."""
    reshard(model)
    for layer in sparse_layers(model).values() if only is None else only:
        layer.merge()
        layer.write_zeros()
        layer.stop_masking()
        layer.__class__ = dense_class(type(layer))  # type: ignore[arg-type]
    if sparse_layers(model):
        return
    _keep_from_ddp(model)
    for module in model.modules():
        for key in refusals(module):
            del module._load_state_dict_pre_hooks[key]
        vars(module).update(vars(module).pop("_fast_path", {}))


def _keep_from_ddp(model: nn.Module) -> None:
    """Tell a later ``DistributedDataParallel(model)`` to ignore masks.

    Otherwise it would send rank 0's masks to all ranks in every forward, which costs time and hides disagreement.
    """
    names = [".".join(filter(None, (name, MASK_NAME))) for name in sparse_layers(model)]
    others = [name for name in getattr(model, _DDP_IGNORES, ()) if not is_mask(name)]
    if names or hasattr(model, _DDP_IGNORES):
        setattr(model, _DDP_IGNORES, [*others, *names])


def _leave_fast_path(model: nn.Module) -> None:
    for module in model.modules():
        for cls, condition in _FAST_PATH.items():
            if isinstance(module, cls) and "_fast_path" not in vars(module):
                vars(module)["_fast_path"] = {condition: getattr(module, condition)}
                setattr(module, condition, False)


def sparsify_like(module: nn.Module, state_dict: Mapping[str, Any], prefix: str = "") -> None:
    """Sparsify the layers of ``module`` whose masks are in ``state_dict``, so that the state can be loaded.

    To load the state of a sparse model into a dense one: ``sparsify_like(module, state)``, then
    ``module.load_state_dict(state)``, and ``squash(module)`` for true zeros. For Lightning, ``load_from_checkpoint``.
    """
    names = [key.removeprefix(prefix).removesuffix(MASK_NAME).removesuffix(".") for key in state_dict if is_mask(key)]
    layers = [module.get_submodule(name) for name in names]
    new = [layer for layer in layers if not isinstance(layer, MaskedLayer)]
    if new:
        sparsify(module, new)
    for name, layer in zip(names, layers, strict=True):
        assert isinstance(layer, MaskedLayer)
        place = f"{prefix}{name}." if name else prefix
        factor = state_dict.get(place + FACTOR_NAMES[0])
        if factor is not None and not layer.has_factors:
            attach_factors(layer, factor.shape[0], int(state_dict[place + EXTRA_STATE]))


# --- classes ---------------------------------------------------------------------------------------------------------


@functools.cache
def sparse_class(cls: Any) -> type | None:
    """The masked form of a class that computes what ``nn.Linear`` does; None for others."""
    if cls is nn.Linear or class_path(cls) == FALCON_LINEAR:  # FalconLinear becomes an nn.Linear after squash
        return SparseLinear
    if class_path(cls) == CONV1D:
        from sparse_train.layers.conv1d import SparseConv1D

        return SparseConv1D
    # fully_shard has created a class FSDPLinear(FSDPModule, Linear) for this module; it must stay an FSDPModule.
    first, *others = cls.__bases__
    if first.__name__ == "FSDPModule" and first.__module__.startswith("torch.distributed.") and others == [nn.Linear]:
        return type(f"{cls.__name__}Sparse", (first, SparseLinear), dict(cls.__dict__))
    return None


@functools.cache
def dense_class(cls: Any) -> type:
    if cls.__bases__[-1] is not SparseLinear:
        return cls.dense
    return type(cls.__name__.removesuffix("Sparse"), (cls.__bases__[0], nn.Linear), dict(cls.__dict__))
