"""Forwards of a model in calibration: in eval mode, without autograd, with the forwards of its blocks replaced."""

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

Batch = Tensor | Mapping[str, Any]
"""Token ids (B, L), or the model's keyword arguments."""
ForwardContext = Callable[[], AbstractContextManager[Any]]
"""Makes the context under which forwards are computed, anew each time: autocast keeps casts of weights until it ends,
and weights change between blocks."""
TokenMask = Callable[[Any], Tensor | None]
"""Which tokens of a batch count, (B, L), 0 = padding; None = all."""


def under_autocast(dtype: torch.dtype | None, device: torch.device) -> ForwardContext:
    """Forwards in ``dtype``, or (None) as they are."""
    return nullcontext if dtype is None else functools.partial(torch.autocast, device.type, dtype)


class Stop(Exception):
    """Ends a forward early, and carries a value out of it."""

    def __init__(self, value: Any) -> None:
        super().__init__()
        self.value = value


def ids_of(batch: Any) -> Any:
    return batch.get("input_ids") if isinstance(batch, Mapping) else batch


def call(model: nn.Module, batch: Batch) -> Any:
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


@contextmanager
def inference(model: nn.Module, **wanted: Any) -> Iterator[None]:
    """Eval mode, no autograd, and its configurations with the ``wanted`` values; all is restored afterwards."""
    training = [module for module in model.modules() if module.training]
    configs = {id(c): c for m in model.modules() if (c := getattr(m, "config", None)) is not None}
    before = [(c, key, getattr(c, key)) for c in configs.values() for key in wanted if hasattr(c, key)]
    model.eval()
    for config, key, _ in before:
        setattr(config, key, wanted[key])
    try:
        # not inference_mode: cached outputs would be inference tensors, which a later autograd forward refuses
        with torch.no_grad():
            yield
    finally:
        for module in training:
            module.training = True
        for config, key, value in before:
            setattr(config, key, value)


def check_not_rescaled(model: nn.Module) -> None:
    """Raise ValueError for RWKV with ``rescale_every``: in eval mode it divides its weights, and stays divided.

    A run is not hit: the next forward in train mode multiplies them again.
    """
    rescales = getattr(getattr(model, "config", None), "rescale_every", 0)
    if rescales or any(getattr(module, "layers_are_rescaled", False) for module in model.modules()):
        raise ValueError(
            f"{type(model).__name__} divides its weights in eval mode, and would be saved divided. Load it again, with "
            "rescale_every = 0 in its configuration."
        )


@contextmanager
def answering(blocks: Iterable[nn.Module], answer: Callable[..., Any]) -> Iterator[None]:
    """Inside, block ``i`` returns ``answer(i, its own forward, *args, **kwargs)``."""
    before = [(block, block.__dict__.get("forward"), block.forward) for block in blocks]
    for number, (block, _, forward) in enumerate(before):
        block.__dict__["forward"] = functools.partial(answer, number, forward)
    try:
        yield
    finally:
        for block, own, _ in before:
            block.__dict__.pop("forward", None)
            if own is not None:
                block.__dict__["forward"] = own


def one_sample(batch: Batch) -> Batch:
    """The first sample of a batch: the first entry of every tensor that has as many entries as there are ids."""
    if isinstance(batch, Tensor):
        return batch[:1]
    size = len(batch["input_ids"]) if "input_ids" in batch else 0
    tensors = {key: each for key, each in batch.items() if isinstance(each, Tensor) and each.dim()}
    return {**batch, **{key: each[:1] for key, each in tensors.items() if len(each) == size}}


def check_ids(model: nn.Module, ids: Tensor) -> None:
    """Raise ValueError for token ids that a transformers model has no embeddings for."""
    if not hasattr(model, "config") or not hasattr(model, "get_input_embeddings"):
        return
    try:
        known = getattr(model.get_input_embeddings(), "num_embeddings", None)  # type: ignore[operator]
    except NotImplementedError:  # a model whose code is not that of transformers
        return
    if known is not None and ids.numel() and not 0 <= int(ids.min()) <= int(ids.max()) < known:
        raise ValueError(
            f"Token ids go from {int(ids.min())} to {int(ids.max())}, and {type(model).__name__} has embeddings for 0 "
            f"to {known - 1}. Are they from the tokenizer of another model?"
        )


def prepared(batch: Batch, model: nn.Module, device: torch.device) -> Batch:
    """A batch as the model is called with it, on the device."""
    config = getattr(model, "config", None)
    what = "Calibration data is a list, or the like, of tensors of token ids (B, L) or dicts of model inputs. This has"
    if isinstance(batch, Mapping):
        needs_labels = getattr(config, "is_encoder_decoder", False)  # which makes inputs of them; no loss is needed
        named = {key: value for key, value in batch.items() if key != "labels" or needs_labels}
        batch = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in named.items()}
    elif isinstance(batch, Tensor):
        batch = batch.to(device)
    else:
        raise ValueError(f"{what} a {type(batch).__name__}.")
    ids = ids_of(batch)
    if config is not None and isinstance(ids, Tensor) and ids.dim() < 2:
        raise ValueError(
            f"{what} ids of shape {tuple(ids.shape)}: one sample. Put a batch dimension in front "
            "(ids[None]), or use a DataLoader."
        )
    if isinstance(ids, Tensor) and not ids.is_floating_point():
        check_ids(model, ids)
    return batch
