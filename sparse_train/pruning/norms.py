"""Statistics between mask updates: attached to layers, summed over ranks, checked; and ``RunningNorms`` over a run."""

import logging
import operator
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor

from sparse_train.arguments import leave_out
from sparse_train.criteria import Criterion
from sparse_train.distributed.collectives import gather_objects, rank, sum_over_ranks, world_size
from sparse_train.layers.masked_layer import MaskedLayer, MaskedMatrix
from sparse_train.recorder import Recorder
from sparse_train.statistics import ActivationNorm, LastSums, Statistics

_log = logging.getLogger(__name__)


def attach(layers: Iterable[MaskedMatrix], recorder: Recorder, statistics: type[Statistics] | None) -> None:
    """Attach one shared recorder, and new empty statistics, to each of the layers."""
    for layer in layers:
        layer.recorder = recorder
        layer.statistics = None if statistics is None else statistics(layer.in_features, layer.weight_mask.device)


# --- over ranks ------------------------------------------------------------------------------------------------------


def sum_statistics(layers: Iterable[MaskedMatrix]) -> None:
    """Sum the statistics of layers over ranks, in place."""
    recorded = [layer.statistics for layer in layers if layer.statistics is not None]
    sum_over_ranks([tensor for statistics in recorded for tensor in statistics.tensors()])


# --- checks ----------------------------------------------------------------------------------------------------------


def check_statistics(layers: Mapping[str, MaskedMatrix]) -> None:
    """Raise ValueError if a layer has seen no token, or sums that are not finite."""
    seen = {name: layer.statistics for name, layer in layers.items()}
    unreached = [name for name, stats in seen.items() if stats is None or int(stats.tokens) == 0]
    if unreached:
        raise ValueError(
            f"{unreached[0]} is a target, but no token reached it since the last mask update, so it has no activations "
            f"to score with; the same is true of {len(unreached) - 1} more. Forwards under no_grad are not recorded if "
            "the model is in eval mode or frozen. If few tokens reach it, such as an expert, let earlier windows count "
            "(norm_decay above 0), with a first mask from calibration on enough tokens. If the model does not use it, "
            "leave it out. " + leave_out(unreached)
        )
    for name, stats in seen.items():
        if stats is not None and not bool(stats.sum_squares_I.isfinite().all()):
            raise not_finite(name)


def check_nothing_dropped(layers: Mapping[str, MaskedMatrix]) -> None:
    """Raise ValueError if an input was not finite: in calibration, where all of the data should count."""
    for name, layer in layers.items():
        if layer.statistics is not None and int(layer.statistics.dropped):
            raise not_finite(name)


def not_finite(where: str) -> ValueError:
    return ValueError(
        f"{where}: the input activations are not finite, so Wanda scores cannot be computed; masks were not changed. "
        "Look for NaN in the data, a learning rate that is too high, or an overflow of float16."
    )


# --- over a run ------------------------------------------------------------------------------------------------------


class RunningNorms:
    """Records activations in the steps before an update, and keeps the norms of earlier windows."""

    def __init__(self, layers: Mapping[str, MaskedLayer], criterion: Criterion, norm_decay: float) -> None:
        self._layers, self._needs_norms, self._decay = layers, criterion.needs_activations, norm_decay
        self.recorder = Recorder()
        """The recorder of all layers."""
        attach(layers.values(), self.recorder, ActivationNorm if self._needs_norms else None)
        self._tokens: dict[str, int] = {}  # after the last update
        self._warned = self._probing = False

    def _norms(self) -> dict[str, ActivationNorm]:
        own = self._layers.items()
        return {name: each.statistics for name, each in own if isinstance(each.statistics, ActivationNorm)}

    def check_attached(self) -> None:
        """Raise ValueError if layers now record for another run, or are no longer masked."""
        lost = [n for n, layer in self._layers.items() if getattr(layer, "recorder", None) is not self.recorder]
        if lost:
            raise ValueError(
                f"{lost[0]} is pruned by another MaskUpdater or callback, too, or it was squashed. "
                "Only one of them may prune a layer; give several of them targets that do not overlap."
            )

    def take_calibration_norms(self) -> None:
        """Take norms that one-shot pruning has left, if it has in all layers, for a first window with its update."""
        first = {n: state for n, layer in self._layers.items() if (state := layer.calibration_norm) is not None}
        own = self._norms()
        if self._decay and all(name in first and int(first[name]["tokens"]) for name in own):
            for name, norm in own.items():
                norm.merge_state_dict(first[name])
            self.fade()

    def record(self, wanted: bool) -> None:
        """Set whether the next step is recorded, if the criterion needs activations."""
        self.recorder.last = LastSums()  # a loader may fill the next batch into the same memory
        self.recorder.when = "training" if (wanted and self._needs_norms) or self._probing else "never"

    def probe(self) -> None:
        """Record one step in a run that needs no norms, only to see which layers it reaches."""
        attach(self._layers.values(), self.recorder, ActivationNorm)
        self._probing = True

    def warn_of_unreached(self) -> None:
        """Warn of layers that the step since ``probe`` has not reached: their masks may have no effect."""
        if not self._probing:
            return
        self._probing = False
        unreached = [name for name, norm in self._norms().items() if not int(norm.tokens)]
        attach(self._layers.values(), self.recorder, ActivationNorm if self._needs_norms else None)
        if unreached and rank() == 0:
            _log.warning(
                "The first step reached no forward of %d targets, such as %s. If the model reads their weight in "
                "another way, or another model is trained, masks have no effect, and the pruned weights are lost at "
                "the end. Leave such layers out with ignore=[%r].",
                *(len(unreached), unreached[0], unreached[0]),
            )

    def check_new_tokens(self) -> None:
        """Warn of targets that have nothing new since ``fade``, or whose inputs were sometimes not finite; raise
        ValueError if none was, and nothing is remembered."""
        norms = self._norms()
        tokens = {name: int(norm.tokens) for name, norm in norms.items()}
        dropped = [name for name, norm in norms.items() if int(norm.dropped)]
        for name in dropped:
            if tokens[name] == 0:
                raise not_finite(name)
        old = [name for name in norms if tokens[name] <= self._tokens.get(name, -1) and name not in dropped]
        if old and not self._warned and rank() == 0:
            self._warned = True
            _log.warning(
                "No token reached %d targets since the last mask update, such as %s: masks there use the norms of "
                "earlier windows. If the model no longer uses it, leave it out with ignore=[%r].",
                *(len(old), old[0], old[0]),
            )
        if dropped and rank() == 0:
            _log.warning(
                "%s: in %d forwards since the last mask update, the input activations were not finite, nor were those "
                "of %d more. They do not count in the statistics. This is normal for a step that a loss scaler skips.",
                *(dropped[0], int(norms[dropped[0]].dropped), len(dropped) - 1),
            )

    def fade(self) -> None:
        """After an update: reduce the weight of the norms, or reset them.

        Every rank holds the sum over ranks now. All but rank 0 begin again at zero, or the next sum would count it
        several times.
        """
        norms = self._norms()
        if self._decay:
            for norm in norms.values():
                norm.fade(self._decay)
            self._tokens = {name: int(norm.tokens) for name, norm in norms.items()}
        if not self._decay or rank() != 0:
            for norm in norms.values():
                norm.reset()

    def state_dict(self) -> dict[str, Any]:
        """The state of all ranks; all of them must call."""
        own = {name: norm.state_dict() for name, norm in self._norms().items()}
        return {"norms_by_rank": gather_objects(own), "tokens": self._tokens}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Each rank gets its own norms back; if the number of ranks has changed, rank 0 gets their sum."""
        by_rank: Sequence[Mapping[str, dict[str, Tensor]]] = state["norms_by_rank"]
        self._tokens = {name: operator.index(tokens) for name, tokens in state["tokens"].items()}
        own, same_ranks = self._norms(), len(by_rank) == world_size()
        for norm in own.values():
            norm.reset()
        for process, saved in enumerate(by_rank):
            if rank() == (process if same_ranks else 0):
                for name, norm in own.items():
                    norm.merge_state_dict(saved[name])
