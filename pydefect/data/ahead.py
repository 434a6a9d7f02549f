"""Work for each of some numbers, done ahead of its use by processes of their own."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

import cv2
import torch
from torch.utils.data import DataLoader, Dataset

__all__ = ["done_ahead", "idle_workers"]

Item = TypeVar("Item")

# More than that are seldom needed to keep a card busy.
_MOST_WORKERS = 15


def idle_workers(device: torch.device) -> int:
    """Count the processes that can prepare images for a device.

    Parameters
    ----------
    device
        Where the networks compute.

    Returns
    -------
    int
        0 where they compute on the processor, which has no core to spare; else all cores but one, at most 15.
    """
    if device.type == "cpu":
        return 0
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(_MOST_WORKERS, cores - 1))


def done_ahead(
    make: Callable[[int], Item], numbers: Iterable[int], workers: int, ahead: int = 4
) -> Iterator[Item]:
    """Yield ``make(number)`` for every number, in order.

    Parameters
    ----------
    make
        Depends on its argument alone; with workers what it returns is pickled, arrays and tensors by way of
        shared memory.
    numbers
        Read as they are needed.
    workers
        Processes; 0: everything is made here when it is asked for.
    ahead
        Items that each process makes ahead of their use.

    Yields
    ------
    Item
        What `make` returned.
    """
    if workers == 0:
        yield from map(make, numbers)
        return
    loader = DataLoader(
        _Made(make),
        sampler=numbers,
        batch_size=None,
        num_workers=workers,
        prefetch_factor=ahead,
        collate_fn=_as_it_is,
        worker_init_fn=_begin,
        # Python 3.14 would start a server that imports the caller's script, which then has to guard its own
        # doings by `if __name__ == "__main__"`. A fork is safe here: nothing in it touches a card.
        multiprocessing_context="fork" if sys.platform == "linux" else None,
        # Else it would draw the processes' seeds from PyTorch's own generator.
        generator=torch.Generator(),
    )
    made: Any = iter(loader)
    try:
        yield from made
    finally:
        # After an error it would be garbage together with the traceback, and collecting it would take five
        # seconds a process: what tells them to end is gone by then.
        made._shutdown_workers()


class _Made(Dataset[Item], Generic[Item]):
    def __init__(self, make: Callable[[int], Item]) -> None:
        self._make = make

    def __getitem__(self, number: int) -> Item:
        return self._make(number)


def _as_it_is(item: Any) -> Any:
    return item


def _begin(_: int) -> None:
    # A process has one image at a time, and OpenCV's threads do not survive a fork.
    cv2.setNumThreads(0)
    # Ctrl-C in a terminal reaches every process. It is for the main one, which may have a use for what is
    # still being made, and then ends the others.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
