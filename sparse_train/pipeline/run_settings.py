"""``RunSettings``: the settings of a training run with re-pruning, checked once, in any kind of trainer."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from sparse_train.allocation import Allocation, Outliers, Uniform, check_pattern
from sparse_train.arguments import require_type, to_python_number
from sparse_train.criteria import Criterion, Wanda
from sparse_train.description import describe
from sparse_train.layers.matrices import MaskedLayer
from sparse_train.layers.sharding import check_layout
from sparse_train.layers.sparsify import sparsify
from sparse_train.patterns import Pattern, group_label
from sparse_train.pipeline.divided_sparsity import DividedSparsity, check_outliers
from sparse_train.pipeline.earlier_windows import Memory, check_memory
from sparse_train.pipeline.margins import Margin, check_margin, check_window
from sparse_train.pipeline.policies import MaskPolicy, StraightThrough
from sparse_train.pipeline.regrow import Regrow
from sparse_train.pipeline.schedules import Cubic, Schedule, resolve_target
from sparse_train.pipeline.timing import Timing, check_update_freq
from sparse_train.solvers import Solver
from sparse_train.targets import select


@dataclass(frozen=True)
class RunSettings:
    """The arguments of ``MaskUpdater`` that do not depend on the model or on the length of the run; explained there.

    Raises:
        ValueError: arguments are out of range, or in conflict with each other.
    """

    mask_structure: Pattern
    schedule: Schedule
    criterion: Criterion
    policy: MaskPolicy
    allocation: Allocation
    targets: Sequence[str] | None
    ignore: Sequence[str]
    update_freq: int
    start_step: int | float
    end_step: int | float
    window: int | float
    memory: Memory
    hysteresis: float
    noise_margin: float
    flip_agreement: bool

    def __post_init__(self) -> None:
        check_memory(self.memory, self.criterion)
        if self.policy.comes_back == "by gradient" and not isinstance(self.policy, Regrow):
            raise ValueError(
                f'{self.policy}: comes_back is "by gradient", which only Regrow can do. Subclass Regrow, or let '
                'weights come back "by score".'
            )
        check_pattern(self.allocation, self.mask_structure)
        check_outliers(self.allocation, self.criterion)
        check_margin(self.margin, self.flip_agreement, self.policy, self.criterion, self.memory == "frozen")

    @staticmethod
    def resolve(
        mask_structure: str | Pattern,
        sparsity: float | None,
        schedule: Schedule | None,
        criterion: Criterion | None,
        policy: MaskPolicy | None,
        *,
        allocation: Allocation | None,
        **others: Any,
    ) -> "RunSettings":
        """From what users write: a pattern as a word, a sparsity or a schedule, None for the defaults."""
        others = {name: to_python_number(value) for name, value in others.items()}
        others["update_freq"] = check_update_freq(others["update_freq"])
        if isinstance(criterion, Solver):
            raise ValueError(
                f"criterion is {criterion}, which moves weights and has no scores for re-pruning. Give it as "
                "initial_criterion, for the first mask, or prune the model with it before the run; for updates, give "
                "a Criterion such as Wanda()."
            )
        scores = require_type("criterion", criterion, Wanda(), Criterion)
        if schedule is not None:
            require_type("schedule", schedule, Cubic(0.5), Schedule)
        pattern, schedule = resolve_target(mask_structure, sparsity, schedule, scores.group)
        return RunSettings(
            pattern,
            schedule,
            scores,
            require_type("policy", policy, StraightThrough(), MaskPolicy),
            require_type("allocation", allocation, Uniform(), Allocation),
            **others,
        )

    @property
    def first_sparsity(self) -> float:
        """Sparsity of the masks at step 0."""
        return self.sparsity_at(0.0) if self.start_step == 0 else 0.0

    def sparsity_at(self, progress: float) -> float:
        """Sparsity of the schedule at ``progress``, always as a Python number."""
        return float(to_python_number(self.schedule.sparsity(progress)))

    @property
    def margin(self) -> Margin:
        """How much better a pruned weight has to be than a kept one."""
        return Margin(self.hysteresis, self.noise_margin)

    @property
    def halved(self) -> bool:
        """Whether odd and even steps are recorded separately."""
        return self.noise_margin > 0 or self.flip_agreement

    def timing(self, total_steps: int | float | None, has_masks: bool) -> Timing:
        """When masks change in a run of this length, which starts with masks or makes its first ones.

        Raises:
            ValueError: the length is needed but unknown, or steps are in conflict with it or with each other.
        """
        timing = Timing.resolve(
            start_step=self.start_step,
            end_step=self.end_step,
            update_freq=self.update_freq,
            window=self.window,
            total_steps=to_python_number(total_steps),
            first_from_window=self.criterion.needs_activations and not has_masks,
        )
        if self.halved:
            check_window(timing.window)
        return timing

    def sparsify(self, model: nn.Module) -> dict[str, MaskedLayer]:
        """Give the targets of a model masks that keep everything, unless they are masked already; returns them by name.

        Raises:
            ValueError: nothing to prune, or a target that cannot be masked. The model is then unchanged.
        """
        layers = select(model, self.mask_structure, self.targets, self.ignore).layers
        for name, layer in layers.items():
            check_layout(name, layer)
        sparsify(model, layers.values())
        return {name: layer for name, layer in layers.items() if isinstance(layer, MaskedLayer)}

    def divided_sparsity(
        self, model: nn.Module, layers: Mapping[str, MaskedLayer], outliers: Outliers | None = None
    ) -> DividedSparsity:
        """How the sparsity is divided among the targets of a model, see ``MaskUpdater``."""
        return DividedSparsity(model, layers, self.allocation, self.mask_structure, self.sparsity_at(1.0), outliers)

    def as_strings(self) -> dict[str, str]:
        """Settings that a run and one that continues it must share, except those that depend on the model."""
        return {
            "mask_structure": group_label(self.mask_structure),
            "schedule": describe(self.schedule),
            "criterion": describe(self.criterion),
            "statistics": "norms" if self.criterion.needs_activations else "none",
            "policy": describe(self.policy),
            "allocation": describe(self.allocation),
            "comes_back": self.policy.comes_back,
            "update_freq": str(self.update_freq),
            "start_step": str(self.start_step),
            "end_step": str(self.end_step),
            "window": str(self.window),
            "memory": str(self.memory if self.memory == "frozen" else float(self.memory)),
            "margin": repr(self.margin) if self.margin else "none",
            "flip_agreement": str(self.flip_agreement),
        }


def check_settings(saved: Mapping[str, str], own: Mapping[str, str]) -> None:
    """Raise ValueError if a saved run had other settings, in words, than these."""
    for name, now in own.items():
        if saved.get(name) != now:
            raise ValueError(
                f"The checkpoint was written with {name} = {saved.get(name)}, and this run has {now}. Resume with the "
                "same setting, or start a new run from the exported model."
            )
