"""ReLU and average pooling of 2 x 2 cells, fused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pydefect.ops import _library, reference
from pydefect.ops._autograd import differentiable_once
from pydefect.ops._maps import is_channels_last
from pydefect.ops.reference.relu_avg_pool import check_relu_avg_pool

__all__ = ["relu_avg_pool"]

_library.load_cpu_library()
_library.load_cuda_library()


def relu_avg_pool(maps: Tensor, padding: int = 0) -> Tensor:
    """Take the mean over 2 x 2 cells of what is above zero.

    ``avg_pool2d(relu(maps), 2, 2, padding=padding)``, whose first map and its gradient are the largest that
    a patch description network has: here neither is written.

    Parameters
    ----------
    maps : Tensor
        Shape ``[B, C, H, W]``, floating point, B >= 0.
    padding : int
        0 or 1: so many rows and columns of zeros around every map, which count as cells.

    Returns
    -------
    Tensor
        Shape ``[B, C, (H + 2 padding) // 2, (W + 2 padding) // 2]``, the dtype and memory layout of `maps`.
        An odd last row or column is in no mean. Differentiable once. NaN is passed on, by gradients too.

    Raises
    ------
    RuntimeError
        If an argument has the wrong shape or dtype, `padding` is another number, or maps are so small that
        nothing comes out.

    Notes
    -----
    Native on the CPU and on CUDA for channels_last maps of float32 and bfloat16, with one result for every
    number of threads and instruction set, on the CPU to the bit that of PyTorch's operators. Other layouts
    and dtypes take the pure-PyTorch twin.

    References
    ----------
    Batzner et al., EfficientAD, WACV 2024, tables 6 and 7.

    Examples
    --------
    >>> import torch
    >>> from pydefect.ops import relu_avg_pool
    >>> relu_avg_pool(torch.tensor([[[[1.0, -5.0], [2.0, 5.0]]]]))
    tensor([[[[2.]]]])
    """
    check_relu_avg_pool(maps, padding)
    native = maps.dtype in (torch.float32, torch.bfloat16) and is_channels_last(maps)
    if not (native and _library.has_kernels(maps.device)):
        return reference.relu_avg_pool(maps, padding)
    output: Tensor = torch.ops.pydefect.relu_avg_pool(maps.permute(0, 2, 3, 1), padding)
    result = output.permute(0, 3, 1, 2)
    return result.contiguous() if maps.is_contiguous() else result


@torch.library.register_fake("pydefect::relu_avg_pool")
def _relu_avg_pool_fake(maps: Tensor, padding: int) -> Tensor:
    batch, height, width, channels = maps.shape
    return maps.new_empty((batch, (height + 2 * padding) // 2, (width + 2 * padding) // 2, channels))


@torch.library.register_fake("pydefect::relu_avg_pool_backward")
def _relu_avg_pool_backward_fake(d_output: Tensor, maps: Tensor, padding: int) -> Tensor:
    return maps.new_empty(maps.shape)


def _setup_context(ctx: Any, inputs: tuple[Tensor, int], output: Tensor) -> None:
    maps, ctx.padding = inputs
    ctx.save_for_backward(maps)


def _backward(ctx: Any, d_output: Tensor) -> tuple[Tensor, None]:
    (maps,) = ctx.saved_tensors
    return torch.ops.pydefect.relu_avg_pool_backward(d_output, maps, ctx.padding), None


torch.library.register_autograd("pydefect::relu_avg_pool", _backward, setup_context=_setup_context)
differentiable_once("relu_avg_pool", "relu_avg_pool_backward")
