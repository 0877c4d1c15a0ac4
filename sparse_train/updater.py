"""``MaskUpdater``: the pipeline over a training run, schedule -> scores -> masks -> policy; needs torch alone."""

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_train.choice import Rules
from sparse_train.criteria import Criterion
from sparse_train.distributed import gather_objects, rank
from sparse_train.earlier_windows import EarlierWindows, Memory
from sparse_train.input_sharing import InputSharing
from sparse_train.layers import fold, sparsify
from sparse_train.margins import NO_MARGIN, check_window
from sparse_train.mask_lora import check_policy, describe_adapters
from sparse_train.matrices import MaskedLayer, Recorder
from sparse_train.patterns import Pattern
from sparse_train.policies import MaskPolicy
from sparse_train.pruner import (
    LayerUpdate,
    UpdateReport,
    check_masks,
    measure,
    sample_rows,
    share_differing,
    update_masks,
)
from sparse_train.recording import (
    attach,
    check_agreement,
    exchange,
    needed_statistics,
    norms_of,
    restore,
    share_statistics,
    turn_halves,
    warn_of_padding,
)
from sparse_train.regrow import Growth, Regrow
from sparse_train.run_settings import RunSettings, check_settings
from sparse_train.schedules import Schedule
from sparse_train.sharding import check_layout, reshard
from sparse_train.targets import select
from sparse_train.timing import Timing

_log = logging.getLogger(__name__)


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
        memory: factor per update with which the statistics of earlier windows count, tokens alike: 0 = the last window
            alone, up to 1 = all windows, the default, which trained best (docs/results.md). Where the masks that the
            model has come from one-shot pruning, its norms count as the first window's, half of them in
            each half for ``noise_margin`` and ``flip_agreement``.
            "frozen": the norms of the first mask for ever; from there, or from the first window.
        hysteresis: share by which the scores of kept weights count more at updates.
        noise_margin: how many standard errors, estimated from the odd and the even steps of the window, kept weights
            are taken for better and pruned ones for worse than they look; see ``sparse_train.margins``.
        flip_agreement: report which share of an update's flips odd and even steps would each have made alone.
        total_steps: optimizer steps of the run; needed for shares of it.
        state: ``state_dict`` of the run to resume, whose masks the model has, or will load.

    Raises:
        ValueError: any of these out of range or in conflict, nothing to prune, a target that cannot be masked, or
            masks that the model already has and that are not this run's.
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
        memory: Memory = 1.0,
        hysteresis: float = 0.0,
        noise_margin: float = 0.0,
        flip_agreement: bool = False,
        total_steps: int | float | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.run = RunSettings.resolve(
            mask_structure,
            sparsity,
            schedule,
            criterion,
            policy,
            targets=targets,
            ignore=ignore,
            update_freq=update_freq,
            start_step=start_step,
            end_step=end_step,
            window=window,
            memory=memory,
            hysteresis=hysteresis,
            noise_margin=noise_margin,
            flip_agreement=flip_agreement,
        )
        """What it was asked to do."""
        self._model = model
        layers = select(model, self.run.mask_structure, targets, ignore).layers
        began_dense = not any(isinstance(layer, MaskedLayer) for layer in layers.values())
        for name, layer in layers.items():
            check_layout(name, layer)
        sparsify(model, layers.values())
        self.layers: dict[str, MaskedLayer] = {n: m for n, m in layers.items() if isinstance(m, MaskedLayer)}
        try:
            self._start(total_steps, state)
        except BaseException:
            if began_dense:
                fold(model)  # the masks keep everything: the model is as it was
            raise

    def _start(self, total_steps: int | float | None, state: Mapping[str, Any] | None) -> None:
        run = self.run
        initial = run.schedule.sparsity(0.0)
        check_policy(self.layers, run.policy)
        self._adapters = describe_adapters(self.layers)
        # A run starts from the masks that are there; where nothing is to be pruned yet, that is also a mask.
        masked = state is not None or initial == 0 or not all(layer.keeps_all() for layer in self.layers.values())
        if masked and state is None:
            check_masks(self.layers, run.mask_structure, initial)
        self.timing = Timing.resolve(
            start_step=run.start_step,
            end_step=run.end_step,
            update_freq=run.update_freq,
            window=run.window,
            total_steps=total_steps,
            first_from_window=run.criterion.needs_activations and not masked,
        )
        self.recorder = Recorder()
        # with a recorder they are an earlier updater's, and whole on rank 0 alone
        first = norms_of({n: layer for n, layer in self.layers.items() if layer.recorder is None})
        if run.halved:
            check_window(self.timing.window)
        attach(self.layers.values(), self.recorder, needed_statistics(run.criterion, run.halved))
        for layer in self.layers.values():
            layer.straight_through = run.policy.straight_through
        self._growth = Growth(self.layers, run.policy, run.criterion) if isinstance(run.policy, Regrow) else None
        self.steps = 0
        self.target: float | None = initial if masked else None
        """Sparsity of the masks as they are; None before the first."""
        self._last_update = 0
        self._sharing_known = self._warned = False
        self._earlier = EarlierWindows(self.layers, run.memory)
        if masked and state is None:
            # also "cumulative" means all there is: the norms behind the first mask are the first that are remembered
            self._earlier.begin_with(first)
        self._first_rows: dict[str, Tensor] = sample_rows(self.layers) if masked else {}
        if state is not None:
            self.load_state_dict(state)
        elif self.timing.is_update(0) and not masked:
            self.update()
        self._set_recording()

    @property
    def token_mask(self) -> Tensor | None:
        """Which tokens of the current batch count, (B, L) bool or integer, 0 = padding; None = all."""
        return self.recorder.token_mask

    @token_mask.setter
    def token_mask(self, mask: Tensor | None) -> None:
        self.recorder.token_mask = mask

    def watch(self, optimizers: Iterable[Optimizer]) -> None:
        """Tell which optimizers train the layers; ``Regrow`` clears their moments, other policies do not need them."""
        if self._growth is not None:
            self._growth.watch(optimizers)

    def before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Call behind backward and ahead of clipping and ``optimizer.step()``, for ``Regrow``; others do not need it.

        Takes the gradients of pruned weights, where the step is an update's, so that the optimizer does not see them.
        """
        if self._growth is not None:
            self._growth.take(optimizer)

    def step(self) -> UpdateReport | None:
        """Call after every optimizer step, before the next forward. Returns a report at the steps of updates."""
        self.steps += 1
        warn_of_padding(self.recorder)
        if self.recorder.sharing is not None:
            self._sharing_known = share_statistics(self.recorder, list(self.layers.values()))
        if self.recorder.when == "training":
            turn_halves(self.layers.values())
        report = None
        if self.timing.is_update(self.steps):
            report = self.update() if self._would_change(self.steps) else self._confirm()
        elif self.timing.is_frozen(self.steps) and (self.steps - self.timing.end_step) % self.timing.update_freq == 0:
            check_agreement(self.layers)
        self._set_recording()
        return report

    def update(self) -> UpdateReport:
        """Replace the masks now, from the statistics gathered so far, which then fade as ``memory`` says."""
        began = time.perf_counter()
        reshard(self._model)
        progress = self.timing.progress(self.steps)
        target = self.run.schedule.sparsity(progress)
        exchange(self.layers)
        self._earlier.warn_of_old()
        since = 0 if self.target is None else self.steps - self._last_update
        shadow_factor = self.run.policy.shadow_decay(progress, since) if since else 1.0
        check_policy(self.layers, self.run.policy, shadow_factor)  # adapters may have come after the updater
        before = {}
        if self._growth is not None:
            self._growth.check()
            before = {name: layer.weight_mask.clone() for name, layer in self.layers.items()}
        rules = Rules(
            self.run.criterion,
            self.run.mask_structure,
            target,
            self.run.policy,
            shadow_factor=shadow_factor,
            margin=NO_MARGIN if self.target is None else self.run.margin,
            growth=self._growth,
        )
        changes = update_masks(self.layers, rules, compare_halves=self.run.flip_agreement and self.target is not None)
        if self._growth is not None:
            self._growth.restart(before)
        self._earlier.fade()
        self.target, self._last_update = target, self.steps
        return self._report(changes, time.perf_counter() - began)

    def _confirm(self) -> UpdateReport:
        check_agreement(self.layers)  # statistics stay: nothing was recorded, and a sum would count what is remembered
        unreached = [name for name, layer in self.layers.items() if not layer.reached]
        if unreached and len(unreached) < len(self.layers) and not self._warned and rank() == 0:
            self._warned = True
            _log.warning(
                "%s is a target, and no forward has reached it so far: if its weight is read in another way, its mask "
                "has no effect until it is folded in at the end. Leave it out with ignore=[%r].",
                unreached[0],
                unreached[0],
            )
        return self.report()

    def report(self) -> UpdateReport:
        """The masks as they are, unchanged: sparsity counted on the weights, flip rate 0."""
        began = time.perf_counter()
        reshard(self._model)
        return self._report(measure(self.layers), time.perf_counter() - began)

    def finish(self) -> None:
        """Call once before ``squash``, where several ranks train: a last look at whether their masks are the same."""
        check_agreement(self.layers)

    def state_dict(self) -> dict[str, Any]:
        """All that decides a later mask and is not in the model: counters, timing, statistics, settings.

        Where several ranks train, all of them must call: the statistics of each are in what all of them get.
        """
        return {
            "steps": self.steps,
            "target": self.target,
            "last_update": self._last_update,
            "earlier_windows": self._earlier.state_dict(),
            "timing": asdict(self.timing),
            "settings": self.settings(),
            "statistics_by_rank": gather_objects({n: stats.state_dict() for n, stats in norms_of(self.layers).items()}),
            "gradients": {} if self._growth is None else self._growth.state_dict(),
            "first_rows": {name: rows.cpu() for name, rows in self._first_rows.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state_dict`` was taken. The masks come with the model's own state dict.

        The steps of updates stay those of the interrupted run, also where the resumed one is longer. Each rank gets its
        own statistics back; another number of ranks gets their sum, on rank 0, which is the same to an update.

        Raises:
            ValueError: the state is from a run with another pattern, sparsity, criterion or interval, or other targets.
        """
        check_settings(state["settings"], self.settings())
        by_rank: list[dict[str, dict[str, Tensor]]] = state["statistics_by_rank"]
        unknown = sorted(set().union(*by_rank, state["first_rows"]) - set(self.layers))
        if unknown:
            raise ValueError(f"The checkpoint pruned layers that are no targets of this run, such as {unknown[0]}.")
        self.steps, self.target, self._last_update = state["steps"], state["target"], state["last_update"]
        self.timing = Timing(**state["timing"])
        self._earlier.load_state_dict(state["earlier_windows"])
        self._first_rows = {n: rows.to(self.layers[n].weight_OI.device) for n, rows in state["first_rows"].items()}
        if self._growth is not None:
            self._growth.load_state_dict(state["gradients"])
        restore(norms_of(self.layers), by_rank)
        self._set_recording()

    def settings(self) -> dict[str, str]:
        """What a run that continues this one must have in common with it, in words."""
        self._adapters = describe_adapters(self.layers) or self._adapters  # as they were, once they are merged
        adapters = {"mask_lora": self._adapters} if self._adapters else {}
        return adapters | self.run.words() | {"layers": f"{len(self.layers)} targets"}

    def _would_change(self, step: int) -> bool:
        if self.target is None or self.run.policy.revives:
            return True
        return self.run.schedule.sparsity(self.timing.progress(step)) != self.target

    def _set_recording(self) -> None:
        update = self.timing.next_update(self.steps)
        wanted = (
            self.run.criterion.needs_activations
            and not self._earlier.frozen
            and update is not None
            and self.timing.is_recorded(self.steps)
            and self._would_change(update)
        )
        if self._growth is not None:
            next_is_update = self.target is not None and self.timing.is_update(self.steps + 1)
            self._growth.ask(self.timing.progress(self.steps + 1) if next_is_update else None)
        self.recorder.when = "training" if wanted else "never"
        self.recorder.sharing = InputSharing() if wanted and not self._sharing_known else None

    def _report(self, changes: dict[str, LayerUpdate], seconds: float) -> UpdateReport:
        self._first_rows = self._first_rows or sample_rows(self.layers)
        differing = share_differing(self.layers, self._first_rows)
        return UpdateReport(self.steps, self.target or 0.0, changes, differing, seconds)
