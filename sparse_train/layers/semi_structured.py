"""2:4 weights on the sparse tensor cores of GPUs, through ``torch.sparse.to_sparse_semi_structured``."""

from dataclasses import dataclass

import torch
from torch import nn

from sparse_train.layers.matrices import MaskedMatrix, is_conv1d
from sparse_train.patterns import detect_pattern

DTYPES = (torch.float16, torch.bfloat16)
"""Supported dtypes of weights and of their inputs."""
BLOCK = 16
"""Both dimensions of a weight must be multiples of this: cuSPARSELt's block size in these dtypes, as torch sets it."""


@dataclass(frozen=True)
class Conversion:
    """Which layers now compute on 2:4 hardware, and why the others do not."""

    converted: tuple[str, ...]
    refused: dict[str, str]
    """Reason, by layer."""

    def __str__(self) -> str:
        head = f"{len(self.converted)} layers converted, {len(self.refused)} unchanged"
        return "\n".join([head, *(f"  {name}: {reason}" for name, reason in self.refused.items())])


def to_sparse_semi_structured(model: nn.Module) -> Conversion:
    """Let the 2:4 layers of a model compute on sparse tensor cores, for inference.

    If hardware, dtype and shape allow it and zeros are 2:4, the weight of a plain ``nn.Linear`` is replaced by its
    compressed form (``torch.sparse.to_sparse_semi_structured``), which takes 9/16 of the memory. The compressed form
    has no gradient, and ``save_pretrained`` cannot write it, so convert a loaded model and keep the folder. Other
    layers stay unchanged; the result says why.

    The conversion itself has never been run by its authors, who had no GPU: it follows the API of torch 2.13, and only
    the refusals and the choice of layers are tested. Compare the model's outputs before and after.

    Args:
        model: on its GPU, in float16 or bfloat16, squashed.
    """
    converted, refused = [], {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.Linear) and not is_conv1d(module):
            continue
        reason = why_not_module(module)
        if reason is None:
            assert isinstance(module, nn.Linear)
            compressed = torch.sparse.to_sparse_semi_structured(module.weight.detach().contiguous())
            module.weight = nn.Parameter(compressed, requires_grad=False)
            converted.append(name)
        else:
            refused[name] = reason
    return Conversion(tuple(converted), refused)


def why_not_module(module: nn.Module) -> str | None:
    """Why this layer, on its current device, cannot compute on 2:4 hardware; None if it can."""
    if isinstance(module, MaskedMatrix):
        return "it is masked; squash the model first"
    if type(module) is not nn.Linear:
        return f"it is a {type(module).__name__}, not a plain nn.Linear"
    weight = module.weight.detach()
    found = why_not_weight(tuple(weight.shape), weight.dtype, detect_pattern(weight != 0))
    return found or why_not_device(weight.device)


def why_not_weight(shape: tuple[int, ...], dtype: torch.dtype, pattern: str) -> str | None:
    """Why no 2:4 hardware could compute with such a weight; None if some could.

    Args:
        shape: (out_features, in_features).
        dtype: of the weight.
        pattern: of its zeros, from ``detect_pattern``.
    """
    if pattern not in ("1:4", "2:4"):
        return f"its zeros are {pattern}, not 2:4" if pattern != "dense" else "it is dense"
    if dtype not in DTYPES:
        return f"its dtype is {str(dtype).removeprefix('torch.')}; bfloat16 and float16 can be 2:4"
    if shape[0] % BLOCK or shape[1] % BLOCK:
        return f"its shape {' x '.join(map(str, shape))} is not in multiples of {BLOCK}"
    return None


def why_not_device(device: torch.device) -> str | None:
    """Why this device cannot compute 2:4; None if it can."""
    if device.type != "cuda":
        return f"it is on {device.type}, and 2:4 needs a CUDA GPU"
    major, minor = torch.cuda.get_device_capability(device)
    if major < 8:
        return f"the GPU has compute capability {major}.{minor}, and 2:4 needs 8.0 (Ampere) or later"
    if not torch.backends.cusparselt.is_available():
        return "this build of torch has no cuSPARSELt"
    return None
