"""What the operators on maps share: checks, and the layout of their kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from pydefect.ops import _library
from pydefect.ops._precision import compute_dtype

__all__ = [
    "check_map",
    "check_shapes",
    "from_positions",
    "has_kernels",
    "is_channels_last",
    "to_positions",
]


def check_map(op: str, name: str, tensor: Tensor) -> None:
    """Raise a RuntimeError for what is no [B, C, H, W] map of floating-point numbers."""
    if tensor.dim() != 4:
        raise RuntimeError(f"{op}: {name} must have 4 dimensions [B, C, H, W], got {tensor.dim()}")
    if not tensor.is_floating_point():
        raise RuntimeError(f"{op}: {name} must be floating point, got {tensor.dtype}")
    if min(tensor.shape[1:]) < 1:
        raise RuntimeError(f"{op}: {name} must have C, H and W of at least 1, got {list(tensor.shape)}")


def check_shapes(op: str, device: torch.device, expected: dict[str, tuple[Tensor, tuple[int, ...]]]) -> None:
    """Raise a RuntimeError for a tensor of another shape, on another device or not of floating point."""
    for name, (tensor, shape) in expected.items():
        if tuple(tensor.shape) != shape:
            raise RuntimeError(f"{op}: {name} must have the shape {list(shape)}, got {list(tensor.shape)}")
        if not tensor.is_floating_point():
            raise RuntimeError(f"{op}: {name} must be floating point, got {tensor.dtype}")
        if tensor.device != device:
            raise RuntimeError(f"{op}: {name} must be on {device}, got {tensor.device}")


def has_kernels(features: Tensor) -> bool:
    """Whether maps of this device and dtype have native kernels."""
    return _library.has_kernels(features.device) and compute_dtype(features) == torch.float32


def is_channels_last(*maps: Tensor) -> bool:
    """Whether all maps are stored position by position, so that the kernels can read them as they are."""
    return all(map_.is_contiguous(memory_format=torch.channels_last) for map_ in maps)


def to_positions(map_: Tensor) -> Tensor:
    """[B, C, H, W] as contiguous float32 [B, H, W, C]: no copy where it is channels_last float32."""
    return map_.float().permute(0, 2, 3, 1).contiguous()


def from_positions(map_: Tensor, like: Tensor) -> Tensor:
    """[B, H, W, C] as [B, C, H, W] with the dtype and the memory layout of `like`."""
    result = map_.permute(0, 3, 1, 2).to(like.dtype)
    return result.contiguous() if like.is_contiguous() else result
