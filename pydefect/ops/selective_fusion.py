"""The selective fusion module, fused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pydefect.ops import reference
from pydefect.ops._autograd import differentiable_once
from pydefect.ops._library import load_cpu_library, load_cuda_library
from pydefect.ops._maps import from_positions, has_kernels, is_channels_last, to_positions
from pydefect.ops.reference.selective_fusion import check_selective_fusion

__all__ = ["selective_fusion"]

load_cpu_library()
load_cuda_library()


def selective_fusion(
    first: Tensor,
    second: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor,
    first_weight: Tensor,
    first_bias: Tensor,
    second_weight: Tensor,
    second_bias: Tensor,
) -> tuple[Tensor, Tensor]:
    """Weigh two maps against each other, channel by channel.

    With O1 = `first` and O2 = `second`::

        s = relu(reduce(mean over positions of (O1 + O2)))
        N1, N2 = softmax over the two of Conv1x1(s), Conv1x1(s)     # per channel, N1 + N2 = 1
        result = N1 * O1, N2 * O2

    Each direction is two passes over the maps; their sum never exists.

    Parameters
    ----------
    first, second : Tensor
        O1 and O2, shape ``[B, C, H, W]``, floating point, one dtype.
    reduce_weight, reduce_bias : Tensor
        The fully connected layer, ``[R, C]`` and ``[R]``; a ReLU follows.
    first_weight, first_bias, second_weight, second_bias : Tensor
        The two 1x1 convolutions, ``[C, R, 1, 1]`` and ``[C]`` each.

    Returns
    -------
    fused_first, fused_second : Tensor
        N1 * O1 and N2 * O2, each with the shape, dtype and memory layout of its map. Differentiable once in
        all arguments.

    Raises
    ------
    RuntimeError
        If an argument has the wrong shape, dtype or device.

    Notes
    -----
    Native on the CPU and on CUDA for channels_last maps, the layout that convolutions prefer: the same result
    for every number of threads, in float32; maps of half precision are computed so too and rounded once.
    Other layouts and float64 take the pure-PyTorch twin: a copy to channels_last would cost more than the
    whole operation.

    References
    ----------
    Liang and Chen, dual autoencoder for industrial anomaly detection, section 1.4; Li et al., Selective
    kernel networks, CVPR 2019.

    Examples
    --------
    >>> import torch
    >>> from pydefect.ops import selective_fusion
    >>> reduce = torch.nn.Linear(32, 2)
    >>> heads = torch.nn.Conv2d(2, 32, 1), torch.nn.Conv2d(2, 32, 1)
    >>> parameters = [p for layer in (reduce, *heads) for p in (layer.weight, layer.bias)]
    >>> map_ = torch.randn(1, 32, 7, 7)
    >>> a, b = selective_fusion(map_, map_, *parameters)
    >>> torch.allclose(a + b, map_, atol=1e-6)
    True
    """
    parameters = [reduce_weight, reduce_bias, first_weight, first_bias, second_weight, second_bias]
    check_selective_fusion(first, second, *parameters)
    if not (has_kernels(first) and is_channels_last(first, second)):
        return reference.selective_fusion(first, second, *parameters)
    fused_first, fused_second, *_ = torch.ops.pydefect.selective_fusion(
        to_positions(first),
        to_positions(second),
        reduce_weight.float(),
        reduce_bias.float(),
        first_weight.float().flatten(1),
        first_bias.float(),
        second_weight.float().flatten(1),
        second_bias.float(),
    )
    return from_positions(fused_first, first), from_positions(fused_second, second)


@torch.library.register_fake("pydefect::selective_fusion")
def _selective_fusion_fake(
    first: Tensor,
    second: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor,
    first_weight: Tensor,
    first_bias: Tensor,
    second_weight: Tensor,
    second_bias: Tensor,
) -> tuple[Tensor, ...]:
    batch, channels = first.shape[0], first.shape[3]
    return (
        first.new_empty(first.shape),
        first.new_empty(first.shape),
        first.new_empty((batch, channels)),
        first.new_empty((batch, reduce_weight.shape[0])),
        first.new_empty((batch, channels)),
    )


@torch.library.register_fake("pydefect::selective_fusion_backward")
def _selective_fusion_backward_fake(
    d_fused_first: Tensor,
    d_fused_second: Tensor,
    first: Tensor,
    second: Tensor,
    reduce_weight: Tensor,
    first_weight: Tensor,
    second_weight: Tensor,
    pooled: Tensor,
    hidden: Tensor,
    share: Tensor,
) -> tuple[Tensor, ...]:
    reduced, channels = reduce_weight.shape
    head = (first.new_empty((channels, reduced)), first.new_empty((channels,)))
    return (
        first.new_empty(first.shape),
        first.new_empty(first.shape),
        first.new_empty((reduced, channels)),
        first.new_empty((reduced,)),
        *head,
        *(tensor.clone() for tensor in head),
    )


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    first, second, reduce_weight, _, first_weight, _, second_weight, _ = inputs
    ctx.save_for_backward(first, second, reduce_weight, first_weight, second_weight, *output[2:])


def _backward(ctx: Any, d_fused_first: Tensor, d_fused_second: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
    gradients: tuple[Tensor, ...] = torch.ops.pydefect.selective_fusion_backward(
        d_fused_first, d_fused_second, *ctx.saved_tensors
    )
    return gradients


torch.library.register_autograd("pydefect::selective_fusion", _backward, setup_context=_setup_context)
differentiable_once("selective_fusion", "selective_fusion_backward")
