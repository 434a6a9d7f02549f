"""Which machine and which software a run was measured on, and what that machine can do at most."""

from __future__ import annotations

import os
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from pydefect import _native
from pydefect.buildinfo import build_info

peers: dict[str, str] = {}
"""Versions of what was timed in another environment."""

_limits: dict[int, dict[str, float]] = {}


def _busy_seconds() -> tuple[float, float]:
    """Processor seconds of the whole machine, and of this process and its ended children."""
    user, nice, system = map(int, Path("/proc/stat").read_text().split()[1:4])
    return (user + nice + system) / os.sysconf("SC_CLK_TCK"), sum(os.times()[:4])


_began, _busy_before = time.monotonic(), _busy_seconds()


def taken_by_others() -> float:
    """Return how many cores other processes kept busy since the run began: 0 on a machine left alone."""
    everybody, own = (after - before for after, before in zip(_busy_seconds(), _busy_before, strict=True))
    return round(max(0.0, everybody - own) / (time.monotonic() - _began), 2)


def cpu_name() -> str:
    """Return the processor's name, with its family and model where the system tells them."""
    named: dict[str, str] = {}
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        name, _, value = line.partition(":")
        named.setdefault(name.strip(), value.strip())
    found = named.get("model name", "")
    # Virtual machines hide the model; family and number still tell generations apart.
    if "cpu family" in named:
        found += f" (family {named['cpu family']}, model {named.get('model', '?')})"
    return found


def measure_limits(threads: int) -> None:
    """Measure what `threads` threads reach; of several measurements the best counts."""
    measured: dict[str, float] = dict(_native.machine_limits(threads))
    before = _limits.get(threads, measured)
    _limits[threads] = {name: max(value, before[name]) for name, value in measured.items()}


def limits() -> dict[str, dict[str, float]]:
    """Return what was measured, by number of threads (as text, as JSON wants keys)."""
    return {
        str(threads): {name: round(value, 1) for name, value in at.items()} for threads, at in _limits.items()
    }


def measure_again() -> None:
    """Measure once more: a run begins and ends with its limits."""
    for threads in list(_limits):
        measure_limits(threads)


def facts() -> dict[str, Any]:
    """Return what is added to pytest-benchmark's machine information."""
    versions = {"pydefect": version("pydefect-vision"), "CPU level": build_info().cpu_level_active}
    for package in ("torch", "numpy", "scipy", "scikit-learn", "faiss-cpu"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {
        "cores": len(os.sched_getaffinity(0)),
        "taken_by_others": taken_by_others(),
        "versions": versions | peers,
        "limits": limits(),
    }
