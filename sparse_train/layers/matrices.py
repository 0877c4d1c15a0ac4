"""``MaskedMatrix``: a weight matrix with its packed mask, which scores, selection and updates work on.

Shape suffixes: O out_features, I in_features, J packed mask bytes = ceil(I / 8).
"""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sparse_train.layers import masks
from sparse_train.layers.functional import masked_linear
from sparse_train.statistics.accumulation import recomputing
from sparse_train.statistics.activations import Statistics, fits
from sparse_train.statistics.input_sharing import InputSharing, SeenInput

MASK_NAME = "weight_mask"
"""Name of the packed mask buffer next to ``weight`` in a state dict."""
FACTOR_NAMES = ("mask_lora_A", "mask_lora_B")
"""Names of the factors next to ``weight`` in a layer with a low-rank adapter, see ``layers.mask_lora``."""
_REACHED_NAMES = ("reached_eager", "reached_compiled")
"""Attributes of masked layers that store ``MaskedLayer.reached``."""


@dataclass
class Recorder:
    """State that all masked layers of a model share while activations are recorded."""

    when: Literal["never", "training", "always"] = "never"
    """"training" skips evaluation: forwards in eval mode with autograd off. Calibration uses "always"."""
    token_mask: Tensor | None = None
    """Which tokens of the current batch count (B, L); None = all."""
    sharing: InputSharing | None = None
    """Set during the one forward that is searched for shared inputs."""
    mask_misfit: str | None = None
    """Shape of the first input that the token mask did not fit, for a single warning."""
    warned: bool = False

    is_paused: bool = False

    def wants(self, training: bool) -> bool:
        if self.is_paused:
            return False
        return self.when == "always" or (self.when == "training" and (training or torch.is_grad_enabled()))

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Inside this context, nothing is recorded."""
        before, self.is_paused = self.is_paused, True
        try:
            yield
        finally:
            self.is_paused = before


class MaskedMatrix:
    """A weight matrix with a packed mask and statistics of its input; subclasses say where the weights are.

    Attributes:
        weight_mask: packed mask, uint8 (O, ceil(I / 8)), see ``sparse_train.layers.masks``.
        statistics: of the input, shared between layers that share the input; None if nothing needs them.
        reached: whether a forward has used the matrix since the last mask update.
        in_features, out_features: I and O.
        adapted: whether a low-rank adapter is part of the weight, see ``sparse_train.layers.mask_lora``.
    """

    adapted: bool = False
    weight_mask: Tensor
    statistics: Statistics | None
    reached: bool
    in_features: int
    out_features: int

    @property
    def weight_OI(self) -> Tensor:
        """Kept and shadow values (O, I): the parameter, or a view of it that can be written to."""
        raise NotImplementedError

    def unmasked_weight(self) -> Tensor:
        """What is masked and scored (O, I): ``weight_OI``, or its sum with an adapter; read only."""
        return self.weight_OI.detach()

    def masked_weight(self) -> Tensor:
        """``where(mask, weight, 0)``, a new tensor (O, I)."""
        return masks.apply(self.unmasked_weight(), self.weight_mask)

    def merge(self) -> None:
        """Fold an adapter inside the mask into the weight; does nothing if there is none."""

    def unpacked_mask(self) -> Tensor:
        """The bool mask (O, I), True = kept."""
        return masks.unpack(self.weight_mask, self.in_features)

    def keeps_all(self) -> bool:
        """Whether the mask prunes nothing."""
        return masks.count(self.weight_mask) == self.in_features * self.out_features

    def set_mask(self, mask_OI: Tensor) -> None:
        """Replace the mask in place."""
        self.weight_mask.copy_(masks.pack(mask_OI))


class MaskedLayer(MaskedMatrix):
    """The forward of masked layers, a mixin for their original layer class.

    Attributes:
        straight_through: whether pruned weights get the gradient of their masked self, or none.
        records: False if another layer records the shared input.
        recorder: the model's common switch and token mask.
        reached_eager, reached_compiled: the two parts of ``reached``. A compiled forward sets a tensor, uint8 (),
            because setting an attribute under activation checkpointing breaks the graph of the whole block.
    """

    straight_through: bool
    reached_eager: bool
    reached_compiled: Tensor
    records: bool
    recorder: Recorder | None
    bias: Any
    training: bool

    def start_masking(self) -> None:
        """Get a mask that keeps everything, and whatever else a masked layer has; the class has just been changed."""
        assert isinstance(self, nn.Module)
        self.register_buffer(MASK_NAME, masks.full(self.out_features, self.in_features, self.weight_OI.device))
        self.straight_through, self.statistics, self.records, self.recorder = True, None, True, None
        self.reached = False

    def stop_masking(self) -> None:
        """Lose all that ``start_masking`` has given; the class is about to be changed back."""
        for name in (MASK_NAME, "straight_through", "statistics", "records", "recorder", *_REACHED_NAMES):
            delattr(self, name)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        from sparse_train.layers.adapters import guard_adapters  # which know this class
        from sparse_train.layers.state_dicts import teach_save_pretrained

        teach_save_pretrained()  # as sparsify does: a pickled model may be loaded by a process that has not called it
        guard_adapters()

    def forward(self, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling():
            self.reached_compiled.fill_(1)
        else:
            self.reached_eager = True
        recorder = self.recorder
        if recorder is not None and self.statistics is not None and recorder.wants(self.training):
            self._record(x, recorder, self.statistics)
        return self.product(x)

    @property
    def reached(self) -> bool:
        return self.reached_eager or bool(self.reached_compiled)

    @reached.setter
    def reached(self, reached: bool) -> None:
        self.reached_eager = reached
        with torch.inference_mode(False):  # an evaluation may set it, and training writes to it afterwards
            self.reached_compiled = torch.zeros((), dtype=torch.uint8, device=self.weight_mask.device)

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        applied = super()._apply(fn, recurse)  # type: ignore[misc]  # for .to() and the like; this has moved the mask
        if self.reached_compiled.device != self.weight_mask.device:
            # a tensor created on the meta device has no value to move
            self.reached = not self.reached_compiled.is_meta and self.reached
        if self.statistics is not None and self.statistics.tokens.device != self.weight_mask.device:
            self.statistics.move(self.weight_mask.device)
        return applied

    def product(self, x: Tensor) -> Tensor:
        """The layer's output (..., O), without recording."""
        return masked_linear(x, self.weight_OI, self.weight_mask, self.bias, straight_through=self.straight_through)

    def _record(self, x: Tensor, recorder: Recorder, statistics: Statistics) -> None:
        seen = None if torch.compiler.is_compiling() or recomputing() else SeenInput(x)
        if recorder.sharing is not None and seen is not None:
            assert isinstance(self, nn.Module)
            recorder.sharing.watch(self, seen)
        mask = recorder.token_mask
        if mask is not None and mask.device != x.device:
            mask = recorder.token_mask = mask.to(x.device)
        if mask is not None and recorder.mask_misfit is None and not fits(mask, x):
            recorder.mask_misfit = f"{tuple(x.shape)}"
        if seen is not None and not self.records and not seen.is_same_as(statistics.last_input):
            statistics = self.record_alone()
        if self.records:
            statistics.add(x, mask)
            if seen is not None:  # in a compiled forward, setting an attribute could break the graph
                statistics.last_input = seen

    def record_alone(self) -> Statistics:
        """Record inputs in statistics of the layer's own, which begin as a copy of those it has shared."""
        assert self.statistics is not None
        if not self.records:
            with torch.inference_mode(False):  # training writes to the copy afterwards
                self.statistics, self.records = copy.deepcopy(self.statistics), True
        return self.statistics

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {MASK_NAME}"


CONV1D = "transformers.pytorch_utils.Conv1D"
FALCON_LINEAR = "transformers.models.falcon.modeling_falcon.FalconLinear"
"""A subclass of ``nn.Linear`` that computes what ``nn.Linear`` does."""


def class_path(cls: type) -> str:
    """Module and name, which together identify classes of libraries that are not imported here."""
    return f"{cls.__module__}.{cls.__qualname__}"


def is_conv1d(module: nn.Module) -> bool:
    """Whether this is transformers' ``Conv1D`` (GPT-2): a linear layer whose weight is stored (I, O)."""
    return any(class_path(cls) == CONV1D for cls in type(module).__mro__)


def is_linear(module: nn.Module) -> bool:
    """``nn.Linear``, also a subclass, or transformers' ``Conv1D``."""
    return isinstance(module, nn.Linear) or is_conv1d(module)


def shape_OI(module: nn.Module) -> tuple[int, int]:
    """``(out_features, in_features)`` of a linear layer or a ``Conv1D``, also if its weight is sharded."""
    if isinstance(module, (nn.Linear, MaskedMatrix)):
        return module.out_features, module.in_features
    return int(module.nf), int(module.nx)  # type: ignore[arg-type]
