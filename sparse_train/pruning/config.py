"""``PruningConfig``: the arguments of a run with re-pruning, in any kind of trainer; and the types of first masks."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

from sparse_train.arguments import as_data, did_you_mean, require_type, to_python_number
from sparse_train.criteria import Criterion, Wanda
from sparse_train.distributions import SparsityDistribution, Uniform, check_pattern
from sparse_train.patterns import Pattern, group_label
from sparse_train.policies import MaskPolicy, StraightThrough
from sparse_train.schedules import ROUNDING, Cubic, Schedule, Timing, pattern_and_schedule, whole_steps
from sparse_train.solvers import Solver


class FirstMask:
    """Where the first mask of a run comes from, if the model has none.

    Layers that are masked already, as ``prune(..., squash=False)`` leaves them, begin with their masks.
    """


@dataclass(frozen=True)
class OneShot(FirstMask):
    """One-shot pruning at step 0, block by block, calibrated on batches of the training data.

    It needs a transformers model that is not sharded, batches that are dicts or tensors of token ids, and data that is
    neither a stream nor read by a sampler of its own. Otherwise the mask comes from the first window, and the log says
    why. So it does in a plain loop, where there is no data to be found (call ``prune(..., squash=False)`` before), and
    if ``start_step`` is above 0.

    Args:
        criterion: scores for this mask; default: the criterion of the run. Or a ``Solver``, such as ``IHT()``, which
            also moves the weights that it keeps, and gives pruned ones the values with which they may come back. If it
            is given, and one-shot pruning cannot make the first mask, the run raises an error.
        samples: number of sequences, over all ranks, in whole batches, or all if there are fewer: random ones of the
            training data, or, in Lightning, the first of the loader that a data module's ``calibration_dataloader()``
            returns.
    """

    criterion: Criterion | Solver | None = None
    samples: int = 32

    needs: ClassVar[str] = (
        "a transformers model that is not sharded, and training data that is not a stream, has no sampler of its own, "
        "and has batches of token ids or dicts with input_ids, at least one for each process"
    )

    def __post_init__(self) -> None:
        if type(to_python_number(self.samples)) is not int or self.samples < 1:
            raise ValueError(f"OneShot.samples is a whole number, at least 1, got {self.samples!r}.")
        require_type("OneShot.criterion", self.criterion, Wanda(), (Criterion, Solver))


@dataclass(frozen=True)
class FirstWindow(FirstMask):
    """The activations of the first ``window`` steps, which run dense."""


@dataclass(frozen=True)
class FromZeros(FirstMask):
    """The zeros of a model that was pruned before, which must follow the pattern at the first sparsity."""


@dataclass(frozen=True)
class PruningConfig:
    """The settings of a run with re-pruning. Steps are checked in ``timing``, all else here.

    Args:
        mask_structure: "unstructured", "N:M" with N **kept** of every M consecutive inputs, or a ``Pattern``.
        sparsity: share of targeted weights that are zero, in [0, 1); implied by N:M and by ``schedule``.
        update_freq: k, optimizer steps between updates (never micro-batches).
        criterion: scores weights. Its ``group`` is the group that "unstructured" compares in.
        policy: what pruned weights do between updates.
        schedule: sparsity between ``start_step`` and ``end_step``; default constant.
        distribution: how the final sparsity is divided among layers, such as ``OWL()``; on the way to it, layers have
            a lower one in proportion. If the model has masks or zeros already, ``OWL`` keeps their division.
            "unstructured" only.
        targets: list of layers by name, part of a name ("q_proj"), class name, or "re:" regular expression. Default:
            those of the decoder blocks; in a model without such blocks, all but the last. See
            ``layers.targets.find_targets``.
        ignore: list of layers to leave dense, in the same forms.
        start_step: first update; int = steps, float = share of the run. If there are no masks yet and the criterion
            reads activations, it comes at step ``window`` at the earliest; until then the model is dense.
        end_step: the step after which masks are frozen; int = steps, float = share of the run. With manual
            optimization, both must be whole numbers; a batch in which any optimizer steps counts as one step.
        window: steps before an update over which activations are recorded; float = share of ``update_freq``.
        norm_decay: factor per update with which activations of earlier windows count. 0 = only the last window; 1 = all
            windows, including the calibration of the first mask: the default, which trained best (docs/results.md).
        first_mask: where the first mask comes from: ``OneShot()``, ``FirstWindow()``, ``FromZeros()``; None = the model
            must have masks already.

    Raises:
        ValueError: arguments are out of range, or in conflict with each other.
    """

    mask_structure: str | Pattern = "2:4"
    sparsity: float | None = None
    update_freq: int = 10
    criterion: Criterion = field(default_factory=Wanda)
    policy: MaskPolicy = field(default_factory=StraightThrough)
    schedule: Schedule | None = None
    distribution: SparsityDistribution = field(default_factory=Uniform)
    targets: Sequence[str] | None = None
    ignore: Sequence[str] = ()
    start_step: int | float = 0
    end_step: int | float = 0.75
    window: int | float = 0.5
    norm_decay: float = 1.0
    first_mask: FirstMask | None = field(default_factory=OneShot)

    pattern: Pattern = field(init=False, repr=False, compare=False)
    """Of ``mask_structure``."""
    resolved_schedule: Schedule = field(init=False, repr=False, compare=False)
    """``schedule``, or the constant ``sparsity``."""

    def __post_init__(self) -> None:
        for each in fields(self):
            if each.init:
                self._set(each.name, to_python_number(getattr(self, each.name)))
        if type(self.update_freq) is not int or self.update_freq < 1:
            raise ValueError(
                f"update_freq is the number of steps between mask updates, at least 1, got {self.update_freq!r}."
            )
        self._set("criterion", require_type("criterion", self.criterion, Wanda(), Criterion))
        self._set("policy", require_type("policy", self.policy, StraightThrough(), MaskPolicy))
        self._set("distribution", require_type("distribution", self.distribution, Uniform(), SparsityDistribution))
        require_type("schedule", self.schedule, Cubic(0.5), Schedule)
        require_type("first_mask", self.first_mask, OneShot(), FirstMask)
        group = self.criterion.group
        pattern, schedule = pattern_and_schedule(self.mask_structure, self.sparsity, self.schedule, group)
        self._set("pattern", pattern)
        self._set("resolved_schedule", schedule)
        check_pattern(self.distribution, pattern)
        if (solver := self.first_solver) is not None:
            solver.check_pattern(pattern)
        if self.distribution.outliers_above is not None and not self.criterion.needs_activations:
            raise ValueError(
                f"{self.distribution} reads activations, and {self.criterion} does not, so that none are recorded. Use "
                "Wanda(), or Explicit."
            )
        if not (isinstance(self.norm_decay, (int, float)) and 0 <= self.norm_decay <= 1):
            raise ValueError(f"norm_decay is the factor of earlier norms, from 0 to 1, got {self.norm_decay!r}.")

    @classmethod
    def of(
        cls,
        config: "PruningConfig | None",
        mask_structure: str | Pattern | None,
        sparsity: float | None,
        **settings: Any,
    ) -> "PruningConfig":
        """``config``, or the settings as one; TypeError for a name that is none, ValueError for both."""
        names = [each.name for each in fields(cls) if each.init]
        for name in settings.keys() - names:
            raise TypeError(f"There is no setting {name!r}.{did_you_mean(name, names)}")
        require_type("config", config, cls(), cls)
        if config is None:
            return cls("2:4" if mask_structure is None else mask_structure, sparsity, **settings)
        # as the command line gives them: all, and lists for tuples
        by_default = len(settings) == len(names) - 2 and cls(**settings).as_data() == cls().as_data()
        if mask_structure is not None or sparsity is not None or (settings and not by_default):
            raise ValueError("Give config or settings, not both: write the settings into the config.")
        return config

    def _set(self, name: str, value: Any) -> None:
        object.__setattr__(self, name, value)  # the class is frozen for everyone else

    @property
    def first_solver(self) -> Solver | None:
        """What makes the first mask, if that also moves weights."""
        criterion = self.first_mask.criterion if isinstance(self.first_mask, OneShot) else None
        return criterion if isinstance(criterion, Solver) else None

    def sparsity_at(self, progress: float) -> float:
        """Sparsity of the schedule at ``progress``, always as a Python number."""
        return float(to_python_number(self.resolved_schedule.sparsity(progress)))

    def timing(self, total_steps: int | float | None, has_masks: bool) -> Timing:
        """When masks change in a run of this length, which starts with masks or makes its first ones.

        Raises:
            ValueError: the length is needed but unknown, or steps are in conflict with it or with each other.
        """
        total_steps, window = to_python_number(total_steps), self.window
        if total_steps is not None and total_steps < 1:
            raise ValueError(f"total_steps is the number of optimizer steps of the run, at least 1, got {total_steps}.")
        if isinstance(window, float):
            if not 0 < window <= 1:
                raise ValueError(f"window as a share of update_freq must be above 0 and at most 1, got {window}.")
            window = math.ceil(window * self.update_freq - ROUNDING)
        if not 1 <= window <= self.update_freq:
            raise ValueError(f"window must be from 1 to update_freq ({self.update_freq}) steps, got {window}.")
        start = whole_steps("start_step", self.start_step, total_steps)
        end = whole_steps("end_step", self.end_step, total_steps)
        if end < start:
            raise ValueError(f"end_step ({end}) must not lie before the first update, start_step ({start}).")
        if total_steps is not None and start > total_steps:
            raise ValueError(f"start_step ({start}) lies after the end of the run ({total_steps:g} steps).")
        if self.criterion.needs_activations and not has_masks:
            # a run shorter than the window (a trial of a few steps) still ends sparse
            start = max(start, int(min(window, total_steps or window)))
            if isinstance(self.end_step, float):  # a share is only approximate
                end = max(start, end)
            if end < start:
                raise ValueError(f"end_step ({end}) is before the first mask: it needs {window} steps of activations.")
        return Timing(start, end, self.update_freq, window)

    def as_data(self) -> dict[str, Any]:
        """The settings as plain data, for checkpoints, cards and reports; parts name their class."""
        settings = {each.name: as_data(getattr(self, each.name)) for each in fields(self) if each.init}
        return {**settings, "mask_structure": group_label(self.pattern), "sparsity": self.sparsity_at(1.0)}
