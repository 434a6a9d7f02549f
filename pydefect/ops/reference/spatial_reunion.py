"""The spatial reunion module behind its two wide convolutions (dual autoencoder, equations 2 to 7)."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from pydefect.ops._maps import check_map, check_shapes
from pydefect.ops._precision import compute_dtype

__all__ = ["NORMALISATIONS", "Normalisation", "check_spatial_reunion", "spatial_reunion"]

Normalisation = Literal["none", "mean", "softmax"]
# The native operator counts them in this order.
NORMALISATIONS: tuple[Normalisation, ...] = ("none", "mean", "softmax")


def check_spatial_reunion(
    features: Tensor, local: Tensor, coarse: Tensor, weight: Tensor, bias: Tensor, normalisation: str
) -> None:
    """Raise a RuntimeError that names the argument that is wrong."""
    op = "spatial_reunion"
    check_map(op, "features", features)
    check_map(op, "coarse", coarse)
    batch, channels = features.shape[:2]
    expected = {
        "local": (local, tuple(features.shape)),
        "coarse": (coarse, (batch, channels, *coarse.shape[2:])),
        "weight": (weight, (1, channels, 3, 3)),
        "bias": (bias, (1,)),
    }
    check_shapes(op, features.device, expected)
    if normalisation not in NORMALISATIONS:
        raise RuntimeError(
            f"{op}: normalisation must be one of {', '.join(NORMALISATIONS)}, got {normalisation!r}"
        )


def spatial_reunion(
    features: Tensor,
    local: Tensor,
    coarse: Tensor,
    weight: Tensor,
    bias: Tensor,
    normalisation: Normalisation = "none",
) -> Tensor:
    """Gate, attend, sum and add, one operation after the other; see :func:`pydefect.ops.spatial_reunion`."""
    check_spatial_reunion(features, local, coarse, weight, bias, normalisation)
    dtype = compute_dtype(features)
    identity, local, coarse = features.to(dtype), local.to(dtype), coarse.to(dtype)
    up = F.interpolate(coarse, size=features.shape[2:], mode="bilinear", align_corners=False)
    gated = local * torch.sigmoid(up + identity)
    attention = F.conv2d(gated, weight.to(dtype), bias.to(dtype), padding=1)
    if normalisation == "mean":
        attention = attention / (features.shape[2] * features.shape[3])
    elif normalisation == "softmax":
        attention = attention.flatten(2).softmax(2).reshape(attention.shape)
    context = (identity * attention).sum((2, 3), keepdim=True)
    return (identity + context).to(features.dtype)
