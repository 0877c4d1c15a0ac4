"""Running squared norms of layer inputs.

Shape suffixes: T tokens, I in_features.
"""

import functools
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor


class Statistics(ABC):
    """Sums over the tokens that reach a layer's input."""

    tokens: Tensor

    @abstractmethod
    def __init__(self, in_features: int, device: torch.device | str | None = None) -> None:
        """Empty statistics for an input with this many features."""

    @abstractmethod
    def add(self, x: Tensor, token_mask: Tensor | None = None) -> None:
        """Count one batch of inputs, see ``ActivationNorm.add``."""

    @abstractmethod
    def tensors(self) -> list[Tensor]:
        """All sums, as tensors that can be summed over ranks in place."""

    @abstractmethod
    def move(self, device: torch.device) -> None:
        """Move to the device of the layer's input, in place, because layers may share this object."""

    @property
    @abstractmethod
    def sum_squares_I(self) -> Tensor:
        """Sum of squares of each feature, float32 (I,)."""

    @property
    def norm_I(self) -> Tensor:
        """``||X_j||_2`` over all tokens seen (arXiv 2306.11695, equation 1), float32 (I,)."""
        return self.sum_squares_I.sqrt()

    def reset(self) -> None:
        """Forget everything seen, in place."""
        for tensor in self.tensors():
            tensor.zero_()

    def fade(self, factor: float) -> None:
        """Multiply what was seen by ``factor``, above 0 and at most 1, in place; token counts are rounded up."""
        if factor == 1:
            return
        for tensor in self.tensors():
            tensor.copy_(tensor * factor if tensor.is_floating_point() else (tensor.double() * factor).ceil())


def fits(token_mask: Tensor | None, x: Tensor) -> bool:
    """Whether a mask (B, L) has an entry for every token of ``x``, which is (B, L, I) or (B * L, I)."""
    if token_mask is None:
        return False
    return token_mask.shape == x.shape[:-1] or (x.dim() == 2 and token_mask.numel() == len(x))


class ActivationNorm(Statistics):
    """Sum of squares of each input feature over the tokens seen, and the number of tokens.

    Plain tensors and not buffers: casting a model to bfloat16 must not cast its statistics.

    Attributes:
        sum_squares_I: float32 (I,).
        tokens: int64 scalar, tokens counted.
    """

    def __init__(self, in_features: int, device: torch.device | str | None = None) -> None:
        self._sum_squares_I = torch.zeros(in_features, dtype=torch.float32, device=device)
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def sum_squares_I(self) -> Tensor:
        return self._sum_squares_I

    def tensors(self) -> list[Tensor]:
        return [self._sum_squares_I, self.tokens]

    def move(self, device: torch.device) -> None:
        self._sum_squares_I, self.tokens = self._sum_squares_I.to(device), self.tokens.to(device)

    def add(self, x: Tensor, token_mask: Tensor | None = None) -> None:
        """Count one batch of inputs.

        Args:
            x: (..., I), any float dtype.
            token_mask: bool or integer (...), 0 = padding; None, or a shape that does not fit, counts every token.
        """
        # the operator is only for compilers; calling one costs about as much as reading a small input
        accumulate = _accumulate if torch.compiler.is_compiling() else _accumulate_now
        accumulate(x.detach(), token_mask if fits(token_mask, x) else None, self._sum_squares_I, self.tokens)

    def state_dict(self) -> dict[str, Tensor]:
        return {"sum_squares": self.sum_squares_I.cpu().clone(), "tokens": self.tokens.cpu().clone()}

    def merge_state_dict(self, state: dict[str, Tensor]) -> None:
        """Add what another one has seen; the result is the same as of one that has seen both."""
        self._sum_squares_I += state["sum_squares"].to(self._sum_squares_I.device)
        self.tokens += state["tokens"].to(self.tokens.device)

    def merge(self, other: "ActivationNorm") -> None:
        """Add what another ``ActivationNorm`` has seen."""
        self.merge_state_dict(other.state_dict())


class HalvedNorm(ActivationNorm):
    """An ``ActivationNorm`` in two halves of disjoint tokens, from which its noise can be estimated.

    Attributes:
        halves: new tokens are added to the first.
    """

    def __init__(self, in_features: int, device: torch.device | str | None = None) -> None:
        self.halves = ActivationNorm(in_features, device), ActivationNorm(in_features, device)

    @property
    def sum_squares_I(self) -> Tensor:
        return self.halves[0].sum_squares_I + self.halves[1].sum_squares_I

    @property
    def tokens(self) -> Tensor:  # type: ignore[override]
        return self.halves[0].tokens + self.halves[1].tokens

    def tensors(self) -> list[Tensor]:
        return [tensor for half in self.halves for tensor in half.tensors()]

    def add(self, x: Tensor, token_mask: Tensor | None = None) -> None:
        self.halves[0].add(x, token_mask)

    def turn(self) -> None:
        """Exchange the halves, in place; forwards, which may be compiled, always add to the first."""
        for first, second in zip(self.halves[0].tensors(), self.halves[1].tensors(), strict=True):
            before = first.clone()
            first.copy_(second)
            second.copy_(before)

    def move(self, device: torch.device) -> None:
        for half in self.halves:
            half.move(device)

    def alone(self, half: int) -> ActivationNorm:
        """One half, scaled to the number of all tokens; it must have seen some."""
        norm, own = ActivationNorm(len(self.sum_squares_I), self.tokens.device), self.halves[half]
        norm.merge_state_dict({"sum_squares": own.sum_squares_I * (self.tokens / own.tokens), "tokens": self.tokens})
        return norm

    def state_dict(self) -> dict[str, Tensor]:
        states = [half.state_dict() for half in self.halves]
        return {key: torch.stack([state[key] for state in states]) for key in states[0]}

    def merge_state_dict(self, state: dict[str, Tensor]) -> None:
        for index, half in enumerate(self.halves):
            half.merge_state_dict({key: value[index] for key, value in state.items()})

    def merge(self, other: ActivationNorm) -> None:
        """Add half of it to each half: norms that were not recorded in halves count as if they had no noise."""
        state = other.state_dict()
        second = state["tokens"] // 2
        for half, tokens in zip(self.halves, (state["tokens"] - second, second), strict=True):
            half.merge_state_dict({"tokens": tokens, "sum_squares": state["sum_squares"] * (tokens / state["tokens"])})


@contextmanager
def in_float32(device_type: str) -> Iterator[None]:
    """Inside, float32 matrix products are computed in full float32, whatever autocast and TF32 settings say."""
    restore = _no_tf32()
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        restore()


def _no_tf32() -> Callable[[], None]:
    """Turn TF32 off through the same API that set it: torch has two, and raises if they are mixed."""
    backends = torch.backends.cuda, torch.backends.mkldnn
    own = [backend.matmul for backend in backends if hasattr(backend, "matmul")]  # mkldnn's since torch 2.9
    precisions = [getattr(each, "fp32_precision", None) for each in own]  # since torch 2.9
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # it was set by fp32_precision of torch.backends or a backend, as by transformers' tf32=True
        before = None
    if before is not None:
        torch.set_float32_matmul_precision("highest")
    else:
        for each in own:
            each.fp32_precision = "ieee"

    def restore() -> None:
        if before is not None:
            torch.set_float32_matmul_precision(before)  # this sets fp32_precision to "ieee" even if it was not set
        for each, precision in zip(own, precisions, strict=True):
            if precision is not None:
                each.fp32_precision = "none"  # follow torch.backends again
                if each.fp32_precision != precision:
                    each.fp32_precision = precision

    return restore


class ActivationGram(Statistics):
    """Sum of ``x x^T`` over the tokens seen: second moments of the input, for methods that move weights.

    Only for calibration: takes I * I floats, and does not detect recomputed forwards.

    Attributes:
        gram_II: float32 (I, I).
        tokens: int64 scalar, tokens counted.
    """

    def __init__(self, in_features: int, device: torch.device | str | None = None) -> None:
        self.gram_II = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)

    @property
    def sum_squares_I(self) -> Tensor:
        return self.gram_II.diagonal()

    def tensors(self) -> list[Tensor]:
        return [self.gram_II, self.tokens]

    def move(self, device: torch.device) -> None:
        self.gram_II, self.tokens = self.gram_II.to(device), self.tokens.to(device)

    def add(self, x: Tensor, token_mask: Tensor | None = None) -> None:
        x_TI = x.detach().reshape(-1, x.shape[-1]).float()
        if token_mask is not None and fits(token_mask, x):
            x_TI = x_TI[token_mask.reshape(-1).bool()]
        with in_float32(x_TI.device.type):
            self.gram_II.addmm_(x_TI.t(), x_TI)
        self.tokens += len(x_TI)

    def norm(self) -> ActivationNorm:
        """The norms of the features: a copy of the diagonal."""
        norm = ActivationNorm(len(self.gram_II), self.gram_II.device)
        norm.merge_state_dict({"sum_squares": self.sum_squares_I, "tokens": self.tokens})
        return norm


@torch.library.custom_op("sparse_train::accumulate", mutates_args=("sum_squares_I", "tokens"))
def _accumulate(x: Tensor, token_mask: Tensor | None, sum_squares_I: Tensor, tokens: Tensor) -> None:
    # One opaque operator, so that a compiled forward keeps it and checks at run time whether it is recomputed.
    _accumulate_now(x, token_mask, sum_squares_I, tokens)


@torch.no_grad()
def _accumulate_now(x: Tensor, token_mask: Tensor | None, sum_squares_I: Tensor, tokens: Tensor) -> None:
    # inside a backward (a forward recomputed by activation checkpointing, of either kind), tokens would count twice
    if recomputing():
        return
    x_TI = x.reshape(-1, x.shape[-1])
    kept_T = None if token_mask is None else token_mask.reshape(-1).bool()
    # in parts: a float32 copy of a whole long batch would raise the peak memory of the run, in recorded steps
    rows = max(1, _PART // max(1, x_TI.shape[1]))
    for start in range(0, len(x_TI), rows):
        part_TI = x_TI[start : start + rows]
        if kept_T is not None:
            # ``where`` and not a product: padding may hold infinities or NaN
            part_TI = torch.where(kept_T[start : start + rows, None], part_TI.float(), 0)
        sum_squares_I += sum_of_squares(part_TI)
    tokens += len(x_TI) if kept_T is None else kept_T.sum()


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
def _(x: Tensor, token_mask: Tensor | None, sum_squares_I: Tensor, tokens: Tensor) -> None:
    return None


def recomputing() -> bool:
    """Whether this forward runs inside a backward, like the second forward of activation checkpointing."""
    return torch._C._current_graph_task_id() != -1
