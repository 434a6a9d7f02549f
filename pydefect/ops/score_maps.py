"""Patch scores and smoothed anomaly maps, with upsampling and smoothing in one pass."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter1d
from torch import Tensor

from pydefect.ops.reference.score_maps import patch_scores

__all__ = ["score_maps"]


@lru_cache(maxsize=64)
def _upsample_and_smooth(length: int, size: int, sigma: float) -> Tensor:
    """Both steps along one axis as a [size, length] matrix: they are linear and separable."""
    identity = torch.eye(length, dtype=torch.float64)
    matrix = F.interpolate(identity.unsqueeze(0), size=size, mode="linear", align_corners=False)[0].T.numpy()
    if sigma > 0:
        matrix = gaussian_filter1d(matrix, sigma, axis=0, mode="reflect", truncate=4.0)
    return torch.from_numpy(np.ascontiguousarray(matrix, dtype=np.float32))


def score_maps(
    distances: Tensor, size: tuple[int, int], sigma: float, *, certainty: bool = True
) -> tuple[Tensor, Tensor]:
    """Turn distances into patch scores and pixel scores.

    Parameters
    ----------
    distances
        [B, H, W, K] float32 >= 0: Euclidean distances of every patch to its K nearest centres.
    size
        (height, width) of the maps in pixels of the network's input.
    sigma
        Standard deviation of the Gaussian in those pixels; 0 for no smoothing.
    certainty
        Weight the distance with equation (9)'s certainty; False: the plain distance to the nearest centre.

    Returns
    -------
    scores
        [B, H, W] float32: patch scores, equation (9).
    maps
        [B, height, width] float32: bilinearly upsampled (half-pixel centres), then smoothed with a Gaussian
        cut at 4 sigma and mirrored at the border, equation (12).

    References
    ----------
    Luo et al., Computer Science 52(1), 2025, equations (9) and (12).
    """
    scores = patch_scores(distances, certainty)
    rows = _upsample_and_smooth(scores.shape[1], size[0], sigma).to(scores.device)
    columns = _upsample_and_smooth(scores.shape[2], size[1], sigma).to(scores.device)
    return scores, rows @ scores @ columns.T
