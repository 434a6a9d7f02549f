"""A frozen convolution in the form that runs fastest, with its activation fused into it."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from pydefect.ops import convolution, convolution_tiles

__all__ = ["Convolution", "Shape", "has_fused_convolutions"]

Shape = tuple[int, int, int, int]


@dataclass(frozen=True)
class Convolution:
    """A frozen convolution with what follows it.

    ``tiles``: run as :func:`pydefect.ops.convolution`, whose weights they are. ``fused``: run as one of
    PyTorch's fused oneDNN operators, with which activation and residual sum cost no pass over memory of their
    own, and whose weights can be laid out once instead of in every call.
    """

    weight: Tensor
    bias: Tensor
    stride: tuple[int, int]
    padding: tuple[int, int]
    fused: bool = False
    tiles: Tensor | None = None

    def __call__(self, x: Tensor) -> Tensor:
        """convolution(x)"""
        if self.tiles is not None:
            return self._tiled(x)
        return self._fused(x, "none") if self.fused else self._plain(x)

    def relu(self, x: Tensor) -> Tensor:
        """relu(convolution(x))"""
        if self.tiles is not None:
            return self._tiled(x, relu=True)
        return self._fused(x, "relu") if self.fused else self._plain(x).relu_()

    def add_relu(self, residual: Tensor, x: Tensor) -> Tensor:
        """relu(convolution(x) + residual), which may be in residual's memory."""
        if self.tiles is not None:
            return self._tiled(x, relu=True, residual=residual)
        if not self.fused:
            return residual.add_(self._plain(x)).relu_()
        total: Tensor = torch.ops.mkldnn._convolution_pointwise_.binary(
            residual, x, self.weight, self.bias, self.padding, self.stride, (1, 1), 1,
            "add", 1.0, "relu", [], "",
        )  # fmt: skip
        return total

    def _plain(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, self.bias, self.stride, self.padding)

    def _fused(self, x: Tensor, activation: str) -> Tensor:
        result: Tensor = torch.ops.mkldnn._convolution_pointwise(
            x, self.weight, self.bias, self.padding, self.stride, (1, 1), 1, activation, [], ""
        )
        return result

    def _tiled(self, x: Tensor, *, relu: bool = False, residual: Tensor | None = None) -> Tensor:
        return convolution(
            x,
            self.weight,
            self.bias,
            padding=self.padding[0],
            relu=relu,
            residual=residual,
            tiles=self.tiles,
        )

    def fastest(self, fused: bool) -> Convolution:
        """Choose the form that runs fastest here, for images of any size.

        Parameters
        ----------
        fused
            Whether PyTorch's fused operators are there: :func:`has_fused_convolutions`.
        """
        tiles = None
        rows, columns = self.padding
        if self.stride == (1, 1) and rows == columns < min(self.weight.shape[2:]):
            tiles = convolution_tiles(self.weight)
        return replace(self, fused=fused and tiles is None, tiles=tiles)

    def packed(self, shape: Shape) -> Convolution:
        """Lay the weights of a fused one out as its operator wants them for images of a shape."""
        if not self.fused:
            return self
        weight = torch.ops.mkldnn._reorder_convolution_weight(
            self.weight, self.padding, self.stride, (1, 1), 1, shape
        )
        return replace(self, weight=weight)

    def output_shape(self, shape: Shape) -> Shape:
        height, width = (
            (size + 2 * padding - kernel) // stride + 1
            for size, padding, kernel, stride in zip(
                shape[2:], self.padding, self.weight.shape[2:], self.stride, strict=True
            )
        )
        return shape[0], self.weight.shape[0], height, width


@functools.cache
def has_fused_convolutions(dtype: torch.dtype) -> bool:
    """Tell whether this PyTorch's fused CPU convolutions are there, and right, for the type.

    They are the operators that ``torch.compile`` builds its CPU code with, but no public interface: a PyTorch
    that drops or changes them must cost nothing but speed. So they are tried once on a small example.

    Parameters
    ----------
    dtype
        float32 or bfloat16; for the latter the processor must have AVX-512.
    """
    shape = (1, 16, 6, 6)
    generator = torch.Generator().manual_seed(0)
    # Ones and zeros: sums of 144 products, which both types hold exactly in whatever order.
    images, residual, weight = (
        torch.randint(-1, 2, size, generator=generator)
        .to(dtype)
        .contiguous(memory_format=torch.channels_last)
        for size in (shape, (1, 16, 3, 3), (16, 16, 3, 3))
    )
    plain = Convolution(weight, torch.ones(16, dtype=dtype), (2, 2), (1, 1))
    fused = replace(plain, fused=True)
    try:
        if dtype == torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return False
        for one in (fused.packed(shape), fused):
            if not (
                torch.equal(one(images), plain(images))
                and torch.equal(one.relu(images), plain.relu(images))
                and torch.equal(
                    one.add_relu(residual.clone(), images), plain.add_relu(residual.clone(), images)
                )
            ):
                return False
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
    return True
