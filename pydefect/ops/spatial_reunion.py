"""The spatial reunion module behind its two wide convolutions, fused."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pydefect.ops import reference
from pydefect.ops._autograd import differentiable_once
from pydefect.ops._library import load_cpu_library, load_cuda_library
from pydefect.ops._maps import from_positions, has_kernels, to_positions
from pydefect.ops.reference.spatial_reunion import NORMALISATIONS, Normalisation, check_spatial_reunion

__all__ = ["spatial_reunion"]

load_cpu_library()
load_cuda_library()


def spatial_reunion(
    features: Tensor,
    local: Tensor,
    coarse: Tensor,
    weight: Tensor,
    bias: Tensor,
    normalisation: Normalisation = "none",
) -> Tensor:
    """Add to a map the context that a gated view of it attends to.

    With I = `features`, A = `local` and U = `coarse` upsampled bilinearly (half-pixel centres) to I's size::

        F = Conv3x3(A * sigmoid(U + I))        # one channel, zero padding
        X = sum over positions of I * F'       # [B, C, 1, 1], F' = F normalised
        result = I + X

    The module's two wide convolutions, A = Conv3x3(I) and Conv3x3(AvgPool(I)), stay PyTorch's. Everything
    around them is done here in three passes over the maps: upsampled, gated and weighed maps never exist, and
    the backward pass computes the gate again instead of keeping it.

    Parameters
    ----------
    features : Tensor
        I, shape ``[B, C, H, W]``, floating point.
    local : Tensor
        A, the shape of `features`.
    coarse : Tensor
        Shape ``[B, C, h, w]`` with any h and w of at least 1.
    weight, bias : Tensor
        The convolution to one channel, ``[1, C, 3, 3]`` and ``[1]``.
    normalisation : {"none", "mean", "softmax"}
        F' is F as printed, F divided by H * W, or the softmax of F over the positions of an image.

    Returns
    -------
    Tensor
        The shape, dtype and memory layout of `features`. Differentiable once in all tensors.

    Raises
    ------
    RuntimeError
        If an argument has the wrong shape, dtype, device or value.

    Notes
    -----
    Native on the CPU, with the same result for every number of threads, and on CUDA, with the same one in
    every run, in float32; maps of half precision are computed so too and rounded once. The fast layout is
    channels_last, which convolutions prefer there; other maps are copied to it and back. On CUDA the backward
    pass keeps one map beyond its results. Float64 and other devices take the pure-PyTorch twin.

    References
    ----------
    Liang and Chen, dual autoencoder for industrial anomaly detection, equations (2) to (7).

    Examples
    --------
    >>> import torch
    >>> from pydefect.ops import spatial_reunion
    >>> features, coarse = torch.ones(1, 2, 4, 4), torch.zeros(1, 2, 1, 1)
    >>> weight, bias = torch.zeros(1, 2, 3, 3), torch.full((1,), 0.5)
    >>> spatial_reunion(features, features, coarse, weight, bias)[0, 0, 0]  # 1 + 16 * 0.5
    tensor([9., 9., 9., 9.])
    """
    check_spatial_reunion(features, local, coarse, weight, bias, normalisation)
    if not has_kernels(features):
        return reference.spatial_reunion(features, local, coarse, weight, bias, normalisation)
    output, _ = torch.ops.pydefect.spatial_reunion(
        to_positions(features),
        to_positions(local),
        to_positions(coarse),
        weight.float().flatten(2)[0].T,
        bias.float(),
        NORMALISATIONS.index(normalisation),
    )
    return from_positions(output, features)


@torch.library.register_fake("pydefect::spatial_reunion")
def _spatial_reunion_fake(
    features: Tensor, local: Tensor, coarse: Tensor, weight: Tensor, bias: Tensor, normalisation: int
) -> tuple[Tensor, Tensor]:
    batch, height, width, _ = features.shape
    return features.new_empty(features.shape), features.new_empty((batch, height * width))


@torch.library.register_fake("pydefect::spatial_reunion_backward")
def _spatial_reunion_backward_fake(
    d_output: Tensor,
    features: Tensor,
    local: Tensor,
    coarse: Tensor,
    weight: Tensor,
    attention: Tensor,
    normalisation: int,
) -> tuple[Tensor, ...]:
    return (
        features.new_empty(features.shape),
        features.new_empty(features.shape),
        features.new_empty(coarse.shape),
        features.new_empty(weight.shape),
        features.new_empty((1,)),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    features, local, coarse, weight, _, ctx.normalisation = inputs
    ctx.save_for_backward(features, local, coarse, weight, output[1])


def _backward(ctx: Any, d_output: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    gradients = torch.ops.pydefect.spatial_reunion_backward(d_output, *ctx.saved_tensors, ctx.normalisation)
    return (*gradients, None)


torch.library.register_autograd("pydefect::spatial_reunion", _backward, setup_context=_setup_context)
differentiable_once("spatial_reunion", "spatial_reunion_backward")
