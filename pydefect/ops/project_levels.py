"""The 1x1 CoordConv over several feature levels, without the concatenation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pydefect.ops._autograd import differentiable_once
from pydefect.ops._library import has_kernels, load_cpu_library, load_cuda_library
from pydefect.ops.reference.project_levels import check_arguments, coordinate_channels

__all__ = ["project_levels"]

load_cpu_library()
load_cuda_library()


def project_levels(
    levels: Sequence[Tensor], weight: Tensor, bias: Tensor | None = None, *, pool: bool = False
) -> Tensor:
    """Fuse feature levels and coordinates with a 1x1 convolution.

    A 1x1 convolution commutes with bilinear upsampling, so every level is projected on its own grid and the
    results are upsampled and added: W_1 l_1 + up(W_2 l_2) + ... + W_c coordinates + b. Nothing of the
    concatenated width exists at full resolution, and coarse levels cost a quarter or a sixteenth of the
    multiplications.

    Parameters
    ----------
    levels
        [B, C_l, H_l, W_l] each, finest grid first; float32, bfloat16 or float16. Channels-last tensors are
        read where they lie, others are copied first. B may be 0.
    weight
        [D, sum(C_l) + 2] float32: columns of the first level, the second, ..., row coordinate, column
        coordinate.
    bias
        [D] float32, or None for none.
    pool
        Average every level over 3x3 neighbourhoods first, pixels outside the map counting as zeros: raw
        backbone maps become locally aware features on the way in, as ``F.avg_pool2d(level, 3, 1, 1)`` makes
        them.

    Returns
    -------
    Tensor
        [B, H_1 * W_1, D] float32, patches in row-major order, contiguous. The same bit for bit for every
        number of threads; another instruction set may change last digits.

    Raises
    ------
    RuntimeError
        If an argument has the wrong shape, dtype or device.

    Notes
    -----
    Differentiable in all arguments; gradients of gradients are left to :mod:`pydefect.ops.reference`. A NaN
    or infinity makes those patches not finite whose interpolation (or pooling) touches it, and no others.

    Levels in any of the three formats with a float32 weight take the native kernels, on the CPU and on CUDA
    (there at most 8 levels). Everything else is composed of PyTorch's operators, in the weight's dtype.

    References
    ----------
    Luo et al., Computer Science 52(1), 2025, section 3.3; Liu et al., An intriguing failing of convolutional
    neural networks and the CoordConv solution, NeurIPS 2018; Roth et al., Towards total recall in industrial
    anomaly detection, CVPR 2022, section 3.1 (pooling).
    """
    levels = list(levels)
    if weight.dtype == torch.float32 and has_kernels(weight.device):
        out: Tensor = torch.ops.pydefect.project_levels(levels, weight, bias, pool)
        return out
    check_arguments(levels, weight, bias)
    return _compose(levels, weight, bias, pool)


def _compose(levels: Sequence[Tensor], weight: Tensor, bias: Tensor | None, pool: bool) -> Tensor:
    batch, _, height, width = levels[0].shape
    *level_weights, coordinate_weight = weight.split([*(level.shape[1] for level in levels), 2], dim=1)
    coordinates = coordinate_channels(height, width, dtype=weight.dtype, device=weight.device)
    # [H, W, D]: channels last throughout, which is what the k-NN wants and what interpolate keeps.
    constant = coordinates.permute(1, 2, 0) @ coordinate_weight.T
    if bias is not None:
        constant = constant + bias
    fused: Tensor = constant.unsqueeze(0)
    for level, level_weight in zip(levels, level_weights, strict=True):
        features = level.to(weight.dtype)
        if pool:
            features = F.avg_pool2d(features, 3, stride=1, padding=1)
        projected = features.permute(0, 2, 3, 1) @ level_weight.T
        if projected.shape[1:3] != (height, width):
            projected = F.interpolate(
                projected.permute(0, 3, 1, 2), size=(height, width), mode="bilinear", align_corners=False
            ).permute(0, 2, 3, 1)
        fused = fused + projected
    # Spelled out, for a width of -1 is ambiguous where there are no images.
    return fused.reshape(batch, height * width, weight.shape[0])


@torch.library.register_fake("pydefect::project_levels")
def _project_levels_fake(levels: list[Tensor], weight: Tensor, bias: Tensor | None, pool: bool) -> Tensor:
    check_arguments(levels, weight, bias)
    batch, _, height, width = levels[0].shape
    return weight.new_empty((batch, height * width, weight.shape[0]))


@torch.library.register_fake("pydefect::project_levels_weight_gradient")
def _weight_gradient_fake(gradient: Tensor, levels: list[Tensor], pool: bool) -> tuple[Tensor, Tensor]:
    dimension = gradient.shape[2]
    inputs = sum(level.shape[1] for level in levels) + 2
    return gradient.new_empty((dimension, inputs)), gradient.new_empty((dimension,))


@torch.library.register_fake("pydefect::project_levels_level_gradient")
def _level_gradient_fake(
    gradient: Tensor, weight: Tensor, height: int, width: int, level_height: int, level_width: int
) -> Tensor:
    return gradient.new_empty((gradient.shape[0], level_height, level_width, weight.shape[1]))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    levels, weight, bias, ctx.pool = inputs
    ctx.with_bias = bias is not None
    ctx.save_for_backward(weight, *levels)


def _backward(ctx: Any, gradient: Tensor) -> tuple[list[Tensor | None], Tensor | None, Tensor | None, None]:
    weight, *levels = ctx.saved_tensors
    needs_levels, needs_weight, needs_bias, _ = ctx.needs_input_grad
    weight_gradient = bias_gradient = None
    if needs_weight or needs_bias:
        weight_gradient, bias_gradient = torch.ops.pydefect.project_levels_weight_gradient(
            gradient, levels, ctx.pool
        )
    level_gradients: list[Tensor | None] = [None] * len(levels)
    height, width = levels[0].shape[2:]
    # What PyTorch says of a list of tensors is a list, or one value for all of them.
    needed = needs_levels if isinstance(needs_levels, (list, tuple)) else [needs_levels] * len(levels)
    parts = weight.split([*(level.shape[1] for level in levels), 2], dim=1)
    for index, (level, part) in enumerate(zip(levels, parts[:-1], strict=True)):
        if not needed[index]:
            continue
        one = torch.ops.pydefect.project_levels_level_gradient(
            gradient, part, height, width, level.shape[2], level.shape[3]
        ).permute(0, 3, 1, 2)
        if ctx.pool:  # the pooling is a symmetric matrix
            one = F.avg_pool2d(one, 3, stride=1, padding=1)
        level_gradients[index] = one.to(level.dtype)
    return level_gradients, weight_gradient, bias_gradient if ctx.with_bias else None, None


torch.library.register_autograd("pydefect::project_levels", _backward, setup_context=_setup_context)
differentiable_once("project_levels", "project_levels_weight_gradient", "project_levels_level_gradient")
