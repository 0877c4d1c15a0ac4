"""Calibration: run batches through a model, block by block, so that each block sees the outputs of pruned blocks.

To run block 2, the whole model is called. Blocks 0 and 1 do not run: block 1 answers with its kept output, and block 0
with anything of that shape. The model's own code gives block 2 its other inputs (masks, position embeddings). Block 2
runs, and raises ``Stop`` with its output, which is kept for block 3. This does not depend on the architecture. That
blocks run in order, once each, and take nothing else of earlier ones, is checked (``check``).
"""

import copy
import functools
import inspect
import logging
import operator
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_leaves, tree_map_only

from sparse_train.layers import masks
from sparse_train.layers.masked_layer import MaskedLayer, MaskedMatrix
from sparse_train.oneshot.experts import ExpertMatrix, ExpertRecorder
from sparse_train.oneshot.forwards import (
    Batch,
    ForwardContext,
    Stop,
    TokenMask,
    answering,
    call,
    one_sample,
    prepared,
)
from sparse_train.pruning.norms import attach
from sparse_train.recorder import Recorder, reads_two_texts
from sparse_train.statistics import ActivationNorm, LastSums, Statistics

_log = logging.getLogger(__name__)

WAY_OUT = (
    "In training, first_mask=FirstWindow() makes the first mask from the first steps. In one shot, only "
    'Unstructured(group="model") is calibrated in one pass of the whole model.'
)
_MISSING = (LookupError, AttributeError, TypeError)  # raised by code that finds nothing left by an earlier block


class CalibrationPass:
    """Runs calibration batches through a model or through one block of it at a time, recording activations.

    ``labels`` of batches are dropped. ``token_mask``, or by default the ``attention_mask`` (B, L) of a batch, says
    which tokens count. ``keep_on`` is the device where the outputs of a block are kept for the next one, in their own
    dtype. Forwards are computed under ``context``, and the caller has put the model under ``inference``.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[nn.Module],
        batches: Iterable[Batch],
        device: torch.device,
        keep_on: torch.device,
        context: ForwardContext,
        token_mask: TokenMask | None = None,
    ) -> None:
        self._model, self.blocks, self._device, self._keep_on, self._context = model, blocks, device, keep_on, context
        many = hasattr(batches, "__iter__") or hasattr(batches, "__getitem__")
        given: Any = batches if many else [batches]  # such as a tokenizer, which is refused
        self._batches: list[Batch] = []
        self._token_masks: list[Tensor | None] = []  # of each batch; none if attention_mask says which tokens count
        for batch in given:
            self._batches.append(prepared(batch, model, device))
            if token_mask is not None:
                self._token_masks.append(token_mask(batch))
        if not self._batches:
            raise ValueError("There is no calibration data: the iterable of batches is empty.")
        self._recorder = Recorder()
        self._kept: list[Any] = [None] * len(self._batches)
        self._in_order: set[int] = set()
        self.weights: Mapping[MaskedLayer, Tensor] = {}
        """Of layers that compute with others than their masked ones."""
        self.seconds = 0.0
        """Time spent in forward passes."""

    def twin(self) -> "CalibrationPass":
        """Another pass of the same batches, which keeps outputs of its own."""
        other = copy.copy(self)
        other._kept, other.seconds = [None] * len(self._batches), 0.0
        return other

    def record(
        self, layers: Mapping[str, MaskedMatrix], statistics: type[Statistics], block: int | None, *, keep: bool = False
    ) -> None:
        """Give layers fresh statistics, and record one forward per batch: of one block, on the kept outputs of the
        block before it, or (None) of the whole model. ``keep`` keeps the outputs for the next block."""
        self.check(block)
        recorder, experts = self._recorder, [layer for layer in layers.values() if isinstance(layer, ExpertMatrix)]
        attach(layers.values(), recorder, statistics)
        token_masks = self.token_masks(layers.values())
        if experts and (padded := [mask for mask in token_masks if mask is not None]):
            recorder.misfit = "(tokens that are routed to experts, I)", padded[0]
        recorder.when = "always"
        try:
            with ExpertRecorder(experts) if experts else nullcontext():
                # which experts read depends on the batch, so that no read is known to be the last
                self._forwards(block, keep, token_masks, () if keep or experts else tuple(layers.values()))
        finally:
            recorder.when, recorder.token_mask, recorder.last = "never", None, LastSums()
        recorder.warn_of_padding()

    def keep_outputs(self, block: int) -> None:
        """Run a block, and keep its outputs for the next one."""
        self.record({}, ActivationNorm, block, keep=True)

    def token_masks(self, layers: Iterable[MaskedMatrix]) -> list[Tensor | None]:
        """Which tokens of each batch count in these layers (B, L); None = all."""
        self._recorder.two_texts = reads_two_texts(self._model, layers)
        given = self._token_masks or [self._recorder.padding_of(batch) for batch in self._batches]
        return [None if mask is None or bool(mask.all()) else mask for mask in given]

    def token_mask_for(self, x: Tensor, token_mask: Tensor | None) -> Tensor | None:
        """The ``token_mask`` of a batch for an input; None, and a warning once, if it does not fit."""
        self._recorder.token_mask = token_mask
        mask, self._recorder.token_mask = self._recorder.token_mask_for(x), None
        self._recorder.warn_of_padding()
        return mask

    def forward(self, block: int, index: int, watched: AbstractContextManager[Any]) -> Any:
        """The output of one block for one batch; ``watched`` is entered once the layers have their products."""
        began = time.perf_counter()
        with self._context(), _masked_once(self.blocks[block].modules(), self.weights), watched:
            output = self._at_block(block, index, operator.call)
            if self._device.type == "cuda":
                torch.cuda.synchronize(self._device)  # otherwise the time is counted where the result is needed
        self.seconds += time.perf_counter() - began
        return output

    def _forwards(
        self, block: int | None, keep: bool, token_masks: Sequence[Tensor | None], readers: Sequence[Any]
    ) -> None:
        """``readers``: the layers that record, if nothing else is wanted of a forward."""
        with self._context(), _masked_once(() if block is None else self.blocks[block].modules(), self.weights):
            reads = _Reads(() if block is None else readers)
            for index, batch in enumerate(self._batches):
                began = time.perf_counter()
                self._recorder.token_mask = token_masks[index]
                reads.begin(batch)
                output = call(self._model, batch) if block is None else self._at_block(block, index, operator.call)
                if self._device.type == "cuda":
                    torch.cuda.synchronize(self._device)  # otherwise the time is counted where the result is needed
                self.seconds += time.perf_counter() - began
                if keep:
                    self._kept[index] = _moved(output, self._keep_on)

    def _at_block(
        self, block: int, index: int, act: Callable[..., Any], change: Callable[[Tensor], Tensor] = Tensor.clone
    ) -> Any:
        """Call the model on a batch up to a block; returns what ``act`` makes of the block's forward and its arguments.

        The blocks before it do not run: the last of them returns its kept output, and the others that output after
        ``change``, which should make no difference.
        """
        called: list[int] = []
        kept = _moved(self._kept[index], self._device) if block else None
        others = tree_map_only(Tensor, change, kept)

        def answer(number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            called.append(number)
            assert called == list(range(number + 1)), called  # as in the sample that was checked
            if number == block:
                raise Stop(act(forward, *args, **kwargs))
            # a copy, since the block and what runs before it may write into their input
            return tree_map_only(Tensor, Tensor.clone, kept) if number == block - 1 else others

        try:
            with answering(self.blocks[: block + 1], answer):
                call(self._model, self._batches[index])
        except Stop as stop:
            return stop.value
        except _MISSING as error:
            raise (self._needs_more(block, f"{type(error).__name__}: {error}") if block else error) from error
        raise ValueError(
            f"Block {block} of {type(self._model).__name__} was not reached by a forward of the calibration data, so "
            "its layers cannot be calibrated. Are these the blocks that the model runs?"
        )

    def check(self, block: int | None) -> None:
        """Before a block runs for the first time: raise ValueError if blocks do not run one after the other."""
        if block is None or block in self._in_order:
            return
        began = time.perf_counter()
        with self._context():
            if not self._in_order:
                self._check_order()
            if block > 1:
                changes: list[Callable[[Tensor], Tensor]] = [Tensor.clone, _reordered]
                one, other = (self._at_block(block, 0, _tensors, change) for change in changes)
                if not all(map(torch.equal, one, other)):
                    raise self._needs_more(block, "its input changes with the outputs of earlier ones")
        self.seconds += time.perf_counter() - began
        self._in_order.add(block)

    def _check_order(self) -> None:
        """Raise ValueError unless each block runs once; the first one runs, and all others answer with its output."""
        called: list[int] = []
        outputs: list[Any] = []

        def answer(number: int, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            called.append(number)
            if not outputs:
                outputs.append(forward(*args, **kwargs))
            return tree_map_only(Tensor, Tensor.clone, outputs[0])

        model: Any = self._model
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            model = functools.partial(model, logits_to_keep=1)  # of a large head, all take longer than a block
        try:
            with answering(self.blocks, answer):
                call(model, one_sample(self._batches[0]))
        except (*_MISSING, RuntimeError) as error:  # if a block itself fails, it will raise when its turn comes
            # otherwise it failed before the blocks, as it will again; or after them: a head that is not loaded yet
            if called and called != list(range(len(self.blocks))):
                why = f"{type(error).__name__}: {error}"
                _log.warning(
                    "Whether the blocks of %s run once each could not be told (%s); in a model that loops over them, "
                    "masks would be wrong.",
                    *(type(self._model).__name__, why),
                )
        if called != list(range(len(called))):
            raise ValueError(
                f"The blocks of {type(self._model).__name__} do not run one after the other, once each (came "
                f"{called}), so they cannot be calibrated one by one. {WAY_OUT}"
            )

    def _needs_more(self, block: int, why: str) -> ValueError:
        return ValueError(
            f"Block {block} of {type(self._model).__name__} does not run on the output of the block before it alone "
            f"({why}): it takes more from earlier ones, such as a skip connection or shared keys and values, so blocks "
            f"cannot be calibrated one by one. {WAY_OUT}"
        )


@contextmanager
def _masked_once(modules: Iterable[nn.Module], weights: Mapping[MaskedLayer, Tensor]) -> Iterator[None]:
    """Inside, weights stay as they are, so masked layers mask and cast them once, and not in every forward. Layers in
    ``weights`` compute with those (O, I)."""
    layers = [module for module in modules if isinstance(module, MaskedLayer)]
    for layer in layers:
        weight_OI, device = layer.unmasked_weight(), layer.weight_mask.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weight_OI.dtype
        if layer in weights or layer.is_dense():
            weight_OI = weights.get(layer, weight_OI).to(dtype).contiguous()
        else:
            weight_OI = masks.apply(weight_OI, layer.weight_mask, dtype)
        layer.__dict__["product"] = functools.partial(F.linear, weight=weight_OI, bias=layer.bias)
    try:
        yield
    finally:
        for layer in layers:
            del layer.__dict__["product"]


class _Reads:
    """Ends a forward (``Stop``) when each of some layers has read its input: the last of their products is not needed.

    Only if each has read once in the forward before, on a batch of the same shape: how often a layer reads may depend
    on that. Used inside ``_masked_once``, which restores the layers.
    """

    def __init__(self, layers: Sequence[Any]) -> None:
        self._all, self._order, self._ends = set(layers), list[Any](), False
        self._shapes: list[Any] = []
        for layer in layers:
            layer.__dict__["product"] = functools.partial(self._product, layer, layer.product)

    def begin(self, batch: Batch) -> None:
        """Called before each forward."""
        shapes = [each.shape for each in tree_leaves(batch) if isinstance(each, Tensor)]
        once = len(self._order) == len(self._all) and set(self._order) == self._all
        self._ends, self._shapes, self._order = once and shapes == self._shapes, shapes, []

    def _product(self, layer: Any, product: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        self._order.append(layer)
        if self._ends and set(self._order) == self._all:
            raise Stop(None)
        return product(x)


def _tensors(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> list[Tensor]:
    """The tensors among the arguments of a forward, without NaN, which no comparison calls equal."""
    return [each.nan_to_num() for each in tree_leaves((args, kwargs)) if isinstance(each, Tensor)]


def _reordered(tensor: Tensor) -> Tensor:
    return tensor.roll(1) if tensor.is_floating_point() else tensor.clone()


def _moved(value: Any, device: torch.device) -> Any:
    return tree_map_only(Tensor, lambda tensor: tensor.detach().to(device), value)
