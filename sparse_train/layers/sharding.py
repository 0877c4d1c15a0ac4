"""What a process holds of a weight matrix: all of it, some of its rows (FSDP2), or a flat piece (ZeRO-3).

This module has all that the rest of the package needs from engines that shard. It inspects the parameters themselves,
so nothing has to be told which engine runs, and an engine is imported only when one of its parameters appears.

Shape suffixes: O out_features, I in_features, J packed mask bytes; R rows of this process.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparse_train.distributed import rank, world_size
from sparse_train.layers.blocks import block_lists
from sparse_train.layers.matrices import MaskedMatrix

NO_ADAPTERS = (
    "{} has a mask_lora adapter, and its parameters are divided among processes (FSDP2, DeepSpeed), where the sum of "
    "the two cannot be masked. Train in one process or with DDP, or without mask_lora."
)
"""Error message, to be formatted with the layer's name."""

Elementwise = Callable[[Tensor, Tensor], Tensor]
"""Computes new values from weights and the mask entries that belong to them, both of the same, arbitrary shape."""


def is_sharded(layer: MaskedMatrix) -> bool:
    """Whether no process holds the whole weight."""
    return is_dtensor(layer.weight_OI) or is_zero3(_parameter(layer))


def is_dtensor(tensor: Any) -> bool:
    """Whether this is a tensor of FSDP2 (or of tensor parallelism), of which each process holds a part."""
    return hasattr(tensor, "placements")


def is_zero3(parameter: Any) -> bool:
    """Whether DeepSpeed's ZeRO-3 has partitioned this parameter."""
    return hasattr(parameter, "ds_id")


def has_masters(layer: MaskedMatrix) -> bool:
    """Whether parameters are whole, but DeepSpeed's ZeRO-1 or 2 holds float32 masters of them in pieces."""
    return hasattr(_parameter(layer), "_hp_mapping")


def check_layout(name: str, layer: nn.Module) -> None:
    """Raise ValueError for a layer whose weight is sharded in a way that masks cannot follow."""
    parameter: Any = layer.weight
    if getattr(layer, "adapted", False):
        factor: Any = layer.mask_lora_A
        if is_dtensor(parameter) or is_zero3(parameter) or hasattr(factor, "_hp_mapping"):
            raise ValueError(NO_ADAPTERS.format(name))
    if getattr(parameter, "ds_secondary_tensor", None) is not None:
        raise ValueError(
            f"{name} has a second copy within its node (ZeRO++'s zero_hpz_partition_size), which is not masked. "
            "Set zero_hpz_partition_size to 1."
        )
    if not is_dtensor(parameter):
        return
    one_way = len(parameter.placements) == 1 and parameter.placements[0].is_shard(0)
    if not one_way or parameter.device_mesh.size() != world_size():
        raise ValueError(
            f"{name} is laid out as {parameter.placements} over {parameter.device_mesh.size()} of {world_size()} "
            "processes. Masks follow weights that FSDP2 shards along their first dimension over all processes; tensor "
            "parallelism and hybrid sharding are not supported. Set data_parallel_size to the number of processes and "
            'tensor_parallel_size to 1, and give fully_shard the mesh of one dimension, device_mesh["data_parallel"].'
        )


@contextmanager
def weights(layer: MaskedMatrix, by_rows: bool) -> Iterator[tuple[Tensor, slice]]:
    """The weight, for reading, and which of its rows these are: all of them, or, if ``by_rows``, this process's.

    One layer at a time: ZeRO-3 gathers it on entry and releases it on exit; FSDP2 gathers it unless ``by_rows``.
    """
    everything, device = slice(0, layer.out_features), layer.weight_mask.device
    if is_zero3(_parameter(layer)):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([_parameter(layer)]):
            yield layer.weight_OI.detach(), everything
        return
    weight: Any = layer.weight_OI.detach()
    if not is_dtensor(weight):
        yield layer.unmasked_weight(), everything
    elif by_rows and weight.placements[0].is_shard(0):
        weight_RI = weight.to_local()
        rows = rows_of(rank(), layer.out_features)
        assert weight_RI.shape[0] == rows.stop - rows.start, (weight_RI.shape, rows)
        yield weight_RI.to(device), rows  # shards may be in main memory (CPUOffloadPolicy)
    else:
        yield weight.full_tensor().to(device), everything


def rows_of(process: int, out_features: int) -> slice:
    """The rows that FSDP2 gives to a process: equal chunks, the last ones shorter or empty."""
    chunk = -(-out_features // world_size())
    return slice(min(out_features, process * chunk), min(out_features, (process + 1) * chunk))


def reshard(model: nn.Module) -> None:
    """Release weights that FSDP2 still holds gathered, for example after an evaluation. What is written to gathered
    weights is lost, and they are not recognised as sharded."""
    for module in model.modules():
        if any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__):
            module.reshard()  # type: ignore[operator]


@torch.no_grad()
def rewrite(layer: MaskedMatrix, function: Elementwise) -> None:
    """Replace weights in place, in each process its part, together with DeepSpeed's float32 masters.

    If the masters kept the old values, the next optimizer step would bring them back.
    """
    parameter = _parameter(layer)
    if is_zero3(parameter):
        _rewrite_zero3(layer, parameter, function)
        return
    weight: Any = layer.weight_OI
    if is_dtensor(weight):
        here = _here(weight)
        local = weight.to_local()
        local.copy_(function(local, layer.unpacked_mask()[here].to(local.device)))
        return
    weight.copy_(function(weight, layer.unpacked_mask()))
    if getattr(parameter, "_hp_mapping", None) is not None:  # ZeRO-1 and 2: parameters are whole, masters in pieces
        # DeepSpeed's safe_set_full_fp32_param does this too, but needs the whole master, which would cost a reduce
        piece, master = parameter._hp_mapping.lp_fragment_address, parameter._hp_mapping.get_hp_fragment()
        keep = stored(layer, layer.unpacked_mask()).reshape(-1)[piece.start : piece.start + piece.numel]
        master.copy_(function(master.reshape(-1), keep.to(master.device)).view_as(master))


def _rewrite_zero3(layer: MaskedMatrix, parameter: Any, function: Elementwise) -> None:
    piece = parameter.ds_tensor  # this process's piece, flat; the last process's is padded at its end
    flat = stored(layer, layer.unpacked_mask()).reshape(-1)
    mine = flat[rank() * piece.numel() : (rank() + 1) * piece.numel()].to(piece.device)
    own = piece.data[: len(mine)]
    own.copy_(function(own, mine))
    if parameter.data.numel() == parameter.ds_numel:  # a small parameter, which DeepSpeed keeps gathered
        parameter.data.copy_(function(parameter.data, flat.view_as(parameter.data)))
    if hasattr(parameter, "_z3_optimizer"):  # absent for frozen parameters and outside training
        from deepspeed.utils import safe_get_local_fp32_param, safe_set_local_fp32_param

        master = safe_get_local_fp32_param(parameter)
        if master is not None:
            master = master.clone().reshape(-1)
            master[: len(mine)] = function(master[: len(mine)], mine.to(master.device))
            safe_set_local_fp32_param(parameter, master)


def _here(weight: Any) -> tuple[slice, ...]:
    dim = weight.placements[0].dim
    own = rows_of(rank(), weight.shape[dim])
    return tuple(own if index == dim else slice(None) for index in range(weight.dim()))


def _parameter(layer: MaskedMatrix) -> Any:
    """The parameter of which ``weight_OI`` may be a view."""
    return getattr(layer, "weight", layer.weight_OI)


def stored(layer: MaskedMatrix, matrix_OI: Tensor) -> Tensor:
    """A matrix (O, I) in the orientation in which the layer's parameter is stored, or the other way round."""
    return matrix_OI if isinstance(layer, nn.Linear) else matrix_OI.t()


def decay_shadow(layer: MaskedMatrix, factor: float) -> None:
    """Multiply the values of pruned weights by ``factor``."""
    rewrite(layer, lambda weight, keep: torch.where(keep, weight, weight * factor))


def write_zeros(layer: MaskedMatrix) -> None:
    """Make pruned weights exact zeros."""
    if is_sharded(layer) or has_masters(layer):
        rewrite(layer, lambda weight, keep: torch.where(keep, weight, 0))
    else:
        layer.weight_OI.copy_(layer.masked_weight())  # the same result, without a bool per weight


def whole_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The whole state dict of a sharded model, on the CPU of rank 0; empty on other ranks, which must call too.

    It gathers one tensor at a time, so no device holds more than its shard and one tensor.
    """
    reshard(model)
    found: dict[int, Tensor] = {}  # tied parameters stay tied
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in found:
            with _gathered(tensor) as whole:
                found[id(tensor)] = whole.detach().cpu().clone() if rank() == 0 else whole.new_empty(0)
        state[name] = found[id(tensor)]
    return state if rank() == 0 else {}


@contextmanager
def _gathered(tensor: Any) -> Iterator[Tensor]:
    if is_zero3(tensor):
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([tensor]):
            yield tensor
    else:
        yield tensor.full_tensor() if is_dtensor(tensor) else tensor


@contextmanager
def whole_first() -> Iterator[None]:
    """Build a whole model inside ``zero.Init``, which Lightning's DeepSpeed strategy enters around ``configure_model``.

    DeepSpeed's engine partitions the model right afterwards. For models whose initialisation does not work on pieces,
    such as those of transformers.
    """
    parameters: Any = sys.modules.get("deepspeed.runtime.zero.partition_parameters")
    if parameters is None:
        yield
        return
    parameters.shutdown_init_context()
    try:
        yield
    finally:
        parameters.restore_init_context()


def shard_blocks(model: nn.Module, mesh: Any, *, bfloat16: bool = False) -> None:
    """FSDP2's ``fully_shard`` on each decoder block, and on the rest of the model; for ``configure_model``.

    Args:
        model: each process must have the same whole copy.
        mesh: a ``DeviceMesh`` of one dimension over all processes, such as ``self.device_mesh["data_parallel"]``.
        bfloat16: gather and compute in bfloat16; shards, sums of gradients and optimizer stay float32.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bfloat16 else MixedPrecisionPolicy()
    for blocks in block_lists(model).values():
        for block in blocks:
            fully_shard(block, mesh=mesh, mp_policy=precision)
    fully_shard(model, mesh=mesh, mp_policy=precision)
