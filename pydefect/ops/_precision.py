"""The precision that operators compute in."""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["compute_dtype"]


def compute_dtype(tensor: Tensor) -> torch.dtype:
    """Float64 for float64; float32 for everything narrower."""
    return torch.promote_types(tensor.dtype, torch.float32)
