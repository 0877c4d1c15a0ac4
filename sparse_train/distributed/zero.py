"""DeepSpeed: ZeRO-1 and 2 hold float32 masters of whole parameters in pieces, ZeRO-3 the parameters, too."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sparse_train.distributed.collectives import rank
from sparse_train.distributed.layout import Elementwise, Layout, Whole


class ZeRO12(Whole):
    """ZeRO-1 and 2: the parameter is whole, and each process holds a flat piece of some float32 masters."""

    has_masters = True

    @staticmethod
    def holds(parameter: Any) -> bool:
        return hasattr(parameter, "_hp_mapping")

    @torch.no_grad()
    def rewrite(self, function: Elementwise, keep: Tensor) -> None:
        super().rewrite(function, keep)
        mapping = self.parameter._hp_mapping
        if mapping is not None:
            # DeepSpeed's safe_set_full_fp32_param does this too, but needs the whole master, which would cost a reduce
            piece, master = mapping.lp_fragment_address, mapping.get_hp_fragment()
            own = keep.reshape(-1)[piece.start : piece.start + piece.numel]
            master.copy_(function(master.reshape(-1), own.to(master.device)).view_as(master))

    def state_rows(self, state: Tensor) -> Tensor | None:
        return None


class ZeRO3(Layout):
    """ZeRO-3: each process holds a flat piece of the parameter, and of its float32 master."""

    is_sharded = has_masters = True

    @staticmethod
    def holds(parameter: Any) -> bool:
        return hasattr(parameter, "ds_id")

    @contextmanager
    def gathered(self) -> Iterator[Tensor]:
        from deepspeed.runtime.zero import GatheredParameters

        with GatheredParameters([self.parameter]):
            yield self.parameter

    @torch.no_grad()
    def rewrite(self, function: Elementwise, keep: Tensor) -> None:
        parameter = self.parameter
        piece = parameter.ds_tensor  # this process's piece, flat; the last process's is padded at its end
        flat = keep.reshape(-1)
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

    def check(self, name: str) -> None:
        if getattr(self.parameter, "ds_secondary_tensor", None) is not None:
            raise ValueError(
                f"{name} has a second copy within its node (ZeRO++'s zero_hpz_partition_size), which is not masked. "
                "Set zero_hpz_partition_size to 1."
            )


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
