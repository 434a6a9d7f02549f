"""The 1x1 CoordConv over several feature levels: upsample, concatenate, convolve."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["check_arguments", "coordinate_channels", "project_levels"]


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


def check_arguments(levels: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> None:
    """Raise a RuntimeError that says what is wrong with the arguments of :func:`project_levels`."""
    if not levels:
        raise RuntimeError("project_levels: levels must hold at least 1 tensor, got none")
    for index, level in enumerate(levels):
        name = f"levels[{index}]"
        if level.dim() != 4:
            raise RuntimeError(f"project_levels: {name} must have 4 dimensions, got {level.dim()}")
        if level.dtype not in (weight.dtype, torch.float32, torch.bfloat16, torch.float16):
            raise RuntimeError(
                f"project_levels: {name} must be float32, bfloat16 or float16, got {level.dtype}"
            )
        if level.shape[0] != levels[0].shape[0]:
            raise RuntimeError(
                f"project_levels: {name} must have the batch size of levels[0], {levels[0].shape[0]}, "
                f"got {level.shape[0]}"
            )
        if min(level.shape[1:]) < 1:
            raise RuntimeError(
                f"project_levels: {name} must have between 1 and 2^30 channels, rows and columns, "
                f"got {level.shape[1]}, {level.shape[2]} and {level.shape[3]}"
            )
    if weight.dim() != 2:
        raise RuntimeError(f"project_levels: weight must have 2 dimensions, got {weight.dim()}")
    if not weight.is_floating_point():
        raise RuntimeError(f"project_levels: weight must be float32, got {weight.dtype}")
    if any(tensor.device != weight.device for tensor in (*levels, *([] if bias is None else [bias]))):
        raise RuntimeError("project_levels: all tensors must be on one device")
    inputs = sum(level.shape[1] for level in levels) + 2
    if weight.shape[0] < 1:
        raise RuntimeError("project_levels: weight must have at least 1 row, got 0")
    if weight.shape[1] != inputs:
        raise RuntimeError(
            "project_levels: weight must have a column for each of the levels' channels and 2 for the "
            f"coordinates, {inputs}, got {weight.shape[1]}"
        )
    if bias is None:
        return
    if bias.shape != weight.shape[:1]:
        raise RuntimeError(f"project_levels: bias must have the shape [{weight.shape[0]}]")
    if bias.dtype != weight.dtype:
        raise RuntimeError(f"project_levels: bias must be {str(weight.dtype)[6:]}, got {bias.dtype}")


def project_levels(
    levels: Sequence[Tensor], weight: Tensor, bias: Tensor | None = None, *, pool: bool = False
) -> Tensor:
    """Fuse feature levels and coordinates with a 1x1 convolution.

    Parameters
    ----------
    levels
        [B, C_l, H_l, W_l] float each, finest grid first; taken in the weight's dtype.
    weight
        [D, sum(C_l) + 2]: columns of the first level, the second, ..., row coordinate, column coordinate.
    bias
        [D], or None for none.
    pool
        Average every level over 3x3 neighbourhoods first, pixels outside the map counting as zeros.

    Returns
    -------
    Tensor
        [B, H_1 * W_1, D], patches in row-major order.

    References
    ----------
    Luo et al., Computer Science 52(1), 2025, section 3.3; Liu et al., An intriguing failing of convolutional
    neural networks and the CoordConv solution, NeurIPS 2018.
    """
    check_arguments(levels, weight, bias)
    batch, _, height, width = levels[0].shape
    upsampled = []
    for level in levels:
        features = level.to(weight.dtype)
        if pool:
            features = F.avg_pool2d(features, 3, stride=1, padding=1)
        if level.shape[2:] != (height, width):
            features = F.interpolate(features, size=(height, width), mode="bilinear", align_corners=False)
        upsampled.append(features)
    coordinates = coordinate_channels(height, width, dtype=weight.dtype, device=weight.device)
    features = torch.cat([*upsampled, coordinates.expand(batch, -1, -1, -1)], dim=1)
    projected = F.conv2d(features, weight[:, :, None, None], bias)
    return projected.flatten(2).transpose(1, 2)
