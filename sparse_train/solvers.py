"""Methods that choose a mask and new values for the kept weights: ``Solver.solve``, SparseGPT and IHT.

Shape suffixes: O out_features, I in_features, B columns per block.
"""

import logging
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from sparse_train.patterns import NM, Group, Pattern, sparsity_for

_log = logging.getLogger(__name__)


class Solver(ABC):
    """Prunes one layer and updates the kept weights to compensate, from second moments of the layer's input."""

    group: ClassVar[Group] = "row"
    """The group in which "unstructured" compares weights under this solver; ``Unstructured(group=...)`` sets it."""
    asymmetric: bool = False
    """Whether layers are fitted to what the dense model computes, see ``sparse_train.oneshot.asymmetric``."""
    dampening_frac: float
    """Share of the mean diagonal of the inputs' second moments that is added to the diagonal."""
    way_out = " It prunes in one shot, and in a run it can make the first mask: first_mask=OneShot(IHT())."
    """The end of the error if a user gives a solver as the criterion of a run."""

    def check_pattern(self, pattern: Pattern) -> None:
        """Raise ValueError if the solver cannot prune to this pattern: a group is at most the weights of a layer."""
        if pattern.model_wide:
            raise ValueError(
                f'{type(self).__name__} cannot compare over the whole model. Use Unstructured(group="layer") or '
                '"row", or N:M.'
            )

    @abstractmethod
    def solve(self, weight_OI: Tensor, gram_II: Tensor, pattern: Pattern, sparsity: float) -> tuple[Tensor, Tensor]:
        """Prune one layer, to this sparsity over each group of the pattern.

        Args:
            weight_OI: the layer's weights, any float dtype; not changed.
            gram_II: float32 or better, the sum of x x^T over the layer's inputs x (I,).

        Returns:
            weight_OI: float32, kept weights updated; pruned ones have a value to come back with, as shadow values.
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
        if self.block_size < 1 or not self.dampening_frac > 0:
            raise ValueError(f"block_size must be at least 1, dampening_frac above 0, got {self}.")

    def check_pattern(self, pattern: Pattern) -> None:
        super().check_pattern(pattern)
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
            own = work_OI[:, block], mask_OI[:, block], factor_II[block, block], diagonal_I[block]
            errors_OB = _prune_block(*own, pattern, _block_sparsity(pattern, sparsity, rows, start, stop))
            work_OI[:, stop:] -= errors_OB @ factor_II[block, stop:]
        return torch.where(mask_OI, work_OI, before_OI), mask_OI


@dataclass(frozen=True)
class IHT(Solver):
    """Iterative hard thresholding: Wanda's scores, measured again after the kept weights have moved.

    In each round, the kept weights are fitted to the outputs of the dense layer (least squares, by conjugate
    gradients). Each pruned weight gets the value that fits best beside them, if it alone came back (a Newton step).
    Then ``|w|`` times the norm of the input scores all weights for the next mask: but for the dampening, its square is
    the error that a kept weight saves, or that a pruned one would save. Pruned weights keep their values as shadow
    values, so a run that begins here compares both kinds by the same measure.

    Sources: Blumensath and Davies, arXiv 0805.0510, for the iteration; for language models, Boza, arXiv 2401.02938, and
    Meng et al., "ALPS", arXiv 2406.07831, alternate between masks and least squares by ADMM.

    Args:
        rounds: how many masks follow Wanda's; fewer if the error no longer falls.
        iterations: of conjugate gradients in a round.
        dampening_frac: share of the mean diagonal of H, the inputs' second moments, that is added to the diagonal.
        asymmetric: fit each layer to what the dense model computes in its place, so that it makes up for what earlier
            layers have lost, and not to its own dense outputs. Takes several times as long. Leave it out before a
            training: at 2:4 with a teacher, that ended worse after it (docs/oneshot.md).
    """

    rounds: int = 4
    iterations: int = 5
    dampening_frac: float = 0.01
    asymmetric: bool = False

    def __post_init__(self) -> None:
        if self.rounds < 0 or self.iterations < 1 or not self.dampening_frac > 0:
            raise ValueError(f"rounds must be at least 0, iterations at least 1, dampening_frac above 0, got {self}.")

    def solve(self, weight_OI: Tensor, gram_II: Tensor, pattern: Pattern, sparsity: float) -> tuple[Tensor, Tensor]:
        dense_OI, norm_I = weight_OI.detach().float(), gram_II.float().diagonal().sqrt()
        hessian_II = dampened(gram_II, self.dampening_frac)
        values_OI, least = dense_OI, torch.inf
        for number in range(self.rounds + 1):
            # zeros go before weights whose inputs are always zero: to prune again is then to prune nothing else
            scores_OI = (values_OI.abs() * norm_I).masked_fill(values_OI == 0, -torch.inf)
            mask_OI = pattern.mask(scores_OI, sparsity)
            kept_OI = _fit(dense_OI, hessian_II, mask_OI, torch.where(mask_OI, values_OI, 0), self.iterations)
            lost_OI = dense_OI - kept_OI
            gradient_OI = lost_OI @ hessian_II
            error = float((lost_OI * gradient_OI).sum())
            if number and not error < least:
                break
            # of pruned weights, what fits best; of kept ones, a step on, from which the next fit begins
            values_OI = kept_OI + gradient_OI / hessian_II.diagonal()
            least, best = error, (torch.where(mask_OI, kept_OI, values_OI), mask_OI)
        return best


def dampened(gram_II: Tensor, dampening_frac: float) -> Tensor:
    """A float32 copy of second moments, with a share of their mean diagonal added to the diagonal."""
    hessian_II = gram_II.float().clone()
    mean = float(hessian_II.diagonal().mean()) or 1.0  # 0 if all inputs are zero: then anything fits
    hessian_II.diagonal().add_(dampening_frac * mean)
    return hessian_II


def _fit(dense_OI: Tensor, hessian_II: Tensor, mask_OI: Tensor, start_OI: Tensor, iterations: int) -> Tensor:
    """The kept weights, and zeros, whose outputs are closest to those of the dense weights.

    Conjugate gradients on all rows at once, preconditioned by the diagonal of the Hessian.
    """
    tiny, diagonal_I = torch.finfo(torch.float32).tiny, hessian_II.diagonal()
    found_OI, residual_OI = start_OI, torch.where(mask_OI, (dense_OI - start_OI) @ hessian_II, 0)
    towards_OI = residual_OI / diagonal_I
    size_O1 = (residual_OI * towards_OI).sum(1, keepdim=True)
    for _ in range(iterations):
        change_OI = torch.where(mask_OI, towards_OI @ hessian_II, 0)
        step_O1 = size_O1 / (towards_OI * change_OI).sum(1, keepdim=True).clamp_min(tiny)
        found_OI, residual_OI = found_OI + step_O1 * towards_OI, residual_OI - step_O1 * change_OI
        before_O1, scaled_OI = size_O1, residual_OI / diagonal_I
        size_O1 = (residual_OI * scaled_OI).sum(1, keepdim=True)
        towards_OI = scaled_OI + size_O1 / before_O1.clamp_min(tiny) * towards_OI
    return found_OI


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
                return factor_II.float()
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
    return sparsity_for(count, members)


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
