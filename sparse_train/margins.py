"""By how much a pruned weight has to be better than a kept one to take its place: ``Margin``.

Shape suffixes: O out_features, I in_features.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from sparse_train.policies import MaskPolicy, only_kept


@dataclass(frozen=True)
class Margin:
    """What is added to the scores of kept weights when masks are updated; the counts of groups stay exact.

    Args:
        hysteresis: share by which kept weights count more: a pruned one needs ``1 + hysteresis`` times the score.
            Infinite: masks lose what the schedule asks for, and get nothing back.
    """

    hysteresis: float = 0.0

    def __post_init__(self) -> None:
        if not self.hysteresis >= 0:
            raise ValueError(
                f"hysteresis is the share by which kept weights count more, 0 (none) or above, got {self.hysteresis}."
            )

    def __bool__(self) -> bool:
        return self.hysteresis > 0

    def apply(self, scores_OI: Tensor, keep_OI: Tensor) -> Tensor:
        """Scores for selection (O, I), from scores of at least 0 (-inf: pruned first) and the mask so far."""
        if self.hysteresis == torch.inf:
            return only_kept(scores_OI, keep_OI)
        return torch.where(keep_OI, scores_OI * (1 + self.hysteresis), scores_OI)


NO_MARGIN = Margin()


def check_margin(margin: Margin, policy: MaskPolicy) -> None:
    """Raise ValueError where pruned weights do not come back by their scores, so that a margin has no effect."""
    if margin and not policy.straight_through:
        raise ValueError(f"{margin} has no effect with {policy}, under which pruned weights do not come back by score.")
