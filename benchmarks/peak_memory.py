"""Peak memory of a call, for the benchmarks and for the peers' environment: the standard library only."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any


def _peak_resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def peak_mib(call: Callable[[], Any]) -> float:
    """Return the resident memory that the call needs beyond what is in use before it."""
    # What earlier calls freed goes back to the system, or this one would get it for nothing.
    ctypes.CDLL(None).malloc_trim(0)
    # Linux sets the high-water mark back to what is in use now.
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak_resident_bytes()
    call()
    return round((_peak_resident_bytes() - before) / 2**20, 1)
