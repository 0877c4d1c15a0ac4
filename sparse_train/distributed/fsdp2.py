"""FSDP2 (``fully_shard``): each process holds some rows of a parameter, as a ``DTensor``.

Shape suffixes: R rows of this process, I in_features.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparse_train.architecture import all_blocks
from sparse_train.distributed.collectives import rank, world_size
from sparse_train.distributed.layout import Elementwise, Layout


class FSDP2(Layout):
    """Equal chunks of rows, the last ones shorter or empty."""

    is_sharded = True

    @staticmethod
    def holds(parameter: Any) -> bool:
        return hasattr(parameter, "placements")  # also a tensor of tensor parallelism, which ``check`` refuses

    @contextmanager
    def gathered(self) -> Iterator[Tensor]:
        yield self.parameter.detach().full_tensor()

    def own_rows(self) -> tuple[Tensor, slice]:
        weight_RI = self.parameter.detach().to_local()
        rows, chunk = len(self.parameter), -(-len(self.parameter) // world_size())
        mine = slice(min(rows, rank() * chunk), min(rows, (rank() + 1) * chunk))
        assert len(weight_RI) == mine.stop - mine.start, (weight_RI.shape, mine)
        return weight_RI, mine

    @torch.no_grad()
    def rewrite(self, function: Elementwise, keep: Tensor) -> None:
        own, rows = self.own_rows()
        own.copy_(function(own, keep[rows].to(own.device)))

    def state_rows(self, state: Any) -> Tensor | None:
        return state.to_local() if self.holds(state) else None

    def check(self, name: str) -> None:
        placements, processes = self.parameter.placements, self.parameter.device_mesh.size()
        if len(placements) == 1 and placements[0].is_shard(0) and processes == world_size():
            return
        raise ValueError(
            f"{name} is laid out as {placements} over {processes} of {world_size()} "
            "processes. Masks follow weights that FSDP2 shards along their first dimension over all processes; tensor "
            "parallelism and hybrid sharding are not supported. Set data_parallel_size to the number of processes and "
            'tensor_parallel_size to 1, and give fully_shard the mesh of one dimension, device_mesh["data_parallel"].'
        )


def reshard(model: nn.Module) -> None:
    """Release weights that FSDP2 still holds gathered, for example after an evaluation. What is written to gathered
    weights is lost, and they are not recognised as sharded."""
    for module in model.modules():
        if any(cls.__name__ == "FSDPModule" for cls in type(module).__mro__):
            module.reshard()  # type: ignore[operator]


def shard_blocks(model: nn.Module, mesh: Any, *, bfloat16: bool = False) -> None:
    """FSDP2's ``fully_shard`` on each decoder block, and on the rest of the model; for ``configure_model``.

    Args:
        model: each process must have the same whole copy.
        mesh: a ``DeviceMesh`` of one dimension over all processes, such as ``self.device_mesh["data_parallel"]``.
        bfloat16: gather and compute in bfloat16; shards, sums of gradients and optimizer stay float32.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    precision = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if bfloat16 else MixedPrecisionPolicy()
    for block in all_blocks(model):
        fully_shard(block, mesh=mesh, mp_policy=precision)
    fully_shard(model, mesh=mesh, mp_policy=precision)
