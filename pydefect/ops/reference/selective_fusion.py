"""The selective fusion module (dual autoencoder, section 1.4)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pydefect.ops._maps import check_map, check_shapes
from pydefect.ops._precision import compute_dtype

__all__ = ["check_selective_fusion", "selective_fusion"]


def check_selective_fusion(
    first: Tensor,
    second: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor,
    first_weight: Tensor,
    first_bias: Tensor,
    second_weight: Tensor,
    second_bias: Tensor,
) -> None:
    """Raise a RuntimeError that names the argument that is wrong."""
    op = "selective_fusion"
    check_map(op, "first", first)
    # The reduced width is free: its bias tells it.
    channels, reduced = first.shape[1], reduce_bias.numel()
    expected = {
        "second": (second, tuple(first.shape)),
        "reduce_weight": (reduce_weight, (reduced, channels)),
        "reduce_bias": (reduce_bias, (reduced,)),
        "first_weight": (first_weight, (channels, reduced, 1, 1)),
        "first_bias": (first_bias, (channels,)),
        "second_weight": (second_weight, (channels, reduced, 1, 1)),
        "second_bias": (second_bias, (channels,)),
    }
    check_shapes(op, first.device, expected)
    if first.dtype != second.dtype:
        raise RuntimeError(f"{op}: second must have the dtype of first, {first.dtype}, got {second.dtype}")


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
    """Add, pool, weigh and scale, one after the other; see :func:`pydefect.ops.selective_fusion`."""
    parameters = [reduce_weight, reduce_bias, first_weight, first_bias, second_weight, second_bias]
    check_selective_fusion(first, second, *parameters)
    dtype = compute_dtype(first)
    reduce_weight, reduce_bias, *heads = (p.to(dtype) for p in parameters)
    a, b = first.to(dtype), second.to(dtype)
    pooled = (a + b).mean((2, 3))
    hidden = torch.relu(F.linear(pooled, reduce_weight, reduce_bias))[:, :, None, None]
    logits = torch.stack([F.conv2d(hidden, heads[0], heads[1]), F.conv2d(hidden, heads[2], heads[3])])
    shares = logits.softmax(0)
    return (shares[0] * a).to(first.dtype), (shares[1] * b).to(second.dtype)
