"""Greedy k-centre: a subset that covers all points (PatchCore's coreset)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["farthest_first", "kcenter_greedy"]


def kcenter_greedy(features: Tensor, m: int) -> Tensor:
    """Choose m points, each the farthest from those before it; see :func:`pydefect.ops.kcenter_greedy`.

    Every pair is measured in float64 and rounded to the features' dtype, so points whose float32 distances
    differ by their last bits only may change places.
    """
    if features.dim() != 2:
        raise RuntimeError(f"kcenter_greedy: features must have 2 dimensions, got {features.dim()}")
    if features.dtype not in (torch.float32, torch.float64):
        raise RuntimeError(f"kcenter_greedy: features must be float32 or float64, got {features.dtype}")
    if features.size(0) < 1:
        raise RuntimeError("kcenter_greedy: features must have at least 1 row, got 0")
    if features.size(1) < 1:
        raise RuntimeError("kcenter_greedy: features must have a width of at least 1, got 0")
    if not 1 <= m <= len(features):
        raise RuntimeError(
            f"kcenter_greedy: m must be between 1 and the {len(features)} rows of features, got {m}"
        )
    return farthest_first(features.detach(), m)[0]


def farthest_first(points: Tensor, m: int) -> tuple[Tensor, Tensor]:
    """Choose greedily.

    Parameters
    ----------
    points
        [N, D] float32 or float64.
    m
        Number of points to choose, 1..N.

    Returns
    -------
    chosen
        [m] int64 in the order of choice, beginning with point 0; ties go to the lower index.
    nearest
        [N]: every point's squared distance from its nearest chosen one; -1 for the chosen ones themselves.
    """
    chosen = [0]
    nearest = torch.full((len(points),), torch.inf, dtype=points.dtype, device=points.device)
    while True:
        distances = (points.double() - points[chosen[-1]].double()).square().sum(1).to(points.dtype)
        # A distance that is not a number lowers nothing.
        nearest = torch.where(distances < nearest, distances, nearest)
        nearest[chosen] = -1
        if len(chosen) == m:
            return torch.tensor(chosen, device=points.device), nearest
        # The first one of equals.
        chosen.append(int(nearest.argmax()))
