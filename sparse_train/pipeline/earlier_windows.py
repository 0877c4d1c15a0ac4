"""How much the statistics of earlier windows count at an update: ``memory``."""

import logging
from collections.abc import Mapping
from typing import Any, Literal

from sparse_train.criteria import Criterion
from sparse_train.distributed import rank
from sparse_train.layers.matrices import MaskedMatrix
from sparse_train.pipeline.recording import distinct, norms_of, not_finite
from sparse_train.statistics.activations import ActivationNorm

_log = logging.getLogger(__name__)

Memory = float | Literal["frozen"]
"""How much the statistics of earlier windows count: a factor per update, or "frozen" = the first ones, forever."""


def check_memory(memory: Memory, criterion: Criterion) -> None:
    """Raise ValueError unless this is a factor from 0 to 1, or "frozen", and there is something to remember."""
    if memory != "frozen" and not (isinstance(memory, (int, float)) and 0 <= memory <= 1):
        raise ValueError(
            "memory is the factor with which statistics of earlier windows count at an update, from 0 (only the last "
            f'window) to 1 (all of them equally), or "frozen" (norms of the first mask, forever), got {memory!r}.'
        )
    if memory == "frozen" and not criterion.needs_activations:
        raise ValueError(f"{criterion} reads no activations, so that memory='frozen' has nothing to keep.")


class EarlierWindows:
    """Keeps, between updates, the part of the statistics that ``memory`` says.

    Args:
        layers: with statistics attached.
        memory: a factor per update, or "frozen".
    """

    def __init__(self, layers: Mapping[str, MaskedMatrix], memory: Memory) -> None:
        self._layers, self._memory = layers, memory
        self._tokens: dict[str, int] = {}
        self._warned = False
        self.frozen = False
        """Whether statistics are final."""

    def begin_with(self, first: Mapping[str, ActivationNorm]) -> None:
        """Start with the norms of the first mask, summed over ranks, as if an update had just used them.

        Does nothing if nothing is remembered, or if a layer has no norms because the mask came from elsewhere.
        """
        own = norms_of(self._layers)
        if not self._memory or not all(name in first and int(first[name].tokens) for name in own):
            return
        for name, norm in own.items():
            norm.merge(first[name])
        self.fade()

    def check_new(self) -> None:
        """Warn of targets that have nothing new since ``fade``, or whose inputs were sometimes not finite.

        Raises:
            ValueError: no input of a target was finite, and nothing is remembered.
        """
        norms = norms_of(self._layers)
        tokens = {name: int(norm.tokens) for name, norm in norms.items()}
        dropped = {name: count for name, norm in norms.items() if (count := int(norm.dropped))}
        empty = next((name for name in dropped if tokens[name] == 0), None)
        if empty is not None:
            raise not_finite(empty)
        old = [name for name in norms if tokens[name] <= self._tokens.get(name, -1) and name not in dropped]
        if old and not self._warned and rank() == 0:
            _log.warning(
                "No token reached %s%s since the last mask update: masks there use the norms of earlier windows. If "
                "the model no longer uses it, leave it out with ignore=[%r].",
                old[0],
                f" and {len(old) - 1} other targets" if len(old) > 1 else "",
                old[0],
            )
        self._warned = self._warned or bool(old)
        if dropped and rank() == 0:
            name, count = next(iter(dropped.items()))
            _log.warning(
                "%s: in %d forwards since the last mask update, the input activations were not finite%s. They do not "
                "count in the statistics. This is normal for a step that a loss scaler skips.",
                name,
                count,
                f", nor were those of {len(dropped) - 1} other targets" if len(dropped) > 1 else "",
            )

    def fade(self) -> None:
        """After an update: reduce the weight of the statistics, or reset them.

        They are already sums over ranks, so only rank 0 continues with them: the next sum over ranks is then exact, and
        checkpoints hold them once.
        """
        factor = 1.0 if self._memory == "frozen" else self._memory
        for each in distinct(self._layers.values()):
            if factor:
                each.fade(factor)
            else:
                each.reset()
        self.frozen = self._memory == "frozen"
        if factor and not self.frozen:
            self._tokens = {name: int(norm.tokens) for name, norm in norms_of(self._layers).items()}
        if rank() != 0:
            for each in distinct(self._layers.values()):
                each.reset()

    def state_dict(self) -> dict[str, Any]:
        return {"tokens": self._tokens, "frozen": self.frozen}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._tokens, self.frozen = dict(state["tokens"]), state["frozen"]
