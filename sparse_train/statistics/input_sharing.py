"""``InputSharing``: finds layers that read the same input."""

from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef


class InputSharing:
    """Finds the layers that read the same input (q/k/v; gate/up), so that it is measured once.

    It watches the forwards of one step, in eager mode, and compares storages. Tensors cannot be compared by identity,
    because engines may give each layer its own view (the hooks of ZeRO-3 do), nor by address, because addresses are
    reused. A weak reference to the storage solves both: while it is alive, no other storage has its identity.
    Layers that shared their input in this step are assumed to share it from then on.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[Any, ...], tuple[StorageWeakRef, nn.Module]] = {}
        self._leaders: dict[nn.Module, list[nn.Module]] = {}

    def watch(self, layer: nn.Module, x: Tensor) -> None:
        storage = StorageWeakRef(x.untyped_storage())
        version = 0 if x.is_inference() else x._version  # a tensor that was changed in place is another input
        key = (storage.cdata, x.storage_offset(), x.shape, x.stride(), version)
        known, leader = self._seen.get(key, (storage, layer))
        if known.expired():
            leader = layer
        if leader is layer:
            self._seen[key] = (storage, layer)
        self._leaders.setdefault(layer, []).append(leader)

    def leaders(self) -> dict[nn.Module, nn.Module]:
        """For each layer, the first layer that always had the same input; itself if there is none."""
        found: dict[nn.Module, nn.Module] = {}
        for layer, leaders in self._leaders.items():
            always = all(leader is leaders[0] for leader in leaders)
            same_calls = len(self._leaders[leaders[0]]) == len(leaders)
            found[layer] = leaders[0] if always and same_calls else layer
        return found

    # Copies and pickles of a model start without the references to a finished forward.
    def __deepcopy__(self, memo: dict[int, Any]) -> "InputSharing":
        return InputSharing()

    def __reduce__(self) -> tuple[Any, ...]:
        return InputSharing, ()
