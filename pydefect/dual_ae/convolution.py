"""Convolutions that are trained on a processor, without its slow ways."""

from __future__ import annotations

from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from pydefect.ops import convolution, convolution_tiles, convolution_weight_gradient

__all__ = ["SmallConvolution", "TrainedConvolution", "trained_convolution"]


class TrainedConvolution(nn.Conv2d):
    """A convolution at stride 1 that trains as :func:`trained_convolution` does."""

    small: ClassVar[bool] = False

    def forward(self, maps: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, out_channels, H + 2 p - k + 1, W + 2 p - k + 1]."""
        assert self.bias is not None
        return trained_convolution(maps, self.weight, self.bias, int(self.padding[0]), small=self.small)


class SmallConvolution(TrainedConvolution):
    """The same for small maps."""

    small = True


def trained_convolution(
    maps: Tensor, weight: Tensor, bias: Tensor, padding: int, *, small: bool = False
) -> Tensor:
    """Convolve at stride 1; while it trains on a processor, without oneDNN's slow paths.

    oneDNN's gradient of the bias takes ten times as long as one product with ones on maps of more than a
    hundred pixels a side, and its gradient of the weights two to ten times as long where the padding is one
    less than the kernel: 4x4 with a padding of 3, as a PDN has, is. Together they were a fifth of a training
    step, and more than half of one at 256 pixels. In float32 the convolution and its gradient of the maps are
    :func:`pydefect.ops.convolution`, the gradient of the weights is
    :func:`pydefect.ops.convolution_weight_gradient`, all in a third of oneDNN's time.

    Parameters
    ----------
    maps
        [B, C, H, W].
    weight, bias
        [O, C, k, k] and [O], parameters.
    padding
        Rows and columns of zeros around every map.
    small
        oneDNN has no slow paths for maps of this size and padding: in other types than float32 it is
        PyTorch's convolution.

    Returns
    -------
    Tensor
        [B, O, H + 2 padding - k + 1, W + 2 padding - k + 1], differentiable once while it trains; under
        autocast in its type.
    """
    trains = torch.is_grad_enabled() and weight.requires_grad and not torch.compiler.is_compiling()
    autocast = torch.is_autocast_enabled("cpu")
    dtype = torch.get_autocast_dtype("cpu") if autocast else weight.dtype
    if maps.device.type != "cpu" or not trains or (small and dtype != torch.float32):
        return F.conv2d(maps, weight, bias, padding=padding)
    inputs = (one.to(dtype) for one in (maps, weight, bias))
    return cast(Tensor, _Convolved.apply(*inputs, padding))


class _Convolved(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, maps: Tensor, weight: Tensor, bias: Tensor, padding: int) -> Tensor:
        ctx.save_for_backward(maps, weight)
        tiles = convolution_tiles(weight)
        ctx.padding, ctx.tiled = padding, tiles is not None
        return convolution(maps, weight, bias, padding=padding, tiles=tiles)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        maps, weight = ctx.saved_tensors
        padding = ctx.padding
        of_maps = of_weight = of_bias = None
        if ctx.needs_input_grad[0]:
            of_maps = _gradient_of_maps(gradient, maps, weight, padding)
        if ctx.needs_input_grad[1]:
            of_weight = _gradient_of_weight(gradient, maps, weight, padding, ctx.tiled)
        if ctx.needs_input_grad[2]:
            rows = gradient.permute(0, 2, 3, 1).flatten(0, 2)
            of_bias = (rows.new_ones(1, len(rows)) @ rows)[0]
        return of_maps, of_weight, of_bias, None


def _gradient_of_maps(gradient: Tensor, maps: Tensor, weight: Tensor, padding: int) -> Tensor | None:
    """A convolution of the gradient with the weights' other side: inputs for outputs, last pixel first."""
    turned = weight.transpose(0, 1).flip(2, 3).contiguous()
    tiles = convolution_tiles(turned)
    remaining = weight.shape[-1] - 1 - padding
    if tiles is None or remaining < 0:
        return _gradients(gradient, maps, weight, padding, (True, False, False))[0]
    return convolution(gradient, turned, turned.new_zeros(len(turned)), padding=remaining, tiles=tiles)


def _gradient_of_weight(
    gradient: Tensor, maps: Tensor, weight: Tensor, padding: int, tiled: bool
) -> Tensor | None:
    kernel = weight.shape[-1]
    if tiled:
        return convolution_weight_gradient(gradient, maps, kernel=kernel, padding=padding)
    # Only the kernels for AVX-512 have a path that larger paddings leave.
    if padding >= kernel - 1 > 0 and torch.backends.cpu.get_cpu_capability() == "AVX512":
        maps, padding = F.pad(maps, (padding,) * 4), 0
    return _gradients(gradient, maps, weight, padding, (False, True, False))[1]


def _gradients(
    gradient: Tensor, maps: Tensor, weight: Tensor, padding: int, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    of_all: tuple[Tensor | None, Tensor | None, Tensor | None] = torch.ops.aten.convolution_backward(
        gradient, maps, weight, None, (1, 1), (padding, padding), (1, 1), False, (0, 0), 1, wanted
    )
    return of_all
