"""Work done ahead: the same results in the same order, whoever does it."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from pydefect.data.ahead import done_ahead, idle_workers


def square(number: int) -> np.ndarray:
    return np.full(3, number**2, np.uint8)


def whose(number: int) -> int:
    return os.getpid()


def fails(number: int) -> int:
    if number == 3:
        raise ValueError("number 3 cannot be made")
    return number


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results_come_in_order(workers):
    numbers = [5, 2, 2, 9, 0, 11]
    found = list(done_ahead(square, numbers, workers))
    assert [int(one[0]) for one in found] == [number**2 for number in numbers]
    assert all(one.dtype == np.uint8 for one in found)
    assert list(done_ahead(square, [], workers)) == []


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_is_drawn_from_the_callers_random_numbers(workers):
    before = torch.get_rng_state()
    list(done_ahead(square, range(4), workers))
    assert torch.equal(torch.get_rng_state(), before)


def test_who_does_the_work():
    assert set(done_ahead(whose, range(4), 0)) == {os.getpid()}
    assert os.getpid() not in set(done_ahead(whose, range(4), 2))


SCRIPT = """
import multiprocessing
multiprocessing.set_start_method("forkserver")  # what Python 3.14 begins with
from pydefect.data.ahead import done_ahead

print(list(done_ahead(str, range(3), 1)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="other systems cannot fork")
def test_a_script_needs_no_guard(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.returncode) == ("['0', '1', '2']\n", 0), done.stderr


@pytest.mark.parametrize("workers", [0, 2])
def test_errors_arrive(workers):
    others = set(multiprocessing.active_children())
    found = done_ahead(fails, range(6), workers)
    assert [next(found) for _ in range(3)] == [0, 1, 2]
    with pytest.raises(ValueError, match="number 3 cannot be made"):
        next(found)
    assert set(multiprocessing.active_children()) <= others  # none is left to the garbage collector


def test_without_workers_nothing_is_done_before_it_is_asked_for():
    seen = []
    found = done_ahead(seen.append, range(9), 0)
    next(found)
    assert seen == [0]


def test_only_cards_leave_cores_idle():
    assert idle_workers(torch.device("cpu")) == 0
    assert 1 <= idle_workers(torch.device("cuda")) <= 15
