"""Streaming k-centre: centres and new points reduced to m centres again."""

from __future__ import annotations

import torch
from torch import Tensor

from pydefect.ops.reference.kcenter_greedy import farthest_first

__all__ = ["kcenter_reduce"]


def kcenter_reduce(
    centres: Tensor, added: Tensor, m: int, distances: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose m of the centres and the added points; see :func:`pydefect.ops.kcenter_reduce`.

    Every pair is measured in float64 and rounded to the centres' dtype; ``distances`` is not needed for it.
    """
    _check(centres, added, m, distances)
    points = torch.cat([centres, added]).detach()
    chosen, nearest = farthest_first(points, m)
    rows = points[chosen].double()
    between = torch.stack([(rows - row).square().sum(1) for row in rows]).to(points.dtype)
    return chosen, nearest.max().clamp_min(0), between


def _check(centres: Tensor, added: Tensor, m: int, distances: Tensor | None) -> None:
    for name, tensor in (("centres", centres), ("added", added), ("distances", distances)):
        if tensor is None:
            continue
        if tensor.dim() != 2:
            raise RuntimeError(f"kcenter_reduce: {name} must have 2 dimensions, got {tensor.dim()}")
        if tensor.dtype not in (torch.float32, torch.float64) or tensor.dtype != centres.dtype:
            raise RuntimeError(f"kcenter_reduce: {name} must be float32 or all float64, got {tensor.dtype}")
        if tensor.device != centres.device:
            raise RuntimeError(f"kcenter_reduce: centres and {name} must be on one device")
    if centres.size(0) < 1:
        raise RuntimeError("kcenter_reduce: centres must have at least 1 row, got 0")
    if centres.size(1) < 1:
        raise RuntimeError("kcenter_reduce: centres must have a width of at least 1, got 0")
    if added.size(1) != centres.size(1):
        raise RuntimeError(
            f"kcenter_reduce: added must have the width of centres, {centres.size(1)}, got {added.size(1)}"
        )
    points = centres.size(0) + added.size(0)
    if not 1 <= m <= points:
        raise RuntimeError(
            f"kcenter_reduce: m must be between 1 and the {points} rows of centres and added, got {m}"
        )
    if distances is not None and distances.shape != (len(centres), len(centres)):
        raise RuntimeError(
            f"kcenter_reduce: distances must be {len(centres)} x {len(centres)}, "
            f"got {' x '.join(map(str, distances.shape))}"
        )
