"""What a retry of ``auto_find_batch_size`` starts from."""

import copy
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from sparse_train.allocation import Outliers
from sparse_train.layers.matrices import MaskedLayer


class FirstTry:
    """Masks and statistics from right after the first mask was made, for a retry with smaller batches.

    A retry does not make a new first mask: a solver has already moved the weights for this one, and would move them
    again. So no copy of weights is needed. The Trainer itself also keeps what was trained before the failure.

    Args:
        layers: by name; only statistics left by calibration are stored, not those that an updater still records.
        outliers: what ``set_first_mask`` has returned.
    """

    def __init__(self, layers: Mapping[str, MaskedLayer], outliers: Outliers | None) -> None:
        self._outliers = outliers
        self._layers: dict[str, tuple[Tensor, Any]] = {
            name: (layer.weight_mask.clone(), copy.deepcopy(layer.statistics) if layer.recorder is None else None)
            for name, layer in layers.items()
        }

    def bring_back(self, layers: Mapping[str, MaskedLayer]) -> Outliers | None:
        """Restore the masks and statistics of layers, and return the outliers."""
        for name, (mask_OJ, statistics) in self._layers.items():
            layers[name].weight_mask.copy_(mask_OJ)
            layers[name].recorder, layers[name].statistics = None, copy.deepcopy(statistics)
        return self._outliers
