"""The hypersphere loss (ConPatch, equation 7)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from pydefect.ops._precision import compute_dtype
from pydefect.ops.reference.knn import knn

__all__ = ["check_arguments", "hypersphere"]


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
        Scalar: mean over patches and centres of max(0, distance - r^2), in the units of the features. Half
        precision is computed in float32 and rounded once.

    References
    ----------
    Luo et al., Computer Science 52(1), 2025, equation (7).
    """
    check_arguments(features, bank, k, r, distance_power)
    bank = bank.detach()
    # Which centres are the nearest is decided in float32, as the native search does, whatever the gradient's
    # precision.
    indices = knn(features.detach().float(), bank.float(), k)[1]
    precision = compute_dtype(features)
    squared = (features.to(precision).unsqueeze(1) - bank.to(precision)[indices]).square().sum(2)
    # The clamp stops the square root's gradient where a patch lies on its centre.
    distances = squared if distance_power == 2 else squared.clamp_min(1e-30).sqrt()
    return torch.relu(distances - r**2).mean().to(features.dtype)


def check_arguments(features: Tensor, bank: Tensor, k: int, r: float, distance_power: int) -> None:
    """What the native operator refuses, for the compositions in PyTorch's operators."""
    for name, tensor in (("features", features), ("bank", bank)):
        if tensor.dim() != 2:
            raise RuntimeError(f"hypersphere: {name} must have 2 dimensions, got {tensor.dim()}")
    if not features.is_floating_point():
        raise RuntimeError(f"hypersphere: features must be floating point, got {features.dtype}")
    if features.dtype != bank.dtype:
        raise RuntimeError(f"hypersphere: bank must be {features.dtype} like features, got {bank.dtype}")
    if features.device != bank.device:
        raise RuntimeError("hypersphere: features and bank must be on one device")
    if features.size(1) < 1:
        raise RuntimeError("hypersphere: features must have a width of at least 1, got 0")
    if features.size(1) != bank.size(1):
        raise RuntimeError(
            f"hypersphere: bank must have the width of features, {features.size(1)}, got {bank.size(1)}"
        )
    if bank.size(0) < 1:
        raise RuntimeError("hypersphere: bank must have at least 1 row, got 0")
    if not 1 <= k <= bank.size(0):
        raise RuntimeError(f"hypersphere: k must be between 1 and the {bank.size(0)} rows of bank, got {k}")
    if not (r >= 0 and math.isfinite(r)):
        raise RuntimeError(f"hypersphere: r must be a finite number of at least 0, got {r}")
    if distance_power not in (1, 2):
        raise RuntimeError(f"hypersphere: distance_power must be 1 or 2, got {distance_power}")
