"""``Window``: which activations the next update sees, over a run."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sparse_train.criteria import Criterion
from sparse_train.distributed import gather_objects, rank, world_size
from sparse_train.layers.matrices import MaskedLayer, Recorder
from sparse_train.pipeline.earlier_windows import EarlierWindows, Memory
from sparse_train.pipeline.recording import (
    attach,
    exchange,
    needed_statistics,
    norms_of,
    restore,
    share,
    share_statistics,
    turn_halves,
    warn_of_padding,
)
from sparse_train.statistics.input_sharing import InputSharing


class Window:
    """Records activations in the steps before an update, and keeps what is remembered of earlier windows.

    Args:
        layers: masked layers by name, which get statistics; norms left there by a first mask are kept aside.
        criterion: reads the statistics, if it needs any.
        halved: record odd and even steps separately.
        memory: how much earlier windows count.
    """

    def __init__(self, layers: Mapping[str, MaskedLayer], criterion: Criterion, halved: bool, memory: Memory) -> None:
        self._layers, self._wanted = layers, criterion.needs_activations
        # norms of a layer with a recorder are those of an earlier window, and complete only on rank 0
        self._of_first_mask = norms_of({name: layer for name, layer in layers.items() if layer.recorder is None})
        self.recorder = Recorder()
        """The recorder of all layers."""
        attach(layers.values(), self.recorder, needed_statistics(criterion, halved))
        self._earlier = EarlierWindows(layers, memory)
        self._sharing_known = False

    def check_own(self) -> None:
        """Raise ValueError if layers now record for another window, or are no longer masked."""
        lost = [n for n, layer in self._layers.items() if getattr(layer, "recorder", None) is not self.recorder]
        if lost:
            raise ValueError(
                f"{lost[0]} is no longer this updater's: another MaskUpdater or callback prunes it too, or it was "
                "squashed. Only one of them may prune a layer; give several of them targets that do not overlap."
            )

    def begin_with_first_masks(self) -> None:
        """Remember the norms of the first masks, which count as a window."""
        self._earlier.begin_with(self._of_first_mask)
        self._of_first_mask = {}

    def record(self, wanted: bool) -> None:
        """Set whether the next step is recorded, if the criterion needs activations and they are not frozen."""
        wanted = wanted and self._wanted and not self._earlier.frozen
        self.recorder.when = "training" if wanted else "never"
        self.recorder.sharing = InputSharing() if wanted and not self._sharing_known else None

    def after_step(self) -> None:
        """Call after each step, before the next ``record``."""
        warn_of_padding(self.recorder)
        if self.recorder.sharing is not None:
            self._sharing_known = share_statistics(self.recorder, list(self._layers.values()))
        if self.recorder.when == "training":
            turn_halves(self._layers.values())

    def before_update(self) -> None:
        """Sum statistics over ranks, and look at what is new in them.

        Raises:
            ValueError: on every rank, if ranks hold different masks, or if the inputs of a layer were never finite.
        """
        exchange(self._layers)
        self._earlier.check_new()

    def after_update(self) -> None:
        """Reduce the weight of the statistics, or reset them."""
        self._earlier.fade()

    def state_dict(self) -> dict[str, Any]:
        """The state of all ranks; all of them must call."""
        own = {name: norm.state_dict() for name, norm in norms_of(self._layers).items()}
        return {
            "earlier_windows": self._earlier.state_dict(),
            "statistics_by_rank": gather_objects(own),
            "leaders_by_rank": gather_objects(self._leaders() if self._sharing_known else None),
        }

    def _leaders(self) -> dict[str, str]:
        """The layers that do not record their input, and those that do it for them."""
        recording = {id(each.statistics): name for name, each in self._layers.items() if each.records}
        return {name: recording[id(each.statistics)] for name, each in self._layers.items() if not each.records}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Each rank gets its own statistics back; if the number of ranks has changed, rank 0 gets their sum.

        Raises:
            ValueError: the state has statistics of layers that do not exist here.
        """
        by_rank: list[dict[str, dict[str, Tensor]]] = state["statistics_by_rank"]
        check_known(set().union(*by_rank), self._layers)
        for layer in self._layers.values():
            if layer.statistics is not None:
                layer.record_alone()
        self._earlier.load_state_dict(state["earlier_windows"])
        restore(norms_of(self._layers), by_rank)
        leaders: list[dict[str, str] | None] = state.get("leaders_by_rank", [None] * len(by_rank))
        self._sharing_known = any(each is not None for each in leaders)
        if self._sharing_known and len(leaders) == world_size():  # otherwise each records alone, which is always right
            for name, leader in (leaders[rank()] or {}).items():
                share(self._layers[name], self._layers[leader])


def check_known(saved: set[str], layers: Mapping[str, MaskedLayer]) -> None:
    """Raise ValueError if a checkpoint names layers that are not targets."""
    unknown = sorted(saved - set(layers))
    if unknown:
        raise ValueError(f"The checkpoint pruned layers that are not targets of this run, such as {unknown[0]}.")
