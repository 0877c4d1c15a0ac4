"""Sparsity of a model, counted on its weights, and whether GPUs with 2:4 sparse tensor cores could compute with them.

Shape suffixes: O out_features, I in_features, E experts.
"""

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sparse_train.architecture import fused_experts, is_conv1d, is_linear
from sparse_train.layers.state_dicts import folded_state_dict
from sparse_train.patterns import PRUNED, detect_pattern
from sparse_train.pruning.counts import sparsity_of

DTYPES_2OF4 = (torch.float16, torch.bfloat16)
"""Dtypes of weights and inputs in which this package uses 2:4 hardware."""
BLOCK_2OF4 = 16
"""Both dimensions of a weight must be multiples of this, cuSPARSELt's block size in these dtypes."""


@dataclass(frozen=True)
class LayerSparsity:
    """One weight matrix."""

    name: str
    shape: tuple[int, int]
    """(out_features, in_features)."""
    zeros: int
    pattern: str
    """The tightest pattern that the zeros follow: "2:4", "4:8", "unstructured" or "dense"."""
    dtype: torch.dtype | None = None
    """None = not known."""
    kind: str = "Linear"
    """Class of the layer, or "experts" for fused ones."""

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    @property
    def sparsity(self) -> float:
        return self.zeros / self.size

    @property
    def dense_bytes(self) -> int:
        """Bytes in safetensors."""
        assert self.dtype is not None
        return self.size * self.dtype.itemsize

    @property
    def misfit_2of4(self) -> str | None:
        """Why 2:4 hardware could not compute with it in any dtype; None if it could."""
        if self.kind not in ("Linear", "SparseLinear"):
            return f"it is not a plain nn.Linear ({self.kind})"
        if self.pattern not in ("1:4", "2:4"):
            return f"its zeros are {self.pattern}, not 2:4" if self.pattern != "dense" else "it is dense"
        if any(size % BLOCK_2OF4 for size in self.shape):
            return f"its shape {' x '.join(map(str, self.shape))} is not in multiples of {BLOCK_2OF4}"
        return None

    @property
    def why_not_2of4(self) -> str | None:
        """Why 2:4 hardware could not compute with it in its dtype; None if it could. The dtype is judged last."""
        if self.misfit_2of4 is None and self.dtype not in DTYPES_2OF4:
            dtype = str(self.dtype).removeprefix("torch.")
            return f"it is {dtype}, and tensor cores compute 2:4 in bfloat16 or float16"
        return self.misfit_2of4

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            **asdict(self),
            "dtype": str(self.dtype).removeprefix("torch."),
            "sparsity": self.sparsity,
            "dense_bytes": self.dense_bytes,
            "fits_2of4": self.misfit_2of4 is None,
            "runs_on_2of4_hardware": self.why_not_2of4 is None,
            "why_not_2of4": self.why_not_2of4,
        }


def layer_sparsities(model: nn.Module, state: Mapping[str, Any] | None = None) -> list[LayerSparsity]:
    """Each linear layer of ``model``, as its forward uses it; fused experts are one, with their matrices stacked.

    ``state`` is its whole state dict, if ``model`` is sharded or is written in another dtype; default: its own.
    """
    state = folded_state_dict(model, state)
    counted = []
    for name, module in model.named_modules():
        if is_linear(module):
            weight = state.get(f"{name}.weight".removeprefix("."), module.weight)  # parametrized layers compute theirs
            counted.append(_count(name, weight.t() if is_conv1d(module) else weight, type(module).__name__))
    for name, experts in fused_experts(model).items():
        matrices_EOI = state[name].mT if experts.transposed else state[name]
        counted.append(_count(name, matrices_EOI.flatten(0, 1), "experts"))
    return counted


def _count(name: str, weight_OI: Tensor, kind: str) -> LayerSparsity:
    nonzero_OI = weight_OI.detach() != 0
    rows, columns = weight_OI.shape
    zeros = rows * columns - int(nonzero_OI.sum())
    return LayerSparsity(name, (rows, columns), zeros, detect_pattern(nonzero_OI), weight_OI.dtype, kind)


def pruned_layers(layers: Sequence[LayerSparsity]) -> list[LayerSparsity]:
    """Those that were pruned."""
    return [layer for layer in layers if layer.sparsity > PRUNED]


def by_projection(layers: Sequence[LayerSparsity]) -> list[tuple[str, str, str, str]]:
    """Layers grouped by their name within a block: name, count, sparsity, patterns; as shown in tables."""
    groups: dict[str, list[LayerSparsity]] = defaultdict(list)
    for layer in layers:
        groups[layer.name.rsplit(".", 1)[-1]].append(layer)
    return [
        (name, str(len(own)), f"{sparsity_of(own):.4f}", ", ".join(sorted({layer.pattern for layer in own})))
        for name, own in groups.items()
    ]


def summary(model: nn.Module) -> str:
    """The pruned layers of a model, masked or squashed, by projection: count, sparsity, pattern; and their share of it.

    ::

        print(sparse_train.summary(model))

    All numbers are counted on the weights, as the forward uses them.
    """
    layers = layer_sparsities(model)
    sparse = pruned_layers(layers)
    rows = [f"{name:16}{count:>4}  {sparsity}  {patterns}" for name, count, sparsity, patterns in by_projection(sparse)]
    size, parameters = sum(layer.size for layer in sparse), sum(each.numel() for each in model.parameters())
    share = sum(layer.zeros for layer in sparse) / max(1, parameters)
    rows.append(
        f"{len(sparse)} of {len(layers)} linear layers are pruned: {sparsity_of(sparse):.4f} of their {size:,} "
        f"weights, {share:.4f} of all {parameters:,} parameters."
    )
    return "\n".join(rows)
