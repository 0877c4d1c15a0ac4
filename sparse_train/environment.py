"""What a run ran on (versions, machine, memory) without host names, user names or paths; and its random states."""

import os
import platform
import random
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch

_PACKAGES = ("sparse-train", "torch", "lightning", "transformers", "datasets", "numpy", "deepspeed", "peft")


def versions() -> dict[str, str]:
    """Versions of Python and of those installed packages that matter for a result."""
    installed = {"python": platform.python_version()}
    for package in _PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            installed[package] = metadata.version(package)
    return installed | {"torch": str(torch.__version__)}  # with the kind of build


def machine() -> dict[str, Any]:
    """System, processor, cores, torch threads, memory, and names of accelerators."""
    names = re.findall(r"^model name\s*: (.*)", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    facts: dict[str, Any] = {
        "system": f"{platform.system()} {platform.machine()}",
        "processor": names[0] if names else platform.processor(),  # not all kinds of processor have this line
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory": f"{os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / 2**30:.1f} GiB",
    }
    if torch.cuda.is_available():
        facts["accelerators"] = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return facts


def peak_bytes() -> int:
    """Peak resident memory of this process."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM:"))
    return int(line.split()[1]) * 1024


@contextmanager
def isolated_rng() -> Iterator[None]:
    """Afterwards, the random states of Python, numpy and torch (on all CUDA devices) are restored."""
    python_state, numpy_state = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(range(torch.cuda.device_count()), device_type="cuda"):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)
