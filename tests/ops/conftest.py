"""What the operators' tests share.

With PYDEFECT_CUDA_EMULATION naming a library built from tests/cuda_emulation, the CUDA kernels run on the CPU
and take the places of the CPU's: the same tests then hold for them (.ci/emulate).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator

import pytest
import torch

import pydefect.ops  # noqa: F401 - the CPU's kernels are there before others take their places

EMULATION = os.environ.get("PYDEFECT_CUDA_EMULATION")

if EMULATION:
    torch.ops.load_library(EMULATION)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if EMULATION and ("at_level" in getattr(item, "fixturenames", ()) or item.get_closest_marker("cpu")):
            item.add_marker(pytest.mark.skip(reason="about the CPU's kernels alone"))


@pytest.fixture(autouse=True, scope="session")
def _twins_in_float32() -> None:
    """On a card PyTorch's convolutions are TF32's unless they are told not to."""
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(autouse=True)
def _memory_full_of_nan() -> Iterator[None]:
    """What a kernel leaves unwritten shows."""
    if not EMULATION:
        yield
        return
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


# Runs the code of every line it reads, each with names of its own, and answers with what went wrong.
_WORKER = """
import json, os, sys, traceback
import torch
import pydefect.ops
from pydefect.buildinfo import build_info
assert build_info().cpu_level_active == os.environ["PYDEFECT_CPU_LEVEL"]
for line in sys.stdin:
    try:
        exec(json.loads(line), {})
        answer = ""
    except Exception:
        answer = traceback.format_exc()
    print(json.dumps(answer), flush=True)
"""


@pytest.fixture(scope="session")
def at_level(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str, str], None]]:
    """``at_level(level, code)`` runs the code on an instruction set level.

    A process chooses its level once, so each level has one, which all tests share: importing PyTorch takes
    longer than what they run.
    """
    # Not in the source folder, which Python would put in front of the installed package.
    folder = tmp_path_factory.mktemp("levels")
    workers: dict[str, subprocess.Popen[str]] = {}

    def run(level: str, code: str) -> None:
        if level not in workers or workers[level].poll() is not None:
            workers[level] = subprocess.Popen(
                [sys.executable, "-c", _WORKER],
                cwd=folder,
                env={**os.environ, "PYDEFECT_CPU_LEVEL": level},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
        worker = workers[level]
        assert worker.stdin is not None
        assert worker.stdout is not None
        worker.stdin.write(json.dumps(code) + "\n")
        worker.stdin.flush()
        answer = worker.stdout.readline()
        assert answer, f"the process at level {level} ended with exit status {worker.wait()}"
        wrong = json.loads(answer)
        assert not wrong, wrong

    yield run
    for worker in workers.values():
        assert worker.stdin is not None
        worker.stdin.close()  # all of them first: they end side by side
    for worker in workers.values():
        worker.wait()
