"""How far masks have moved from the first ones: ``FirstMasks``, measured on a sample of rows.

Shape suffixes: J packed mask bytes, S sampled rows.
"""

from collections.abc import Mapping

from torch import Tensor

from sparse_train.layers import masks
from sparse_train.layers.matrices import MaskedMatrix

_STRIDE = 128  # whole first masks would double the memory of masks


class FirstMasks:
    """Every 128th row of the first mask of each layer, but at least four rows per layer.

    Args:
        layers: masked layers by name.
    """

    def __init__(self, layers: Mapping[str, MaskedMatrix]) -> None:
        self._layers = layers
        self.rows_SJ: dict[str, Tensor] = {}
        """The sample by layer, uint8; empty before the first masks."""

    def keep(self) -> None:
        """Store the current masks as the first ones, unless some are stored already."""
        if not self.rows_SJ:
            self.rows_SJ = {name: rows_SJ.clone() for name, rows_SJ in self._sample().items()}

    def share_differing(self) -> float:
        """The share of mask entries that differ from the first masks, scaled from the sample to whole layers."""
        differing = 0.0
        for name, rows_SJ in self._sample().items():
            scale = self._layers[name].out_features / len(rows_SJ)
            differing += masks.count_differing(rows_SJ, self.rows_SJ[name].to(rows_SJ.device)) * scale
        return differing / sum(layer.in_features * layer.out_features for layer in self._layers.values())

    def state_dict(self) -> dict[str, Tensor]:
        return {name: rows_SJ.cpu() for name, rows_SJ in self.rows_SJ.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        self.rows_SJ = {name: rows_SJ.to(self._layers[name].weight_mask.device) for name, rows_SJ in state.items()}

    def _sample(self) -> dict[str, Tensor]:
        strides = {name: max(1, min(_STRIDE, layer.out_features // 4)) for name, layer in self._layers.items()}
        return {name: layer.weight_mask[:: strides[name]] for name, layer in self._layers.items()}
