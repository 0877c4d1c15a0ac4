"""The masked layer: an ``nn.Linear`` that keeps its dense parameter and computes with ``where(mask, weight, 0)``.

Shape suffixes: O out_features, I in_features, J packed mask bytes = ceil(I / 8).
"""

import functools
from typing import Any

from torch import Tensor, nn

from sparse_train.layers import masks
from sparse_train.layers.matrices import CONV1D, FALCON_LINEAR, MASK_NAME, MaskedLayer, class_path

SPARSE_CONV1D = "sparse_train.layers.conv1d.SparseConv1D"


class SparseLinear(MaskedLayer, nn.Linear):
    """A linear layer whose forward uses only kept weights.

    ``sparsify`` makes it from an ``nn.Linear`` in place. The parameter objects and their names stay, so optimizers,
    sharding engines and checkpoints are not affected. ``weight`` (O, I) holds kept and shadow values together;
    ``weight_mask`` (O, ceil(I / 8)) uint8 is the packed mask, see ``sparse_train.layers.masks``.
    """

    @property
    def weight_OI(self) -> Tensor:
        return self.weight

    def reset_parameters(self) -> None:
        # Also called after ``to_empty`` of a layer created on the meta device, when the buffer's bytes are garbage.
        super().reset_parameters()
        if MASK_NAME in self._buffers:
            masks.fill_full(self.weight_mask, self.in_features)


def sparse_layers(model: nn.Module) -> dict[str, MaskedLayer]:
    """The masked layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MaskedLayer)}


@functools.cache
def sparse_class(cls: Any) -> type:
    if cls is nn.Linear or class_path(cls) == FALCON_LINEAR:  # FalconLinear becomes an nn.Linear after squash
        return SparseLinear
    if class_path(cls) == CONV1D:
        from sparse_train.layers.conv1d import SparseConv1D

        return SparseConv1D
    # fully_shard has created a class FSDPLinear(FSDPModule, Linear) for this module; it must stay an FSDPModule.
    assert cls.__bases__[-1] is nn.Linear and len(cls.__bases__) == 2, cls
    return type(f"{cls.__name__}Sparse", (cls.__bases__[0], SparseLinear), dict(cls.__dict__))


@functools.cache
def dense_class(cls: Any) -> type:
    if cls is SparseLinear:
        return nn.Linear
    if class_path(cls) == SPARSE_CONV1D:
        return next(base for base in cls.__bases__ if base is not MaskedLayer)  # type: ignore[no-any-return]
    return type(cls.__name__.removesuffix("Sparse"), (cls.__bases__[0], nn.Linear), dict(cls.__dict__))
