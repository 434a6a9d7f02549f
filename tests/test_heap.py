"""Processes of our own keep no large blocks that they have freed."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest

# Fills a heap with blocks of which every other one is freed: what is left of it in memory, in MB.
_HOLES = """
import ctypes, sys
if sys.argv[1] == "ours":
    from pydefect.heap import return_large_blocks
    return_large_blocks()
c = ctypes.CDLL(None)
c.malloc.restype, c.malloc.argtypes, c.free.argtypes = ctypes.c_void_p, [ctypes.c_size_t], [ctypes.c_void_p]
def block(megabytes):
    pointer = c.malloc(megabytes << 20)
    ctypes.memset(pointer, 1, megabytes << 20)
    return pointer
def resident():
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line for line in lines if line.startswith("VmRSS:")).split()[1]) / 1024
c.free(block(31))  # from now on glibc would keep blocks up to this size
before = resident()
blocks = [pointer for _ in range(20) for pointer in (block(6), c.malloc(100_000))]
for pointer in blocks[::2]:
    c.free(pointer)
print(resident() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other C libraries have no such threshold")
def test_large_blocks_go_back_to_the_system():
    kept = {
        who: float(
            subprocess.run(
                [sys.executable, "-c", _HOLES, who], capture_output=True, text=True, check=True
            ).stdout
        )
        for who in ("ours", "library")
    }
    # 120 MB were freed between small blocks that stay.
    assert kept["ours"] < 20
    assert kept["library"] > 60
