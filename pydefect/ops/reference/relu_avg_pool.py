"""ReLU and average pooling of 2 x 2 cells (EfficientAD, table 6)."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from pydefect.ops._maps import check_map

__all__ = ["check_relu_avg_pool", "relu_avg_pool"]


def check_relu_avg_pool(maps: Tensor, padding: int) -> None:
    """Raise a RuntimeError that names the argument that is wrong."""
    op = "relu_avg_pool"
    check_map(op, "maps", maps)
    if padding not in (0, 1):
        raise RuntimeError(f"{op}: padding must be 0 or 1, got {padding}")
    smallest = max(1, 2 - 2 * padding)
    if min(maps.shape[2:]) < smallest:
        height, width = maps.shape[2:]
        raise RuntimeError(
            f"{op}: maps must have a height and a width of at least {smallest}, got {height} and {width}"
        )


def relu_avg_pool(maps: Tensor, padding: int = 0) -> Tensor:
    """PyTorch's two operators, one after the other; see :func:`pydefect.ops.relu_avg_pool`."""
    check_relu_avg_pool(maps, padding)
    return F.avg_pool2d(F.relu(maps), 2, 2, padding=padding)
