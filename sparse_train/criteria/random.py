"""Random scores, the control. Shape suffixes: O out_features, I in_features."""

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_train.criteria.base import Criterion
from sparse_train.statistics.activations import ActivationNorm


@dataclass(frozen=True)
class Random(Criterion):
    """Uniform random scores: the baseline that a method has to beat.

    Weights that are zero are pruned first, so pruning twice gives the same result as pruning once.

    Args:
        seed: the same seed and weights give the same scores. Layers with different weights differ, and so do those of
            one layer before and after an optimizer step: with a policy by which weights come back, each update draws a
            new mask. ``Fixed()`` keeps the first one.
    """

    seed: int = 0

    def scores(self, weight_OI: Tensor, stats: ActivationNorm | None = None) -> Tensor:
        # The first row of the layer distinguishes layers of equal shape, without a state that has to be kept or saved.
        row = weight_OI[0].detach().float().cpu().numpy().tobytes()
        generator = torch.Generator().manual_seed(zlib.crc32(row, self.seed))
        scores_OI = torch.rand(weight_OI.shape, generator=generator, dtype=torch.float32).to(weight_OI.device)
        return torch.where(weight_OI != 0, scores_OI + torch.finfo(torch.float32).tiny, 0)
