"""Sparsity of a model, counted on its weights."""

from dataclasses import dataclass

from torch import nn

from sparse_train.layers import SparseLinear
from sparse_train.patterns import detect_pattern


@dataclass(frozen=True)
class LayerSparsity:
    """One weight matrix."""

    name: str
    shape: tuple[int, ...]
    zeros: int
    pattern: str
    """The tightest that the zeros follow: "2:4", "4:8", "unstructured" or "dense"."""

    @property
    def size(self) -> int:
        out_features, in_features = self.shape
        return out_features * in_features

    @property
    def sparsity(self) -> float:
        return self.zeros / self.size


def layer_sparsities(model: nn.Module) -> list[LayerSparsity]:
    """Each linear layer of ``model``, as its forward sees it: masked layers with pruned weights as zeros."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            weight_OI = module.masked_weight() if isinstance(module, SparseLinear) else module.weight.detach()
            nonzero_OI = weight_OI != 0
            zeros = nonzero_OI.numel() - int(nonzero_OI.sum())
            found.append(LayerSparsity(name, tuple(weight_OI.shape), zeros, detect_pattern(nonzero_OI)))
    return found


def overall_sparsity(layers: list[LayerSparsity]) -> float:
    """Share of zeros over all ``layers``; 0 of none."""
    size = sum(layer.size for layer in layers)
    return sum(layer.zeros for layer in layers) / size if size else 0.0
