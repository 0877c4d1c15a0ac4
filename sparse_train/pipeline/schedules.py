"""Sparsity over time: ``Schedule.sparsity`` over the progress from the first update to the last.

Progress is 0 at ``start_step`` and 1 at ``end_step``; steps are optimizer steps, and belong to ``Timing``.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from sparse_train.arguments import check_sparsity, to_python_number
from sparse_train.patterns import Group, Pattern, parse_pattern


def _check_rise(init_sparsity: float, final_sparsity: float, ramp: float) -> None:
    check_sparsity("init_sparsity", init_sparsity)
    check_sparsity("final_sparsity", final_sparsity)
    if init_sparsity > final_sparsity:
        raise ValueError(f"Sparsity rises: init_sparsity ({init_sparsity}) must not be above {final_sparsity}.")
    if not 0 < ramp <= 1:
        raise ValueError(f"ramp is the share of the way on which sparsity rises, above 0 and at most 1, got {ramp}.")


class Schedule(ABC):
    """Sparsity as a function of progress."""

    @abstractmethod
    def sparsity(self, progress: float) -> float:
        """Target sparsity in [0, 1) at ``progress`` in [0, 1]."""


@dataclass(frozen=True)
class Constant(Schedule):
    """The same sparsity from the first update on."""

    final_sparsity: float

    def __post_init__(self) -> None:
        check_sparsity("final_sparsity", self.final_sparsity)

    def sparsity(self, progress: float) -> float:
        return self.final_sparsity


@dataclass(frozen=True)
class Linear(Schedule):
    """From ``init_sparsity`` to ``final_sparsity`` in a straight line, then constant.

    Args:
        final_sparsity, init_sparsity: shares of zeros.
        ramp: share of the way from first to last update over which sparsity rises; afterwards masks are re-pruned at
            ``final_sparsity``. N:M counts round down, so an N:M pattern is only complete at the end of the ramp.
    """

    final_sparsity: float
    init_sparsity: float = 0.0
    ramp: float = 1.0

    def __post_init__(self) -> None:
        _check_rise(self.init_sparsity, self.final_sparsity, self.ramp)

    def sparsity(self, progress: float) -> float:
        risen = min(1.0, progress / self.ramp)
        return self.init_sparsity * (1 - risen) + self.final_sparsity * risen  # exact at both ends


@dataclass(frozen=True)
class Cubic(Schedule):
    """``s_f + (s_i - s_f) (1 - progress / ramp)^3``: fast at first, slow near the end of the ramp, then ``s_f``.

    Source: Zhu and Gupta, "To prune, or not to prune", arXiv 1710.01878, equation 1.

    Args:
        final_sparsity, init_sparsity: shares of zeros.
        ramp: share of the way from first to last update over which sparsity rises; afterwards masks are re-pruned at
            ``final_sparsity``. N:M counts round down, so an N:M pattern is only complete at the end of the ramp.
    """

    final_sparsity: float
    init_sparsity: float = 0.0
    ramp: float = 1.0

    def __post_init__(self) -> None:
        _check_rise(self.init_sparsity, self.final_sparsity, self.ramp)

    def sparsity(self, progress: float) -> float:
        left = 1 - min(1.0, progress / self.ramp)
        return self.final_sparsity + (self.init_sparsity - self.final_sparsity) * left**3


def resolve_target(
    mask_structure: str | Pattern, sparsity: float | None, schedule: Schedule | None, group: Group = "row"
) -> tuple[Pattern, Schedule]:
    """Pattern and schedule from what users write; raises ValueError if they contradict each other.

    ``group`` is the group in which "unstructured" compares weights.
    """
    if schedule is None:
        pattern, sparsity = parse_pattern(mask_structure, sparsity, group)
        return pattern, Constant(sparsity)
    final = to_python_number(schedule.sparsity(1.0))
    if sparsity is not None and to_python_number(sparsity) != final:
        raise ValueError(f"sparsity={sparsity} is in conflict with the schedule, which ends at {final}: give one.")
    pattern, _ = parse_pattern(mask_structure, final, group)
    return pattern, schedule
