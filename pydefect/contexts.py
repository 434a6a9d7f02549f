"""What a caller has switched on in PyTorch for networks of their own is off in ours."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import torch

from pydefect.errors import InputError
from pydefect.forking import note_threads

__all__ = ["for_inference", "for_training"]


@contextmanager
def for_inference(device: torch.device) -> Iterator[None]:
    """Compute where the networks are, in the types they have, whatever autocast and default device are set.

    Parameters
    ----------
    device
        Where the networks compute.
    """
    note_threads()
    # Every call in such a block costs something, and of most callers nothing is to be undone.
    placed = nullcontext() if torch.get_default_device().type == "cpu" else torch.device("cpu")
    with torch.autocast(device.type, enabled=False), placed:
        yield


@contextmanager
def for_training(device: torch.device) -> Iterator[None]:
    """Build networks, and differentiate them, also where the caller has gradients off, autocast on or
    another default device.

    Parameters
    ----------
    device
        Where the networks compute.

    Raises
    ------
    InputError
        PyTorch's default dtype is not float32. It is the whole process's: changing it here would change it
        for the caller's other threads.
    """
    if torch.get_default_dtype() != torch.float32:
        raise InputError(
            f"torch.get_default_dtype(): {torch.get_default_dtype()} is set; allowed is torch.float32, in "
            "which networks are built"
        )
    with torch.inference_mode(False), torch.enable_grad(), for_inference(device):
        yield
