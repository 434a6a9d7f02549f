"""Patch scores and smoothed anomaly maps from nearest-neighbour distances (ConPatch, equations 9 and 12)."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import Tensor

__all__ = ["patch_scores", "score_maps"]


def patch_scores(distances: Tensor, certainty: bool = True) -> Tensor:
    """Distance to the nearest centre, weighted by how clearly it is the nearest, equation (9).

    Parameters
    ----------
    distances
        [..., K] float >= 0: Euclidean distances to the K nearest centres.
    certainty
        False: the plain distance to the nearest centre.

    Returns
    -------
    Tensor
        [...], >= 0.

    References
    ----------
    Luo et al., Computer Science 52(1), 2025, equation (9).
    """
    nearest = distances.amin(-1)
    if not certainty:
        return nearest
    # exp(-S) / sum exp(-D_k), divided through by exp(-S): no underflow however large the distances are.
    return nearest / torch.exp(nearest.unsqueeze(-1) - distances).sum(-1)


def score_maps(
    distances: Tensor, size: tuple[int, int], sigma: float, *, certainty: bool = True
) -> tuple[Tensor, Tensor]:
    """Turn distances into patch scores and pixel scores.

    Parameters
    ----------
    distances
        [B, H, W, K] float >= 0: Euclidean distances of every patch to its K nearest centres.
    size
        (height, width) of the maps in pixels of the network's input.
    sigma
        Standard deviation of the Gaussian in those pixels; 0 for no smoothing.
    certainty
        See :func:`patch_scores`.

    Returns
    -------
    scores
        [B, H, W]: patch scores, equation (9).
    maps
        [B, height, width]: bilinearly upsampled (half-pixel centres), then smoothed with a Gaussian cut at 4
        sigma and mirrored at the border, equation (12).

    References
    ----------
    Luo et al., Computer Science 52(1), 2025, equations (9) and (12).
    """
    scores = patch_scores(distances, certainty)
    maps = F.interpolate(scores.unsqueeze(1), size=size, mode="bilinear", align_corners=False).squeeze(1)
    if sigma > 0 and len(maps):
        smoothed = np.stack(
            [gaussian_filter(one, sigma, mode="reflect", truncate=4.0) for one in maps.cpu().numpy()]
        )
        maps = torch.from_numpy(smoothed).to(maps.device)
    return scores, maps
