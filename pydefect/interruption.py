"""What Ctrl-C leaves: one line of a command, of a training the state after its last whole step."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

__all__ = ["INTERRUPTED", "end_while_loading", "saved_between_steps"]

INTERRUPTED = 130
"""The exit code of an interrupted command, as shells give it."""


def end_while_loading(number: int, frame: FrameType | None) -> None:
    """Handle SIGINT as Python does, but end the process, in one line, where a module is being imported.

    While PyTorch is loaded, a KeyboardInterrupt in it comes out as another error, or aborts the process.
    """
    place = frame
    while place is not None and not place.f_code.co_filename.startswith("<frozen importlib"):
        place = place.f_back
    if place is None:
        signal.default_int_handler(number, frame)
    with suppress(OSError, ValueError, AttributeError, RuntimeError):
        sys.stdout.flush()
    with suppress(OSError):
        os.write(2, b"pydefect: interrupted\n")
    os._exit(INTERRUPTED)


@contextmanager
def saved_between_steps(save: Callable[[], None] | None, interval: float) -> Iterator[Callable[[], None]]:
    """Save a training now and then, and once more before an interruption ends it.

    A step that is cut off leaves weights, moments and random streams that belong to no step. So the first
    interruption waits for the step to end, is answered with ``save()``, and ends the training then; a second
    one ends it at once. On a terminal a line says so. What is put off is Python's own handling, or that of
    the command line: a program with a handler of its own keeps that, and other threads than the main one get
    no signals.

    Parameters
    ----------
    save
        Keeps the state as it is between two steps. None: there is nowhere to keep it, and an interruption
        ends the training at once.
    interval
        Seconds between two calls of `save`.

    Yields
    ------
    callable
        To be called after every step, when all of it is done.

    Raises
    ------
    KeyboardInterrupt
        After saving: from what was yielded, or from the end of the block where it came after the last call.
    """
    interrupted = False
    saved_at = time.monotonic()

    def between_steps() -> None:
        nonlocal saved_at
        if save is None:
            return
        if interrupted or time.monotonic() - saved_at > interval:
            save()
            saved_at = time.monotonic()
        if interrupted:
            raise KeyboardInterrupt

    def hold(number: int, frame: Any) -> None:
        nonlocal interrupted
        if interrupted:
            signal.default_int_handler(number, frame)
        interrupted = True
        # Whatever stands in for a terminal, or has become of it: it is the step that counts.
        with suppress(OSError, ValueError, AttributeError):
            if sys.stderr.isatty():
                # Not print: the signal may have come in the middle of one.
                os.write(sys.stderr.fileno(), b"\nstopping after this step; Ctrl-C again stops at once\n")

    before = signal.getsignal(signal.SIGINT)
    is_held = threading.current_thread() is threading.main_thread() and before in (
        signal.default_int_handler,
        end_while_loading,
    )
    if save is None or not is_held:
        yield between_steps
        return
    signal.signal(signal.SIGINT, hold)
    try:
        yield between_steps
    finally:
        signal.signal(signal.SIGINT, before)
    if interrupted:
        # After the last step, or in what the block does around it: without an error the state is whole.
        save()
        raise KeyboardInterrupt
