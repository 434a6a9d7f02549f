"""Which machine and which software a run was measured on, and what that machine can do at most."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from os import sched_getaffinity
from typing import Any

from pydefect import _native
from pydefect.buildinfo import build_info

_limits: dict[int, dict[str, float]] = {}


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
    for package in ("torch", "numpy", "scipy", "faiss-cpu"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return {"cores": len(sched_getaffinity(0)), "versions": versions, "limits": limits()}
