"""Forwards of a model in calibration: in eval mode, without autograd, with the forward of some modules replaced."""

import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sparse_train.layers.matrices import MaskedLayer

Batch = Tensor | Mapping[str, Any]
"""Token ids (B, L), or the model's keyword arguments."""


@contextmanager
def forward_replaced(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    before = module.__dict__.get("forward")
    module.__dict__["forward"] = forward
    try:
        yield
    finally:
        if before is None:
            del module.__dict__["forward"]
        else:
            module.__dict__["forward"] = before


@contextmanager
def inference(model: nn.Module) -> Iterator[None]:
    """Eval mode, no autograd, no cache of keys and values, experts one by one; all is restored afterwards."""
    training = [module for module in model.modules() if module.training]
    wanted = {"use_cache": False, "_experts_implementation": "eager"}
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


def call(model: nn.Module, batch: Batch) -> Any:
    return model(**batch) if isinstance(batch, Mapping) else model(batch)


def raised_in_forward(error: BaseException) -> bool:
    """Whether an error was raised in a forward of the model, and not in the processing of its activations."""
    codes = {frame.f_code for frame, _ in traceback.walk_tb(error.__traceback__)}
    return call.__code__ in codes and MaskedLayer._record.__code__ not in codes


def one_sample(batch: Batch) -> Batch:
    """The first sample of a batch: the first entry of every tensor that has as many entries as there are ids."""
    if isinstance(batch, Tensor):
        return batch[:1]
    size = len(batch["input_ids"]) if "input_ids" in batch else 0
    tensors = {key: each for key, each in batch.items() if isinstance(each, Tensor) and each.dim()}
    cut = {key: each[:1] for key, each in tensors.items() if len(each) == size}
    return {**batch, **cut}
