"""Sums over tokens in chunks, so that never more than one chunk is in float32.

Shape suffixes: T all tokens, N tokens that count, C tokens of one chunk, K sums, X vocabulary or width.
"""

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

_CHUNK_ELEMENTS = 2**22
"""Elements of a chunk of tokens in float32, 16 MiB: large enough to keep a GPU busy, small next to any logits."""


def chunked_sums(
    sums: Callable[..., Tensor],
    gradient: Callable[..., Tensor],
    tokens_N: Tensor | None,
    student_TX: Tensor,
    *constants_T: Tensor,
) -> Tensor:
    """``sums(student, *constants)`` (K,) over the tokens ``tokens_N``; only the student gets a gradient.

    Args:
        sums: from rows of all operands, the sums over these rows, float32 (K,).
        gradient: from ``grad_K`` and the same rows, the gradient of the student's rows, float32.
        tokens_N: rows that count, int64; None = all of them.
        student_TX: one row per token.
        constants_T: other operands with one entry per token.
    """
    found_K: Tensor = _ChunkedSums.apply(sums, gradient, tokens_N, student_TX, *constants_T)  # type: ignore[no-untyped-call]
    return found_K


class _ChunkedSums(torch.autograd.Function):
    """Holds only the operands until backward.

    Plain autograd would hold several float32 copies of all logits. Backward computes each chunk again, so in both
    directions only one chunk exists in float32.
    """

    @staticmethod
    def forward(
        ctx: Any,
        sums: Callable[..., Tensor],
        gradient: Callable[..., Tensor],
        tokens_N: Tensor | None,
        student_TX: Tensor,
        *constants_T: Tensor,
    ) -> Tensor:
        ctx.gradient = gradient
        ctx.save_for_backward(tokens_N, student_TX, *constants_T)
        operands_T = (student_TX, *constants_T)
        chunks = _chunks(tokens_N, student_TX)
        return torch.stack([sums(*(each[chunk] for each in operands_T)) for chunk in chunks]).sum(0)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_K: Tensor) -> tuple[Tensor | None, ...]:
        tokens_N, student_TX, *constants_T = ctx.saved_tensors
        grad_TX = torch.zeros_like(student_TX)
        for chunk in _chunks(tokens_N, student_TX):
            grad_CX = ctx.gradient(grad_K, student_TX[chunk], *(each[chunk] for each in constants_T))
            grad_TX[chunk] = grad_CX.to(grad_TX.dtype)
        return None, None, None, grad_TX, *(None for _ in constants_T)


def _chunks(tokens_N: Tensor | None, student_TX: Tensor) -> Iterator[Tensor | slice]:
    """Indices of rows; if all rows count, slices, which copy nothing."""
    size = max(1, _CHUNK_ELEMENTS // student_TX.shape[-1])
    if tokens_N is not None:
        yield from tokens_N.split(size)
    else:
        yield from (slice(start, start + size) for start in range(0, max(1, len(student_TX)), size))
