"""What the benchmarks share: devices, and the peak memory of a call beside its time."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[
                pytest.mark.gpu,
                pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
            ],
        ),
    ]
)
def device(request: pytest.FixtureRequest) -> str:
    return request.param


def _peak_resident_bytes() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:"))


def _peak_bytes_of(call: Callable[[], Any], device: str) -> int:
    """Memory that the call needs beyond what is in use before it."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    # What earlier calls freed goes back to the system, or this one would get it for nothing.
    ctypes.CDLL(None).malloc_trim(0)
    # Linux sets the high-water mark back to what is in use now.
    Path("/proc/self/clear_refs").write_text("5")
    before = _peak_resident_bytes()
    call()
    return _peak_resident_bytes() - before


@pytest.fixture
def measure(benchmark: Any, device: str) -> Callable[..., None]:
    """Time a call, the device synchronised inside it, in a group with its rivals; note its peak memory.

    ``flops`` counts the arithmetic operations that the task needs, ``traffic`` the bytes that it must read
    and write at least: the same numbers for every rival of a group.
    """

    def run(group: str, call: Callable[[], Any], *, flops: float = 0, traffic: float = 0) -> None:
        def timed() -> None:
            call()
            if device == "cuda":
                torch.cuda.synchronize()

        benchmark.group = f"{group} {device}"
        benchmark.extra_info["peak_mib"] = round(_peak_bytes_of(timed, device) / 2**20, 1)
        benchmark.extra_info["threads"] = torch.get_num_threads()
        benchmark.extra_info |= {"flops": flops, "traffic": traffic}
        benchmark.pedantic(timed, rounds=7, warmup_rounds=2)

    return run


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Peak memory, which pytest-benchmark's own table has no column for."""
    session = getattr(config, "_benchmarksession", None)
    lines = [
        f"{bench.group:<32} {bench.name:<48} {bench.extra_info['peak_mib']:>9} MiB"
        for bench in getattr(session, "benchmarks", [])
        if "peak_mib" in bench.extra_info
    ]
    if lines:
        terminalreporter.section("peak memory beyond inputs")
        terminalreporter.write_line("\n".join(sorted(lines)))
