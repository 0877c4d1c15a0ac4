"""``MaskUpdater``: re-pruning over a training run, schedule -> scores -> masks -> policy."""

import copy
import logging
import operator
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from sparse_train.architecture import frozen_linears, transformers_models
from sparse_train.arguments import as_call, as_data
from sparse_train.distributed.collectives import rank
from sparse_train.distributed.fsdp2 import reshard
from sparse_train.distributions import Division, Outliers
from sparse_train.layers import masks
from sparse_train.layers.adapters import check_adapters
from sparse_train.layers.functional import read_elsewhere
from sparse_train.layers.mask_lora import check_not_divided, describe_factors
from sparse_train.layers.masked_layer import MaskedLayer, sparse_layers
from sparse_train.layers.sparsify import sparsify, squash_layers
from sparse_train.layers.targets import find_targets, layers_in_words
from sparse_train.patterns import Pattern, group_label
from sparse_train.policies import Optimizers
from sparse_train.pruning.config import FromZeros, OneShot, PruningConfig
from sparse_train.pruning.counts import (
    LayerUpdate,
    UpdateReport,
    check_agreement,
    mask_sparsities,
    measure,
    misfitting_layer,
    sparsity_of,
)
from sparse_train.pruning.norms import RunningNorms, check_statistics, sum_statistics
from sparse_train.pruning.resuming import check_restored_masks, check_same_layers, check_same_settings
from sparse_train.pruning.update import Rules, measure_outliers, shapes_of, update_masks
from sparse_train.pruning.zeros import masks_from_zeros, warn_of_filled
from sparse_train.recorder import reads_two_texts
from sparse_train.schedules import Timing

_log = logging.getLogger(__name__)

FirstMaker = Callable[[nn.Module, Mapping[str, MaskedLayer], PruningConfig], Outliers | None]
"""Makes the first masks of a model's layers in place, by one-shot pruning. Returns the outliers that it measured ({} =
none); None if it could not, and all is as before."""

BY_UPDATE = "made by the first update"
"""``origin`` of a run whose first masks are not there before its first update."""


def mask_targets(model: nn.Module, config: PruningConfig) -> dict[str, MaskedLayer]:
    """Give the targets of a run masks that keep everything, unless they are masked already; returns them by name."""
    layers = find_targets(model, config.pattern, config.targets, config.ignore).layers
    sparsify(model, layers.values())
    return {name: layer for name, layer in layers.items() if isinstance(layer, MaskedLayer)}


class MaskUpdater:
    """Keeps a model at its target sparsity over a training run; needs only torch and numpy.

    ::

        updater = MaskUpdater(model, "2:4", update_freq=10, total_steps=1000)
        for batch in batches:
            loss = model(**batch).loss
            loss.backward(); optimizer.step(); optimizer.zero_grad()
            updater.step()
        updater.finish()  # warns if the loop ended before the final sparsity
        squash(model)

    Args:
        model: sparsified in place, see ``sparse_train.sparsify``. If it already has masks, the run starts with them.
        mask_structure, sparsity, settings: of a ``PruningConfig``, where they are explained.
        config: the settings as one object, instead.
        layers: the masked layers to prune, by name, instead of those that ``targets`` and ``ignore`` choose.
        total_steps: optimizer steps of the run; needed if steps are given as a share of it.
        optimizers: those that train the layers, for policies and criteria that look at their state. One that is made
            later is known from its first ``before_optimizer_step`` on.
        make_first_mask: called after all checks, if the run begins with one-shot pruning; callbacks give
            ``oneshot.first_mask.make_first_mask``. Where it is None or returns None, the first update makes the masks.
        outliers: ``OneShotReport.outliers`` of the pruning that made the first masks, for a distribution that needs
            them. Default: measured with the first masks; or masks that exist tell.
        state: ``state_dict`` of the run to resume; the model must have that run's masks, or load them later. Update
            steps stay those of the interrupted run, even if the resumed one is longer.

    Raises:
        ValueError: an argument is out of range or in conflict with another, there is nothing to prune, a target cannot
            be masked, or the model has masks that do not belong to this run.
    """

    def __init__(
        self,
        model: nn.Module,
        mask_structure: str | Pattern | None = None,
        sparsity: float | None = None,
        *,
        config: PruningConfig | None = None,
        layers: Mapping[str, MaskedLayer] | None = None,
        total_steps: int | float | None = None,
        optimizers: Iterable[Optimizer] = (),
        make_first_mask: FirstMaker | None = None,
        outliers: Outliers | None = None,
        state: Mapping[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        self.config = PruningConfig.of(config, mask_structure, sparsity, **settings)
        self._model = model
        self.steps = self._last_update = 0
        self.sparsity: float | None = None
        """Target sparsity of the current masks; None before the first."""
        self.origin = as_call(as_data(self.config.first_mask))
        """Where the first masks came from, in words: the setting is only what was asked for."""
        self._first_rows: dict[str, Tensor] = {}  # every 128th row of the first masks, packed
        self._restored_masks: dict[str, int] = {}  # fingerprints, until the first step after a resume
        self._pruned: dict[str, int] = {}  # weights that masks pruned when they were last changed or checked
        self._optimizers, self.policy = Optimizers(), copy.deepcopy(self.config.policy)
        for optimizer in optimizers:
            self._optimizers.add(optimizer)
        before = {id(layer) for layer in sparse_layers(model).values()}  # masked by one-shot pruning or another updater
        self.layers = mask_targets(model, self.config) if layers is None else dict(layers)
        try:
            self._set_up(outliers)
            if state is None:
                self._start(total_steps, make_first_mask)
            else:
                try:
                    self._resume(state, total_steps)
                    of_policy = state["policy"]
                except (LookupError, TypeError, AttributeError, RuntimeError) as error:
                    raise ValueError(f"The state of the run is no updater's, or damaged: {error!r}.") from error
                self.policy.load_state_dict(of_policy)
            self._prepare_step()
            for layer in self.layers.values():
                layer.calibration_norm = None  # this run has taken it, or has norms of its own
            # of the recorder, which a copy of the model copies with its layers
            recorder = self.norms.recorder
            self._hooks = [model.register_forward_pre_hook(recorder.read_padding, with_kwargs=True)]
            within = transformers_models(model, self.layers.values())
            self._hooks += [each.register_forward_pre_hook(recorder.enter) for each in within]
        except BaseException:
            new = [layer for layer in self.layers.values() if id(layer) not in before]
            for layer in new:
                layer.keep_all()  # a mask that is there already would be folded into the weights
            squash_layers(model, new)
            raise

    def _set_up(self, outliers: Outliers | None) -> None:
        """Keep what the run needs to know of its layers, which stay as they are; ValueError if settings do not fit."""
        config = self.config
        for name, layer in self.layers.items():
            if layer.has_factors:
                check_not_divided(name, layer)
        self._factors = describe_factors(self.layers)
        self._shapes = shapes_of(self._model, self.layers)
        final = config.sparsity_at(1.0)
        self._division = Division(config.distribution, self._shapes, config.pattern, final, outliers)
        self.policy.begin(self.layers, self._optimizers, config.update_freq)
        self.policy.check()

    def _start(self, total_steps: int | float | None, make_first_mask: FirstMaker | None) -> None:
        """Begin a run: its first masks are there, are made now, or come from the first update."""
        # checked before a solver moves weights; the first update is later if it has to make the masks
        self.timing = self.config.timing(total_steps, has_masks=True)
        has_masks = self._begin_with_masks(make_first_mask)
        if not has_masks:
            self.timing = self.config.timing(total_steps, has_masks=False)
        self._connect_layers()
        if has_masks:
            self.sparsity, self._pruned = self.config.sparsity_at(0.0), self._count_pruned()
            self.norms.take_calibration_norms()
            self._keep_first_rows()
        elif self.timing.is_update(0):  # the criterion needs no activations
            self.update()
        warn_of_filled(self.layers)
        if not (self.config.criterion.needs_activations and self._masks_change()):
            self.norms.probe()

    def _resume(self, state: Mapping[str, Any], total_steps: int | float | None) -> None:
        check_same_settings(state["settings"], self.settings())
        check_same_layers(state["masks"], self.layers)
        self._connect_layers()
        self.norms.load_state_dict(state["norms"])
        self.origin = as_call(state["settings"]["first_mask"])
        self.steps, self._last_update = operator.index(state["steps"]), operator.index(state["last_update"])
        self.sparsity = state["sparsity"]
        # of the whole run, including the part that is done
        self.timing = Timing(**{name: operator.index(steps) for name, steps in state["timing"].items()})
        share, end = self.config.end_step, self.timing.end_step
        if isinstance(share, float) and share * (total_steps or 0) >= end + 1 and self._masks_change() and rank() == 0:
            _log.warning("Masks freeze at step %d, as in the run that is resumed, although this run is longer.", end)
        device = next(iter(self.layers.values())).weight_mask.device
        self._first_rows = {name: rows_SJ.to(device) for name, rows_SJ in state["first_rows"].items()}
        self._restored_masks = dict(state["masks"])
        if (sparsities := state["layer_sparsities"]) is not None:
            self._division.final_sparsities = {name: sparsities[name] for name in self.layers}

    def _connect_layers(self) -> None:
        """Connect the layers with this run: from now on they record for it, and follow its policy."""
        self.norms = RunningNorms(self.layers, self.config.criterion, self.config.norm_decay)
        self.norms.recorder.two_texts = reads_two_texts(self._model, self.layers.values())
        frozen = frozen_linears(self._model)
        for name, layer in self.layers.items():
            layer.straight_through, layer.frozen = self.policy.straight_through, name in frozen

    def _begin_with_masks(self, make_first_mask: FirstMaker | None) -> bool:
        """Decide, here alone, where the first masks come from, and make them; False if the first update has to.

        At sparsity 0, masks that keep everything are right until then. Called after all other checks, because a solver
        moves weights.
        """
        config, first, sparsity = self.config, self.config.first_mask, self.config.sparsity_at(0.0)
        criterion = first.criterion if isinstance(first, OneShot) else None
        if not all(layer.is_dense() for layer in self.layers.values()):
            if criterion is not None:
                raise ValueError(
                    f"first_mask is {first}, and the model has masks already. To start with those, write "
                    "first_mask=None; to begin with new ones, squash the model first."
                )
            self._check_masks(sparsity)
            self.origin = "the model had masks"
            return True
        if isinstance(first, FromZeros):
            masks_from_zeros(self.layers, config.pattern, sparsity, self._division)
            return True
        if first is None:
            raise ValueError(
                "first_mask is None, so the model must have masks already, and none of its targets has a pruned "
                "weight. Prune it first (prune(..., squash=False)), or let the run make its mask: "
                "first_mask=OneShot()."
            )
        # without activations, the first update makes the same mask
        needed = criterion is not None or config.criterion.needs_activations
        one_shot = isinstance(first, OneShot) and needed and sparsity and self.timing.start_step == 0
        if one_shot and make_first_mask is not None:
            outliers = make_first_mask(self._model, self.layers, config)
            if outliers is not None:
                if not self._division.known:
                    self._division.divide_by(outliers)
                return True
            if criterion is None and rank() == 0:
                why = f"one-shot pruning needs {OneShot.needs}"
                _log.warning("The first steps run dense, and their activations give the first mask: %s.", why)
        if criterion is not None:
            raise ValueError(
                f"first_mask is {first}, and no one-shot pruning has made the first mask. A trainer's "
                f"callback does at start_step 0, if there is something to prune, and needs {OneShot.needs}. "
                "Elsewhere, as in a plain loop, prune the model before the run: prune(..., squash=False). Or let the "
                "first steps make it, by the run's criterion: first_mask=FirstWindow()."
            )
        self.origin = BY_UPDATE
        return not sparsity

    def _check_masks(self, sparsity: float) -> None:
        """Raise ValueError if masks that were there before the run are not those of its first sparsity."""
        if not self._division.known:
            self._division.take_from_masks(mask_sparsities(self.layers, self.config.pattern), sparsity)
        sparsities = self._division.at(sparsity)
        if (name := misfitting_layer(self.layers, self.config.pattern, sparsities)) is not None:
            raise ValueError(
                f"The model has masks already, and those of {name} are not {group_label(self.config.pattern)} at a "
                f"sparsity of {sparsities[name]:g}, which this run starts with (if layers are to differ, give it the "
                "distribution, too). Squash the model first to begin with new masks; to resume a run, pass its state "
                "(MaskUpdater(..., state=...)); to train with these masks unchanged, leave updater or callback "
                "out, and squash the model at the end."
            )

    # --- in each step ------------------------------------------------------------------------------------------------

    @property
    def token_mask(self) -> Tensor | None:
        """Which tokens of the current batch count, (B, L) bool or integer, 0 = padding; None = all.

        Until it is first set, it follows the keyword argument ``attention_mask`` of the model's forwards.
        """
        return self.norms.recorder.token_mask

    @token_mask.setter
    def token_mask(self, mask: Tensor | None) -> None:
        self.norms.recorder.told, self.norms.recorder.token_mask = True, mask

    def padding_of(self, batch: Any) -> Tensor | None:
        """What trainers set ``token_mask`` to by default: ``batch["attention_mask"]``, if there is one.

        None, with one warning that padding counts, where it is not known which inputs a mask is for: in an
        encoder-decoder model, which reads two texts, and inside a nested batch.
        """
        return self.norms.recorder.padding_of(batch)

    def paused(self) -> AbstractContextManager[None]:
        """A context in which forwards do not count in statistics, such as a pass on other text. A forward of a
        transformers model under ``no_grad``, as in generation, never counts; of another module, none in eval mode."""
        return self.norms.recorder.paused()

    def warn_of_other_readers(self, loss: Tensor) -> None:
        """Warn if a loss depends on weights of these layers also without their masks; call before a first backward."""
        elsewhere = read_elsewhere(loss, [layer.weight for layer in self.layers.values()])
        names = [name for name, layer in self.layers.items() if id(layer.weight) in elsewhere]
        if names and rank() == 0:
            _log.warning(
                "The loss also reads the weights of %d targets, such as %s, beside their forward, where masks have no "
                "effect. There, the model uses pruned weights until the end of the run, and zeros after it. Leave such "
                "layers out with ignore=[%r]. A penalty on weights does no harm.",
                *(len(names), names[0], names[0]),
            )

    def before_optimizer_step(self, optimizer: Optimizer) -> None:
        """Call after backward, before clipping and ``optimizer.step()``, for policies that look at gradients."""
        self.policy.before_optimizer_step(self._optimizers.add(optimizer))

    def step(self) -> UpdateReport | None:
        """Call after every optimizer step, before the next forward. Returns a report at update steps."""
        self.norms.check_attached()
        self.norms.warn_of_unreached()
        self._check_restored_masks()
        self.steps += 1
        self.norms.recorder.warn_of_padding()
        # an update that is due is made if it can change masks, and otherwise only compared and reported
        report, due = None, self.timing.is_update(self.steps)
        if due and self._would_change(self.steps):
            try:
                report = self.update()
            except BaseException:  # a checkpoint that is written now makes the update when it is resumed
                self.steps -= 1
                raise
        elif self.timing.is_compared(self.steps):
            check_agreement(self.layers)
            report = self.report() if due else None
        self._prepare_step()
        return report

    def _check_restored_masks(self) -> None:
        """After a resume, once: raise ValueError if the masks are not those that the state belongs to."""
        saved, self._restored_masks = self._restored_masks, {}
        if saved:
            check_restored_masks(saved, self.layers, self.sparsity)
            self._pruned = self._count_pruned()

    def _count_pruned(self) -> dict[str, int]:
        counts = {name: layer.pruned() for name, layer in self.layers.items()}
        return {"the model": sum(counts.values())} if self.config.pattern.model_wide else counts

    def _prepare_step(self) -> None:
        """Tell the policy about the coming step, and record in it if an update will read its activations."""
        update = self.timing.recorded_for(self.steps)
        follows = self.sparsity is not None and self.timing.is_update(self.steps + 1)
        self.policy.before_step(self.timing.progress(self.steps + 1) if follows else None)
        self.norms.record(update is not None and self._would_change(update))

    def _would_change(self, step: int) -> bool:
        """Whether an update at ``step`` can change masks: weights come back, or more of them go."""
        if self.sparsity is None or self.policy.regrowth != "never":
            return True
        return self.config.sparsity_at(self.timing.progress(step)) > self.sparsity

    def _masks_change(self) -> bool:
        """Whether an update of the run can change masks."""
        return any(self._would_change(step) for step in (self.timing.start_step, self.timing.end_step))

    # --- at an update ------------------------------------------------------------------------------------------------

    def update(self) -> UpdateReport:
        """Replace the masks now, from the activations recorded so far, which then fade according to ``norm_decay``."""
        began = time.perf_counter()
        reshard(self._model)
        config, target = self.config, self.config.sparsity_at(self.timing.progress(self.steps))
        check_agreement(self.layers)
        sum_statistics(self.layers.values())
        self.norms.check_new_tokens()
        check_adapters(self._model)
        self.policy.check()
        self.policy.before_update(0 if self.sparsity is None else self.steps - self._last_update)
        if target and not self._division.known:
            check_statistics(self.layers)
            above = config.distribution.outliers_above
            assert above is not None, "a division that waits has outliers to wait for"
            self._division.divide_by(measure_outliers(self._shapes, self.layers, above))
        rules = Rules(config.criterion, config.pattern, self._division.at(target), self.policy, self._optimizers)
        changes = update_masks(self.layers, rules)
        self.policy.after_update()
        self.norms.fade()
        self.sparsity, self._last_update, self._pruned = target, self.steps, self._count_pruned()
        return self._report(changes, began)

    def report(self) -> UpdateReport:
        """A report on the current masks, unchanged: sparsity counted on the weights, flip rate 0."""
        began = time.perf_counter()
        reshard(self._model)
        return self._report(measure(self.layers), began)

    def _report(self, changes: dict[str, LayerUpdate], began: float) -> UpdateReport:
        if self.sparsity is not None:
            self._keep_first_rows()
        differing = 0.0
        for name, first_SJ in self._first_rows.items():
            now_SJ, scale = _sampled_rows(self.layers[name]), self.layers[name].out_features / len(first_SJ)
            differing += masks.count_differing(now_SJ, first_SJ.to(now_SJ.device)) * scale
        rate, seconds = differing / sum(layer.size for layer in self.layers.values()), time.perf_counter() - began
        return UpdateReport(self.steps, self.sparsity or 0.0, changes, rate, seconds)

    def _keep_first_rows(self) -> None:
        if not self._first_rows:
            self._first_rows = {name: _sampled_rows(layer).clone() for name, layer in self.layers.items()}

    def finish(self) -> None:
        """Call once before ``squash``: stops recording, and makes last checks; warns if the masks are not at the final
        sparsity."""
        self.norms.record(False)
        for hook in self._hooks:
            hook.remove()
        check_agreement(self.layers)
        check_adapters(self._model)
        self._check_restored_masks()
        now = self._count_pruned()
        if (name := next((name for name, pruned in self._pruned.items() if now[name] < pruned), None)) is not None:
            raise ValueError(
                f"The run is at a sparsity of {self.sparsity}, and the mask of {name} prunes {now[name]} weights, not "
                f"the {self._pruned[name]} of the last update: it was replaced since, such as by loading another "
                "model. Resume from a checkpoint with masks."
            )
        final = self.config.sparsity_at(1.0)
        if rank() == 0 and self.steps and (self.sparsity or 0.0) < final:
            _log.warning(
                "The run ended after %d steps, before its masks reached the final sparsity of %g: they are at %g. "
                "end_step is %d.",
                *(self.steps, final, self.sparsity or 0.0, self.timing.end_step),
            )

    # --- checkpoints -------------------------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Everything that decides later masks and is not in the model: counters, timing, norms, settings.

        With several ranks, all of them must call; each gets the norms of all ranks.
        """
        return {
            "steps": self.steps,
            "sparsity": self.sparsity,
            "last_update": self._last_update,
            "timing": asdict(self.timing),
            "settings": self.settings(),
            "norms": self.norms.state_dict(),
            "policy": self.policy.state_dict(),
            "masks": {name: masks.fingerprint_number(layer.weight_mask) for name, layer in self.layers.items()},
            "first_rows": {name: rows_SJ.cpu() for name, rows_SJ in self._first_rows.items()},
            "layer_sparsities": self._division.final_sparsities,
        }

    def settings(self) -> dict[str, Any]:
        """The settings as data. A run and one that continues it share all but targets, ignore and first_mask."""
        self._factors = describe_factors(self.layers) or self._factors  # after a merge, those from before
        return {**self.config.as_data(), "first_mask": self.origin, "mask_lora": self._factors}

    def in_words(self) -> str:
        """Which layers are pruned and how far, and when masks change, in words."""
        final = self.config.sparsity_at(1.0)
        zeros = self.origin == as_call(as_data(FromZeros())) and self.steps == 0
        when = self.timing.in_words() if self._masks_change() else "masks do not change"
        if self.sparsity is None and self.policy.regrowth == "never" and self.config.sparsity_at(0.0) == final:
            when = f"masks are made at step {self.timing.start_step}, and kept"
        parts = (
            f"{layers_in_words(self.layers)} at {group_label(self.config.pattern)}",
            *([f"{100 * sparsity_of(measure(self.layers).values()):.2f} % zeros before the run"] if zeros else []),
            f"final sparsity {final:g}",
            when,
        )
        return "; ".join(parts)


def _sampled_rows(layer: MaskedLayer) -> Tensor:
    """Every 128th row of a mask, but at least four, packed (S, J): whole first masks would double their memory."""
    return layer.weight_mask[:: max(1, min(128, layer.out_features // 4))]
