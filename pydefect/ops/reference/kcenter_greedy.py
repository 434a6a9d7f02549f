"""Greedy k-centre: a subset that covers all points (PatchCore's coreset)."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["kcenter_from_distances", "kcenter_greedy"]


def kcenter_greedy(features: Tensor, m: int) -> Tensor:
    """Choose m points, each the farthest from those chosen before it.

    Parameters
    ----------
    features
        [N, D] float.
    m
        Number of points to choose, 1..N.

    Returns
    -------
    Tensor
        [m] int64 in the order of choice, beginning with point 0; ties go to the lower index.

    References
    ----------
    Gonzalez, Clustering to minimize the maximum intercluster distance, 1985; Roth et al., Towards total
    recall in industrial anomaly detection, CVPR 2022, algorithm 1.
    """
    differences = features.unsqueeze(1) - features
    return kcenter_from_distances(differences.square().sum(2), m)[0]


def kcenter_from_distances(squared_distances: Tensor, m: int) -> tuple[Tensor, float]:
    """Choose as :func:`kcenter_greedy` does, from a table of squared distances.

    Parameters
    ----------
    squared_distances
        [N, N] float >= 0, symmetric.
    m
        Number of points to choose, 1..N.

    Returns
    -------
    chosen
        [m] int64 in the order of choice, beginning with point 0; ties go to the lower index.
    radius
        Squared distance of the farthest point from its nearest chosen one; 0 when every point is chosen.
    """
    chosen = [0]
    for _ in range(1, m):
        nearest = squared_distances[chosen].amin(0)
        nearest[chosen] = -1
        chosen.append(int(nearest.argmax()))
    radius = float(squared_distances[chosen].amin(0).max()) if m < len(squared_distances) else 0.0
    return torch.tensor(chosen, device=squared_distances.device), radius
