"""The masked layer: it keeps its dense parameter and computes with ``where(mask, weight, 0)``.

Shape suffixes: O out_features, I in_features, J packed mask bytes = ceil(I / 8).
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparse_train.distributed.engines import layout_of
from sparse_train.distributed.layout import Elementwise, Layout
from sparse_train.layers import masks
from sparse_train.layers.functional import masked_linear
from sparse_train.layers.masks import MASK_NAME
from sparse_train.layers.state_dicts import teach_save_pretrained
from sparse_train.recorder import Recorder
from sparse_train.statistics import Statistics


class MaskedMatrix:
    """A weight matrix with a packed mask and statistics of its input; subclasses say where the weights are.

    Attributes:
        weight_mask: packed mask, uint8 (O, ceil(I / 8)), see ``sparse_train.layers.masks``.
        statistics: of the input; None if nothing needs them.
        calibration_norm: state of the ``ActivationNorm`` with which one-shot pruning made the mask. A run that starts
            with the mask takes it over, and counts it as its first window.
        in_features, out_features: I and O.
        has_factors: whether a low-rank adapter is part of the weight, see ``sparse_train.layers.mask_lora``.
        rows_are_divided: whether each process holds some rows (FSDP2), which it can score and select alone.

    To score, ``read``: it works under every engine. To compute or count with what the forward uses, ``masked_weight``.
    To change weights in training, ``MaskedLayer.rewrite``: it reaches shards and masters. ``weight_OI`` is the tensor
    itself, for code that has refused engines that divide it.
    """

    has_factors: bool = False
    rows_are_divided: bool = False
    weight_mask: Tensor
    statistics: Statistics | None = None
    calibration_norm: dict[str, Tensor] | None = None
    recorder: Recorder | None = None
    in_features: int
    out_features: int

    @property
    def weight_OI(self) -> Tensor:
        """Kept and shadow values (O, I): the parameter, or a view of it that can be written to."""
        raise AssertionError(f"{type(self).__name__} does not say where its weights are")

    @property
    def size(self) -> int:
        return self.in_features * self.out_features

    def unmasked_weight(self) -> Tensor:
        """What is masked and scored (O, I): ``weight_OI``, or its sum with an adapter; read only."""
        return self.weight_OI.detach()

    def masked_weight(self) -> Tensor:
        """``where(mask, weight, 0)``, a new tensor (O, I)."""
        return masks.apply(self.unmasked_weight(), self.weight_mask)

    @contextmanager
    def read(self, by_rows: bool = False) -> Iterator[tuple[Tensor, slice]]:
        """``unmasked_weight``, and which of its rows these are: all, or, if ``by_rows``, those of this process."""
        yield self.unmasked_weight(), slice(0, self.out_features)

    def write_zeros(self) -> None:
        self.weight_OI.copy_(masks.apply(self.weight_OI.detach(), self.weight_mask))

    def unpacked_mask(self) -> Tensor:
        """The bool mask (O, I), True = kept."""
        return masks.unpack(self.weight_mask, self.in_features)

    def pruned(self) -> int:
        """The number of weights that the mask prunes."""
        return self.size - masks.count(self.weight_mask)

    def is_dense(self) -> bool:
        return self.pruned() == 0

    def keep_all(self) -> None:
        masks.fill_full(self.weight_mask, self.in_features)

    def set_mask(self, mask_OI: Tensor) -> None:
        self.weight_mask.copy_(masks.pack(mask_OI))


class MaskedLayer(MaskedMatrix):
    """The forward of masked layers, a mixin for their original layer class.

    Attributes:
        straight_through: whether pruned weights get the gradient of their masked self, or none.
        frozen: whether it belongs to a module that is frozen beside others in training; a forward of it under
            ``no_grad``, such as a teacher's, is then not recorded.
        recorder: the model's common switch and token mask.
        had_adapter: whether an adapter of peft has been seen around the layer, see ``layers.adapters``.
    """

    is_transposed = False
    """Whether the parameter is stored (I, O)."""
    dense: type[nn.Module] = nn.Linear
    """The class after ``squash``."""
    had_adapter = False
    frozen = False
    weight: Tensor
    bias: Any
    straight_through = True
    factors: tuple[nn.Parameter, nn.Parameter] | None = None
    scale = 1.0
    """Of the product of the factors."""
    training: bool

    # --- the parameter, under any engine -----------------------------------------------------------------------------

    @property
    def layout(self) -> Layout:
        """What this process holds of the parameter."""
        return layout_of(self.weight)

    @property
    def rows_are_divided(self) -> bool:  # type: ignore[override]
        return not self.is_transposed and self.layout.own_rows() is not None

    @property
    def weight_OI(self) -> Tensor:
        return self.turned(self.weight)

    def turned(self, matrix: Tensor) -> Tensor:
        """A matrix (O, I) in the orientation of the parameter, or the other way round."""
        return matrix.t() if self.is_transposed else matrix

    @contextmanager
    def read(self, by_rows: bool = False) -> Iterator[tuple[Tensor, slice]]:
        """As ``MaskedMatrix.read``; sharded weights are gathered on entry, unless by rows, so enter few at a time."""
        layout, device = self.layout, self.weight_mask.device
        own = layout.own_rows() if by_rows and not self.is_transposed else None
        if own is not None:
            yield own[0].to(device), own[1]  # shards may be in main memory (CPUOffloadPolicy)
        elif layout.is_sharded:
            with layout.gathered() as whole:
                yield self.turned(whole.detach()).to(device), slice(0, self.out_features)
        else:
            yield self.unmasked_weight(), slice(0, self.out_features)

    def rewrite(self, function: Elementwise) -> None:
        """Replace the weights by ``function(weights, mask)``, elementwise, with the engine's masters."""
        self.layout.rewrite(function, self.turned(self.unpacked_mask()))

    def write_zeros(self) -> None:
        if self.layout.is_sharded or self.layout.has_masters:
            self.rewrite(lambda weight, keep: torch.where(keep, weight, 0))
        else:
            super().write_zeros()  # by bits, several times as fast

    def merge(self) -> None:
        """Fold an adapter inside the mask into the weight; does nothing if there is none."""

    # --- masking -----------------------------------------------------------------------------------------------------

    def start_masking(self) -> None:
        """Get a mask that keeps everything; the class has just been changed, and has the rest."""
        assert isinstance(self, nn.Module)
        self.register_buffer(MASK_NAME, masks.full(self.out_features, self.in_features, self.weight_OI.device))

    def stop_masking(self) -> None:
        """Lose the mask, and what was set beside it; the class is about to be changed back."""
        delattr(self, MASK_NAME)
        for name in ("straight_through", "statistics", "recorder", "had_adapter", "frozen", "calibration_norm"):
            self.__dict__.pop(name, None)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)  # type: ignore[misc]
        teach_save_pretrained()  # as sparsify does: a pickled model may be loaded by a process that has not called it

    # --- forward -----------------------------------------------------------------------------------------------------

    def forward(self, x: Tensor) -> Tensor:
        recorder = self.recorder
        if recorder is not None and self.statistics is not None and recorder.wants(self.training and not self.frozen):
            self.statistics.add(x, recorder.token_mask_for(x), recorder.last)
        return self.product(x)

    def product(self, x: Tensor) -> Tensor:
        """The layer's output (..., O), without recording. Calibration replaces this method on the instance
        (``oneshot.calibration``), to mask the weight once, and to end a forward early."""
        return masked_linear(
            x, self.weight_OI, self.weight_mask, self.bias, self.factors, self.scale, self.straight_through
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Any:
        applied = super()._apply(fn, recurse)  # type: ignore[misc]  # for .to() and the like; this has moved the mask
        if self.statistics is not None and self.statistics.tokens.device != self.weight_mask.device:
            self.statistics.move(self.weight_mask.device)
        return applied

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, {MASK_NAME}"


class SparseLinear(MaskedLayer, nn.Linear):
    """A linear layer whose forward uses only kept weights.

    ``sparsify`` makes it from an ``nn.Linear`` in place. The parameter objects and their names stay, so optimizers,
    sharding engines and checkpoints are not affected. ``weight`` (O, I) holds kept and shadow values together;
    ``weight_mask`` (O, ceil(I / 8)) uint8 is the packed mask, see ``sparse_train.layers.masks``.
    """

    def reset_parameters(self) -> None:
        # Also called after ``to_empty`` of a layer created on the meta device, when the buffer's bytes are garbage.
        super().reset_parameters()
        self.keep_all()


def sparse_layers(model: nn.Module) -> dict[str, MaskedLayer]:
    """The masked layers of a model by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, MaskedLayer)}
