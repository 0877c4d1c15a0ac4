"""Keep the highest scores of every group, exactly and fast. Among equal scores the lower index is pruned first.

Shape suffixes: G groups, M members of a group, P those that are pruned.

On the CPU, numpy processes the matrix in threads, in chunks of rows: at 4096 x 11008 that is more
than ten times faster than sorting rows (``benchmarks/selection.py``). Other devices use torch.
"""

import functools
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

T = TypeVar("T")

CHUNK = 1 << 19
"""Scores that a thread takes at a time: 2 MiB of float32, near its cache, and few waits for the interpreter."""
_PAIRWISE = (2, 4, 8)  # M bytes are a word of numpy; above 8, a partition costs less than comparing all pairs


def keep_highest(scores_GM: Tensor, kept: int) -> Tensor:
    """Bool mask (G, M) with exactly ``kept`` True in each row of float32 scores without NaN; infinities are ordered."""
    members = scores_GM.shape[1]
    assert 0 <= kept <= members, (kept, members)
    if kept in (0, members) or not len(scores_GM):  # a process may have no rows
        return torch.full_like(scores_GM, kept > 0, dtype=torch.bool)
    pairwise = members in _PAIRWISE
    if scores_GM.device.type != "cpu":
        return (by_comparison if pairwise else by_threshold)(scores_GM, kept)
    return _in_chunks(_comparison_chunk if pairwise else _threshold_chunk, scores_GM, kept)


def by_threshold(scores_GM: Tensor, kept: int) -> Tensor:
    """``keep_highest`` by the threshold of each row; ties at the threshold are resolved by index."""
    # not kthvalue, which deterministic algorithms refuse on GPUs because of its indices
    lowest_GP = scores_GM.topk(scores_GM.shape[1] - kept, dim=1, largest=False, sorted=False).values
    threshold_G1 = lowest_GP.amax(1, keepdim=True)
    keep_GM = scores_GM > threshold_G1
    missing_G1 = kept - keep_GM.sum(1, keepdim=True)
    if missing_G1.any():
        tied_GM = scores_GM == threshold_G1
        first_kept_G1 = tied_GM.sum(1, keepdim=True) - missing_G1
        keep_GM |= tied_GM & (tied_GM.cumsum(1) > first_kept_G1)
    return keep_GM


def by_comparison(scores_GM: Tensor, kept: int) -> Tensor:
    """``keep_highest`` by comparing every pair: the rank of a member is the number of members that it beats."""
    groups, members = scores_GM.shape
    ranks = [torch.zeros(groups, dtype=torch.uint8, device=scores_GM.device) for _ in range(members)]
    for low in range(members):
        for high in range(low + 1, members):
            high_wins = scores_GM[:, low] <= scores_GM[:, high]  # the higher index wins a tie
            ranks[high] += high_wins
            ranks[low] += ~high_wins
    return torch.stack([rank >= members - kept for rank in ranks], dim=1)


# --- CPU: the same two methods, on numpy chunks ----------------------------------------------------------------------

_Array = np.ndarray  # short, and mypy accepts the bare name


def _in_chunks(select: Callable[[_Array, _Array, int], None], scores_GM: Tensor, kept: int) -> Tensor:
    scores = scores_GM.detach().contiguous().numpy()
    keep = np.empty(scores.shape, dtype=bool)
    in_threads(lambda part: select(scores[part], keep[part], kept), row_chunks(*scores.shape))
    return torch.from_numpy(keep)


def row_chunks(rows: int, columns: int) -> list[slice]:
    """Chunks of at most ``CHUNK`` scores, of about the same size."""
    chunks = -(-rows // max(1, CHUNK // columns))
    size = -(-rows // chunks)
    return [slice(start, start + size) for start in range(0, rows, size)]


def in_threads(function: Callable[[Any], T], parts: Sequence[Any]) -> list[T]:
    """``function`` of each part, in as many threads as torch uses, inside which it uses one; their errors are raised.

    torch and numpy release the interpreter lock inside their loops, so parts really run in parallel. Gradients are not
    recorded.
    """
    threads = torch.get_num_threads()
    return list((map if min(threads, len(parts)) == 1 else _pool(threads).map)(function, parts))


@functools.cache
def _pool(threads: int) -> ThreadPoolExecutor:
    pool, all_started = ThreadPoolExecutor(threads, "sparse_train", _start), threading.Barrier(threads, timeout=60)
    list(pool.map(lambda _: all_started.wait(), range(threads)))
    torch.set_num_threads(threads)  # the pool's 1 has also become the number of threads to come
    return pool


def _start() -> None:
    torch.get_num_threads()  # first: a thread's first question would undo what it has set
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)


os.register_at_fork(after_in_child=_pool.cache_clear)  # a forked child has the pool, but none of its threads


def _threshold_chunk(scores: _Array, keep: _Array, kept: int) -> None:
    pruned = scores.shape[1] - kept
    scores = _ordered_integers(scores)
    threshold = np.partition(scores, pruned - 1, axis=1)[:, pruned - 1 : pruned]
    np.greater(scores, threshold, out=keep)
    if np.count_nonzero(keep) < len(scores) * kept:  # ties; not counted by row at first, which takes longer
        missing = kept - np.count_nonzero(keep, axis=1)
        rows = np.flatnonzero(missing)
        tied = scores[rows] == threshold[rows]
        first_kept = np.count_nonzero(tied, axis=1) - missing[rows]
        keep[rows] |= tied & (np.cumsum(tied, axis=1) > first_kept[:, None])


def _ordered_integers(scores: _Array) -> _Array:
    """int32 in the same order: numpy partitions these faster than floats, which may be NaN."""
    bits = scores.view(np.int32)
    if bits.min() >= 0:
        return bits
    bits = (scores + np.float32(0)).view(np.int32)  # turns -0.0 into 0.0, which is equal
    return bits ^ ((bits >> 31) & 0x7FFFFFFF)


def _comparison_chunk(scores: _Array, keep: _Array, kept: int) -> None:
    members = scores.shape[1]
    word = np.dtype(f"<u{members}")  # a group's ranks in one number, a byte for each member
    row, higher_wins = scores.reshape(-1), np.zeros(scores.shape, dtype=bool)
    ranks = np.full(len(scores), sum((members - 1 - low) << 8 * low for low in range(members)), word)  # if all low win
    for apart in range(1, members):
        np.less_equal(row[:-apart], row[apart:], out=higher_wins.reshape(-1)[:-apart])
        wins = higher_wins.view(word)[:, 0] & ((1 << 8 * (members - apart)) - 1)  # of pairs inside a group
        wins *= (1 << 8 * apart) - 1  # one more for the higher member, ``apart`` bytes further, one less for the lower
        ranks += wins
    np.greater_equal(ranks.view(np.uint8).reshape(scores.shape), members - kept, out=keep)
