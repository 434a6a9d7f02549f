"""A convolution with what follows it, in float64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv2d_weight

from pydefect.ops._maps import check_map

__all__ = [
    "check_convolution",
    "check_convolution_weight_gradient",
    "convolution",
    "convolution_tiles",
    "convolution_weight_gradient",
]

# Of Toom and Cook's construction, and infinity.
_POINTS = (0.0, 1.0, -1.0, 2.0, -0.5)


def check_convolution(
    maps: Tensor, weight: Tensor, bias: Tensor, padding: int, residual: Tensor | None
) -> None:
    """Raise a RuntimeError that names the argument that is wrong."""
    op = "convolution"
    check_map(op, "maps", maps)
    check_map(op, "weight", weight)
    outputs, inputs, height, width = weight.shape
    if inputs != maps.shape[1] or height != width:
        raise RuntimeError(
            f"{op}: weight must have the shape [O, {maps.shape[1]}, k, k], got {list(weight.shape)}"
        )
    grown = _check_sides(op, maps, height, padding)
    if tuple(bias.shape) != (outputs,):
        raise RuntimeError(f"{op}: bias must have the shape [{outputs}], got {list(bias.shape)}")
    output = (maps.shape[0], outputs, maps.shape[2] + grown, maps.shape[3] + grown)
    if residual is not None and tuple(residual.shape) != output:
        raise RuntimeError(f"{op}: residual must have the shape {list(output)}, got {list(residual.shape)}")
    for name, tensor in (("weight", weight), ("bias", bias), ("residual", residual)):
        if tensor is None:
            continue
        if tensor.dtype != maps.dtype:
            raise RuntimeError(f"{op}: {name} must be {maps.dtype}, as maps are, got {tensor.dtype}")
        if tensor.device != maps.device:
            raise RuntimeError(f"{op}: {name} must be on {maps.device}, as maps are, got {tensor.device}")


def check_convolution_weight_gradient(gradient: Tensor, maps: Tensor, kernel: int, padding: int) -> None:
    """Raise a RuntimeError that names the argument that is wrong."""
    op = "convolution_weight_gradient"
    check_map(op, "maps", maps)
    check_map(op, "gradient", gradient)
    if kernel < 1:
        raise RuntimeError(f"{op}: kernel must be at least 1, got {kernel}")
    grown = _check_sides(op, maps, kernel, padding)
    batch, _, height, width = maps.shape
    if gradient.shape[0] != batch or tuple(gradient.shape[2:]) != (height + grown, width + grown):
        raise RuntimeError(
            f"{op}: gradient must have the shape [{batch}, O, {height + grown}, {width + grown}], "
            f"got {list(gradient.shape)}"
        )
    if gradient.dtype != maps.dtype:
        raise RuntimeError(f"{op}: gradient must be {maps.dtype}, as maps are, got {gradient.dtype}")
    if gradient.device != maps.device:
        raise RuntimeError(f"{op}: gradient must be on {maps.device}, as maps are, got {gradient.device}")


def _check_sides(op: str, maps: Tensor, kernel: int, padding: int) -> int:
    """By how much the output's sides differ from the maps'."""
    if padding not in range(kernel):
        raise RuntimeError(f"{op}: padding must be between 0 and {kernel - 1}, got {padding}")
    grown = 2 * padding - kernel + 1
    if min(maps.shape[2:]) + grown < 1:
        raise RuntimeError(
            f"{op}: maps must have a height and a width of at least {1 - grown}, "
            f"got {maps.shape[2]} and {maps.shape[3]}"
        )
    return grown


def convolution(
    maps: Tensor,
    weight: Tensor,
    bias: Tensor,
    *,
    padding: int = 0,
    relu: bool = False,
    residual: Tensor | None = None,
    tiles: Tensor | None = None,
) -> Tensor:
    """PyTorch's operators, in float64; see :func:`pydefect.ops.convolution`. ``tiles`` are not read."""
    check_convolution(maps, weight, bias, padding, residual)
    result = F.conv2d(maps.double(), weight.double(), bias.double(), padding=padding)
    if residual is not None:
        result = result + residual.double()
    result = result.relu() if relu else result
    return result.to(maps.dtype)


def convolution_tiles(weight: Tensor) -> Tensor:
    """G w G^T for every kernel, in float64; see :func:`pydefect.ops.convolution_tiles`.

    G evaluates the polynomial whose coefficients are a line of the kernel at the points, each divided by the
    product of its differences from the others; at infinity that is the last coefficient.
    """
    outputs, inputs, side, _ = weight.shape
    points = torch.tensor(_POINTS, dtype=torch.float64)
    differences = points[:, None] - points + torch.eye(len(points), dtype=torch.float64)
    evaluated = points[:, None] ** torch.arange(side) / differences.prod(1, keepdim=True)
    last = F.one_hot(torch.tensor([side - 1]), side).double()
    transform = torch.cat([evaluated, last])
    numbers = transform @ weight.double() @ transform.T  # [O, C, 6, 6]
    padded = F.pad(numbers.flatten(2), (0, 0, 0, -inputs % 16, 0, -outputs % 32))
    panels: Tensor = padded.unflatten(0, (-1, 32))
    return panels.permute(0, 3, 2, 1).contiguous().float()


def convolution_weight_gradient(gradient: Tensor, maps: Tensor, *, kernel: int, padding: int = 0) -> Tensor:
    """PyTorch's gradient, in float64; see :func:`pydefect.ops.convolution_weight_gradient`."""
    check_convolution_weight_gradient(gradient, maps, kernel, padding)
    shape = (gradient.shape[1], maps.shape[1], kernel, kernel)
    result: Tensor = conv2d_weight(maps.double(), shape, gradient.double(), padding=padding)
    return result.to(maps.dtype)
