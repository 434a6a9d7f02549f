"""Interruptions of a training: the step is ended and saved first, and none is swallowed."""

from __future__ import annotations

import io
import multiprocessing
import os
import pty
import signal
import subprocess
import sys
import threading
import time

import pytest

from pydefect.data.ahead import done_ahead
from pydefect.interruption import end_while_loading, saved_between_steps

pytestmark = pytest.mark.usefixtures("interruptible")


def train(steps: int, save, interval: float, *, interrupt_in=(), times: int = 1) -> list[int]:
    """Steps that were finished; `interrupt_in` those steps, so many times."""
    finished = []
    with saved_between_steps(save, interval) as between_steps:
        for step in range(steps):
            if step in interrupt_in:
                for _ in range(times):
                    signal.raise_signal(signal.SIGINT)
            finished.append(step)
            if save is not None:
                save.finished = list(finished)
            between_steps()
    return finished


class Saved(list):
    finished: list[int]

    def __call__(self) -> None:
        self.append(list(self.finished))


def test_saves_every_so_often():
    save = Saved()
    assert train(3, save, -1.0) == [0, 1, 2]
    assert save == [[0], [0, 1], [0, 1, 2]]
    save = Saved()
    train(3, save, 1e9)
    assert save == []


def test_the_interval_begins_anew_when_a_save_has_ended(monkeypatch):
    now, seen = 100.0, []

    def save() -> None:
        nonlocal now
        seen.append(now)
        now += 5.0  # it takes a while

    monkeypatch.setattr(time, "monotonic", lambda: now)
    with saved_between_steps(save, 10.0) as between_steps:
        for _ in range(40):
            now += 1.0
            between_steps()
    assert seen == [111.0, 127.0, 143.0]


def test_the_first_interruption_ends_the_step_and_saves():
    save = Saved()
    with pytest.raises(KeyboardInterrupt):
        train(5, save, 1e9, interrupt_in=[2])
    assert save == [[0, 1, 2]]


def test_the_command_lines_handling_is_put_off_too_and_comes_back():
    signal.signal(signal.SIGINT, end_while_loading)
    save = Saved()
    with pytest.raises(KeyboardInterrupt):
        train(5, save, 1e9, interrupt_in=[2])
    assert save == [[0, 1, 2]]
    assert signal.signal(signal.SIGINT, signal.default_int_handler) is end_while_loading


def test_the_second_one_ends_it_at_once():
    save = Saved()
    with pytest.raises(KeyboardInterrupt):
        train(5, save, 1e9, interrupt_in=[2], times=2)
    assert save == []


def test_one_while_it_saves_ends_that():
    saved = []

    def save() -> None:
        signal.raise_signal(signal.SIGINT)
        saved.append("whole")

    save.finished = []
    with pytest.raises(KeyboardInterrupt):
        train(5, save, 1e9, interrupt_in=[2])
    assert (save.finished, saved) == ([0, 1, 2], [])


def test_one_after_the_last_step_is_saved_too():
    saved = []

    def train() -> None:
        with saved_between_steps(lambda: saved.append(1), 1e9) as between_steps:
            between_steps()
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train()
    assert saved == [1]


@pytest.mark.parametrize(
    "problem", [io.UnsupportedOperation("fileno"), OSError("hung up"), ValueError("closed")]
)
def test_what_stands_in_for_a_terminal_harms_nothing(monkeypatch, problem):
    class StandIn(io.StringIO):
        def isatty(self) -> bool:
            return True

        def fileno(self) -> int:
            raise problem

    save = Saved()
    for error_stream in (StandIn(), None):
        monkeypatch.setattr(sys, "stderr", error_stream)
        with pytest.raises(KeyboardInterrupt):
            train(5, save, 1e9, interrupt_in=[2])
    assert save == [[0, 1, 2]] * 2


def test_an_error_of_the_step_is_what_is_raised():
    def train() -> None:
        with saved_between_steps(list, 1e9):
            signal.raise_signal(signal.SIGINT)
            raise ValueError("of the step")

    with pytest.raises(ValueError, match="of the step"):
        train()


def test_with_nowhere_to_save_it_ends_at_once():
    with pytest.raises(KeyboardInterrupt):
        train(5, None, 1e9, interrupt_in=[2])


def test_a_programs_own_handler_is_left_alone():
    seen, save = [], Saved()
    signal.signal(signal.SIGINT, lambda *_: seen.append(1))
    try:
        assert train(3, save, 1e9, interrupt_in=[1]) == [0, 1, 2]
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert (seen, save) == ([1], [])


def test_another_thread_trains_without_signals():
    found = []
    thread = threading.Thread(target=lambda: found.append(train(2, Saved(), 1e9)))
    thread.start()
    thread.join()
    assert found == [[0, 1]]


TRAINING = """
import os, signal
from pydefect.interruption import end_while_loading, saved_between_steps
with saved_between_steps(lambda: print("saved"), 1e9) as between_steps:
    os.kill(os.getpid(), signal.SIGINT)
    print("step done")
    between_steps()
"""


@pytest.mark.parametrize("terminal", [False, True])
def test_a_terminal_is_told_what_happens(terminal):
    ours, theirs = pty.openpty()
    try:
        process = subprocess.run(
            [sys.executable, "-c", f"import signal; signal.signal(2, signal.default_int_handler){TRAINING}"],
            stdout=subprocess.PIPE,
            stderr=theirs if terminal else subprocess.PIPE,
            text=True,
        )
        told = os.read(ours, 65536).decode() if terminal else process.stderr
    finally:
        os.close(ours)
        os.close(theirs)
    assert process.stdout == "step done\nsaved\n"
    assert ("stopping after this step; Ctrl-C again stops at once" in told) == terminal
    assert process.returncode in (1, 130, -signal.SIGINT)


def takes_a_moment(number: int) -> int:
    time.sleep(0.05)
    return number


def test_processes_that_work_ahead_leave_it_to_the_main_one():
    # Ctrl-C in a terminal reaches all of them.
    found = done_ahead(takes_a_moment, range(12), 2)
    assert next(found) == 0
    workers = [process.pid for process in multiprocessing.active_children()]
    assert len(workers) >= 2
    for worker in workers:
        os.kill(worker, signal.SIGINT)
    assert list(found) == list(range(1, 12))
