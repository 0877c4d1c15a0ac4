"""Sparsity of a model, counted on its weights."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from sparse_train.layers import masks
from sparse_train.layers.blocks import fused_experts
from sparse_train.layers.matrices import MASK_NAME, MaskedMatrix, is_conv1d
from sparse_train.layers.semi_structured import why_not_weight
from sparse_train.packed.tensors import packed_bytes
from sparse_train.patterns import detect_pattern


@dataclass(frozen=True)
class LayerSparsity:
    """One weight matrix."""

    name: str
    shape: tuple[int, ...]
    zeros: int
    pattern: str
    """The tightest pattern that the zeros follow: "2:4", "4:8", "unstructured" or "dense"."""

    @property
    def size(self) -> int:
        out_features, in_features = self.shape
        return out_features * in_features

    @property
    def sparsity(self) -> float:
        return self.zeros / self.size


L = TypeVar("L", bound=LayerSparsity)


@dataclass(frozen=True)
class InspectedLayer(LayerSparsity):
    """A weight matrix with its details."""

    dtype: torch.dtype
    kind: str
    """Class of the layer, or "experts" for fused ones."""

    @property
    def dense_bytes(self) -> int:
        """Bytes in safetensors."""
        return self.size * self.dtype.itemsize

    @property
    def packed_bytes(self) -> int:
        """Bytes in a packed file; those of the dense form if packing saves nothing."""
        rows, columns = self.shape
        return min(packed_bytes(rows, columns, self.size - self.zeros, self.dtype.itemsize), self.dense_bytes)

    @property
    def why_not_2of4(self) -> str | None:
        """Why it could not compute on 2:4 hardware if it were on such a GPU; None if it could."""
        if self.kind not in ("Linear", "SparseLinear"):
            return f"it is not a plain nn.Linear ({self.kind})"
        return why_not_weight(self.shape, self.dtype, self.pattern)

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **asdict(self),
            "dtype": str(self.dtype).removeprefix("torch."),
            "sparsity": self.sparsity,
            "dense_bytes": self.dense_bytes,
            "packed_bytes": self.packed_bytes,
            "runs_on_2of4_hardware": self.why_not_2of4 is None,
            "why_not_2of4": self.why_not_2of4,
        }


def layer_sparsities(model: nn.Module, state: Mapping[str, Tensor] | None = None) -> list[InspectedLayer]:
    """Each linear layer of ``model``, as its forward uses it: in masked layers, pruned weights are zeros.

    Fused experts are one layer, with their matrices stacked.

    Args:
        model: any module.
        state: its whole state dict, if ``model`` itself is sharded; default: the model's own tensors.
    """
    found = []
    for name, module in model.named_modules():
        conv1d = is_conv1d(module)
        if isinstance(module, nn.Linear) or conv1d:
            key = f"{name}." if name else ""
            weight = module.weight.detach() if state is None else state[f"{key}weight"]
            weight_OI = weight.t() if conv1d else weight
            if isinstance(module, MaskedMatrix):
                weight_OI = (
                    module.masked_weight() if state is None else masks.apply(weight_OI, state[f"{key}{MASK_NAME}"])
                )
            found.append(_measure(name, weight_OI, type(module).__name__))
    for name, experts in fused_experts(model).items():
        weights = experts.parameter.detach() if state is None else state[name]
        matrices_EOI = weights.mT if experts.transposed else weights
        found.append(_measure(name, matrices_EOI.reshape(-1, matrices_EOI.shape[-1]), "experts"))
    return found


def _measure(name: str, weight_OI: Tensor, kind: str) -> InspectedLayer:
    nonzero_OI = weight_OI != 0
    zeros = nonzero_OI.numel() - int(nonzero_OI.sum())
    return InspectedLayer(name, tuple(weight_OI.shape), zeros, detect_pattern(nonzero_OI), weight_OI.dtype, kind)


def overall_sparsity(layers: Sequence[LayerSparsity]) -> float:
    """Share of zeros over all ``layers``; 0 if there are none."""
    size = sum(layer.size for layer in layers)
    return sum(layer.zeros for layer in layers) / size if size else 0.0


def pruned(layers: Sequence[L]) -> list[L]:
    """Those that were pruned: with at least a twentieth of zeros, as weights rounded to 4 bits have 0.01."""
    return [layer for layer in layers if layer.pattern != "dense" and layer.sparsity >= 0.05]


def sizes(layers: Sequence[InspectedLayer]) -> tuple[int, int]:
    """Bytes of ``layers``, dense and packed."""
    return sum(layer.dense_bytes for layer in layers), sum(layer.packed_bytes for layer in layers)


def by_projection(layers: Sequence[LayerSparsity]) -> list[tuple[str, str, str, str]]:
    """Layers grouped by their name within a block: name, count, sparsity, patterns; as shown in tables."""
    groups: dict[str, list[LayerSparsity]] = defaultdict(list)
    for layer in layers:
        groups[layer.name.rsplit(".", 1)[-1]].append(layer)
    return [
        (name, str(len(own)), f"{overall_sparsity(own):.4f}", ", ".join(sorted({layer.pattern for layer in own})))
        for name, own in groups.items()
    ]
