"""Peak resident memory of a stretch of work."""

import ctypes
import resource
import sys
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak() -> bool:
    """Start a new stretch. False where the system cannot (it is not Linux): peaks are then the process's so far."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # what earlier work has freed is not this stretch's
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def peak_bytes() -> int:
    """Most resident memory since ``reset_peak``, or since the process began where that had no effect."""
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, others kibibytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
