"""Sparsity of a model, counted on its weights."""

from dataclasses import dataclass

from torch import Tensor, nn

from sparse_train.matrices import MaskedMatrix, is_conv1d
from sparse_train.patterns import detect_pattern
from sparse_train.targets import fused_experts


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
    """Each linear layer of ``model``, as its forward sees it: masked layers with pruned weights as zeros.

    Fused experts are one layer, their matrices below each other.
    """
    found = []
    for name, module in model.named_modules():
        if isinstance(module, MaskedMatrix):
            found.append(_measure(name, module.masked_weight()))
        elif isinstance(module, nn.Linear):
            found.append(_measure(name, module.weight.detach()))
        elif is_conv1d(module):
            found.append(_measure(name, module.weight.detach().t()))
    for name, experts in fused_experts(model).items():
        matrices_EOI = experts.parameter.detach().mT if experts.transposed else experts.parameter.detach()
        found.append(_measure(name, matrices_EOI.reshape(-1, matrices_EOI.shape[-1])))
    return found


def _measure(name: str, weight_OI: Tensor) -> LayerSparsity:
    nonzero_OI = weight_OI != 0
    zeros = nonzero_OI.numel() - int(nonzero_OI.sum())
    return LayerSparsity(name, tuple(weight_OI.shape), zeros, detect_pattern(nonzero_OI))


def overall_sparsity(layers: list[LayerSparsity]) -> float:
    """Share of zeros over all ``layers``; 0 of none."""
    size = sum(layer.size for layer in layers)
    return sum(layer.zeros for layer in layers) / size if size else 0.0
