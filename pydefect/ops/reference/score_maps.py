"""Patch scores and smoothed anomaly maps from nearest-neighbour distances (ConPatch, equations 9 and 12)."""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter
from torch import Tensor

__all__ = ["check_arguments", "patch_scores", "score_maps"]


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


def check_arguments(distances: Tensor, size: tuple[int, int], sigma: float) -> None:
    """Raise a RuntimeError that says what is wrong with the arguments of :func:`score_maps`."""
    if distances.dim() != 4:
        raise RuntimeError(f"score_maps: distances must have 4 dimensions, got {distances.dim()}")
    if distances.dtype not in (torch.float32, torch.float64):
        raise RuntimeError(f"score_maps: distances must be float32, got {distances.dtype}")
    if min(distances.shape[1:]) < 1:
        raise RuntimeError(
            "score_maps: distances must have between 1 and 2^30 rows, columns and neighbours, "
            f"got {distances.shape[1]}, {distances.shape[2]} and {distances.shape[3]}"
        )
    if min(size) < 1:
        raise RuntimeError(
            f"score_maps: size must be between 1 and 2^30 pixels each way, got {size[0]} and {size[1]}"
        )
    if not 0 <= sigma < 2**20:
        raise RuntimeError(f"score_maps: sigma must be between 0 and 2^20 pixels, got {sigma:g}")


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
    check_arguments(distances, size, sigma)
    scores = patch_scores(distances, certainty)
    maps = F.interpolate(scores.unsqueeze(1), size=size, mode="bilinear", align_corners=False).squeeze(1)
    if sigma > 0 and len(maps):
        smoothed = np.stack(
            [gaussian_filter(one, sigma, mode="reflect", truncate=4.0) for one in maps.cpu().numpy()]
        )
        maps = torch.from_numpy(smoothed).to(maps.device)
    return scores, maps
