"""Packed files: sparse weights on disk as mask bits and kept values, restored bit for bit.

Shape suffixes: O rows, I entries of a row, J packed mask bytes = ceil(I / 8), K kept values.

A packed file is safetensors. If packing makes a weight ``name`` smaller, it is stored as two tensors:
``name.packed_mask``, uint8 (O, J), see ``layers.masks``, and ``name.kept_values`` (K,), row by row, in the dtype of the
weight. All other tensors are unchanged. The metadata say which weights are packed, their shapes and dtypes, which names
share one tensor, and the version of this format.

Only +0.0 is dropped, whatever a mask says: a kept weight that happens to be +0.0 is not stored, and is restored as
+0.0. -0.0 and NaN are stored as values, with their bits. Zeros that a mask pruned and other zeros are therefore not
distinguished: this is a format for finished models, not for training runs.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sparse_train.files import replacing
from sparse_train.layers import masks
from sparse_train.layers.matrices import MASK_NAME
from sparse_train.layers.state_dicts import squashed_state_dict

FORMAT_VERSION = 1
_METADATA = "sparse_train_packed"
_MASK, _VALUES = ".packed_mask", ".kept_values"


@dataclass(frozen=True)
class SizeReport:
    """Sizes before and after packing, in bytes of tensors."""

    packed: Mapping[str, tuple[int, int]]
    """For each packed weight: bytes before and after."""
    other: int
    """Bytes of all other tensors."""

    @property
    def dense_bytes(self) -> int:
        """All tensors, before packing."""
        return self.other + sum(dense for dense, _ in self.packed.values())

    @property
    def packed_bytes(self) -> int:
        """All tensors, in the packed file."""
        return self.other + sum(packed for _, packed in self.packed.values())

    def __add__(self, other: "SizeReport") -> "SizeReport":
        return SizeReport({**self.packed, **other.packed}, self.other + other.other)

    def __str__(self) -> str:
        share = self.packed_bytes / self.dense_bytes if self.dense_bytes else 1.0
        return (
            f"{len(self.packed)} weights packed; {self.dense_bytes / 1e6:.1f} MB of tensors take "
            f"{self.packed_bytes / 1e6:.1f} MB ({100 * share:.1f} %)"
        )


# --- One weight ------------------------------------------------------------------------------------------------------


def packed_bytes(rows: int, columns: int, kept: int, itemsize: int) -> int:
    """Bytes of a packed matrix: one bit per entry, and ``itemsize`` bytes per kept value.

    Less than dense if more than ``1 / (8 * itemsize)`` of it is zero: 6.25 % in 16 bits, 3.1 % in 32.
    """
    return rows * masks.packed_width(columns) + kept * itemsize


def pack_weight(weight_OI: Tensor) -> tuple[Tensor, Tensor]:
    """Split a matrix into its packed mask (O, J) and the values (K,) that are not +0.0, row by row."""
    bits_OI = weight_OI.detach().cpu().contiguous().view(masks.INTEGER_OF_SIZE[weight_OI.itemsize])
    keep_OI = bits_OI != 0
    return masks.pack(keep_OI), bits_OI[keep_OI].view(weight_OI.dtype)


def unpack_weight(mask_OJ: Tensor, values_K: Tensor, in_features: int) -> Tensor:
    """The matrix (O, I) that ``pack_weight`` has split.

    Raises:
        ValueError: the number of entries that the mask keeps differs from the number of values.
    """
    if masks.count(mask_OJ) != len(values_K):
        raise ValueError(
            f"the mask keeps {masks.count(mask_OJ)} weights, and there are {len(values_K)} values: the file is damaged."
        )
    integer = masks.INTEGER_OF_SIZE[values_K.itemsize]
    bits_OI = torch.zeros(len(mask_OJ), in_features, dtype=integer)
    bits_OI[masks.unpack(mask_OJ, in_features)] = values_K.view(integer)
    return bits_OI.view(values_K.dtype)


# --- Files -----------------------------------------------------------------------------------------------------------


def save_packed(
    model: nn.Module | Mapping[str, Tensor], path: str | Path, metadata: Mapping[str, str] | None = None
) -> SizeReport:
    """Write a model, or its state dict, to one packed file; masks are folded in.

    The file is first written under another name and then renamed: ``path`` is complete or absent.

    Args:
        model: a module, or a state dict without masks.
        path: file to write; must not exist.
        metadata: text to keep in the file, which ``read_metadata`` returns.

    Raises:
        ValueError: ``path`` exists, a state dict with masks, or names that the format uses itself.
    """
    from safetensors.torch import save_file

    path = Path(path)
    if path.exists():
        raise ValueError(f"{path} exists already. Choose another, or remove it first.")
    state = squashed_state_dict(model) if isinstance(model, nn.Module) else dict(model)
    _check_names(state)
    tensors, shapes, aliases, report = _pack_state(state)
    header = {
        _METADATA: str(FORMAT_VERSION),
        "packed": json.dumps(shapes),
        "aliases": json.dumps(aliases),
        "metadata": json.dumps(dict(metadata or {})),
    }
    with replacing(path) as beside:
        save_file(tensors, beside, metadata=header)
    return report


def load_packed(path: str | Path) -> dict[str, Tensor]:
    """The state dict that ``save_packed`` wrote, dense and bit for bit; tied names share one tensor.

    Raises:
        ValueError: no packed file, one of a later version of the format, or a damaged one.
    """
    header, tensors = _read(Path(path))
    packed: dict[str, dict[str, Any]] = json.loads(header["packed"])
    state = {name: tensor for name, tensor in tensors.items() if not name.endswith((_MASK, _VALUES))}
    for name, entry in packed.items():
        try:
            mask_OJ, values_K = tensors[name + _MASK], tensors[name + _VALUES]
            if str(values_K.dtype) != f"torch.{entry['dtype']}":
                raise ValueError(f"its values are {values_K.dtype}, not {entry['dtype']}: the file is damaged.")
            state[name] = unpack_weight(mask_OJ, values_K, entry["shape"][-1]).view(entry["shape"])
        except (ValueError, KeyError, RuntimeError) as error:
            raise ValueError(f"Cannot unpack {name} of {path}: {error}") from error
    for name, original in json.loads(header["aliases"]).items():
        state[name] = state[original]
    return state


def read_metadata(path: str | Path) -> dict[str, str]:
    """The metadata that ``save_packed`` was given."""
    header, _ = _read(Path(path), tensors=False)
    found: dict[str, str] = json.loads(header["metadata"])
    return found


def _check_names(state: Mapping[str, Tensor]) -> None:
    for name in state:
        if name == MASK_NAME or name.endswith(f".{MASK_NAME}"):
            raise ValueError(
                f"The state dict holds masks ({name}), so its weights hold shadow values. Pass the model itself, or "
                "squash it first."
            )
        if name.endswith((_MASK, _VALUES)):
            raise ValueError(f"The state dict has a tensor {name}, a name that packed files use themselves. Rename it.")


def _pack_state(
    state: Mapping[str, Tensor],
) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]], dict[str, str], SizeReport]:
    tensors: dict[str, Tensor] = {}
    shapes: dict[str, dict[str, Any]] = {}
    aliases: dict[str, str] = {}
    sizes: dict[str, tuple[int, int]] = {}
    first: dict[tuple[Any, ...], str] = {}
    other = 0
    for name, value in state.items():
        tensor = value.detach()
        if tensor.numel():
            place = (tensor.device, tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride())
            if place in first:
                aliases[name] = first[place]
                continue
            first[place] = name
        if tensor.is_floating_point() and tensor.dim() >= 2 and tensor.numel():
            mask_OJ, values_K = pack_weight(tensor.reshape(-1, tensor.shape[-1]))
            if mask_OJ.nbytes + values_K.nbytes < tensor.nbytes:
                tensors[name + _MASK], tensors[name + _VALUES] = mask_OJ, values_K
                shapes[name] = {"shape": list(tensor.shape), "dtype": str(tensor.dtype).removeprefix("torch.")}
                sizes[name] = tensor.nbytes, mask_OJ.nbytes + values_K.nbytes
                continue
        dense = tensor.cpu().contiguous()
        whole = dense.untyped_storage().nbytes() == dense.nbytes
        tensors[name] = dense if whole else dense.clone()  # otherwise the whole underlying tensor would be written
        other += dense.nbytes
    return tensors, shapes, aliases, SizeReport(sizes, other)


def _read(path: Path, tensors: bool = True) -> tuple[dict[str, str], dict[str, Tensor]]:
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise ValueError(f"There is no packed file {path}.")
    try:
        with safe_open(path, framework="pt") as opened:
            header: dict[str, str] = opened.metadata() or {}
            found = {key: opened.get_tensor(key) for key in opened.keys()} if tensors else {}  # noqa: SIM118
    except SafetensorError as error:
        raise ValueError(f"{path} is not a complete safetensors file ({error}). Copy or download it again.") from error
    if _METADATA not in header:
        raise ValueError(f"{path} is not a packed file of sparse-train. Plain safetensors need no unpacking.")
    if int(header[_METADATA]) > FORMAT_VERSION:
        raise ValueError(
            f"{path} has version {header[_METADATA]} of the packed format, and this sparse-train reads up to "
            f"{FORMAT_VERSION}. Install a later one."
        )
    return header, found
