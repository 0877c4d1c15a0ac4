"""Files and folders that are complete or absent."""

import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """A new folder to write to, which is renamed to ``out`` at the end; after an error, nothing is left of it.

    Raises:
        ValueError: ``out`` exists and is not an empty folder.
    """
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
        if type(error).__name__ == "SafetensorError":  # of a library that is not imported here
            raise OSError(f"{out} could not be written: {error}") from error
        raise


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file next to ``path`` to write to, which replaces it at the end; after an error, ``path`` is unchanged."""
    beside = path.with_name(f".{path.name}.writing")  # always the same name, so that a leftover is overwritten
    try:
        yield beside
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


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
    """Raise ValueError if ``out`` would be overwritten; to be called before the work."""
    if out.parts[:1] == ("~",):  # it would become a folder of that name, and removing that is dangerous
        raise ValueError(f"~ in {out} was not replaced by a shell. Write the folder out: {out.expanduser()}.")
    if out.is_symlink() or out.is_mount():
        raise ValueError(
            f"{out} is a link or a mount point, which no finished folder can be renamed to. Choose another."
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists already and is not an empty folder. Choose another, or remove it first.")
    above = next(parent for parent in out.absolute().parents if parent.exists())
    if not above.is_dir() or not os.access(above, os.W_OK | os.X_OK):
        why = "is not a folder" if not above.is_dir() else "cannot be written to"
        raise ValueError(f"{out} cannot be created: {above} {why}. Choose another place.")
