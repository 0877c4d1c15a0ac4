"""What a weight is worth: ``Criterion.scores``; larger = keep.

Shape suffixes: O out_features (under FSDP2, the rows that a process holds; in ``rowwise`` criteria, maybe a part of the
rows), I in_features, J packed mask bytes.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from sparse_train.layers import masks
from sparse_train.patterns import Group
from sparse_train.statistics import Statistics


@dataclass(frozen=True)
class LayerContext:
    """What criteria and policies can look at in one layer."""

    weight_OI: Tensor
    """The weights, shadow values included, any float dtype."""
    stats: Statistics | None = None
    """Norms of the layer's input over the tokens seen; None if the criterion needs no activations."""
    name: str = ""
    mask_OJ: Tensor | None = None
    """The packed mask so far; None for a criterion alone."""
    optimizer_state: Mapping[str, Tensor] = field(default_factory=dict)
    """What the optimizer holds for these weights, such as Adam's ``exp_avg`` (O, I); empty before the first step,
    outside training, for engines that hold it in another shape (DeepSpeed), and for a sharded weight (FSDP2) unless
    criterion, pattern and policy are all ``rowwise``."""

    @property
    def norm_I(self) -> Tensor:
        """``||X_j||_2`` of each input feature, float32 (I,)."""
        assert self.stats is not None, f"{self.name}: no norms; the criterion needs needs_activations = True"
        return self.stats.norm_I

    @property
    def keep_OI(self) -> Tensor:
        """The mask so far, bool (O, I), True = kept."""
        assert self.mask_OJ is not None, f"{self.name}: has no mask"
        return masks.unpack(self.mask_OJ, self.weight_OI.shape[1])


class Criterion(ABC):
    """Gives every weight of one layer a score.

    A new criterion is a subclass with this one method. Recipes name it by its class; there is no registry.
    """

    needs_activations: ClassVar[bool] = False
    """Whether ``scores`` reads ``layer.stats``; if not, none are gathered."""
    rowwise: ClassVar[bool] = False
    """Whether the scores of a row need nothing from other rows. Each process can then score the rows that it holds
    (FSDP2), and on the CPU several threads score chunks of rows at a time: ``scores`` then has no state and draws no
    random numbers."""
    group: ClassVar[Group] = "row"
    """The group in which "unstructured" compares weights under this criterion; ``Unstructured(group=...)`` sets it."""

    @abstractmethod
    def scores(self, layer: LayerContext) -> Tensor:
        """float32 scores of a layer's weights (O, I), larger = keep."""


@dataclass(frozen=True)
class Wanda(Criterion):
    """``|W_ij| * ||X_j||_2``: weight magnitude times the norm of its input feature over all tokens.

    Source: Sun et al., "A Simple and Effective Pruning Approach for Large Language Models", arXiv 2306.11695,
    section 3, equation 1. The paper compares within an output row: use it with ``Unstructured(group="row")``,
    the default, or with N:M.
    """

    needs_activations: ClassVar[bool] = True
    rowwise: ClassVar[bool] = True

    def scores(self, layer: LayerContext) -> Tensor:
        return layer.weight_OI.abs().float().mul_(layer.norm_I)


@dataclass(frozen=True)
class WandaCumulative(Criterion):
    """The share of a row's summed Wanda score that is lost if this weight and all lower ones in the row are pruned.

    The variant of Wanda in the paper's code (``use_variant``): every row of a layer loses weights until the same share
    of its summed score is gone, so rows end with different counts. The paper's code finds the share by bisection; here
    shares are compared over the layer, ``Unstructured(group="layer")``, so the count is exact.
    """

    needs_activations: ClassVar[bool] = True
    rowwise: ClassVar[bool] = True
    group: ClassVar[Group] = "layer"

    def scores(self, layer: LayerContext) -> Tensor:
        scores_OI = Wanda().scores(layer)
        sorted_OI, order_OI = scores_OI.sort(dim=1, stable=True)
        # float64: with thousands of inputs, a float32 running sum would make neighbours equal that Wanda distinguishes
        share_OI = sorted_OI.double()
        # on the CPU with deterministic algorithms: GPUs may round differently
        cpu = torch.are_deterministic_algorithms_enabled()
        share_OI = (share_OI.cpu() if cpu else share_OI).cumsum_(1).to(scores_OI.device)
        share_OI /= share_OI[:, -1:].clamp_min(torch.finfo(torch.float64).tiny)
        return torch.empty_like(scores_OI).scatter_(1, order_OI, share_OI.float())


@dataclass(frozen=True)
class RIA(Criterion):
    """``(|W_ij| / sum_i |W_ij| + |W_ij| / sum_j |W_ij|) * ||X_j||_2 ** a``.

    A weight counts by its share of its row and of its column, so that no row or column is emptied.
    Source: Zhang et al., "Plug-and-Play: An Efficient Post-training Pruning Method for Large Language Models",
    ICLR 2024, section 3 (without its channel permutation). Its code compares within a layer:
    ``Unstructured(group="layer")``.

    Args:
        a: exponent of the activation norm.
    """

    a: float = 0.5
    needs_activations: ClassVar[bool] = True

    def scores(self, layer: LayerContext) -> Tensor:
        size_OI = layer.weight_OI.abs().float()
        tiny = torch.finfo(torch.float32).tiny  # an empty row or column gives a share of 0, not 0 / 0
        share_OI = size_OI / size_OI.sum(0).clamp_min(tiny)
        share_OI += size_OI / size_OI.sum(1, keepdim=True).clamp_min(tiny)
        return share_OI.mul_(layer.norm_I**self.a)


@dataclass(frozen=True)
class Magnitude(Criterion):
    """``|W_ij|``: the classic score (Han et al., arXiv 1506.02626, section 3.1).

    The magnitude baseline of the Wanda paper compares within a layer: ``Unstructured(group="layer")``.
    """

    rowwise: ClassVar[bool] = True

    def scores(self, layer: LayerContext) -> Tensor:
        return layer.weight_OI.abs().float()
