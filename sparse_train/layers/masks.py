"""Bit-packed masks: one bit per weight, True = kept.

Shape suffixes: O out_features, I in_features, J bytes per row = ceil(I / 8).

Bit ``b`` of byte ``j`` of a row is input ``8 j + b``; spare bits of the last byte are 0. A packed mask is uint8 and
takes 1/8 byte per weight. Layers store it, checkpoints hold it and ranks exchange it in this form.
"""

from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

MASK_NAME = "weight_mask"
"""Name of the packed mask buffer next to ``weight`` in a state dict."""
FACTOR_NAMES = ("mask_lora_A", "mask_lora_B")
"""Names of the factors next to ``weight`` in a layer with a low-rank adapter, see ``layers.mask_lora``."""
INTEGER_OF_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}
"""The integer dtype of the same size, as which the bits of a dtype are viewed."""


def masked_modules(module: nn.Module, prefix: str = "") -> dict[str, Any]:
    """The masked layers of a module by the prefix of their keys in its state dict, under each of their names."""
    named = module.named_modules(remove_duplicate=False)
    return {f"{prefix}{n}." if n else prefix: each for n, each in named if MASK_NAME in each._buffers}


def pack(mask_OI: Tensor) -> Tensor:
    """Pack a bool mask (O, I) into uint8 (O, ceil(I / 8))."""
    assert mask_OI.dtype == torch.bool and mask_OI.dim() == 2, (mask_OI.dtype, mask_OI.shape)
    if mask_OI.device.type == "cpu":
        return torch.from_numpy(np.packbits(mask_OI.numpy(), axis=1, bitorder="little"))
    spare = -mask_OI.shape[1] % 8
    if spare:
        mask_OI = F.pad(mask_OI, (0, spare))
    # Eight bools form one 64-bit word of 0/1 bytes (first input lowest). Multiplying by this constant moves byte b to
    # bit 56 + b, without carries, so that the top byte holds all eight.
    mask_OI = mask_OI.contiguous()
    if mask_OI.storage_offset() % 8 or mask_OI.stride(0) % 8:  # part of a larger mask, not aligned to words
        mask_OI = mask_OI.clone(memory_format=torch.contiguous_format)
    word_OJ = mask_OI.view(torch.int64)
    return ((word_OJ * 0x0102040810204080) >> 56).to(torch.uint8)


def unpack(packed_OJ: Tensor, in_features: int) -> Tensor:
    """Unpack uint8 (O, ceil(I / 8)) into a bool mask (O, I)."""
    mask = F.embedding(packed_OJ.int(), _byte_table(torch.uint8, packed_OJ.device)).view(torch.bool)
    return mask.flatten(1)[:, :in_features].contiguous()


def apply(weight_OI: Tensor, packed_OJ: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """``where(mask, weight, 0)`` in ``dtype`` (default: the weight's own), as a new tensor.

    Pruned entries become +0.0 whatever they held, infinities and NaN included: the mask is applied to the bits and
    not by multiplication.
    """
    out_features, in_features = weight_OI.shape
    dtype = dtype or weight_OI.dtype
    if torch.compiler.is_compiling():  # the compiler fuses this into one loop, and would rebuild the cached table
        bit_B = torch.arange(8, dtype=torch.uint8, device=packed_OJ.device)
        keep_OI = ((packed_OJ[:, :, None] >> bit_B) & 1).bool().flatten(1)[:, :in_features]
        return torch.where(keep_OI, weight_OI.to(dtype), 0)
    integer = INTEGER_OF_SIZE[dtype.itemsize]
    # A row of the table is eight words of all ones or all zeros, so looking up a byte copies a whole vector.
    bits = F.embedding(packed_OJ.int(), _byte_table(integer, packed_OJ.device)).view(out_features, -1)
    if bits.shape[1] == in_features:
        bits &= weight_OI.to(dtype).view(integer)
        return bits.view(dtype)
    return (bits[:, :in_features] & weight_OI.to(dtype).view(integer)).view(dtype)


def full(out_features: int, in_features: int, device: torch.device | str | None = None) -> Tensor:
    """The packed mask that keeps everything, spare bits 0."""
    packed_OJ = torch.empty((out_features, -(-in_features // 8)), dtype=torch.uint8, device=device)
    fill_full(packed_OJ, in_features)
    return packed_OJ


def fill_full(packed_OJ: Tensor, in_features: int) -> None:
    """Make a packed mask keep everything, in place."""
    packed_OJ.fill_(255)
    if in_features % 8:
        packed_OJ[:, -1] = (1 << in_features % 8) - 1


def count(packed_OJ: Tensor) -> int:
    if packed_OJ.device.type == "cpu":
        return int(np.bitwise_count(_words(packed_OJ)).sum())
    bits_V = _byte_table(torch.uint8, packed_OJ.device).sum(1, dtype=torch.int32)
    return int(bits_V[packed_OJ.int()].sum())


def count_differing(a_OJ: Tensor, b_OJ: Tensor) -> int:
    """Number of entries in which two packed masks of equal shape differ."""
    if a_OJ.device.type == "cpu":  # by numpy: torch would wake threads for each of many small masks
        return int(np.bitwise_count(_words(a_OJ) ^ _words(b_OJ)).sum())
    return count(a_OJ ^ b_OJ)


def _words(packed_OJ: Tensor) -> np.ndarray:
    packed = packed_OJ.contiguous().numpy()
    return packed if packed.shape[1] % 8 else packed.view(np.uint64)  # fewer numbers to add up


def fingerprint(packed_OJ: Tensor) -> Tensor:
    """32 bits, (32,) bool, that almost surely differ if two masks differ.

    Computed on the mask's device, so that no mask has to be copied from an accelerator.
    """
    flat = packed_OJ.reshape(-1)
    words = F.pad(flat, (0, -flat.numel() % 8)).view(torch.int64)
    words = words ^ ((words >> 32) & 0xFFFFFFFF)  # otherwise, changes of the highest bits of two words would cancel out
    # odd multipliers, so that a change of one word always changes the sum (modulo 2^64)
    odd = torch.arange(1, 2 * len(words), 2, device=flat.device) * 0x5851F42D4C957F2D
    total = (words * odd).sum() * 0x2545F4914F6CDD1D
    return ((total ^ (total >> 32)) >> torch.arange(32, device=flat.device)).bitwise_and(1).bool()


def fingerprint_number(packed_OJ: Tensor) -> int:
    return sum(bit << place for place, bit in enumerate(fingerprint(packed_OJ).tolist()))


@cache
def _byte_table(integer: torch.dtype, device: torch.device) -> Tensor:
    """(256, 8): entry b of row v is all ones (1 for uint8, so that it can be viewed as bool) if v has bit b, else 0."""
    with torch.inference_mode(False):  # a table created under inference_mode could not be used in training
        bit_VB = torch.arange(256)[:, None] >> torch.arange(8) & 1
        return (bit_VB if integer == torch.uint8 else -bit_VB).to(integer).to(device)
