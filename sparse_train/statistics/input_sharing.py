"""Layers that read the same input (q/k/v; gate/up) record it once: ``SeenInput``, ``InputSharing``."""

from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef


class SeenInput:
    """Recognises the input of a forward, without keeping it alive.

    Tensors cannot be compared by identity, because engines may give each layer its own view (the hooks of ZeRO-3 do),
    nor by address, because addresses are reused. A weak reference to the storage solves both: while it is alive, no
    other storage has its identity.
    """

    def __init__(self, x: Tensor) -> None:
        self._storage = StorageWeakRef(x.untyped_storage())
        version = 0 if x.is_inference() else x._version  # a tensor that was changed in place is another input
        self.key = (self._storage.cdata, x.storage_offset(), x.shape, x.stride(), version)

    def is_same_as(self, earlier: "SeenInput | None") -> bool:
        """Whether this is the input of an earlier forward, of the same step."""
        return earlier is not None and not earlier.expired() and self.key == earlier.key

    def expired(self) -> bool:
        """Whether the input is gone, so that another one may have its key."""
        return bool(self._storage.expired())

    # Copies and pickles of a model start without the references to a finished forward.
    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        return None

    def __reduce__(self) -> tuple[Any, ...]:
        return type(None), ()


class InputSharing:
    """Finds the layers that read the same input, by watching the forwards of one step in eager mode.

    They share one statistic from then on, in which only the first of them records: their leader. In each later eager
    forward, a layer compares its input with the one that its leader has recorded last, and if that is another one, it
    goes on with a copy of the statistic. Not seen is a layer that is skipped while its leader runs, which counts what
    its leader sees, and a change after the first step in forwards that are compiled later.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[Any, ...], tuple[SeenInput, nn.Module]] = {}
        self._last: dict[nn.Module, SeenInput] = {}
        self._calls: dict[nn.Module, list[tuple[nn.Module, int]]] = {}
        """For each call of a layer, its leader, and which of the leader's calls had that input."""

    def watch(self, layer: nn.Module, own: SeenInput) -> None:
        self._last[layer] = own
        known, leader = self._seen.get(own.key, (own, layer))
        if known.expired() or self._last[leader] is not known:
            leader = layer
        if leader is layer:
            self._seen[own.key] = (own, layer)
        own_calls = self._calls.setdefault(layer, [])
        own_calls.append((leader, len(own_calls) if leader is layer else len(self._calls[leader]) - 1))

    def leaders(self) -> dict[nn.Module, nn.Module]:
        """For each layer, the first layer that always had the same input; itself if there is none."""
        found: dict[nn.Module, nn.Module] = {}
        for layer, calls in self._calls.items():
            leader, _ = calls[0]
            # each call of the leader once: a layer that reads one of two inputs twice has another sum
            every_call = [(leader, number) for number in range(len(self._calls[leader]))]
            found[layer] = leader if calls == every_call else layer
        return found

    # Copies and pickles of a model start without the references to a finished forward.
    def __deepcopy__(self, memo: dict[int, Any]) -> "InputSharing":
        return InputSharing()

    def __reduce__(self) -> tuple[Any, ...]:
        return InputSharing, ()
