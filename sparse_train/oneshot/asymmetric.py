"""Asymmetric calibration: layers are fitted to what the dense model computes in their place.

A solver fits a layer to its dense weights, on inputs that come from pruned layers. So what those have lost stays lost.
Here two models run side by side, the dense one and the pruned one, each on its own activations. A layer's output should
be (1) what the dense model outputs in its place. (2) If it is added to the residual stream, it should also add what the
stream of the pruned model lacks there. Layers of a block are pruned in the order in which they read, each on what the
layers before it now compute; layers that read the same tensor (q, k, v) are one stage.

Which layers write to the stream is seen in a forward: the sum of the stream and their output is what a later module of
the block reads, or what the block returns. If something lies between (a norm, a factor), they only get (1).

Source of (1): Li et al., "GPTAQ", arXiv 2504.02692. (2) is this project's own.

Shape suffixes: T tokens, O out_features, I in_features.
"""

import functools
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sparse_train.layers.masked_layer import MaskedLayer, MaskedMatrix
from sparse_train.oneshot.calibration import CalibrationPass
from sparse_train.oneshot.forwards import Stop
from sparse_train.solvers import dampened
from sparse_train.statistics import ActivationGram, LastSums, in_float32

_log = logging.getLogger(__name__)

_WAY_OUT = "Calibrate it with asymmetric=False."
_Product = Callable[[Tensor], Tensor]


class AsymmetricGram(ActivationGram):
    """Second moments of the input, and its products with what the layer's output lacks of the dense model."""

    def __init__(self, out_features: int, in_features: int, device: torch.device | str | None = None) -> None:
        super().__init__(in_features, device)
        self.missing_OI = torch.zeros(out_features, in_features, dtype=torch.float32, device=device)
        """Sum of ``m x^T``: an input x would have to give the output ``W x + m``, with the dense weights W."""

    def tensors(self) -> list[Tensor]:
        return [*super().tensors(), self.missing_OI]

    def target(self, weight_OI: Tensor, dampening_frac: float) -> Tensor:
        """Dense weights V that make up for what outputs miss, float32 (O, I): of the least ``||V x - W x - m||^2`` over
        the inputs, plus the dampening times ``||V - W||^2``, with the dense weights W = ``weight_OI``."""
        hessian_II = dampened(self.gram_II, dampening_frac)
        return weight_OI.float() + torch.linalg.solve(hessian_II, self.missing_OI, left=False)


@dataclass
class _Stage:
    """Layers that read the same tensor."""

    layers: dict[str, MaskedLayer]
    stream_at: dict[MaskedLayer, nn.Module]
    """Of layers that write to the residual stream: the module whose input the stream is before that."""


class AsymmetricPass:
    """Calibrates blocks on the activations of two models; ``pruned`` runs the one that is being pruned."""

    def __init__(self, pruned: CalibrationPass) -> None:
        self._pruned, self._dense = pruned, pruned.twin()

    def stages(
        self, block: int, targets: Mapping[str, MaskedMatrix], *, keep: bool
    ) -> Iterator[dict[str, MaskedMatrix]]:
        """The targets of a dense block, a stage at a time, with statistics; prune each before the next is asked for.

        ``keep`` keeps the outputs of the dense block for the next one.
        """
        layers = {name: layer for name, layer in targets.items() if isinstance(layer, MaskedLayer)}
        if len(layers) < len(targets):
            other = next(name for name in targets if name not in layers)
            raise ValueError(f"{other} is one of fused experts, which get other tokens after pruning. {_WAY_OUT}")
        self._dense.weights = {layer: layer.weight_OI.detach().clone() for layer in layers.values()}
        if layers:
            self._pruned.check(block)
            stages = _stages(self._dense, block, layers)
            if block == 0 and not any(stage.stream_at for stage in stages):
                _log.warning(
                    "No target of the first block adds its output to the residual stream as it is (the layer that "
                    "does may be no target; a norm, a factor or another output may lie between), so what the stream "
                    "lacks of the dense model's is made up for only in part."
                )
            for stage in stages:
                self._record(block, stage, self._pruned.token_masks(layers.values()))
                yield dict(stage.layers)
        if keep:
            self.keep_outputs(block)
        self._dense.weights = {}

    def keep_outputs(self, block: int) -> None:
        """Keep the outputs of a dense block for the next one."""
        self._dense.keep_outputs(block)

    @property
    def seconds(self) -> float:
        """Time in forwards of the dense model."""
        return self._dense.seconds

    @torch.no_grad()
    def _record(self, block: int, stage: _Stage, token_masks: Sequence[Tensor | None]) -> None:
        for layer in stage.layers.values():
            layer.statistics = AsymmetricGram(layer.out_features, layer.in_features, layer.weight_mask.device)
        for index, token_mask in enumerate(token_masks):
            dense, pruned, last = (
                *(_read(each, block, index, stage) for each in (self._dense, self._pruned)),
                LastSums(),
            )
            for name, layer in stage.layers.items():
                x, x_dense = pruned.get(layer), dense.get(layer)
                if x is None or x_dense is None or x.shape != x_dense.shape:
                    raise ValueError(
                        f"{name} gets other tokens in the pruned model than in the dense one, so what it reads cannot "
                        f"be compared. {_WAY_OUT}"
                    )
                assert isinstance(layer.statistics, AsymmetricGram)
                mask = self._pruned.token_mask_for(x, token_mask)
                layer.statistics.add(x, mask, last)
                with in_float32(x.device.type):
                    missing_TO = F.linear(_rows(x_dense, mask) - _rows(x, mask), layer.weight_OI.float())
                    if (at := stage.stream_at.get(layer)) is not None:
                        missing_TO += _rows(dense[at], mask) - _rows(pruned[at], mask)
                    layer.statistics.missing_OI.addmm_(missing_TO.t(), _rows(x, mask))


def _flat(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _rows(x: Tensor, token_mask: Tensor | None) -> Tensor:
    """The tokens that count, float32."""
    x_TI = _flat(x).float()
    return x_TI if token_mask is None else x_TI[token_mask.reshape(-1).bool()]


def _is_sum(before: Tensor, output: Tensor, now: Tensor) -> bool:
    return output.shape == now.shape and torch.equal(before + output, now)


# --- forwards --------------------------------------------------------------------------------------------------------


def _read(calibration: CalibrationPass, block: int, index: int, stage: _Stage) -> dict[Any, Tensor]:
    """What the layers of a stage read, and the stream before those that write to it; the forward ends there."""
    found: dict[Any, Tensor] = {}

    def product(layer: MaskedLayer, own: _Product, x: Tensor) -> Tensor:
        found[layer] = x
        if found.keys() >= set(stage.layers.values()):
            raise Stop(None)
        return own(x)

    def entered(module: nn.Module, x: Tensor) -> None:
        found.setdefault(module, x.clone())  # it may be added to in place

    calibration.forward(block, index, _watching(stage.layers.values(), product, stage.stream_at.values(), entered))
    return found


def _stages(calibration: CalibrationPass, block: int, layers: Mapping[str, MaskedLayer]) -> list[_Stage]:
    """Which layers read together, in order, and which write to the residual stream: from the forward of a batch."""
    stages: list[_Stage] = []
    names = {layer: name for name, layer in layers.items()}
    read: list[Tensor] = []
    written: list[tuple[MaskedLayer, Tensor]] = []  # outputs that may yet be added to the stream
    seen: list[tuple[nn.Module, Tensor]] = []  # what modules have read: the stream among it, as it was then

    def product(layer: MaskedLayer, own: _Product, x: Tensor) -> Tensor:
        if any(layer in stage.layers.values() for stage in stages):
            raise ValueError(f"{names[layer]} reads more than once in a forward. {_WAY_OUT}")
        if not read or read[-1] is not x:
            stages.append(_Stage({}, {}))
            read.append(x)
        stages[-1].layers[names[layer]] = layer
        output = own(x)
        written.append((layer, _flat(output).clone()))
        return output

    def entered(module: nn.Module, x: Tensor) -> None:
        now = _flat(x)
        if seen and (now.shape != seen[0][1].shape or torch.equal(now, seen[-1][1])):
            return
        for layer, output in written:
            at = next((at for at, before in seen if _is_sum(before, output, now)), None)
            if at is not None:
                next(stage for stage in stages if layer in stage.layers.values()).stream_at[layer] = at
                written.clear()
                break
        seen.append((module, now.clone()))

    root = calibration.blocks[block]
    output = calibration.forward(block, 0, _watching(layers.values(), product, root.modules(), entered))
    entered(root, output[0] if isinstance(output, tuple) else output)
    if unread := [name for name in layers if not any(name in stage.layers for stage in stages)]:
        raise ValueError(f"{unread[0]} reads nothing of the first batch. {_WAY_OUT}")
    return stages


@contextmanager
def _watching(
    layers: Iterable[MaskedLayer],
    product: Callable[[MaskedLayer, _Product, Tensor], Tensor],
    modules: Iterable[nn.Module],
    entered: Callable[[nn.Module, Tensor], None],
) -> Iterator[None]:
    """Inside, layers compute ``product(layer, their own, x)``, and modules call ``entered`` with their first tensor."""

    def hook(module: nn.Module, args: Any, kwargs: Any) -> None:
        for each in (*args, *kwargs.values()):
            if isinstance(each, Tensor) and each.is_floating_point():
                return entered(module, each)
        return None

    with ExitStack() as stack:
        for layer in layers:
            own = layer.product
            layer.__dict__["product"] = functools.partial(product, layer, own)
            stack.callback(layer.__dict__.__setitem__, "product", own)
        for module in set(modules):
            handle = module.register_forward_pre_hook(hook, with_kwargs=True)
            stack.callback(handle.remove)
        yield
