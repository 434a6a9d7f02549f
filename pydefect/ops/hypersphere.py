"""The hypersphere loss (ConPatch, equation 7) over the native nearest-neighbour search."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pydefect.ops.knn import knn

__all__ = ["hypersphere"]


def hypersphere(
    features: Tensor, bank: Tensor, k: int = 3, r: float = 1e-5, *, distance_power: Literal[1, 2] = 1
) -> Tensor:
    """Pull every patch into the spheres of radius r^2 around its k nearest centres.

    Parameters
    ----------
    features
        [N, D] float32: representations F(p) of N = B * T patches; the gradient flows through them only.
    bank
        [M, D] float32: memory bank, taken as constant.
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
    indices = knn(features.detach(), bank, k)[1]
    loss = features.new_zeros(())
    # One centre at a time: [N, D] temporaries instead of [N, k, D].
    for column in range(k):
        squared = (features - bank[indices[:, column]]).square().sum(1)
        # The clamp stops the square root's gradient where a patch lies on its centre.
        distances = squared if distance_power == 2 else squared.clamp_min(1e-30).sqrt()
        loss = loss + torch.relu(distances - r**2).sum()
    return loss / indices.numel()
