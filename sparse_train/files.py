"""Files and folders that are complete or absent; files of ``torch.save``, read without running code in them."""

import errno
import io
import json
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn
from zipfile import is_zipfile

import torch


def load_plain(path: Path, *, part: bytes | None = None, mmap: bool = False) -> Any:
    """What ``torch.save`` wrote to a file, on the CPU, if that is tensors and plain values; runs nothing in the file.

    Args:
        path: an existing file.
        part: the bytes to read in its place, if ``torch.save`` wrote to a part of it.
        mmap: leave tensors on disk until they are used, where the format allows it.
    """
    try:
        source = path if part is None else io.BytesIO(part)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Detected pickle protocol")  # of files that are then refused
            return torch.load(source, map_location="cpu", weights_only=True, mmap=mmap and is_zipfile(path))
    except Exception as error:  # what is raised for bytes of any kind is not documented
        cut_off = isinstance(error, OSError) and error.errno == errno.EINVAL  # torch seeks ahead of its beginning
        if (isinstance(error, (OSError, MemoryError)) and not cut_off) or "memory" in str(error):
            raise
        if named := re.search(r"GLOBAL (\S+)", str(error)):
            raise ValueError(untrusted(path, named[1])) from error
        reason = str(error).rpartition("WeightsUnpickler error:")[2].strip().split("\n")[0].split(". ")[0]
        raise ValueError(
            f"{path} is not a checkpoint of a training run, or is not complete ({reason or 'it ends too early'})."
        ) from error


@contextmanager
def reading(path: Path | str, hint: Callable[[], str] = str) -> Iterator[None]:
    """Inside, whatever a library raises for a damaged file or folder, which none documents, becomes one ValueError."""
    try:
        yield
    except (ImportError, MemoryError):
        raise
    except Exception as error:
        said = str(error) if isinstance(error, (OSError, ValueError)) else f"{type(error).__name__}: {error}"
        raise ValueError(f"Cannot load {str(path)!r}.{hint()} {' '.join(said.split())[:500]}") from error


def untrusted(path: Path, name: str) -> str:
    """The message for a file that would have to be trusted."""
    return (
        f"{path} holds more than tensors and plain values: reading it would call {name}, and such a call can run any "
        "command. So it was not read. If the file is yours, allow what it names (torch.serialization.add_safe_globals) "
        "and read it from Python, or write it again without that object."
    )


@contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """A new folder to write to, which is renamed to ``out`` at the end; after an error, nothing is left of it."""
    check_free(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    beside = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield beside
        if out.exists():
            out.rmdir()
        beside.chmod(0o755)
        beside.rename(out)
    except BaseException as error:
        shutil.rmtree(beside, ignore_errors=True)
        _raise_from(error, out)


@contextmanager
def replacing(path: Path, ending: str = "writing") -> Iterator[Path]:
    """A file next to ``path`` to write to, which replaces it at the end; after an error, ``path`` is unchanged.

    Where several processes may write it at once, ``ending`` is of one of them alone.
    """
    beside = path.with_name(f".{path.name}.{ending}")  # by default the same name, so that a leftover is overwritten
    beside.unlink(missing_ok=True)  # the name can be guessed: a link may be there
    try:
        yield beside
        beside.replace(path)
    except BaseException as error:
        beside.unlink(missing_ok=True)
        _raise_from(error, path)


def write_json(path: Path, content: Any) -> None:
    """Write JSON that people can read; the file is complete or as before."""
    with replacing(path) as beside:
        beside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _raise_from(error: BaseException, out: Path) -> NoReturn:
    """Raise an error again, as OSError that names ``out`` if it could not be written."""
    cause = error.__context__ if type(error) is RuntimeError else error  # torch.save puts an error of its own on top
    disk = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS)  # and not of a network
    unnamed = isinstance(cause, OSError) and cause.errno in disk and (cause is not error or cause.filename is None)
    if unnamed or type(error).__name__ == "SafetensorError":  # of a library that is not imported here
        raise OSError(f"{out} could not be written: {cause}") from error
    raise error


def check_space(out: Path, needed: int) -> None:
    """Raise ValueError if less than ``needed`` bytes are free where ``out`` will be; to be called before the work."""
    above = next(parent for parent in out.absolute().parents if parent.exists())
    free = shutil.disk_usage(above).free
    if free < needed:
        raise ValueError(
            f"{out} needs about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB are free in {above}. Choose another "
            "place, or make room."
        )


def check_free(out: Path) -> None:
    """Raise ValueError if ``out`` would be overwritten or cannot be made; to be called before the work."""
    if out.parts[:1] == ("~",):  # it would become a folder of that name, and removing that is dangerous
        raise ValueError(f"~ in {out} was not replaced by a shell. Write the folder out: {out.expanduser()}.")
    if out.is_symlink() or (out.exists() and (out.is_mount() or not out.is_dir() or any(out.iterdir()))):
        raise ValueError(f"{out} exists already and is not an empty folder. Choose another, or remove it first.")
    above = next(parent for parent in out.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        why = "is not a folder" if not above.is_dir() else "cannot be written to"
        raise ValueError(f"{out} cannot be created: {above} {why}. Choose another place.")
