"""A disk on which one write fails."""

import builtins
import contextlib
import errno
import io
import itertools
import os
from pathlib import Path
from unittest import mock

import safetensors.torch
from safetensors import SafetensorError

FULL, READ_ONLY = errno.ENOSPC, errno.EROFS


@contextlib.contextmanager
def failing(number, code):
    """The write with this number fails, of those to files in the current folder: at its end if the disk is full."""
    opens, serialize, here = io.open, safetensors.torch.serialize_file, Path.cwd()
    numbers = itertools.count(1)

    def fails(path):
        return Path(path).absolute().is_relative_to(here) and next(numbers) == number

    def opened(file, mode="r", *args, **kwargs):
        if isinstance(file, int) or not set("wax+") & set(mode) or not fails(file):
            return opens(file, mode, *args, **kwargs)
        if code == FULL:
            opens(file, mode).close()  # it is there, and lacks what did not fit
        raise OSError(code, os.strerror(code), *[file] * (code == READ_ONLY))

    def serialized(tensors, path, *args, **kwargs):
        if not fails(path):
            return serialize(tensors, path, *args, **kwargs)
        if code == FULL:
            Path(path).touch()
        raise SafetensorError(f"Error while serializing: I/O error: {os.strerror(code)} (os error {code})")

    with (
        mock.patch.object(builtins, "open", opened),
        mock.patch.object(io, "open", opened),
        mock.patch.object(safetensors.torch, "serialize_file", serialized),
    ):
        yield
