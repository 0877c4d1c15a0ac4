"""Which engine holds a parameter (``layout_of``), and the whole state dict of a model under any of them."""

from typing import Any

from torch import Tensor, nn

from sparse_train.distributed.collectives import rank
from sparse_train.distributed.fsdp2 import FSDP2, reshard
from sparse_train.distributed.layout import Layout, Whole
from sparse_train.distributed.zero import ZeRO3, ZeRO12


def layout_of(parameter: Any) -> Layout:
    """What this process holds of a parameter.

    Looked up at each use: an engine may take a parameter over after its layer got a mask.
    """
    layouts: tuple[type[Layout], ...] = (ZeRO3, ZeRO12, FSDP2, Whole)
    return next(layout for layout in layouts if layout.holds(parameter))(parameter)


def whole_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The whole state dict of a sharded model, on the CPU of rank 0; empty on other ranks, which must call too.

    It gathers one tensor at a time, so no device holds more than its shard and one tensor.
    """
    reshard(model)
    gathered: dict[int, Tensor] = {}  # tied parameters stay tied
    state = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in gathered:
            with layout_of(tensor).gathered() as whole:
                gathered[id(tensor)] = whole.detach().cpu().clone() if rank() == 0 else whole.new_empty(0)
        state[name] = gathered[id(tensor)]
    return state if rank() == 0 else {}
