"""What the benchmarks share: devices, a call's peak memory beside its time, and the machine's limits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import machine
import peak_memory
import pytest
import torch
from table import as_text, limits_line, measurements, name_contenders, result_rows


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


def _peak_mib(call: Callable[[], Any], device: str) -> float:
    """Memory that the call needs beyond what is in use before it."""
    if device == "cpu":
        return peak_memory.peak_mib(call)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return round((torch.cuda.max_memory_allocated() - before) / 2**20, 1)


@pytest.fixture
def measure(benchmark: Any, device: str) -> Callable[..., None]:
    """Time a call, the device synchronised inside it, in a group with its rivals; note its peak memory.

    ``flops`` counts the arithmetic operations that the task needs, ``traffic`` the bytes that it must read
    and write at least: the same numbers for every rival of a group. ``precision`` says whose peak the
    operations are held against, "float32" or "bf16". The table compares everybody with the contender
    "pydefect" and with "reference", the twin; a contender who is not named is called after the part of the
    test's id that the rest of the group does not share.
    """

    def run(
        group: str,
        call: Callable[[], Any],
        *,
        flops: float = 0,
        traffic: float = 0,
        precision: Literal["float32", "bf16"] = "float32",
        contender: str = "",
    ) -> None:
        def timed() -> None:
            call()
            if device == "cuda":
                torch.cuda.synchronize()

        threads = torch.get_num_threads()
        if str(threads) not in machine.limits():
            machine.measure_limits(threads)
        benchmark.group = f"{group} {device}"
        benchmark.extra_info["peak_mib"] = _peak_mib(timed, device)
        benchmark.extra_info |= {"contender": contender, "threads": threads, "precision": precision}
        benchmark.extra_info |= {"flops": flops, "traffic": traffic}
        benchmark.pedantic(timed, rounds=7, warmup_rounds=2)

    return run


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish() -> None:
    """Measure the limits at the end as well, before pytest-benchmark writes its file."""
    machine.measure_again()


def pytest_benchmark_update_machine_info(machine_info: dict[str, Any]) -> None:
    """Let the results say what they are held against."""
    machine_info |= machine.facts()


def pytest_terminal_summary(terminalreporter: Any, config: pytest.Config) -> None:
    """Print what pytest-benchmark's own table has no column for."""
    session = getattr(config, "_benchmarksession", None)
    benchmarks = [
        bench.as_dict(include_data=False)
        for bench in getattr(session, "benchmarks", [])
        if bench and "peak_mib" in bench.extra_info
    ]
    if benchmarks:
        name_contenders(benchmarks)
        found = measurements({"machine_info": {"limits": machine.limits()}, "benchmarks": benchmarks})
        terminalreporter.section("against rivals and the machine's limits")
        terminalreporter.write_line(limits_line([machine.limits()]))
        terminalreporter.write_line(as_text(result_rows(found)))
