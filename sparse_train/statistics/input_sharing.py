"""``InputSharing``: the discovery of layers that read one and the same input."""

from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef


class InputSharing:
    """Finds the layers that read one and the same input (q/k/v; gate/up), so that it is measured once.

    Watches the forwards of one step, eagerly, and compares memory: engines may hand each layer a view of its own
    (ZeRO-3's hooks do), and addresses are used again. A weak reference to the storage settles both: as long as it is
    there, its identity belongs to no other.
    What is found is taken to hold from then on: layers that shared their input are expected to go on doing so.
    """

    def __init__(self) -> None:
        self._seen: dict[tuple[Any, ...], tuple[StorageWeakRef, nn.Module]] = {}
        self._leaders: dict[nn.Module, list[nn.Module]] = {}

    def watch(self, layer: nn.Module, x: Tensor) -> None:
        storage = StorageWeakRef(x.untyped_storage())
        version = 0 if x.is_inference() else x._version  # changed in place since: another input
        key = (storage.cdata, x.storage_offset(), x.shape, x.stride(), version)
        known, leader = self._seen.get(key, (storage, layer))
        if known.expired():
            leader = layer
        if leader is layer:
            self._seen[key] = (storage, layer)
        self._leaders.setdefault(layer, []).append(leader)

    def leaders(self) -> dict[nn.Module, nn.Module]:
        """For each layer the first one that always had its input; itself where there is none."""
        found: dict[nn.Module, nn.Module] = {}
        for layer, leaders in self._leaders.items():
            always = all(leader is leaders[0] for leader in leaders)
            same_calls = len(self._leaders[leaders[0]]) == len(leaders)
            found[layer] = leaders[0] if always and same_calls else layer
        return found

    # Copies and pickles of a model start without the references of a forward that is over.
    def __deepcopy__(self, memo: dict[int, Any]) -> "InputSharing":
        return InputSharing()

    def __reduce__(self) -> tuple[Any, ...]:
        return InputSharing, ()
