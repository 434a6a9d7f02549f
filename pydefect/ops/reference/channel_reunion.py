"""The channel reunion module (dual autoencoder, equations 8 to 10)."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pydefect.ops._maps import check_map, check_shapes
from pydefect.ops._precision import compute_dtype

__all__ = ["channel_reunion", "check_channel_reunion"]


def check_channel_reunion(
    features: Tensor,
    inner_weight: Tensor,
    inner_bias: Tensor,
    outer_weight: Tensor,
    outer_bias: Tensor,
    reduce_weight: Tensor,
    reduce_bias: Tensor,
    expand_weight: Tensor,
    expand_bias: Tensor,
) -> None:
    """Raise a RuntimeError that names the argument that is wrong."""
    op = "channel_reunion"
    check_map(op, "features", features)
    channels = features.shape[1]
    # The two inner widths are free: each bias tells its own.
    inner, reduced = inner_bias.numel(), reduce_bias.numel()
    expected = {
        "inner_weight": (inner_weight, (inner, channels, 1, 1)),
        "inner_bias": (inner_bias, (inner,)),
        "outer_weight": (outer_weight, (1, inner, 1, 1)),
        "outer_bias": (outer_bias, (1,)),
        "reduce_weight": (reduce_weight, (reduced, channels)),
        "reduce_bias": (reduce_bias, (reduced,)),
        "expand_weight": (expand_weight, (channels, reduced)),
        "expand_bias": (expand_bias, (channels,)),
    }
    check_shapes(op, features.device, expected)


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
    """Weigh, sum and gate, one operation after the other; see :func:`pydefect.ops.channel_reunion`."""
    parameters = [inner_weight, inner_bias, outer_weight, outer_bias]
    parameters += [reduce_weight, reduce_bias, expand_weight, expand_bias]
    check_channel_reunion(features, *parameters)
    dtype = compute_dtype(features)
    inner_weight, inner_bias, outer_weight, outer_bias, *dense = (p.to(dtype) for p in parameters)
    identity = features.to(dtype)
    weights = F.conv2d(F.conv2d(identity, inner_weight, inner_bias), outer_weight, outer_bias)
    pooled = (identity * weights).sum((2, 3))
    hidden = torch.relu(F.linear(pooled, dense[0], dense[1]))
    gate = torch.sigmoid(F.linear(hidden, dense[2], dense[3]))
    return (identity * gate[:, :, None, None]).to(features.dtype)
