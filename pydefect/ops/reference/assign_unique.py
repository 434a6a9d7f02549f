"""Each centre takes its nearest patch that no earlier centre has taken (ConPatch, algorithm 1)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["assign_unique", "check_assign_unique"]


def assign_unique(bank: Tensor, patches: Tensor) -> Tensor:
    """Find the patches C^NN of algorithm 1, lines 4 to 7; see :func:`pydefect.ops.assign_unique`.

    Every pair is measured in float64 and rounded to the inputs' dtype, so a centre for which two patches'
    float32 distances differ by their last bits only may take the other one than by the native kernel.
    """
    check_assign_unique(bank, patches)
    bank, patches = bank.detach(), patches.detach()
    free = torch.ones(len(patches), dtype=torch.bool, device=bank.device)
    taken = torch.empty(len(bank), dtype=torch.int64, device=bank.device)
    for centre in range(len(bank)):
        distances = (patches.double() - bank[centre].double()).square().sum(1).to(bank.dtype)
        remaining = free.nonzero()[:, 0]
        # A stable sort keeps the lower index first and puts NaN last.
        patch = remaining[distances[remaining].sort(stable=True).indices[0]]
        taken[centre] = patch
        free[patch] = False
    return taken


def check_assign_unique(bank: Tensor, patches: Tensor) -> None:
    """Raise a RuntimeError where the arguments of :func:`assign_unique` do not fit."""
    for name, tensor in (("bank", bank), ("patches", patches)):
        if tensor.dim() != 2:
            raise RuntimeError(f"assign_unique: {name} must have 2 dimensions, got {tensor.dim()}")
        if tensor.dtype not in (torch.float32, torch.float64):
            raise RuntimeError(f"assign_unique: {name} must be float32 or float64, got {tensor.dtype}")
    if bank.dtype != patches.dtype:
        raise RuntimeError(
            f"assign_unique: patches must have the dtype of bank, {bank.dtype}, got {patches.dtype}"
        )
    if bank.device != patches.device:
        raise RuntimeError("assign_unique: bank and patches must be on one device")
    if patches.size(0) < 1:
        raise RuntimeError("assign_unique: patches must have at least 1 row, got 0")
    if patches.size(1) < 1:
        raise RuntimeError("assign_unique: patches must have a width of at least 1, got 0")
    if max(patches.shape) >= 2**30:
        raise RuntimeError(
            f"assign_unique: patches must have fewer than 2^30 rows and columns, got {patches.size(0)} and "
            f"{patches.size(1)}"
        )
    if bank.size(1) != patches.size(1):
        raise RuntimeError(
            f"assign_unique: bank must have the width of patches, {patches.size(1)}, got {bank.size(1)}"
        )
    if bank.size(0) > patches.size(0):
        raise RuntimeError(
            f"assign_unique: bank must have at most one row for each of the {patches.size(0)} patches, "
            f"got {bank.size(0)}"
        )
