"""PyTorch's own random numbers: weights and dropout's masks come from one generator in the whole process."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

__all__ = ["DRAWING", "seeded"]

# Held by the one thread that draws: two fits in threads of one process would draw from each other's sequence.
DRAWING = threading.RLock()


@contextmanager
def seeded(seed: int, device: torch.device | None = None) -> Iterator[None]:
    """Let PyTorch draw from a seed in this block, and afterwards go on as if nothing had been drawn.

    Only one thread is in such a block at a time.

    Parameters
    ----------
    seed
        Equal seeds give equal numbers.
    device
        A card whose generator is seeded too; None or the CPU: no card's is touched.
    """
    on_card = device is not None and device.type == "cuda"
    with DRAWING, torch.random.fork_rng(devices=[device] if on_card else []):
        # Not torch.manual_seed, which seeds the generators of all cards.
        torch.default_generator.manual_seed(seed)
        if on_card:
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
