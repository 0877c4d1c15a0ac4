"""Running sums over the inputs of layers: ``ActivationNorm`` for scores, ``ActivationGram`` for solvers.

Shape suffixes: T tokens, I in_features, C tokens of a chunk.
"""

import functools
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from sparse_train.selection import in_threads

_Sums = tuple[Tensor, Tensor | int, Tensor | int]  # of squares (I,); tokens; dropped batches
_PART = 2**24  # elements, 64 MiB in float32: large enough to keep a GPU busy
_CHUNK = 128  # rows
_WORTH_THREADS = 2**21  # elements; below this, starting threads takes longer than the work


# --- one batch -------------------------------------------------------------------------------------------------------


def batch_sums(x: Tensor, token_mask: Tensor | None) -> _Sums:
    """What one batch (..., I) adds to an ``ActivationNorm``: sum of squares, float32 (I,); tokens; dropped batches.

    A batch that is not finite adds 0, 0 and 1."""
    x_TI = x.reshape(-1, x.shape[-1])
    kept_T = None if token_mask is None else token_mask.reshape(-1).bool()
    if kept_T is not None and kept_T.device.type == "cpu" and kept_T.all():
        kept_T = None  # as of packed text: half the time; a GPU would have to wait for the answer
    # in parts: a float32 copy of a whole long batch would raise the peak memory of the run, in recorded steps
    rows = max(1, _PART // max(1, x_TI.shape[1]))
    parts: Iterable[Tensor] = x_TI.split(rows)
    if kept_T is not None:
        # ``where`` and not a product: padding may hold infinities or NaN
        masked = zip(kept_T.split(rows), parts, strict=True)
        parts = (torch.where(kept_T[:, None], part_TI.float(), 0) for kept_T, part_TI in masked)
    sums_I = functools.reduce(torch.add, map(sum_of_squares, parts))
    tokens = len(x_TI) if kept_T is None else kept_T.sum()
    if sums_I.device.type == "cpu" and np.isfinite(sums_I.numpy()).all():
        return sums_I, tokens, 0
    # decided on the device, because asking for the answer here would make every forward wait for it
    finite = sums_I.isfinite().all()
    return torch.where(finite, sums_I, 0), finite * tokens, (~finite).long()


def sum_of_squares(x_TI: Tensor) -> Tensor:
    """Sum over tokens, float32 (I,). On the CPU by numpy in threads, in chunks of rows that fit the cache.

    Sums of 128 rows are added up in float32, which keeps relative errors around 1e-7; one sum over all rows would not.
    """
    if x_TI.device.type != "cpu" or x_TI.dtype == torch.float64:
        return x_TI.float().square().sum(0)
    if x_TI.numel() < _WORTH_THREADS:
        return torch.from_numpy(_sum_of_squares(x_TI.float()))
    parts = x_TI.split(-(-len(x_TI) // torch.get_num_threads()))
    return torch.from_numpy(sum(in_threads(_sum_of_squares, parts)))


def _sum_of_squares(x_TI: Tensor) -> np.ndarray:
    if x_TI.dtype != torch.float32:  # each chunk is converted in the cache: twice as fast, and the same sums
        held_CI = torch.empty(_CHUNK, x_TI.shape[1], dtype=torch.float32)
        converted = (held_CI[: len(chunk_CI)].copy_(chunk_CI).numpy() for chunk_CI in x_TI.split(_CHUNK))
        return sum(np.einsum("ti,ti->i", chunk, chunk) for chunk in converted)
    x = x_TI.numpy()
    whole = len(x) // _CHUNK * _CHUNK
    chunks = x[:whole].reshape(-1, _CHUNK, x.shape[1])
    total = np.einsum("cti,cti->ci", chunks, chunks).sum(0)
    total += np.einsum("ti,ti->i", x[whole:], x[whole:])
    return total


@torch.library.custom_op("sparse_train::accumulate", mutates_args=("sum_squares_I", "tokens", "dropped"))
def _accumulate(x: Tensor, token_mask: Tensor | None, sum_squares_I: Tensor, tokens: Tensor, dropped: Tensor) -> None:
    # One opaque operator, so that a compiled forward keeps it and checks at run time whether it is recomputed.
    if not recomputing():
        _add_to((sum_squares_I, tokens, dropped), batch_sums(x, token_mask))


@_accumulate.register_fake
def _(x: Tensor, token_mask: Tensor | None, sum_squares_I: Tensor, tokens: Tensor, dropped: Tensor) -> None:
    return None


def _add_to(sums: Iterable[Tensor], batch: _Sums) -> None:
    for total, new in zip(sums, batch, strict=True):
        total += new


def recomputing() -> bool:
    """Whether this forward runs inside a backward, like the second forward of activation checkpointing.

    Its tokens were counted in the first forward.
    """
    return torch._C._current_graph_task_id() != -1


class LastSums:
    """The sums of the tensor that was summed last, for other layers that read the very same tensor (q/k/v, gate/up)."""

    def __init__(self) -> None:
        self._x: Any = lambda: None  # a weak reference: the sums must not keep an input alive
        self._version = 0
        self._token_mask: Tensor | None = None
        self._sums: _Sums | None = None
        self.gram: tuple[ActivationGram, object, object] | None = None
        """What has added up this tensor, and its history before and after."""

    def look_at(self, x: Tensor, token_mask: Tensor | None) -> None:
        """Forget all if this is another tensor than the last one."""
        version = 0 if x.is_inference() else x._version  # a tensor that was changed in place is another input
        if self._x() is not x or self._version != version or self._token_mask is not token_mask:
            self._x, self._version, self._token_mask = weakref.ref(x), version, token_mask
            self._sums = self.gram = None

    def of(self, x: Tensor, token_mask: Tensor | None) -> _Sums:
        """``batch_sums(x, token_mask)``, computed once as long as the tensor lives and is not changed."""
        self.look_at(x, token_mask)
        if self._sums is None:
            self._sums = batch_sums(x.detach(), token_mask)
        return self._sums

    def __reduce__(self) -> tuple[Any, ...]:  # copies and pickles of a model start without sums of a finished forward
        return LastSums, ()


# --- running sums ----------------------------------------------------------------------------------------------------


class Statistics(ABC):
    """Sums over the tokens that reach a layer's input.

    Plain tensors and not buffers: casting a model to bfloat16 must not cast its statistics.
    """

    dimensions: ClassVar[int]
    """Of ``sums``: 1 = (I,), 2 = (I, I)."""

    def __init__(self, in_features: int, device: torch.device | str | None = None) -> None:
        self.sums = torch.zeros((in_features,) * self.dimensions, dtype=torch.float32, device=device)
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)
        """Tokens counted."""
        self.dropped = torch.zeros_like(self.tokens)
        """Forwards since the last ``fade`` or ``reset`` that an ``ActivationNorm`` left out because an input was not
        finite, as in a step that overflows float16 and that a loss scaler then skips."""

    @abstractmethod
    def add(self, x: Tensor, token_mask: Tensor | None = None, last: LastSums | None = None) -> None:
        """Count a batch of inputs (..., I) of any float dtype, but for tokens whose entry in ``token_mask`` is 0.

        ``last`` has sums to reuse if another layer has read the same tensor.
        """

    @property
    def sum_squares_I(self) -> Tensor:
        """Sum of squares of each feature, float32 (I,)."""
        return self.sums

    @property
    def norm_I(self) -> Tensor:
        """``||X_j||_2`` over all tokens seen (arXiv 2306.11695, equation 1), float32 (I,)."""
        return self.sum_squares_I.sqrt()

    def state_dict(self) -> dict[str, Tensor]:
        """A copy of the norms and counts, which ``ActivationNorm.merge_state_dict`` adds; of a gram, its diagonal."""
        sums = {"sum_squares": self.sum_squares_I, "tokens": self.tokens, "dropped": self.dropped}
        return {name: tensor.cpu().clone() for name, tensor in sums.items()}

    def tensors(self) -> list[Tensor]:
        """Everything counted, as tensors that can be summed over ranks in place."""
        return [self.sums, self.tokens, self.dropped]

    def move(self, device: torch.device) -> None:
        """Move to the device of the layer's input."""
        self.sums, self.tokens, self.dropped = (tensor.to(device) for tensor in self.tensors())

    def reset(self) -> None:
        for tensor in self.tensors():
            tensor.zero_()


class ActivationNorm(Statistics):
    """Sum of squares of each input feature over the tokens seen, and the number of tokens.

    Leaves out a forward that is recomputed in backward, and batches that are not finite.
    """

    dimensions = 1

    @torch.no_grad()
    def add(self, x: Tensor, token_mask: Tensor | None = None, last: LastSums | None = None) -> None:
        if torch.compiler.is_compiling():
            _accumulate(x.detach(), token_mask, *self.tensors())
        elif not recomputing():
            _add_to(self.tensors(), (last or LastSums()).of(x, token_mask))

    def fade(self, factor: float) -> None:
        """Multiply what was seen by ``factor``, above 0 and at most 1, in place; token counts are rounded up."""
        self.dropped.zero_()
        if factor != 1:
            self.sums *= factor
            self.tokens.copy_((self.tokens.double() * factor).ceil())

    def merge_state_dict(self, state: dict[str, Tensor]) -> None:
        """Add what another one has seen; the result is the same as of one that has seen both."""
        for tensor, name in zip(self.tensors(), ("sum_squares", "tokens", "dropped"), strict=True):
            tensor += state[name].to(tensor.device)


class ActivationGram(Statistics):
    """Sum of ``x x^T`` over the tokens seen: second moments of the input, for methods that move weights.

    Only for calibration: takes I * I floats, and counts every forward, also one that is not finite or computed again.
    """

    dimensions = 2
    _history: object = None
    """Grams with the same object have the same sums: ``add`` and ``reset`` replace it. So if another gram had this
    one's history, and has just added the same tensor, its sums are copied."""

    @property
    def gram_II(self) -> Tensor:
        """The sum, float32 (I, I)."""
        return self.sums

    @property
    def sum_squares_I(self) -> Tensor:
        return self.gram_II.diagonal()

    def add(self, x: Tensor, token_mask: Tensor | None = None, last: LastSums | None = None) -> None:
        last = last or LastSums()
        last.look_at(x, token_mask)
        if last.gram is not None:
            other, before, after = last.gram
            if self._history is before and other._history is after:
                self.gram_II.copy_(other.gram_II)
                self.tokens.copy_(other.tokens)
                self._history = after
                return
        before, self._history = self._history, object()
        last.gram = self, before, self._history
        x_TI = x.detach().reshape(-1, x.shape[-1]).float()
        if token_mask is not None:
            x_TI = x_TI[token_mask.reshape(-1).bool()]
        with in_float32(x_TI.device.type):
            self.gram_II.addmm_(x_TI.t(), x_TI)
        self.tokens += len(x_TI)

    def reset(self) -> None:
        super().reset()
        self._history = object()


# --- precision -------------------------------------------------------------------------------------------------------


@contextmanager
def in_float32(device_type: str) -> Iterator[None]:
    """Inside, float32 matrix products are computed in full float32, whatever autocast and TF32 settings say.

    TF32 is turned off through the same API that set it: torch has two, and raises if they are mixed.
    """
    backends = torch.backends.cuda, torch.backends.mkldnn
    own = [backend.matmul for backend in backends if hasattr(backend, "matmul")]  # mkldnn's since torch 2.9
    precisions = [getattr(each, "fp32_precision", None) for each in own]  # since torch 2.9
    try:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
    except RuntimeError:  # it was set by fp32_precision of torch.backends or a backend, as by transformers' tf32=True
        before = None
        for each in own:
            each.fp32_precision = "ieee"
    try:
        with torch.autocast(device_type, enabled=False):
            yield
    finally:
        if before is not None:
            torch.set_float32_matmul_precision(before)  # this sets fp32_precision to "ieee" even if it was not set
        for each, precision in zip(own, precisions, strict=True):
            if precision is not None:
                each.fp32_precision = "none"  # follow torch.backends again
                if each.fp32_precision != precision:
                    each.fp32_precision = precision
