"""Running squared norms of layer inputs.

Shape suffixes: T tokens, I in_features.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from sparse_train.statistics.accumulation import accumulate
from sparse_train.statistics.input_sharing import SeenInput


class Statistics(ABC):
    """Sums over the tokens that reach a layer's input.

    Attributes:
        tokens: int64 scalar, tokens counted.
        dropped: int64 scalar, forwards since the last ``fade`` or ``reset`` that were left out because an input was
            not finite, as in a step that overflows float16 and that a loss scaler then skips.
    """

    tokens: Tensor
    dropped: Tensor
    last_input: SeenInput | None = None
    """The latest input of the layer that records, for those that share its statistics."""

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
        self.dropped.zero_()
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
        self.dropped = torch.zeros_like(self.tokens)

    @property
    def sum_squares_I(self) -> Tensor:
        return self._sum_squares_I

    def tensors(self) -> list[Tensor]:
        return [self._sum_squares_I, self.tokens, self.dropped]

    def move(self, device: torch.device) -> None:
        self._sum_squares_I, self.tokens, self.dropped = (tensor.to(device) for tensor in self.tensors())

    def add(self, x: Tensor, token_mask: Tensor | None = None) -> None:
        """Count one batch of inputs; if one of them is not finite, leave the batch out and count it in ``dropped``.

        Args:
            x: (..., I), any float dtype.
            token_mask: bool or integer (...), 0 = padding; None, or a shape that does not fit, counts every token.
        """
        accumulate(x.detach(), token_mask if fits(token_mask, x) else None, *self.tensors())

    def state_dict(self) -> dict[str, Tensor]:
        sums = {"sum_squares": self.sum_squares_I, "tokens": self.tokens, "dropped": self.dropped}
        return {name: tensor.cpu().clone() for name, tensor in sums.items()}

    def merge_state_dict(self, state: dict[str, Tensor]) -> None:
        """Add what another one has seen; the result is the same as of one that has seen both."""
        self._sum_squares_I += state["sum_squares"].to(self._sum_squares_I.device)
        self.tokens += state["tokens"].to(self.tokens.device)
        if "dropped" in state:
            self.dropped += state["dropped"].to(self.dropped.device)

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

    @property
    def dropped(self) -> Tensor:  # type: ignore[override]
        return self.halves[0].dropped + self.halves[1].dropped

    def tensors(self) -> list[Tensor]:
        return [tensor for half in self.halves for tensor in half.tensors()]

    def fade(self, factor: float) -> None:
        for half in self.halves:
            half.fade(factor)

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

    Only for calibration: takes I * I floats, does not detect recomputed forwards, and drops nothing.

    Attributes:
        gram_II: float32 (I, I).
        tokens: int64 scalar, tokens counted.
    """

    def __init__(self, in_features: int, device: torch.device | str | None = None) -> None:
        self.gram_II = torch.zeros(in_features, in_features, dtype=torch.float32, device=device)
        self.tokens = torch.zeros((), dtype=torch.int64, device=device)
        self.dropped = torch.zeros_like(self.tokens)

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
