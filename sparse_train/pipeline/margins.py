"""How much better a pruned weight has to be than a kept one to replace it: ``Margin``; and the errors of scores.

Shape suffixes: O out_features, I in_features.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_train.criteria import Criterion
from sparse_train.pipeline.policies import MaskPolicy, only_kept
from sparse_train.statistics.activations import ActivationNorm, HalvedNorm


@dataclass(frozen=True)
class Margin:
    """The advantage of kept weights when masks are updated; the counts of groups stay exact.

    Args:
        hysteresis: share by which kept weights count more: a pruned weight needs ``1 + hysteresis`` times the score.
            If infinite, masks lose what the schedule asks for, and get nothing back.
        noise_margin: number of standard errors that are added to the scores of kept weights and subtracted from those
            of pruned ones, so that a flip needs scores that far apart. See ``standard_error``.
    """

    hysteresis: float = 0.0
    noise_margin: float = 0.0

    def __post_init__(self) -> None:
        if not self.hysteresis >= 0:
            raise ValueError(
                f"hysteresis is the share by which kept weights count more, 0 (none) or above, got {self.hysteresis}."
            )
        if not self.noise_margin >= 0:
            raise ValueError(f"noise_margin is a number of standard errors, 0 or above, got {self.noise_margin}.")

    def __bool__(self) -> bool:
        return self.hysteresis > 0 or self.noise_margin > 0

    def apply(self, scores_OI: Tensor, keep_OI: Tensor, error_OI: Tensor | None) -> Tensor:
        """Scores for selection (O, I).

        Args:
            scores_OI: of any sign; -inf = pruned first.
            keep_OI: the mask so far.
            error_OI: standard errors of the scores; None = not known, and infinite for a ``noise_margin``.
        """
        unsure = self.noise_margin > 0 and error_OI is None
        if unsure or torch.inf in (self.hysteresis, self.noise_margin):
            return only_kept(scores_OI, keep_OI)
        factor = 1 + self.hysteresis  # divides negative scores, since nearer to 0 is better
        ahead_OI = torch.where(scores_OI < 0, scores_OI / factor, scores_OI * factor)
        if error_OI is not None:
            ahead_OI = ahead_OI + error_OI * self.noise_margin
            scores_OI = scores_OI - error_OI * self.noise_margin
        return torch.where(keep_OI, ahead_OI, scores_OI)


NO_MARGIN = Margin()


def standard_error(
    criterion: Criterion, weight_OI: Tensor, stats: ActivationNorm | None, column_sums_I: Tensor | None = None
) -> Tensor | None:
    """Standard error of each score, float32 (O, I), estimated from the two halves of the statistics.

    ``column_sums_I`` is what the scores of these rows need from other rows, see ``Criterion``.

    It is ``|s_1 - s_2| sqrt(T_1 T_2) / (T_1 + T_2)`` for the scores s of halves with T tokens. If the mean square of a
    feature has variance v / T over T tokens, then v / (T_1 + T_2) is the squared error of the whole window's estimate,
    and s_1 - s_2 estimates v, with one degree of freedom. To first order this also holds for Wanda, which takes the
    root. If the halves are equally large, the error is half the difference.

    Returns:
        None if one of the halves has seen no token.
    """
    assert isinstance(stats, HalvedNorm)
    first, second = (float(half.tokens) for half in stats.halves)
    if not first or not second:
        return None
    if column_sums_I is None:
        column_sums_I = criterion.column_sums(weight_OI)
    one_OI, other_OI = (criterion.scores_of_rows(weight_OI, stats.alone(half), column_sums_I) for half in (0, 1))
    difference_OI = one_OI - other_OI
    return difference_OI.abs_() * (math.sqrt(first * second) / (first + second))


def check_margin(margin: Margin, flip_agreement: bool, policy: MaskPolicy, criterion: Criterion, frozen: bool) -> None:
    """Raise ValueError if a margin has no effect, or there are no halves of a window from which to estimate noise."""
    if margin and policy.comes_back != "by score":
        raise ValueError(f"{margin} has no effect with {policy}, under which pruned weights do not come back by score.")
    if not margin.noise_margin and not flip_agreement:
        return
    asked = "noise_margin" if margin.noise_margin else "flip_agreement"
    if not criterion.needs_activations:
        raise ValueError(f"{asked} compares two halves of the recorded activations, and {criterion} reads none.")
    if frozen:
        raise ValueError(
            f'{asked} compares two halves of each window, and with memory="frozen" none are recorded: leave one out.'
        )


def check_window(steps: int) -> None:
    """Raise ValueError if a window cannot be halved."""
    if steps < 2:
        raise ValueError(
            "noise_margin and flip_agreement compare the odd and the even steps of a window, which is 1 step long: set "
            "window to 2 steps or more, or to a larger share of update_freq."
        )
