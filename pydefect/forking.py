"""Forked processes: PyTorch's threads stay behind, and whoever waits for them waits for ever."""

from __future__ import annotations

import os

import torch

__all__ = ["note_threads"]

_have_run = False


def note_threads() -> None:
    """Note that PyTorch's threads may run from now on: processes forked later compute with one thread."""
    global _have_run
    _have_run = True


def _go_on_alone() -> None:
    if _have_run and torch.get_num_threads() > 1:
        torch.set_num_threads(1)


os.register_at_fork(after_in_child=_go_on_alone)
