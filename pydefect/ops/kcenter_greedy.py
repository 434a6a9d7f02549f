"""Greedy k-centre with all distances from matrix products."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["kcenter_from_distances", "kcenter_greedy"]

# A table of pairwise distances of up to this many float32 is computed at once (256 MB).
_TABLE_ELEMENTS = 1 << 26


def kcenter_greedy(features: Tensor, m: int) -> Tensor:
    """Choose m points, each the farthest from those chosen before it.

    Parameters
    ----------
    features
        [N, D] float32.
    m
        Number of points to choose, 1..N.

    Returns
    -------
    Tensor
        [m] int64 in the order of choice, beginning with point 0; ties go to the lower index. Distances carry
        float32 rounding of the expanded form, so points within about 1e-6 of the squared norm of a tie may
        change places.

    References
    ----------
    Gonzalez, Clustering to minimize the maximum intercluster distance, 1985; Roth et al., Towards total
    recall in industrial anomaly detection, CVPR 2022, algorithm 1.
    """
    n = features.shape[0]
    # Distances do not change under a shift; near the origin the expanded form loses fewer digits.
    features = features - features.mean(0)
    norms = features.square().sum(1)
    if n * n <= _TABLE_ELEMENTS:
        table = torch.addmm(norms, features, features.T, alpha=-2).add_(norms.unsqueeze(1))
        return kcenter_from_distances(table, m)[0]
    chosen = torch.zeros(m, dtype=torch.int64, device=features.device)
    nearest = torch.full_like(norms, torch.inf)
    for step in range(m):
        point = chosen[step]
        torch.minimum(nearest, norms + norms[point] - 2 * (features @ features[point]), out=nearest)
        nearest[point] = -torch.inf
        if step + 1 < m:
            chosen[step + 1] = nearest.argmax()
    return chosen


def kcenter_from_distances(squared_distances: Tensor, m: int) -> tuple[Tensor, float]:
    """Choose as :func:`kcenter_greedy` does, from a table of squared distances.

    Parameters
    ----------
    squared_distances
        [N, N] float32, symmetric.
    m
        Number of points to choose, 1..N.

    Returns
    -------
    chosen
        [m] int64 in the order of choice, beginning with point 0; ties go to the lower index.
    radius
        Squared distance of the farthest point from its nearest chosen one; 0 when every point is chosen.
    """
    n = squared_distances.shape[0]
    chosen = torch.zeros(m, dtype=torch.int64, device=squared_distances.device)
    nearest = torch.full((n,), torch.inf, dtype=squared_distances.dtype, device=squared_distances.device)
    point = 0
    for step in range(m):
        chosen[step] = point
        torch.minimum(nearest, squared_distances[point], out=nearest)
        # Rounding must never bring a chosen point back.
        nearest[point] = -torch.inf
        point = int(nearest.argmax())
    return chosen, max(0.0, float(nearest[point]))
