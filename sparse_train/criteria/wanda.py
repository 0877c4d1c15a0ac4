"""Wanda, and its variant with cumulative scores. Shape suffixes: O out_features, I in_features."""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparse_train.criteria.base import Criterion
from sparse_train.patterns import Group
from sparse_train.statistics.activations import ActivationNorm


@dataclass(frozen=True)
class Wanda(Criterion):
    """``|W_ij| * ||X_j||_2``: weight magnitude times the norm of its input feature over all tokens.

    Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", arXiv 2306.11695,
    section 3, equation 1. The paper compares within an output row: use it with ``Unstructured(group="row")``,
    the default, or with N:M.
    """

    needs_activations: ClassVar[bool] = True
    rowwise: ClassVar[bool] = True

    def scores(self, weight_OI: Tensor, stats: ActivationNorm | None) -> Tensor:
        assert stats is not None, "Wanda needs activation statistics"
        return torch.mul(weight_OI.abs().float(), stats.norm_I)


@dataclass(frozen=True)
class WandaCumulative(Criterion):
    """The share of a row's summed Wanda score that is lost if this weight and all lower ones in the row are pruned.

    The variant of Wanda in the paper's code (``use_variant``): every row of a layer loses weights until the same share
    of its summed score is gone, so rows end with different counts. The paper's code finds the share by bisection. Here
    the shares are compared over the whole layer, ``Unstructured(group="layer")``, so the count is exact. Within one
    row, and in N:M, the order is Wanda's.
    """

    needs_activations: ClassVar[bool] = True
    rowwise: ClassVar[bool] = True
    group: ClassVar[Group] = "layer"

    def scores(self, weight_OI: Tensor, stats: ActivationNorm | None) -> Tensor:
        scores_OI = Wanda().scores(weight_OI, stats)
        sorted_OI, order_OI = scores_OI.sort(dim=1, stable=True)
        # float64: with thousands of inputs, a float32 running sum would make neighbours equal that Wanda distinguishes
        share_OI = _running_sum(sorted_OI.double())
        share_OI /= share_OI[:, -1:].clamp_min(torch.finfo(torch.float64).tiny)
        return torch.empty_like(scores_OI).scatter_(1, order_OI, share_OI.float())


def _running_sum(values_OI: Tensor) -> Tensor:
    """Running sum along the inputs, in place. With deterministic algorithms, on the CPU: GPUs may round differently."""
    if values_OI.device.type != "cpu" and torch.are_deterministic_algorithms_enabled():
        return values_OI.cpu().cumsum_(1).to(values_OI.device)
    return values_OI.cumsum_(1)
