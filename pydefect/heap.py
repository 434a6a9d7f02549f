"""What the processes of our own, the command line's and a benchmark's, ask of the allocator."""

from __future__ import annotations

import ctypes
import sys

__all__ = ["return_large_blocks"]

# mallopt's parameters (malloc.h).
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3


def return_large_blocks() -> None:
    """Let glibc take blocks of 4 MB and more from the system, and give them back, one by one.

    Left alone, it raises that threshold to the largest block freed so far, up to 32 MB. The heap of a long
    fit then fills with holes between blocks of ever new sizes, several times what is in use. Only a process
    of our own is treated so; what a program with pydefect in it allocates is the program's business. Other C
    libraries have no such call: nothing happens there.
    """
    if sys.platform != "linux":
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(_MMAP_THRESHOLD, 4 << 20)
        # Setting one ends the adaptation of the other, whose default would give back every 128 kB.
        mallopt(_TRIM_THRESHOLD, 64 << 20)
