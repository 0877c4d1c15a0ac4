"""Chance, the control. Shape suffixes: O out_features, I in_features."""

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_train.criteria.base import Criterion
from sparse_train.statistics.activations import ActivationNorm


@dataclass(frozen=True)
class Random(Criterion):
    """Uniform random scores: what a method has to beat. Weights that are zero come first, so pruning twice is once.

    Args:
        seed: the same seed prunes the same weights of the same layer; layers differ by their weights.
    """

    seed: int = 0

    def scores(self, weight_OI: Tensor, stats: ActivationNorm | None = None) -> Tensor:
        # The layer's own first row tells layers of one shape apart, without a state that has to be kept or saved.
        row = weight_OI[0].detach().float().cpu().numpy().tobytes()
        generator = torch.Generator().manual_seed(zlib.crc32(row, self.seed))
        scores_OI = torch.rand(weight_OI.shape, generator=generator).to(weight_OI.device)
        return torch.where(weight_OI != 0, scores_OI + torch.finfo(torch.float32).tiny, 0)
