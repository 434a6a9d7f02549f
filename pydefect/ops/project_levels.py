"""The 1x1 CoordConv over several feature levels, without the concatenation."""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor

from pydefect.ops.reference.project_levels import coordinate_channels

__all__ = ["project_levels"]


def project_levels(levels: Sequence[Tensor], weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Fuse feature levels and coordinates with a 1x1 convolution.

    A 1x1 convolution commutes with bilinear upsampling, so every level is projected on its own grid and the
    results are upsampled and added: W_1 l_1 + up(W_2 l_2) + ... + W_c coordinates + b. Nothing of the
    concatenated width exists at full resolution, and coarse levels cost a quarter or a sixteenth of the
    multiplications.

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
        [B, H_1 * W_1, D], patches in row-major order, contiguous. Differentiable in all arguments.

    References
    ----------
    Luo et al., Computer Science 52(1), 2025, section 3.3; Liu et al., An intriguing failing of convolutional
    neural networks and the CoordConv solution, NeurIPS 2018.
    """
    batch, _, height, width = levels[0].shape
    *level_weights, coordinate_weight = weight.split([*(level.shape[1] for level in levels), 2], dim=1)
    coordinates = coordinate_channels(height, width, dtype=weight.dtype, device=weight.device)
    # [H, W, D]: channels last throughout, which is what the k-NN wants and what interpolate keeps.
    constant = coordinates.permute(1, 2, 0) @ coordinate_weight.T
    if bias is not None:
        constant = constant + bias
    fused: Tensor = constant.unsqueeze(0)
    for level, level_weight in zip(levels, level_weights, strict=True):
        projected = level.permute(0, 2, 3, 1) @ level_weight.T
        if projected.shape[1:3] != (height, width):
            projected = F.interpolate(
                projected.permute(0, 3, 1, 2), size=(height, width), mode="bilinear", align_corners=False
            ).permute(0, 2, 3, 1)
        fused = fused + projected
    return fused.reshape(batch, height * width, -1)
