"""Weights that a model also reads outside their layer's forward, where they are not masked."""

import logging
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sparse_train.layers.masked_layer import MaskedLayer

_log = logging.getLogger(__name__)


class OutsideReads:
    """Looks for such weights in one step: is a weight's gradient the one that its layer's own forwards give it?

    It does not look at weights that are frozen, divided among processes, or used in compiled code.
    """

    def __init__(self, layers: Mapping[str, MaskedLayer]) -> None:
        self._own: dict[str, Tensor] = {}
        self._differs: dict[str, Tensor] = {}
        self._handles: list[Any] = []
        for name, layer in layers.items():
            if layer.weight.requires_grad and not layer.layout.is_sharded:
                assert isinstance(layer, nn.Module)
                self._handles += [
                    layer.register_forward_pre_hook(partial(self._enter, name)),
                    layer.register_forward_hook(_leave, always_call=True),
                    layer.weight.register_hook(partial(self._compare, name)),
                ]

    def _enter(self, name: str, layer: Any, inputs: Any) -> None:
        if not torch.compiler.is_compiling() and (own := layer.weight.view_as(layer.weight)).requires_grad:
            own.register_hook(partial(self._add, name))
            layer.__dict__["weight"] = own  # which is found before the parameter

    def _add(self, name: str, grad: Tensor) -> None:
        self._own[name] = self._own.get(name, 0) + _rows(grad)

    def _compare(self, name: str, grad: Tensor) -> None:
        if (own := self._own.pop(name, None)) is not None:  # several forwards are summed in another order
            self._differs[name] = (_rows(grad) - own).norm() > 0.05 * own.norm()

    def end(self) -> None:
        """Stop looking, and warn of what was found."""
        while self._handles:
            self._handles.pop().remove()
        if found := [name for name, differs in self._differs.items() if differs]:
            self._differs = {}
            _log.warning(
                "The model also reads the weight of %s outside the layer's forward, where it is not masked. If that is "
                "more than a penalty on weights, the model will change when pruned weights become zeros, at the end of "
                "the run. Leave such layers dense: ignore=%s.",
                *(found[0], found),
            )


def _leave(layer: Any, *_: Any) -> None:
    layer.__dict__.pop("weight", None)


def _rows(grad: Tensor) -> Tensor:
    return grad.detach()[:: max(1, len(grad) // 8)].float()
