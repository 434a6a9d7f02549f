"""The hypersphere loss (ConPatch, equation 7)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pydefect.ops.reference.knn import knn

__all__ = ["hypersphere"]


def hypersphere(
    features: Tensor, bank: Tensor, k: int = 3, r: float = 1e-5, *, distance_power: Literal[1, 2] = 1
) -> Tensor:
    """Pull every patch into the spheres of radius r^2 around its k nearest centres.

    Parameters
    ----------
    features
        [N, D] float: representations F(p) of N = B * T patches; the gradient flows through them only.
    bank
        [M, D]: memory bank, taken as constant.
    k
        Number of centres K, 1..M.
    r
        Radius; as printed, distances are compared with r^2.
    distance_power
        1: Euclidean distances as printed; 2: squared distances, as in CFA's published code.

    Returns
    -------
    Tensor
        Scalar: mean over patches and centres of max(0, distance - r^2), in the units of the features.

    References
    ----------
    Luo et al., Computer Science 52(1), 2025, equation (7).
    """
    bank = bank.detach()
    # Which centres are the nearest is decided in float32, as the native search does, whatever the gradient's
    # precision.
    indices = knn(features.detach().float(), bank.float(), k)[1]
    squared = (features.unsqueeze(1) - bank[indices]).square().sum(2)
    # The clamp stops the square root's gradient where a patch lies on its centre.
    distances = squared if distance_power == 2 else squared.clamp_min(1e-30).sqrt()
    return torch.relu(distances - r**2).mean()
