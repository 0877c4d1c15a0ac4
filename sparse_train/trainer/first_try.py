"""What a retry of ``auto_find_batch_size`` begins with."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sparse_train.layers.matrices import MaskedLayer


class FirstTry:
    """Masks and statistics as they were after the first mask was made, for a retry with smaller batches.

    A retry does not make a first mask of its own: a solver has moved the weights for this one, and would move them
    again. So no copy of weights is needed. What steps before the failure have trained, the Trainer keeps too.

    Args:
        layers: by name; statistics count that calibration has left, and not those that an updater still records.
    """

    def __init__(self, layers: Mapping[str, MaskedLayer]) -> None:
        self._layers: dict[str, tuple[Tensor, Any]] = {
            name: (layer.weight_mask.clone(), copy.deepcopy(layer.statistics) if layer.recorder is None else None)
            for name, layer in layers.items()
        }

    def bring_back(self, layers: Mapping[str, MaskedLayer]) -> None:
        """Give layers the masks and statistics that they had."""
        for name, (mask_OJ, statistics) in self._layers.items():
            layers[name].weight_mask.copy_(mask_OJ)
            layers[name].recorder, layers[name].statistics = None, copy.deepcopy(statistics)
