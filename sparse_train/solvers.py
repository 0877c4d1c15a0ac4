"""Methods that choose a mask and new values for the kept weights: ``Solver.solve``, and SparseGPT.

Shape suffixes: O out_features, I in_features, B columns per block.
"""

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparse_train.patterns import NM, Group, Pattern, share_of

_log = logging.getLogger(__name__)


class Solver(ABC):
    """Prunes one layer and updates the kept weights to compensate, from second moments of the layer's input."""

    group: ClassVar[Group] = "row"
    """The group in which "unstructured" compares weights under this solver; ``Unstructured(group=...)`` sets it."""
    way_out = " It prunes in one shot: prune with it first, and train the result with first_mask=FromZeros()."
    """What is said where a ``Criterion`` is wanted, in training."""

    def check_pattern(self, pattern: Pattern) -> None:
        """Raise ValueError if the solver cannot prune to this pattern."""

    @abstractmethod
    def solve(self, weight_OI: Tensor, gram_II: Tensor, pattern: Pattern, sparsity: float) -> tuple[Tensor, Tensor]:
        """Prune one layer, to this sparsity over each group of the pattern.

        Args:
            weight_OI: the layer's weights, any float dtype; not changed.
            gram_II: float32 or better, the sum of x x^T over the layer's inputs x (I,).

        Returns:
            weight_OI: float32, kept weights updated; pruned ones have their former value, as shadow values.
            mask_OI: bool, True = kept.
        """


@dataclass(frozen=True)
class SparseGPT(Solver):
    """Optimal brain surgeon over whole rows: columns are pruned from left to right, and the columns to the right of a
    pruned one are updated to compensate for its error.

    Source: Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
    arXiv 2301.00774, algorithm 1. Scores are ``w^2 / [H^-1]_jj^2`` of the weights as updated so far; unstructured masks
    are chosen for a block of columns of all rows at once, N:M masks one group at a time.

    Args:
        block_size: number of columns whose mask is chosen together, and whose updates to the rest are applied together.
        dampening_frac: share of the mean diagonal of H that is added to the diagonal.
    """

    block_size: int = 128
    dampening_frac: float = 0.01
    group: ClassVar[Group] = "layer"

    def __post_init__(self) -> None:
        if not self.dampening_frac > 0:
            raise ValueError(f"dampening_frac must be above 0, got {self.dampening_frac}.")

    def check_pattern(self, pattern: Pattern) -> None:
        if pattern.model_wide:
            raise ValueError(
                'SparseGPT cannot compare over the whole model. Use Unstructured(group="layer") or "row", or N:M.'
            )
        if isinstance(pattern, NM) and self.block_size % pattern.m:
            raise ValueError(f"SparseGPT needs a block_size divisible by {pattern.m}, got {self.block_size}.")

    def solve(self, weight_OI: Tensor, gram_II: Tensor, pattern: Pattern, sparsity: float) -> tuple[Tensor, Tensor]:
        before_OI = weight_OI.detach().float()
        work_OI, mask_OI = before_OI.clone(), torch.ones_like(before_OI, dtype=torch.bool)
        dead_I = gram_II.diagonal() == 0  # inputs that are always zero: their weights are pruned first
        factor_II = _inverse_factor(gram_II, dead_I, self.dampening_frac)
        diagonal_I = factor_II.diagonal().masked_fill(dead_I, torch.inf)  # for scores, and errors, of zero
        rows, inputs = work_OI.shape
        for start in range(0, inputs, self.block_size):
            stop = min(start + self.block_size, inputs)
            block = slice(start, stop)
            errors_OB = _prune_block(
                work_OI[:, block],
                mask_OI[:, block],
                factor_II[block, block],
                diagonal_I[block],
                pattern,
                _block_sparsity(pattern, sparsity, rows, start, stop),
            )
            work_OI[:, stop:] -= errors_OB @ factor_II[block, stop:]
        return torch.where(mask_OI, work_OI, before_OI), mask_OI


def _inverse_factor(gram_II: Tensor, dead_I: Tensor, dampening_frac: float) -> Tensor:
    """Upper Cholesky factor of the inverse of the dampened Gram matrix, float32 (I, I)."""
    hessian_II = gram_II.clone()
    diagonal_I = hessian_II.diagonal()
    diagonal_I[dead_I] = 1
    mean = diagonal_I.mean()
    damping = dampening_frac * mean
    for attempt in range(4):
        if attempt:
            _log.warning("SparseGPT: no Cholesky factor; the dampening grows to %g of the mean.", damping / mean)
        diagonal_I += damping
        factor_II, info = torch.linalg.cholesky_ex(hessian_II)
        if int(info) == 0:
            inverse_II = torch.cholesky_inverse(factor_II)
            factor_II, info = torch.linalg.cholesky_ex(inverse_II, upper=True)
            if int(info) == 0:
                found: Tensor = factor_II.float()
                return found
        damping *= 10  # with few samples, rounding in float32 can make the matrix indefinite
    raise ValueError(
        f"SparseGPT: the matrix of second moments has no Cholesky factor at dampening_frac={dampening_frac}. Give more "
        "calibration samples, or a larger dampening_frac."
    )


def _block_sparsity(pattern: Pattern, sparsity: float, rows: int, start: int, stop: int) -> float:
    """The sparsity of a block for which the counts of all blocks add up to that of the whole group."""
    if isinstance(pattern, NM):
        return sparsity
    per_column = rows if getattr(pattern, "group", "row") == "layer" else 1
    members = per_column * (stop - start)
    count = int(per_column * stop * sparsity) - int(per_column * start * sparsity)
    return share_of(count, members)


def _prune_block(
    work_OB: Tensor, mask_OB: Tensor, factor_BB: Tensor, diagonal_B: Tensor, pattern: Pattern, sparsity: float
) -> Tensor:
    """Set mask and kept weights of a block of columns; returns the errors (O, B) that later columns have to
    compensate."""
    step = pattern.m if isinstance(pattern, NM) else work_OB.shape[1]
    work_BO, has_dead = work_OB.t().contiguous(), bool(diagonal_B.isinf().any())  # columns that lie together are faster
    errors_BO = torch.empty_like(work_BO)
    for column in range(len(work_BO)):
        if column % step == 0:
            part = slice(column, column + step)
            scores_OB = (work_BO[part].t() / diagonal_B[part]).square()
            if has_dead:
                scores_OB[work_BO[part].t() == 0] = -torch.inf  # zeros are pruned before other weights with score 0
            mask_OB[:, part] = pattern.mask(scores_OB, sparsity)
            keep_BO = mask_OB[:, part].t().contiguous()
        torch.div(torch.where(keep_BO[column % step], 0.0, work_BO[column]), diagonal_B[column], out=errors_BO[column])
        work_BO[column + 1 :] -= torch.outer(factor_BB[column, column + 1 :], errors_BO[column])
    work_OB.copy_(work_BO.t())
    return errors_BO.t().contiguous()
