"""Fused experts of Mixture-of-Experts blocks: each expert is a separate matrix, pruned without a masked layer.

The weights of all experts are one parameter (E, O, I), which a masked layer cannot replace. During calibration, every
matrix product is examined, and if its weight is a slice of such a parameter, its input is recorded.

Shape suffixes: E experts, T tokens, O out_features, I in_features.
"""

import logging
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sparse_train.architecture import FusedExperts
from sparse_train.layers import masks
from sparse_train.layers.masked_layer import MaskedMatrix

_log = logging.getLogger(__name__)

FEW_TOKENS = 32
"""An expert that saw fewer calibration tokens than this is scored as if all its inputs were equally strong."""


class ExpertMatrix(MaskedMatrix):
    def __init__(self, experts: FusedExperts, index: int) -> None:
        self.experts, self.index = experts, index
        self.out_features, self.in_features = experts.shape_OI
        self.weight_mask = masks.full(self.out_features, self.in_features, experts.parameter.device)

    @property
    def weight_OI(self) -> Tensor:
        matrix = self.experts.parameter.detach()[self.index]
        return matrix.t() if self.experts.transposed else matrix


def expert_matrices(experts: Mapping[str, FusedExperts]) -> dict[str, ExpertMatrix]:
    """Every expert's matrix, named as in "model.layers.0.mlp.experts.down_proj[3]"."""
    return {
        f"{name}[{index}]": ExpertMatrix(fused, index)
        for name, fused in experts.items()
        for index in range(len(fused.parameter))
    }


# --- recording -------------------------------------------------------------------------------------------------------

_INPUT_AXIS: dict[Callable[..., Any], int] = {
    F.linear: -1,
    **dict.fromkeys((torch.matmul, Tensor.matmul, Tensor.__matmul__, torch.mm, Tensor.mm, torch.bmm, Tensor.bmm), -2),
}
"""Matrix products, and which axis of their second operand holds the input features."""


class ExpertRecorder(TorchFunctionMode):
    """While active, records the inputs of matrix products with experts' weights."""

    def __init__(self, matrices: Iterable[ExpertMatrix]) -> None:
        super().__init__()
        self._matrices: dict[tuple[int, int], ExpertMatrix] = {}
        self._whole: dict[int, list[ExpertMatrix]] = {}
        for matrix in matrices:
            self._matrices[_place(matrix.weight_OI)] = matrix
            self._whole.setdefault(id(matrix.experts), []).append(matrix)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func in _INPUT_AXIS:
            named = (kwargs[name] for name in ("input", "weight", "other", "mat2") if name in kwargs)
            x, weight = (*args, *named, None, None)[:2]
            if isinstance(x, Tensor) and isinstance(weight, Tensor) and weight.dim() in (2, 3):
                self._record_product(x, weight, _INPUT_AXIS[func])
        return func(*args, **kwargs)

    def _record_product(self, x: Tensor, weight: Tensor, input_axis: int) -> None:
        first = self._matrices.get(_place(weight))
        if first is None:
            return
        stored_transposed = weight.stride(input_axis) != 1
        if stored_transposed != first.experts.transposed:
            raise ValueError(
                f"A fused expert weight {tuple(first.experts.parameter.shape)} is used as if it were stored "
                f"{'(E, I, O)' if stored_transposed else '(E, O, I)'}, and its module (is_transposed) says otherwise. "
                "Leave the experts dense with ignore."
            )
        if weight.dim() == 2:
            _add(first, x)
        else:  # all experts in one product: x (E, T, I)
            for matrix, part in zip(self._whole[id(first.experts)], x, strict=True):
                _add(matrix, part[part.ne(0).any(-1)])  # rows of zeros are tokens that go to other experts


def _add(matrix: ExpertMatrix, x: Tensor) -> None:
    assert matrix.statistics is not None, "a recorder is only active while its matrices record"
    matrix.statistics.add(x)


def _place(weight: Tensor) -> tuple[int, int]:
    return weight.untyped_storage().data_ptr(), int(weight.storage_offset())


def fall_back(matrices: Mapping[str, MaskedMatrix]) -> None:
    """Give experts that saw few tokens uniform statistics, and warn; ValueError if none of a parameter saw one."""
    experts = {name: matrix for name, matrix in matrices.items() if isinstance(matrix, ExpertMatrix)}
    tokens = {name: int(matrix.statistics.tokens) for name, matrix in experts.items() if matrix.statistics is not None}
    reached = {id(matrix.experts) for name, matrix in experts.items() if tokens[name]}
    for name, matrix in experts.items():
        if id(matrix.experts) not in reached:
            raise ValueError(
                f"{name}: no product with this expert, or with any other of its block, was seen in calibration, so "
                f"there is nothing to score with. Leave them dense with ignore=[{name.split('[')[0]!r}]."
            )
    few = [name for name in experts if tokens[name] < FEW_TOKENS]
    for name in few:
        stats = experts[name].statistics
        assert stats is not None
        stats.reset()
        stats.sum_squares_I.fill_(1)
        stats.tokens += 1
    if few:
        _log.warning(
            "%d of %d expert matrices saw fewer than %d calibration tokens and were scored as if all their inputs were "
            "equally strong, such as %s. More calibration samples reach more experts.",
            *(len(few), len(experts), FEW_TOKENS, few[0]),
        )
