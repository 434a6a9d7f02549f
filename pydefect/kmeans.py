"""k-means of patch features, without a random number."""

from __future__ import annotations

import torch
from torch import Tensor

from pydefect.ops import kcenter_greedy, knn

__all__ = ["assigned_patches", "kmeans", "nearest_centres"]

# Lloyd's iterations at most. Over a product image the assignment stands after five to seven.
_ITERATIONS = 20


def kmeans(patches: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Find the k-means of patches by Lloyd's algorithm, begun at their k-centres.

    Parameters
    ----------
    patches
        [T, D] float32.
    size
        Number of centres, 1..T.

    Returns
    -------
    centres
        [size, D] float32. A centre that no patch is nearest to stays where it was: of equal patches all but
        one are at the same place.
    counts
        [size] float32: how many patches each stands for, at least 1.

    Notes
    -----
    With a centre for every four patches of an image the sum of squares ends some percent above what greedy
    k-means++ leads to, in a small part of its time (``benchmarks/bench_kmeans.py``).
    """
    centres = patches[kcenter_greedy(patches, size)]
    nearest = nearest_centres(patches, centres)[1]
    for _ in range(_ITERATIONS):
        sums, counts = assigned_patches(patches, nearest, size)
        means = sums / counts.clamp_min(1).unsqueeze(1)
        centres = torch.where(counts.unsqueeze(1) > 0, means, centres)
        before, nearest = nearest, nearest_centres(patches, centres)[1]
        if torch.equal(nearest, before):
            break
    return centres, assigned_patches(patches, nearest, size)[1].clamp_min(1)


def nearest_centres(patches: Tensor, centres: Tensor) -> tuple[Tensor, Tensor]:
    """Find the centre nearest to each patch.

    Parameters
    ----------
    patches, centres
        [T, D] and [M, D] float32.

    Returns
    -------
    distances, indices
        [T] each: its squared distance, float32, and its row, int64.
    """
    distances, indices = knn(patches, centres, 1, precision="bf16")
    return distances[:, 0], indices[:, 0]


def assigned_patches(patches: Tensor, nearest: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Add up and count the patches of every centre.

    Parameters
    ----------
    patches
        [T, D] float32.
    nearest
        [T] int64: each patch's centre, below `size`.
    size
        Number of centres.

    Returns
    -------
    sums, counts
        [size, D] and [size] float32.
    """
    if patches.is_cuda:
        # index_add_ adds in whatever order there; a product adds in one. In float64, which no setting of the
        # caller's rounds to TF32.
        belongs = (nearest == torch.arange(size, device=nearest.device).unsqueeze(1)).double()
        return (belongs @ patches.double()).to(patches.dtype), belongs.sum(1).to(patches.dtype)
    sums = patches.new_zeros(size, patches.shape[1]).index_add_(0, nearest, patches)
    counts = patches.new_zeros(size).index_add_(0, nearest, torch.ones_like(patches[:, 0]))
    return sums, counts
