"""Calibration: run batches through a model, block by block, so that each block sees the outputs of pruned blocks.

This does not depend on the architecture; blocks must run one after the other, once each. To run block i alone, the
whole model is called, with blocks 0 to i - 1 answering with the cached output of block i - 1. The model's own code then
passes block i its other inputs (masks, position embeddings), and the call is cut off after block i.
"""

import itertools
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_train.layers.blocks import ONE_OF_TWO_TEXTS, reads_two_texts, vocabulary_of
from sparse_train.layers.matrices import MaskedLayer, Recorder
from sparse_train.oneshot.block_order import MISSING, check_order, needs_more, out_of_order
from sparse_train.oneshot.experts import ExpertMatrix, ExpertRecorder
from sparse_train.oneshot.forwards import Batch, call, forward_replaced, inference, one_sample
from sparse_train.oneshot.store import Activations, copied, moved
from sparse_train.pipeline.recording import share_statistics
from sparse_train.statistics.input_sharing import InputSharing

_log = logging.getLogger(__name__)


class CalibrationPass:
    """Runs calibration batches through a model or through one block of it at a time, recording activations.

    Args:
        model: in any mode and on any device; its modes are restored after each pass.
        batches: token tensors or dicts; ``labels`` are dropped, an ``attention_mask`` (B, L) marks padding.
        recorder: the recorder of the model's masked layers.
        advance: called after every forward, for a progress bar.
        device: where the model computes; default: where its first parameter is.
        keep: where the outputs of blocks are kept, see ``Activations``.
    """

    def __init__(
        self,
        model: nn.Module,
        batches: Iterable[Batch],
        recorder: Recorder,
        advance: Callable[[], None] = lambda: None,
        device: torch.device | None = None,
        keep: str | Path = "device",
    ) -> None:
        self._device = device or next(model.parameters()).device
        self._model = model
        needs_labels = getattr(getattr(model, "config", None), "is_encoder_decoder", False)  # makes inputs of labels
        self._batches = [_to_device(batch, self._device, needs_labels) for batch in batches]
        for batch in self._batches:
            _check_ids(model, batch)
        if not self._batches:
            raise ValueError("There is no calibration data: the iterable of batches is empty.")
        self._recorder = recorder
        self._advance = advance
        self._activations, self._keep = Activations(len(self._batches), keep), keep
        self._in_order = False
        self._two_texts = reads_two_texts(model, (m for m in model.modules() if isinstance(m, MaskedLayer)))
        self.seconds = 0.0
        """Time spent in forward passes."""

    def __len__(self) -> int:
        return len(self._batches)

    def whole(self, experts: Sequence[ExpertMatrix] = ()) -> None:
        """Record all layers in one forward pass per batch."""
        for _ in self._recorded(lambda index: call(self._model, self._batches[index]), experts):
            pass

    def record_block(self, blocks: Sequence[nn.Module], index: int, experts: Sequence[ExpertMatrix] = ()) -> None:
        """Record the layers of one block, on the outputs of the block before it that ``pass_on`` has kept."""
        self._check_order(blocks)
        for _ in self._recorded(lambda i: self._to_block(blocks, index, i), experts):
            pass

    def pass_on(self, blocks: Sequence[nn.Module], index: int) -> None:
        """Run one block, and keep its outputs for the next."""
        self._check_order(blocks)
        for batch, output in enumerate(self._forwards(lambda i: self._to_block(blocks, index, i))):
            self._activations[batch] = output

    def _check_order(self, blocks: Sequence[nn.Module]) -> None:
        if not self._in_order:
            check_order(self._model, blocks, one_sample(self._batches[0]))
            self._in_order = True

    def _recorded(self, forward: Callable[[int], Any], experts: Sequence[ExpertMatrix]) -> Iterator[Any]:
        recorder = self._recorder
        recorder.when, recorder.sharing = "always", InputSharing()
        watch = ExpertRecorder(experts) if experts else nullcontext()
        try:
            with watch:
                for output in self._forwards(forward):
                    if experts and recorder.token_mask is not None and not bool(recorder.token_mask.all()):
                        recorder.mask_misfit = "(tokens that are routed to experts, I)"
                    if recorder.sharing is not None:
                        share_statistics(recorder, self._recording())
                    yield output
        finally:
            recorder.when, recorder.sharing, recorder.token_mask = "never", None, None

    def _recording(self) -> list[MaskedLayer]:
        layers = (module for module in self._model.modules() if isinstance(module, MaskedLayer))
        return [layer for layer in layers if layer.recorder is self._recorder and layer.statistics is not None]

    def _forwards(self, forward: Callable[[int], Any]) -> Iterator[Any]:
        with inference(self._model):
            for index, batch in enumerate(self._batches):
                began = time.perf_counter()
                self._recorder.token_mask = self._token_mask(batch)
                output = forward(index)
                if self._device.type == "cuda":
                    torch.cuda.synchronize(self._device)  # otherwise the time is counted where the result is needed
                self.seconds += time.perf_counter() - began
                self._advance()
                yield output

    def _token_mask(self, batch: Batch) -> Tensor | None:
        mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
        if mask is not None and self._two_texts:
            self._recorder.mask_misfit = ONE_OF_TWO_TEXTS
            return None
        return mask

    def _to_block(self, blocks: Sequence[nn.Module], index: int, batch: int) -> Any:
        called: list[int] = []
        kept = self._activations[batch] if index else None
        if self._keep != "device":
            kept = moved(kept, self._device)

        def answer(number: int) -> Any:
            called.append(number)
            return copied(kept) if number == index - 1 else kept  # block ``index`` may write into its input

        with ExitStack() as stack:
            for number, earlier in enumerate(itertools.islice(blocks, index)):
                stack.enter_context(forward_replaced(earlier, lambda *args, number=number, **kwargs: answer(number)))
            real = blocks[index].forward

            def stop_behind(*args: Any, **kwargs: Any) -> Any:
                if called != list(range(index)):
                    raise out_of_order(self._model, called, f"before block {index} ")
                raise _Stop(real(*args, **kwargs))

            stack.enter_context(forward_replaced(blocks[index], stop_behind))
            try:
                call(self._model, self._batches[batch])
            except _Stop as stop:
                return stop.output
            except MISSING as error:
                if not index:
                    raise
                raise needs_more(self._model, index, f"{type(error).__name__}: {error}") from error
        raise ValueError(
            f"Block {index} of {type(self._model).__name__} was not reached by a forward of the calibration data, so "
            "its layers cannot be calibrated. Are these the blocks that the model runs?"
        )


class _Stop(Exception):
    """Ends a forward early, and carries a block's output out of it."""

    def __init__(self, output: Any) -> None:
        super().__init__()
        self.output = output


def _check_ids(model: nn.Module, batch: Batch) -> None:
    """Raise ValueError if a transformers model would get the ids of one sample without a batch dimension."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else batch
    if hasattr(model, "config") and isinstance(ids, Tensor) and ids.dim() == 1:
        raise ValueError(
            "A calibration batch is a tensor of token ids (B, L) or a dict of model inputs, got ids of shape "
            f"({len(ids)},): one sample. Put a batch dimension in front (ids[None]), or use a DataLoader."
        )
    if not isinstance(ids, Tensor) or ids.is_floating_point() or not ids.numel():
        return
    known = vocabulary_of(model)
    if known is not None and not 0 <= int(ids.min()) <= int(ids.max()) < known:
        raise ValueError(
            f"Calibration ids go from {int(ids.min())} to {int(ids.max())}, and {type(model).__name__} has embeddings "
            f"for 0 to {known - 1}. Are they from the tokenizer of another model?"
        )


def _to_device(batch: Batch, device: torch.device, labels: bool) -> Batch:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        kept = {key: value for key, value in batch.items() if labels or key != "labels"}  # no loss is needed
        return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in kept.items()}
    raise ValueError(
        f"A calibration batch is a tensor of token ids (B, L) or a dict of model inputs, got {type(batch).__name__}."
    )
