"""Peak resident memory of a stretch of work."""

import ctypes
import resource
import sys
from pathlib import Path

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def reset_peak() -> bool:
    """Start a new stretch. False if the system cannot (it is not Linux): the peak is then that of the whole process."""
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)  # so that memory freed by earlier work does not count
        _CLEAR.write_text("5")
    except OSError:
        return False
    return True


def peak_bytes() -> int:
    """Peak resident memory since ``reset_peak``, or since the process began if that had no effect."""
    if _STATUS.exists():
        line = next(line for line in _STATUS.read_text().splitlines() if line.startswith("VmHWM:"))
        return int(line.split()[1]) * 1024
    unit = 1 if sys.platform == "darwin" else 1024  # macOS counts bytes, others kibibytes
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
