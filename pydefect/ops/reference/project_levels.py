"""The 1x1 CoordConv over several feature levels: upsample, concatenate, convolve."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["coordinate_channels", "project_levels"]


def coordinate_channels(
    height: int, width: int, *, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> Tensor:
    """Row and column of every patch, each linearly in [-1, 1] (0 along an axis of length 1).

    Returns
    -------
    Tensor
        [2, height, width], rows first.
    """

    def axis(length: int) -> Tensor:
        if length == 1:
            return torch.zeros(1, dtype=dtype, device=device)
        return torch.linspace(-1, 1, length, dtype=dtype, device=device)

    return torch.stack(torch.meshgrid(axis(height), axis(width), indexing="ij"))


def project_levels(levels: Sequence[Tensor], weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Fuse feature levels and coordinates with a 1x1 convolution.

    Parameters
    ----------
    levels
        [B, C_l, H_l, W_l] float each, finest grid first.
    weight
        [D, sum(C_l) + 2]: columns of the first level, the second, ..., row coordinate, column coordinate.
    bias
        [D], or None for none.

    Returns
    -------
    Tensor
        [B, H_1 * W_1, D], patches in row-major order.

    References
    ----------
    Luo et al., Computer Science 52(1), 2025, section 3.3; Liu et al., An intriguing failing of convolutional
    neural networks and the CoordConv solution, NeurIPS 2018.
    """
    batch, _, height, width = levels[0].shape
    upsampled = [
        level
        if level.shape[2:] == (height, width)
        else F.interpolate(level, size=(height, width), mode="bilinear", align_corners=False)
        for level in levels
    ]
    coordinates = coordinate_channels(height, width, dtype=weight.dtype, device=weight.device)
    features = torch.cat([*upsampled, coordinates.expand(batch, -1, -1, -1)], dim=1)
    projected = F.conv2d(features, weight[:, :, None, None], bias)
    return projected.flatten(2).transpose(1, 2)
