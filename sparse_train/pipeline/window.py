"""``Window``: which activations the next update sees, over a run."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sparse_train.criteria import Criterion
from sparse_train.distributed import gather_objects
from sparse_train.layers.matrices import MaskedLayer, Recorder
from sparse_train.pipeline.earlier_windows import EarlierWindows, Memory
from sparse_train.pipeline.recording import (
    attach,
    exchange,
    needed_statistics,
    norms_of,
    restore,
    share_statistics,
    turn_halves,
    warn_of_padding,
)
from sparse_train.statistics.input_sharing import InputSharing


class Window:
    """Records in the steps before an update, with what is remembered of earlier ones.

    Args:
        layers: masked layers by name, which get statistics; norms that a first mask has left there are kept aside.
        criterion: reads them, or none.
        halved: record odd and even steps apart.
        memory: what earlier windows count for.
    """

    def __init__(self, layers: Mapping[str, MaskedLayer], criterion: Criterion, halved: bool, memory: Memory) -> None:
        self._layers, self._wanted = layers, criterion.needs_activations
        # with a recorder they are an earlier window's, and whole on rank 0 alone
        self._of_first_mask = norms_of({name: layer for name, layer in layers.items() if layer.recorder is None})
        self.recorder = Recorder()
        """Of all layers."""
        attach(layers.values(), self.recorder, needed_statistics(criterion, halved))
        self._earlier = EarlierWindows(layers, memory)
        self._sharing_known = False

    def check_own(self) -> None:
        """Raise ValueError where layers record for another window by now, or are masked no more."""
        lost = [n for n, layer in self._layers.items() if getattr(layer, "recorder", None) is not self.recorder]
        if lost:
            raise ValueError(
                f"{lost[0]} is no longer this updater's: another MaskUpdater or callback prunes it too, or it was "
                "squashed. One of them for a layer; several have targets that do not overlap."
            )

    def begin_with_first_masks(self) -> None:
        """Remember the norms behind the first masks: all windows means also those."""
        self._earlier.begin_with(self._of_first_mask)
        self._of_first_mask = {}

    def record(self, wanted: bool) -> None:
        """Whether the next step is recorded, if the criterion reads anything that is not known for ever."""
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
        """Sum statistics over ranks. Raises ValueError, on every rank alike, where ranks hold different masks."""
        exchange(self._layers)
        self._earlier.warn_of_old()

    def after_update(self) -> None:
        """Let statistics count less, or begin anew."""
        self._earlier.fade()

    def state_dict(self) -> dict[str, Any]:
        """Of all ranks, all of which must call."""
        own = {name: norm.state_dict() for name, norm in norms_of(self._layers).items()}
        return {"earlier_windows": self._earlier.state_dict(), "statistics_by_rank": gather_objects(own)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Each rank gets its own statistics back; another number of ranks gets their sum, on rank 0.

        Raises:
            ValueError: there are statistics of layers that are not there.
        """
        by_rank: list[dict[str, dict[str, Tensor]]] = state["statistics_by_rank"]
        check_known(set().union(*by_rank), self._layers)
        self._earlier.load_state_dict(state["earlier_windows"])
        restore(norms_of(self._layers), by_rank)


def check_known(saved: set[str], layers: Mapping[str, MaskedLayer]) -> None:
    """Raise ValueError where a checkpoint names layers that are no targets."""
    unknown = sorted(saved - set(layers))
    if unknown:
        raise ValueError(f"The checkpoint pruned layers that are not targets of this run, such as {unknown[0]}.")
