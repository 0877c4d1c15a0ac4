"""``MaskUpdater``: the pipeline over a training run, schedule -> scores -> masks -> policy; needs only torch."""

import logging
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_train.allocation import Allocation, Outliers
from sparse_train.criteria import Criterion
from sparse_train.distributed import rank
from sparse_train.layers.agreement import check_agreement
from sparse_train.layers.blocks import ONE_OF_TWO_TEXTS, reads_two_texts
from sparse_train.layers.mask_lora import describe_adapters
from sparse_train.layers.sharding import reshard
from sparse_train.layers.sparse_linear import sparse_layers
from sparse_train.layers.sparsify import fold
from sparse_train.patterns import Pattern
from sparse_train.pipeline.choice import Rules
from sparse_train.pipeline.earlier_windows import Memory
from sparse_train.pipeline.existing_zeros import masks_from_zeros, warn_of_filled_zeros
from sparse_train.pipeline.first_masks import FirstMasks
from sparse_train.pipeline.margins import NO_MARGIN
from sparse_train.pipeline.policies import MaskPolicy, check_policy, check_precision
from sparse_train.pipeline.pruner import check_masks, measure, update_masks
from sparse_train.pipeline.recording import check_statistics, warn_of_idle, warn_of_unreached
from sparse_train.pipeline.regrow import Growth, Regrow
from sparse_train.pipeline.run_settings import RunSettings, check_settings
from sparse_train.pipeline.schedules import Schedule
from sparse_train.pipeline.timing import Timing
from sparse_train.pipeline.update_report import LayerUpdate, UpdateReport
from sparse_train.pipeline.window import Window, check_known

_log = logging.getLogger(__name__)


class MaskUpdater:
    """Keeps a model at its target sparsity over a training run; needs only torch.

    ::

        updater = MaskUpdater(model, "2:4", update_freq=10, total_steps=1000)
        for batch in batches:
            loss = model(**batch).loss
            loss.backward(); optimizer.step(); optimizer.zero_grad()
            updater.step()
        updater.finish()  # warns if the loop ended before the final sparsity
        squash(model)

    Args:
        model: sparsified in place, see ``sparse_train.sparsify``. If it already has masks, or zeros that follow the
            pattern, the run starts with them.
        mask_structure: "unstructured", "N:M" (N **kept** of every M consecutive inputs) or a ``Pattern``.
        sparsity: share of targeted weights that are zero; implied by N:M and by a schedule.
        criterion: scores weights; default ``Wanda()``.
        policy: what pruned weights do between updates; default ``StraightThrough()``.
        schedule: sparsity over the run; default constant.
        allocation: how the final sparsity is divided among layers; default: equally. Each layer then keeps its own, and
            while the sparsity rises, it has a part of it in proportion. If the model has masks or zeros already,
            ``OWL`` keeps the division that they have. "unstructured" only.
        targets, ignore: which layers, see ``sparse_train.targets.select``.
        update_freq: k, optimizer steps between updates.
        start_step: first update (int = steps, float = share of the run). If the first mask needs activations, it comes
            at the earliest ``window`` steps into the run; until then the model is dense.
        end_step: the step after which masks are frozen (int = steps, float = share of the run).
        window: steps before an update over which activations are recorded (int = steps, float = share of
            ``update_freq``).
        memory: factor per update with which the statistics of earlier windows count; within a window, all tokens count
            equally. 0 = only the last window; 1 = all windows: the default, which trained best (docs/results.md). If
            the model's masks come from one-shot pruning, its norms count as the first window; for ``noise_margin`` and
            ``flip_agreement``, each half gets half of them.
            "frozen" = the norms of the first mask, forever: from one-shot pruning, or from the first window.
        hysteresis: share by which the scores of kept weights count more at updates.
        noise_margin: number of standard errors, estimated from the odd and the even steps of the window, that are added
            to the scores of kept weights and subtracted from those of pruned ones; see
            ``sparse_train.pipeline.margins``.
        flip_agreement: report the share of an update's flips that odd and even steps would each have made alone.
        total_steps: optimizer steps of the run; needed if steps are given as a share of it.
        outliers: share of outliers of each block, for an allocation that needs them, if one-shot pruning has made the
            first masks (``OneshotReport.outliers``). Default: measured with the first masks; or masks that exist tell.
        state: ``state_dict`` of the run to resume; the model must have that run's masks, or load them later.

    Raises:
        ValueError: an argument is out of range or in conflict with another, there is nothing to prune, a target cannot
            be masked, or the model has masks that do not belong to this run.
    """

    def __init__(
        self,
        model: nn.Module,
        mask_structure: str | Pattern = "2:4",
        sparsity: float | None = None,
        *,
        criterion: Criterion | None = None,
        policy: MaskPolicy | None = None,
        schedule: Schedule | None = None,
        allocation: Allocation | None = None,
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
        outliers: Outliers | None = None,
        state: Mapping[str, Any] | None = None,
    ) -> None:
        self.run = RunSettings.resolve(
            mask_structure,
            sparsity,
            schedule,
            criterion,
            policy,
            allocation=allocation,
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
        """The settings."""
        self._model = model
        before = {id(layer) for layer in sparse_layers(model).values()}  # masked by one-shot pruning or another updater
        self.layers = self.run.sparsify(model)
        self._reads_two_texts = reads_two_texts(model, self.layers.values())
        try:
            self._begin(total_steps, outliers, state)
        except BaseException:
            new = [layer for layer in self.layers.values() if id(layer) not in before]
            fold(model, [layer for layer in new if layer.keeps_all()])  # back to plain layers
            raise

    def _begin(
        self, total_steps: int | float | None, outliers: Outliers | None, state: Mapping[str, Any] | None
    ) -> None:
        """Checks settings, masks and state before anything in the layers changes."""
        check_policy(self.layers, self.run.policy)
        check_precision(self.layers, self.run.policy, self.run.update_freq)
        self._adapters = describe_adapters(self.layers)
        self._division = self.run.divided_sparsity(self._model, self.layers, outliers)
        has_masks = state is None and self._has_masks()
        if state is None:
            self.timing = self.run.timing(total_steps, has_masks)
        else:
            self._check_state(state)
        policy = self.run.policy
        self._growth = Growth(self.layers, policy, self.run.criterion) if isinstance(policy, Regrow) else None
        self._take_layers()
        if state is not None:
            self._restore(state)
        elif has_masks:
            self._start_from_masks()
        elif self.timing.is_update(0):
            self.update()
        self._set_recording()

    def _has_masks(self) -> bool:
        """Whether the run starts from existing masks or zeros; ValueError if masks do not fit its settings."""
        first, pattern = self.run.sparsity_at(0.0), self.run.mask_structure
        dense = all(layer.keeps_all() for layer in self.layers.values())
        if dense and self.run.first_sparsity == 0:
            warn_of_filled_zeros(self.layers, pattern, 0.0)
        if first == 0 or not dense:  # if nothing is to be pruned yet, masks that keep everything are right
            self._division.read_masks(first)
            check_masks(self.layers, pattern, self._division.at(first))
            return True
        return self.run.first_sparsity > 0 and masks_from_zeros(self.layers, pattern, first, self._division)

    def _take_layers(self) -> None:
        """Make layers record for this updater, at step 0 of a run without masks."""
        self.window = Window(self.layers, self.run.criterion, self.run.halved, self.run.memory)
        """The activations for the next update."""
        for layer in self.layers.values():
            layer.straight_through = self.run.policy.straight_through
        self.steps = 0
        self.sparsity: float | None = None
        """Target sparsity of the current masks; None before the first."""
        self._last_update = 0
        self._warned = self._idle = False
        self.first_masks = FirstMasks(self.layers)
        """The masks that ``initial_flip_rate`` compares with."""

    def _start_from_masks(self) -> None:
        self.sparsity = self.run.sparsity_at(0.0)
        self.window.begin_with_first_masks()
        self.first_masks.keep()

    @property
    def token_mask(self) -> Tensor | None:
        """Which tokens of the current batch count, (B, L) bool or integer, 0 = padding; None = all."""
        return self.window.recorder.token_mask

    @token_mask.setter
    def token_mask(self, mask: Tensor | None) -> None:
        self.window.recorder.token_mask = mask

    def padding_of(self, batch: Any) -> Tensor | None:
        """What trainers set ``token_mask`` to by default: ``batch["attention_mask"]``, if there is one.

        None for an encoder-decoder model, which reads two texts: the mask belongs to one of them. Warns once that the
        padding of both counts.
        """
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if not isinstance(mask, Tensor):
            return None
        if self._reads_two_texts:
            self.window.recorder.mask_misfit = self.window.recorder.mask_misfit or ONE_OF_TWO_TEXTS
            return None
        return mask

    def paused(self) -> AbstractContextManager[None]:
        """A context in which forwards do not count in statistics, for forwards that are not training on data.

        For example generation in train mode, or a reference pass on other text. A forward in eval mode under
        ``no_grad`` never counts.
        """
        return self.window.recorder.paused()

    def watch(self, optimizers: Iterable[Optimizer]) -> None:
        """Pass the optimizers that train the layers. Only ``Regrow`` needs this, to clear their moments."""
        if self._growth is not None:
            self._growth.watch(optimizers)

    def before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Call after backward, before clipping and ``optimizer.step()``. Only ``Regrow`` needs this.

        In the step of an update, it takes the gradients of pruned weights, so that the optimizer does not see them.
        """
        if self._growth is not None:
            self._growth.capture_gradients(optimizer)

    def step(self) -> UpdateReport | None:
        """Call after every optimizer step, before the next forward. Returns a report at update steps.

        Raises:
            ValueError: another updater or callback has taken over a layer, the model was squashed, or an update fails.
        """
        self.window.check_own()
        self.steps += 1
        self.window.after_step()
        report = None
        if self.timing.is_update(self.steps):
            self._warn_if_idle()
            report = self.update() if self._would_change(self.steps) else self._confirm()
        elif self.timing.is_frozen(self.steps) and (self.steps - self.timing.end_step) % self.timing.update_freq == 0:
            check_agreement(self.layers)
        self._set_recording()
        return report

    def update(self) -> UpdateReport:
        """Replace the masks now, from the statistics recorded so far, which then fade according to ``memory``."""
        began = time.perf_counter()
        reshard(self._model)
        progress = self.timing.progress(self.steps)
        target = self.run.sparsity_at(progress)
        self.window.before_update()
        since = 0 if self.sparsity is None else self.steps - self._last_update
        shadow_factor = self.run.policy.shadow_decay(progress, since) if since else 1.0
        check_policy(self.layers, self.run.policy, shadow_factor)  # adapters may have been added after the updater
        before = {}
        if self._growth is not None:
            self._growth.require_gradients()
            before = {name: layer.weight_mask.clone() for name, layer in self.layers.items()}
        if target and not self._division.known:
            check_statistics(self.layers)
            self._division.measure_outliers()
        rules = Rules(
            self.run.criterion,
            self.run.mask_structure,
            self._division.for_next_update(target),
            self.run.policy,
            shadow_factor=shadow_factor,
            margin=NO_MARGIN if self.sparsity is None else self.run.margin,
            growth=self._growth,
        )
        changes = update_masks(self.layers, rules, compare_halves=self.run.flip_agreement and self.sparsity is not None)
        if self._growth is not None:
            self._growth.reset_changed(before)
        self.window.after_update()
        self.sparsity, self._last_update = target, self.steps
        return self._report(changes, time.perf_counter() - began)

    def _warn_if_idle(self) -> None:
        if self.run.criterion.needs_activations and self.run.memory != "frozen":
            return  # the window notices
        self._idle = self._idle or warn_of_idle(self.layers)

    def _confirm(self) -> UpdateReport:
        check_agreement(self.layers)  # not summed over ranks: nothing was recorded, so statistics stay unchanged
        self._warned = self._warned or warn_of_unreached(self.layers)
        return self.report()

    def report(self) -> UpdateReport:
        """A report on the current masks, unchanged: sparsity counted on the weights, flip rate 0."""
        began = time.perf_counter()
        reshard(self._model)
        return self._report(measure(self.layers), time.perf_counter() - began)

    def finish(self) -> None:
        """Call once before ``squash``, for a last check that all ranks hold the same masks.

        Warns if the run ended before its masks reached their final sparsity, or before they were frozen.
        """
        check_agreement(self.layers)
        final = self.run.sparsity_at(1.0)
        if rank() != 0 or not self.steps:
            return
        if self.sparsity != final:
            _log.warning(
                "The run ended after %d steps, before its masks reached the final sparsity of %g: they are at %s. "
                "end_step is %d.",
                self.steps,
                final,
                self.sparsity,
                self.timing.end_step,
            )
        elif self.run.policy.comes_back != "never" and self.steps < self.timing.end_step:
            _log.warning(
                "The run ended after %d steps, but masks were to change until step %d (end_step), so there were no "
                "last steps with fixed masks.",
                self.steps,
                self.timing.end_step,
            )

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides later masks and is not in the model: counters, timing, statistics, settings.

        With several ranks, all of them must call; each gets the statistics of all ranks.
        """
        return {
            "steps": self.steps,
            "target": self.sparsity,
            "last_update": self._last_update,
            **self.window.state_dict(),
            "timing": asdict(self.timing),
            "settings": self.settings(),
            "gradients": {} if self._growth is None else self._growth.state_dict(),
            "first_rows": self.first_masks.state_dict(),
            "sparsity_division": self._division.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where ``state_dict`` was taken. The masks come with the model's own state dict.

        Update steps stay those of the interrupted run, even if the resumed run is longer. Each rank gets its own
        statistics back; if the number of ranks has changed, rank 0 gets their sum, which gives the same updates.

        Raises:
            ValueError: the state is from a run with another pattern, sparsity, criterion or interval, or other targets.
        """
        self._check_state(state)
        self._restore(state)
        self._set_recording()

    def _check_state(self, state: Mapping[str, Any]) -> None:
        check_settings(state["settings"], self.settings())
        check_known(set(state["first_rows"]), self.layers)

    def _restore(self, state: Mapping[str, Any]) -> None:
        self.window.load_state_dict(state)
        self.steps, self.sparsity, self._last_update = state["steps"], state["target"], state["last_update"]
        self.timing = Timing(**state["timing"])  # of the whole run, including the part that is done
        self.first_masks.load_state_dict(state["first_rows"])
        self._division.load_state_dict(state["sparsity_division"])
        if self._growth is not None:
            self._growth.load_state_dict(state["gradients"])

    def settings(self) -> dict[str, str]:
        """The settings that a run must share with this one to continue it, in words."""
        self._adapters = describe_adapters(self.layers) or self._adapters  # after a merge, those from before
        adapters = {"mask_lora": self._adapters} if self._adapters else {}
        return adapters | self.run.as_strings() | {"layers": f"{len(self.layers)} targets"}

    def plan(self) -> str:
        """How layers differ in sparsity, if they do, and when masks change, in words."""
        changes = any(self._would_change(step) for step in (self.timing.start_step, self.timing.end_step))
        by_layer = self._division.in_words()
        return (f"{by_layer}; " if by_layer else "") + (self.timing.in_words() if changes else "masks do not change")

    def _would_change(self, step: int) -> bool:
        if self.sparsity is None or self.run.policy.comes_back != "never":
            return True
        return self.run.sparsity_at(self.timing.progress(step)) != self.sparsity

    def _set_recording(self) -> None:
        update = self.timing.next_update(self.steps)
        wanted = update is not None and self.timing.is_recorded(self.steps) and self._would_change(update)
        if self._growth is not None:
            next_is_update = self.sparsity is not None and self.timing.is_update(self.steps + 1)
            self._growth.request_gradients(self.timing.progress(self.steps + 1) if next_is_update else None)
        self.window.record(wanted)

    def _report(self, changes: dict[str, LayerUpdate], seconds: float) -> UpdateReport:
        self.first_masks.keep()
        return UpdateReport(self.steps, self.sparsity or 0.0, changes, self.first_masks.share_differing(), seconds)
