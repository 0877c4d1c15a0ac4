"""Files and folders that are complete or absent."""

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(out: Path) -> Iterator[Path]:
    """A new folder to write to, which becomes ``out`` at the end; after an error, nothing is left of it.

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
    except BaseException:
        shutil.rmtree(beside, ignore_errors=True)
        raise


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file to write beside ``path``, which takes its place at the end; after an error ``path`` is as it was."""
    beside = path.with_name(f".{path.name}.writing")  # one name, so that what a kill leaves is written over
    try:
        yield beside
        beside.replace(path)
    except BaseException:
        beside.unlink(missing_ok=True)
        raise


def check_free(out: Path) -> None:
    """Raise ValueError where ``out`` would be overwritten; call it before the work, not after."""
    if out.is_symlink() or out.is_mount():
        raise ValueError(
            f"{out} is a link or a mount point, which no finished folder can be renamed to. Choose another."
        )
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"{out} exists already and is not an empty folder. Choose another, or remove it first.")
