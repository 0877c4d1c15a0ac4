"""Adding a batch to sums of squares: ``accumulate``, in eager and in compiled forwards.

Shape suffixes: T tokens, I in_features.
"""

import functools
import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor


def accumulate(x: Tensor, token_mask: Tensor | None, sum_squares_I: Tensor, tokens: Tensor, dropped: Tensor) -> None:
    """Add a batch to sums in place, or, if it is not finite or in a recomputed forward, nothing.

    Args:
        x: (..., I), any float dtype.
        token_mask: bool or integer (...), 0 = padding; None counts every token.
        sum_squares_I: float32 (I,).
        tokens: int64 scalar, grows by the number of tokens.
        dropped: int64 scalar, grows by 1 if one of the batch's sums is not finite.
    """
    # the operator is only for compilers; calling one costs about as much as reading a small input
    add = _accumulate if torch.compiler.is_compiling() else _accumulate_now
    add(x, token_mask, sum_squares_I, tokens, dropped)


@torch.library.custom_op("sparse_train::accumulate", mutates_args=("sum_squares_I", "tokens", "dropped"))
def _accumulate(x: Tensor, token_mask: Tensor | None, sum_squares_I: Tensor, tokens: Tensor, dropped: Tensor) -> None:
    # One opaque operator, so that a compiled forward keeps it and checks at run time whether it is recomputed.
    _accumulate_now(x, token_mask, sum_squares_I, tokens, dropped)


@torch.no_grad()
def _accumulate_now(
    x: Tensor, token_mask: Tensor | None, sum_squares_I: Tensor, tokens: Tensor, dropped: Tensor
) -> None:
    # inside a backward (a forward recomputed by activation checkpointing, of either kind), tokens would count twice
    if recomputing():
        return
    x_TI = x.reshape(-1, x.shape[-1])
    kept_T = None if token_mask is None else token_mask.reshape(-1).bool()
    # in parts: a float32 copy of a whole long batch would raise the peak memory of the run, in recorded steps
    rows = max(1, _PART // max(1, x_TI.shape[1]))
    sums_I = torch.zeros_like(sum_squares_I)
    for start in range(0, len(x_TI), rows):
        part_TI = x_TI[start : start + rows]
        if kept_T is not None:
            # ``where`` and not a product: padding may hold infinities or NaN
            part_TI = torch.where(kept_T[start : start + rows, None], part_TI.float(), 0)
        sums_I += sum_of_squares(part_TI)
    # decided on the device, because asking for the answer here would make every forward wait for it
    finite = sums_I.isfinite().all()
    sum_squares_I += torch.where(finite, sums_I, 0)
    tokens += finite * (len(x_TI) if kept_T is None else kept_T.sum())
    dropped += ~finite


def sum_of_squares(x_TI: Tensor) -> Tensor:
    """Sum over tokens, float32 (I,). On the CPU by numpy in threads, in chunks of rows that fit the cache.

    Sums of 128 rows are added up in float32, which keeps relative errors around 1e-7; one sum over all rows would not.
    """
    if x_TI.device.type != "cpu" or x_TI.dtype == torch.float64:
        return x_TI.float().square().sum(0)
    threads = torch.get_num_threads()
    rows = -(-len(x_TI) // threads)
    if threads == 1 or x_TI.numel() < _WORTH_THREADS:
        return torch.from_numpy(_sum_of_squares(x_TI.float().numpy()))
    parts = [x_TI[start : start + rows] for start in range(0, len(x_TI), rows)]
    return torch.from_numpy(sum(_threads(threads).map(lambda part: _sum_of_squares(part.float().numpy()), parts)))


_PART = 2**24  # elements, 64 MiB in float32: large enough to keep a GPU busy
_CHUNK = 128
_WORTH_THREADS = 2**21  # elements; below this, starting threads takes longer than the work


def _sum_of_squares(x: np.ndarray) -> np.ndarray:
    whole = len(x) // _CHUNK * _CHUNK
    chunks = x[:whole].reshape(-1, _CHUNK, x.shape[1])
    found: np.ndarray = np.einsum("cti,cti->ci", chunks, chunks).sum(0)
    found += np.einsum("ti,ti->i", x[whole:], x[whole:])
    return found


@functools.cache
def _threads(count: int) -> ThreadPoolExecutor:
    # numpy releases the interpreter lock inside einsum, so parts really run in parallel
    return ThreadPoolExecutor(count, thread_name_prefix="sum_of_squares")


os.register_at_fork(after_in_child=_threads.cache_clear)  # a forked child has the pool, but none of its threads


@_accumulate.register_fake
def _(x: Tensor, token_mask: Tensor | None, sum_squares_I: Tensor, tokens: Tensor, dropped: Tensor) -> None:
    return None


def recomputing() -> bool:
    """Whether this forward runs inside a backward, like the second forward of activation checkpointing."""
    return torch._C._current_graph_task_id() != -1
