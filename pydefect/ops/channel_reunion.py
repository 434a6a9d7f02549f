"""The channel reunion module, fused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pydefect.ops import reference
from pydefect.ops._autograd import differentiable_once
from pydefect.ops._library import load_cpu_library, load_cuda_library
from pydefect.ops._maps import from_positions, has_kernels, is_channels_last, to_positions
from pydefect.ops.reference.channel_reunion import check_channel_reunion

__all__ = ["channel_reunion"]

load_cpu_library()
load_cuda_library()


def channel_reunion(
    features: Tensor,
    inner_weight: Tensor,
    inner_bias: Tensor,
    outer_weight: Tensor,
    outer_bias: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
) -> Tensor:
    """Gate a map's channels by what positions of weight say about them.

    With I = `features`::

        A = Conv1x1(Conv1x1(I))                # inner, outer: one weight a position
        E = sum over positions of A * I        # [B, C]
        result = I * sigmoid(expand(relu(reduce(E))))

    Nothing stands between the two 1x1 convolutions, so they are one dot product a position with
    outer_weight @ inner_weight, whatever the inner width; the weights and the sum come out of one pass over
    the map, the gating is the second.

    Parameters
    ----------
    features : Tensor
        I, shape ``[B, C, H, W]``, floating point.
    inner_weight, inner_bias : Tensor
        The first 1x1 convolution, ``[K, C, 1, 1]`` and ``[K]``. The paper does not say K; as printed it
        changes how the map A is parametrised, not which maps there are.
    outer_weight, outer_bias : Tensor
        The second one, ``[1, K, 1, 1]`` and ``[1]``.
    reduce_weight, reduce_bias : Tensor
        The first fully connected layer, ``[R, C]`` and ``[R]``; a ReLU follows.
    expand_weight, expand_bias : Tensor
        The second one, ``[C, R]`` and ``[C]``.

    Returns
    -------
    Tensor
        The shape, dtype and memory layout of `features`. Differentiable once in all arguments.

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
    Liang and Chen, dual autoencoder for industrial anomaly detection, equations (8) to (10); Hu et al.,
    Squeeze-and-excitation networks, CVPR 2018.

    Examples
    --------
    >>> import torch
    >>> from pydefect.ops import channel_reunion
    >>> inner, outer = torch.nn.Conv2d(32, 2, 1), torch.nn.Conv2d(2, 1, 1)
    >>> reduce, expand = torch.nn.Linear(32, 2), torch.nn.Linear(2, 32)
    >>> parameters = [p for layer in (inner, outer, reduce, expand) for p in (layer.weight, layer.bias)]
    >>> channel_reunion(torch.randn(1, 32, 7, 7), *parameters).shape
    torch.Size([1, 32, 7, 7])
    """
    parameters = [inner_weight, inner_bias, outer_weight, outer_bias]
    parameters += [reduce_weight, reduce_bias, expand_weight, expand_bias]
    check_channel_reunion(features, *parameters)
    if not (has_kernels(features) and is_channels_last(features)):
        return reference.channel_reunion(features, *parameters)
    inner_weight, inner_bias, outer_weight, outer_bias, *dense = (p.float() for p in parameters)
    # Products and sums: autocast would take a matrix product to bfloat16.
    outer = outer_weight.reshape(-1, 1)
    output, *_ = torch.ops.pydefect.channel_reunion(
        to_positions(features),
        (outer * inner_weight.flatten(1)).sum(0),
        (outer[:, 0] * inner_bias).sum() + outer_bias,
        *dense,
    )
    return from_positions(output, features)


@torch.library.register_fake("pydefect::channel_reunion")
def _channel_reunion_fake(
    features: Tensor,
    direction: Tensor,
    offset: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
) -> tuple[Tensor, ...]:
    batch, height, width, channels = features.shape
    return (
        features.new_empty(features.shape),
        features.new_empty((batch, height * width)),
        features.new_empty((batch, channels)),
        features.new_empty((batch, reduce_weight.shape[0])),
        features.new_empty((batch, channels)),
    )


@torch.library.register_fake("pydefect::channel_reunion_backward")
def _channel_reunion_backward_fake(
    d_output: Tensor,
    features: Tensor,
    direction: Tensor,
    reduce_weight: Tensor,
    expand_weight: Tensor,
    weights: Tensor,
    pooled: Tensor,
    hidden: Tensor,
    gate: Tensor,
) -> tuple[Tensor, ...]:
    reduced, channels = reduce_weight.shape
    return (
        features.new_empty(features.shape),
        features.new_empty((channels,)),
        features.new_empty((1,)),
        features.new_empty((reduced, channels)),
        features.new_empty((reduced,)),
        features.new_empty((channels, reduced)),
        features.new_empty((channels,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Tensor, ...], output: tuple[Tensor, ...]) -> None:
    features, direction, _, reduce_weight, _, expand_weight, _ = inputs
    ctx.save_for_backward(features, direction, reduce_weight, expand_weight, *output[1:])


def _backward(ctx: Any, d_output: Tensor, *_: Tensor) -> tuple[Tensor, ...]:
    gradients: tuple[Tensor, ...] = torch.ops.pydefect.channel_reunion_backward(d_output, *ctx.saved_tensors)
    return gradients


torch.library.register_autograd("pydefect::channel_reunion", _backward, setup_context=_setup_context)
differentiable_once("channel_reunion", "channel_reunion_backward")
