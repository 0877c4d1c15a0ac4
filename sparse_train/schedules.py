"""Sparsity over time (``Schedule``), and the optimizer steps at which masks change (``Timing``).

A schedule is over progress: 0 at ``start_step``, 1 at ``end_step``. Optimizer steps belong to ``Timing``.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

from sparse_train.arguments import check_sparsity, to_python_number
from sparse_train.patterns import Group, Pattern, parse_pattern

ROUNDING = 1e-9
"""Added before a share of steps is rounded down: 0.58 * 100 is 57.99999999999999, and means 58."""


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
class Ramp(Schedule):
    """From ``init_sparsity`` to ``final_sparsity``, then constant.

    Args:
        final_sparsity, init_sparsity: shares of zeros.
        ramp: share of the way from first to last update over which sparsity rises; afterwards masks are re-pruned at
            ``final_sparsity``. N:M counts round down, so an N:M pattern is only complete at the end of the ramp.
    """

    final_sparsity: float
    init_sparsity: float = 0.0
    ramp: float = 1.0
    power: ClassVar[int]
    """Of the distance to ``final_sparsity``, which falls from 1 to 0."""

    def __post_init__(self) -> None:
        check_sparsity("init_sparsity", self.init_sparsity)
        check_sparsity("final_sparsity", self.final_sparsity)
        if self.init_sparsity > self.final_sparsity:
            raise ValueError(f"Sparsity rises: init_sparsity ({self.init_sparsity}) is above {self.final_sparsity}.")
        if not 0 < self.ramp <= 1:
            raise ValueError(f"ramp is the share of the way on which sparsity rises, in (0, 1], got {self.ramp}.")

    def sparsity(self, progress: float) -> float:
        left = (1 - min(1.0, progress / self.ramp)) ** self.power
        sparsity = self.init_sparsity * left + self.final_sparsity * (1 - left)  # exact at both ends
        return min(sparsity, self.final_sparsity)  # 0.6 * 6 / 7 + 0.6 / 7 is a little more than 0.6


@dataclass(frozen=True)
class Linear(Ramp):
    """A straight line from ``init_sparsity`` to ``final_sparsity`` at the share ``ramp`` of the way, then constant."""

    power: ClassVar[int] = 1


@dataclass(frozen=True)
class Cubic(Ramp):
    """``s_f + (s_i - s_f) (1 - progress / ramp)^3``: fast at first, slow near the end of the ramp, then ``s_f``.

    Source: Zhu and Gupta, "To prune, or not to prune", arXiv 1710.01878, equation 1.
    """

    power: ClassVar[int] = 3


def pattern_and_schedule(
    mask_structure: str | Pattern, sparsity: float | None, schedule: Schedule | None, group: Group = "row"
) -> tuple[Pattern, Schedule]:
    """Pattern and schedule from what users write; ValueError if they contradict each other."""
    final = sparsity if schedule is None else to_python_number(schedule.sparsity(1.0))
    if schedule is not None and sparsity is not None and to_python_number(sparsity) != final:
        raise ValueError(f"sparsity={sparsity} is in conflict with the schedule, which ends at {final}: give one.")
    pattern, final = parse_pattern(mask_structure, final, group)
    return pattern, schedule or Constant(final)


# --- steps -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Timing:
    """Updates at ``start_step``, then every ``update_freq`` steps, and at ``end_step``; frozen afterwards.

    All in optimizer steps completed, never micro-batches: an update "at step s" happens after the s-th optimizer
    step (s = 0: before training) and before the next forward.
    """

    start_step: int
    end_step: int
    update_freq: int
    window: int
    """Steps before an update over which activations are recorded, at most ``update_freq``."""

    def in_words(self) -> str:
        before = range(self.start_step, self.end_step, self.update_freq)
        steps = [*map(str, before if len(before) < 4 else [*before[:2], "..."]), str(self.end_step)]
        return f"masks change at step{'s' * (len(steps) > 1)} {', '.join(steps)}, then freeze"

    def is_update(self, step: int) -> bool:
        return self.next_update(step - 1) == step

    def is_compared(self, step: int) -> bool:
        """Whether processes compare their masks: at updates, and every ``update_freq`` steps after the last."""
        return self.is_update(step) or (step > self.end_step and (step - self.end_step) % self.update_freq == 0)

    def next_update(self, step: int) -> int | None:
        """The first update after ``step``; None when masks are frozen."""
        if step < self.start_step:
            return self.start_step
        if step >= self.end_step:
            return None
        return min(self.end_step, step + self.update_freq - (step - self.start_step) % self.update_freq)

    def recorded_for(self, step: int) -> int | None:
        """The update for which the forwards between steps ``step`` and ``step + 1`` count; None if there is none."""
        update = self.next_update(step)
        return update if update is not None and step >= update - self.window else None

    def progress(self, step: int) -> float:
        """0 at the first update, 1 at the last."""
        span = self.end_step - self.start_step
        return min(1.0, max(0.0, (step - self.start_step) / span)) if span else 1.0


def whole_steps(name: str, value: int | float, total_steps: int | float | None) -> int:
    """A number of steps, or a share of ``total_steps``, as a number of steps."""
    if isinstance(value, int):
        if value < 0:
            raise ValueError(f"{name} as a number of steps must be at least 0, got {value}.")
        return value
    if not 0 <= value <= 1:
        raise ValueError(f"{name} as a share of the run must be from 0 to 1, got {value}; whole steps are an int.")
    if total_steps is None or not math.isfinite(total_steps):
        raise ValueError(
            f"{name}={value} is a share of the run, whose length is not known. Give a number of steps (the only way "
            "under manual optimization), or limit the run (max_steps, max_epochs with a data set of known length; "
            "total_steps in a custom loop)."
        )
    return int(value * total_steps + ROUNDING)
