"""``MaskUpdater``: the pipeline over a training run, schedule -> scores -> masks -> policy; needs torch alone."""

import time
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from sparse_train import masks
from sparse_train.activations import InputSharing
from sparse_train.criteria import Criterion, Wanda
from sparse_train.layers import Recorder, SparseLinear, sparsify
from sparse_train.patterns import Pattern, parse_pattern
from sparse_train.policies import MaskPolicy, StraightThrough
from sparse_train.pruner import (
    LayerUpdate,
    UpdateReport,
    attach,
    reduce_statistics,
    share_statistics,
    update_masks,
)
from sparse_train.schedules import Constant, Schedule
from sparse_train.targets import select
from sparse_train.timing import Timing

# ``initial_flip_rate`` is measured on every 32nd row: a whole first mask would double what masks take.
_FIRST_MASK_STRIDE = 32


class MaskUpdater:
    """Keeps a model at its target sparsity over a training run; needs torch alone.

    ::

        updater = MaskUpdater(model, "2:4", update_freq=10, total_steps=1000)
        for batch in batches:
            loss = model(**batch).loss
            loss.backward(); optimizer.step(); optimizer.zero_grad()
            updater.step()
        squash(model)

    Args:
        model: sparsified in place, see ``sparse_train.layers``. Masks that it already has are where the run starts.
        mask_structure: "unstructured", "N:M" (N **kept** of every M consecutive inputs) or a ``Pattern``.
        sparsity: share of targeted weights that are zero; implied by N:M and by a schedule.
        criterion: scores weights; default ``Wanda()``.
        policy: what pruned weights do between updates; default ``StraightThrough()``.
        schedule: sparsity over the run; default constant.
        targets, ignore: which layers, see ``sparse_train.targets.select``.
        update_freq: k, optimizer steps between updates.
        start_step: first update (int = steps, float = share of the run). Where the first mask needs activations, it
            comes ``window`` steps into the run at the earliest; until then the model is dense.
        end_step: the step after which masks are frozen (int = steps, float = share of the run).
        window: steps before an update over which activations are recorded (int = steps, float = share of
            ``update_freq``).
        total_steps: optimizer steps of the run; needed for shares of it.

    Raises:
        ValueError: any of these out of range or in conflict, nothing to prune, or a target that cannot be masked.
    """

    def __init__(
        self,
        model: nn.Module,
        mask_structure: str | Pattern = "2:4",
        *,
        sparsity: float | None = None,
        criterion: Criterion | None = None,
        policy: MaskPolicy | None = None,
        schedule: Schedule | None = None,
        targets: Sequence[str] | None = None,
        ignore: Sequence[str] = (),
        update_freq: int = 10,
        start_step: int | float = 0,
        end_step: int | float = 0.75,
        window: int | float = 0.5,
        total_steps: int | float | None = None,
    ) -> None:
        self.pattern, self.schedule = resolve_target(mask_structure, sparsity, schedule)
        self.criterion = criterion or Wanda()
        self.policy = policy or StraightThrough()
        layers = select(model, self.pattern, targets, ignore).layers
        # A run starts from the masks that are there; nothing to prune yet is also a mask.
        already = self.schedule.sparsity(0.0) == 0 or all(
            isinstance(layer, SparseLinear) and not layer.keeps_all() for layer in layers.values()
        )
        self.target: float | None = self.schedule.sparsity(0.0) if already else None
        """Sparsity of the masks as they are; None before the first."""
        self.timing = Timing.resolve(
            start_step=start_step,
            end_step=end_step,
            update_freq=update_freq,
            window=window,
            total_steps=total_steps,
            first_from_window=self.criterion.needs_activations and not already,
        )
        sparsify(model, layers.values())
        self.layers: dict[str, SparseLinear] = {n: m for n, m in layers.items() if isinstance(m, SparseLinear)}
        self.recorder = Recorder()
        attach(self.layers.values(), self.recorder, self.criterion)
        for layer in self.layers.values():
            layer.straight_through = self.policy.straight_through
        self.steps = 0
        self._first_rows: dict[str, Tensor] = self._rows() if already else {}
        self._sharing_known = False
        if self.timing.is_update(0) and not already:
            self.update()
        self._set_recording()

    @property
    def token_mask(self) -> Tensor | None:
        """Which tokens of the current batch count, (B, L) bool or integer, 0 = padding; None = all."""
        return self.recorder.token_mask

    @token_mask.setter
    def token_mask(self, mask: Tensor | None) -> None:
        self.recorder.token_mask = mask

    def step(self) -> UpdateReport | None:
        """Call after every optimizer step, before the next forward. Returns a report where masks were updated."""
        self.steps += 1
        if self.recorder.sharing is not None:
            share_statistics(self.recorder)
            self._sharing_known = True
        report = self.update() if self.timing.is_update(self.steps) and self._would_change(self.steps) else None
        self._set_recording()
        return report

    def update(self) -> UpdateReport:
        """Replace the masks now, from the statistics gathered so far, which are then forgotten."""
        began = time.perf_counter()
        progress = self.timing.progress(self.steps)
        target = self.schedule.sparsity(progress)
        statistics = reduce_statistics(self.layers.values())
        since = min(self.timing.update_freq, self.steps - self.timing.start_step)
        changes = update_masks(
            self.layers,
            criterion=self.criterion,
            pattern=self.pattern,
            sparsity=target,
            policy=self.policy,
            shadow_factor=self.policy.shadow_decay(progress, since) if self.target is not None and since > 0 else 1.0,
        )
        for each in statistics:
            each.reset()
        self.target = target
        return self._report(changes, time.perf_counter() - began)

    def state_dict(self) -> dict[str, Any]:
        """All that decides a later mask and is not in the model: counters, statistics, settings."""
        return {
            "steps": self.steps,
            "target": self.target,
            "settings": self._settings(),
            "statistics": {n: m.statistics.state_dict() for n, m in self.layers.items() if m.statistics is not None},
            "first_rows": {name: rows.cpu() for name, rows in self._first_rows.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state_dict`` was taken. The masks come with the model's own state dict.

        Raises:
            ValueError: the state is from a run with another pattern, sparsity or criterion, or other targets.
        """
        for name, now in self._settings().items():
            before = state["settings"].get(name)
            if before != now:
                raise ValueError(
                    f"The checkpoint was written with {name} = {before}, and this run has {now}. Resume with the "
                    "same setting, or start a new run from the exported model."
                )
        if set(state["statistics"]) - set(self.layers) or set(state["first_rows"]) - set(self.layers):
            unknown = sorted(set(state["statistics"]) | set(state["first_rows"]) - set(self.layers))
            raise ValueError(f"The checkpoint pruned layers that are no targets of this run, such as {unknown[0]}.")
        self.steps, self.target = state["steps"], state["target"]
        device_of = {name: layer.weight.device for name, layer in self.layers.items()}
        self._first_rows = {name: rows.to(device_of[name]) for name, rows in state["first_rows"].items()}
        for name, statistics in state["statistics"].items():
            own = self.layers[name].statistics
            assert own is not None, name
            own.load_state_dict(statistics)
        self._set_recording()

    def _settings(self) -> dict[str, str]:
        return {
            "mask_structure": repr(self.pattern),
            "schedule": repr(self.schedule),
            "criterion": repr(self.criterion),
            "layers": f"{len(self.layers)} targets",
        }

    def _would_change(self, step: int) -> bool:
        if self.target is None or self.policy.revives:
            return True
        return self.schedule.sparsity(self.timing.progress(step)) != self.target

    def _set_recording(self) -> None:
        update = self.timing.next_update(self.steps)
        wanted = (
            self.criterion.needs_activations
            and update is not None
            and self.timing.is_recorded(self.steps)
            and self._would_change(update)
        )
        self.recorder.when = "training" if wanted else "never"
        self.recorder.sharing = InputSharing() if wanted and not self._sharing_known else None

    def _report(self, changes: dict[str, LayerUpdate], seconds: float) -> UpdateReport:
        rows = self._rows()
        self._first_rows = self._first_rows or rows
        differing = sum(masks.count_differing(row, self._first_rows[name]) for name, row in rows.items())
        entries = sum(len(row) * self.layers[name].in_features for name, row in rows.items())
        assert self.target is not None
        return UpdateReport(self.steps, self.target, changes, differing / entries, seconds)

    def _rows(self) -> dict[str, Tensor]:
        return {name: layer.weight_mask[::_FIRST_MASK_STRIDE].clone() for name, layer in self.layers.items()}


def resolve_target(
    mask_structure: str | Pattern, sparsity: float | None, schedule: Schedule | None
) -> tuple[Pattern, Schedule]:
    """Pattern and schedule from what users write; raises ValueError where they contradict each other."""
    if schedule is None:
        pattern, sparsity = parse_pattern(mask_structure, sparsity)
        return pattern, Constant(sparsity)
    final = schedule.sparsity(1.0)
    if sparsity is not None and sparsity != final:
        raise ValueError(f"sparsity={sparsity} is in conflict with the schedule, which ends at {final}: give one.")
    pattern, _ = parse_pattern(mask_structure, final)
    return pattern, schedule
