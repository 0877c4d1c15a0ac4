"""Loads and shards a transformers model: one process reads it, and each process holds its part."""

from typing import Any

import torch
import torch.distributed as dist

from sparse_train.distributed import rank
from sparse_train.layers.sharding import shard_blocks
from sparse_train.models.sources import ModelSource


def load_sharded(source: ModelSource, mesh: Any, *, bfloat16: bool = False) -> Any:
    """The model of ``source``, sharded by FSDP2 over ``mesh``; only rank 0 holds it whole, in main memory, at first.

    Args:
        source: gives a transformers model; read only by rank 0.
        mesh: a ``DeviceMesh`` of one dimension over all processes.
        bfloat16: see ``shard_blocks``.
    """
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
    from transformers import AutoModelForCausalLM

    whole = source.load() if rank() == 0 else None
    described = [None if whole is None else _description(whole)]
    dist.broadcast_object_list(described)
    assert described[0] is not None
    config, generation_config, dtype, buffers = described[0]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation=config._attn_implementation)
    model.generation_config = generation_config
    shard_blocks(model, mesh, bfloat16=bfloat16)
    model.to_empty(device=mesh.device_type)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)
    set_model_state_dict(model, {} if whole is None else whole.state_dict(), options=options)
    for name, buffer in buffers.items():
        owner, _, own = name.rpartition(".")
        model.get_submodule(owner)._buffers[own] = buffer.to(mesh.device_type)
    return model


def _description(model: Any) -> tuple[Any, ...]:
    """All of a model except its weights, including buffers outside its state dict, such as rotary frequencies."""
    saved = model.state_dict().keys()
    buffers = {name: buffer for name, buffer in model.named_buffers() if name not in saved}
    return model.config, getattr(model, "generation_config", None), model.dtype, buffers
