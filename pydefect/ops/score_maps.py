"""Patch scores and smoothed anomaly maps, with upsampling and smoothing in one pass."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d
from torch import Tensor

from pydefect.ops._library import has_kernels, load_cpu_library, load_cuda_library
from pydefect.ops.reference.score_maps import check_arguments, patch_scores

__all__ = ["score_maps"]

load_cpu_library()
load_cuda_library()


def score_maps(
    distances: Tensor, size: tuple[int, int], sigma: float, *, certainty: bool = True
) -> tuple[Tensor, Tensor]:
    """Turn distances into patch scores and pixel scores.

    Upsampling and smoothing are linear and separable: along each axis both are one banded matrix, computed
    once for each length, size and sigma.

    Parameters
    ----------
    distances
        [B, H, W, K] float32 >= 0: Euclidean distances of every patch to its K nearest centres. B may be 0.
    size
        (height, width) of the maps in pixels of the network's input.
    sigma
        Standard deviation of the Gaussian in those pixels, below 2**20; 0 for no smoothing.
    certainty
        Weight the distance with equation (9)'s certainty; False: the plain distance to the nearest centre.

    Returns
    -------
    scores
        [B, H, W] float32: patch scores, equation (9).
    maps
        [B, height, width] float32: bilinearly upsampled (half-pixel centres), then smoothed with a Gaussian
        cut at 4 sigma and mirrored at the border, equation (12). Never below zero: weights are not negative.

    Raises
    ------
    RuntimeError
        If an argument has the wrong shape, dtype or range.

    Notes
    -----
    No gradient flows through this operator: both results are detached. They are the same bit for bit for
    every number of threads; another instruction set may change last digits.

    A score is NaN where one of its distances is NaN or all are infinite. A score that is not finite makes its
    surroundings on the map not finite: the pixels that it reaches through upsampling and smoothing, and on
    the same lines up to 15 pixels beside them.

    The native kernels take float32 on the CPU and on CUDA; float64 goes through two matrix products in
    PyTorch (where NaN spreads over the whole image).

    References
    ----------
    Luo et al., Computer Science 52(1), 2025, equations (9) and (12).
    """
    distances = distances.detach()
    if has_kernels(distances.device) and distances.dtype != torch.float64:
        scores, maps = torch.ops.pydefect.score_maps(distances, size[0], size[1], sigma, certainty)
        return scores, maps
    check_arguments(distances, size, sigma)
    scores = patch_scores(distances, certainty)
    rows, columns = (
        torch.from_numpy(_upsample_and_smooth(length, pixels, sigma)).to(scores)
        for length, pixels in zip(scores.shape[1:], size, strict=True)
    )
    return scores, rows @ scores @ columns.T


@lru_cache(maxsize=64)
def _upsample_and_smooth(length: int, size: int, sigma: float) -> NDArray[np.float64]:
    """Both steps along one axis as a [size, length] matrix."""
    places = ((np.arange(size) + 0.5) * (length / size) - 0.5).clip(0, length - 1)
    matrix = np.maximum(0.0, 1 - np.abs(places[:, None] - np.arange(length)))
    if sigma > 0:
        matrix = gaussian_filter1d(matrix, sigma, axis=0, mode="reflect", truncate=4.0)
    return np.ascontiguousarray(matrix)


@torch.library.register_fake("pydefect::score_maps")
def _score_maps_fake(
    distances: Tensor, height: int, width: int, sigma: float, certainty: bool
) -> tuple[Tensor, Tensor]:
    check_arguments(distances, (height, width), sigma)
    batch, rows, columns, _ = distances.shape
    return distances.new_empty((batch, rows, columns)), distances.new_empty((batch, height, width))
