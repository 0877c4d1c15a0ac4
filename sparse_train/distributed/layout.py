"""``Layout``: what a process holds of one parameter. One class per engine, chosen from the parameter alone.

A layout knows parameters and tensors, never layers. A new engine is a new subclass, named in ``engines``.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

Elementwise = Callable[[Tensor, Tensor], Tensor]
"""Computes new values from weights and the mask entries that belong to them, both of the same, arbitrary shape."""


class Layout(ABC):
    """How an engine holds a parameter, which may be in any state between forwards."""

    is_sharded: ClassVar[bool] = False
    """Whether no process holds the whole parameter."""
    has_masters: ClassVar[bool] = False
    """Whether the optimizer holds its own float32 copy, from which it overwrites the parameter."""

    def __init__(self, parameter: Any) -> None:
        self.parameter = parameter

    @staticmethod
    @abstractmethod
    def holds(parameter: Any) -> bool:
        """Whether the engine of this class holds the parameter."""

    @abstractmethod
    def gathered(self) -> Any:
        """A context with the whole parameter, for reading; on every rank."""

    def own_rows(self) -> tuple[Tensor, slice] | None:
        """The rows (first dimension) that this process holds, and which they are; None if it holds no whole rows."""
        return None

    @abstractmethod
    def rewrite(self, function: Elementwise, keep: Tensor) -> None:
        """Replace values by ``function(values, keep)`` in place, in each process its part; ``keep`` is the whole mask.

        Masters, too: if they kept the old values, the next optimizer step would bring them back.
        """

    def state_rows(self, state: Tensor) -> Tensor | None:
        """An optimizer's state of the parameter, restricted to ``own_rows``; None if it is held in another shape."""
        return None

    def check(self, name: str) -> None:
        """Raise ValueError if the engine is set up in a way that masks cannot follow."""


class Whole(Layout):
    """Every process holds the whole parameter: one process, or DDP."""

    @staticmethod
    def holds(parameter: Any) -> bool:
        return True

    @contextmanager
    def gathered(self) -> Iterator[Tensor]:
        yield self.parameter

    @torch.no_grad()
    def rewrite(self, function: Elementwise, keep: Tensor) -> None:
        self.parameter.copy_(function(self.parameter, keep))

    def state_rows(self, state: Tensor) -> Tensor | None:
        return state
