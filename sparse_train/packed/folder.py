"""Packed Hugging Face folders: each safetensors file is packed separately, other files are copied."""

import shutil
from collections.abc import Iterable
from pathlib import Path

from sparse_train.files import written_whole
from sparse_train.packed.tensors import SizeReport, load_packed, read_metadata, save_packed

SUFFIX = ".packed.safetensors"


def pack_folder(folder: str | Path, out: str | Path) -> SizeReport:
    """Write a packed copy of a Hugging Face folder: ``x.safetensors`` becomes ``x.packed.safetensors``.

    Other files are copied. Only one file at a time is in memory. ``out`` is complete or absent.

    Raises:
        ValueError: no safetensors in ``folder``, or ``out`` exists and is not an empty folder.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file

    source = Path(folder)
    files = [file for file in sorted(source.glob("*.safetensors")) if not file.name.endswith(SUFFIX)]
    if not files:
        raise ValueError(f"There are no safetensors to pack in {source}. Save the model with save_pretrained first.")
    report = SizeReport({}, 0)
    with written_whole(Path(out)) as beside:
        _copy_others(source, beside, files)
        for file in files:
            with safe_open(file, framework="pt") as opened:
                metadata = opened.metadata()
            report += save_packed(load_file(file), beside / f"{file.stem}{SUFFIX}", metadata)
    return report


def unpack_folder(folder: str | Path, out: str | Path) -> Path:
    """Write the Hugging Face folder that ``pack_folder`` has packed: the same tensors, bit for bit.

    Raises:
        ValueError: no packed file in ``folder``, a damaged one, or ``out`` exists and is not an empty folder.
    """
    from safetensors.torch import save_file

    source, out = Path(folder), Path(out)
    files = sorted(source.glob(f"*{SUFFIX}"))
    if not files:
        raise ValueError(f"There is no packed file (*{SUFFIX}) in {source}.")
    with written_whole(out) as beside:
        _copy_others(source, beside, files)
        for file in files:
            name = f"{file.name.removesuffix(SUFFIX)}.safetensors"
            save_file(load_packed(file), beside / name, metadata=read_metadata(file) or None)
    return out


def _copy_others(source: Path, out: Path, files: Iterable[Path]) -> None:
    taken = {file.name for file in files}
    for entry in source.iterdir():
        if entry.name in taken or entry.name.startswith("."):
            continue
        if entry.is_dir():
            shutil.copytree(entry, out / entry.name)  # such as an adapter in the folder of its base
        elif entry.is_file():
            shutil.copyfile(entry, out / entry.name)
