"""Nearest neighbours by measuring every pair."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

# The float64 differences of one chunk of queries to the whole bank take at most this much.
_CHUNK_BYTES = 64 << 20


def knn(
    queries: Tensor, bank: Tensor, k: int, *, precision: Literal["float32", "bf16"] = "float32"
) -> tuple[Tensor, Tensor]:
    """Find the `k` rows of `bank` nearest to each row of `queries`; see :func:`pydefect.ops.knn`.

    Every pair is measured in float64 and rounded to float32, so neighbours whose float32 distances differ by
    their last bits only may come in another order than from the native kernels. Memory beyond inputs and
    outputs stays at a few times 64 MiB, or a few times the bank in float64 where that is more. `precision`
    changes nothing here.
    """
    _check(queries, bank, k, precision)
    chunk = max(1, _CHUNK_BYTES // (8 * bank.numel()))
    rows = bank.detach().double()
    parts = [_nearest(some.double(), rows, k) for some in queries.detach().split(chunk)]
    distances, indices = zip(*parts, strict=True)
    return torch.cat(distances), torch.cat(indices)


def _nearest(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    distances = (queries[:, None] - bank[None]).square().sum(-1).float()
    # torch.topk promises no order among equals; a stable sort keeps the lower index first.
    ordered, indices = distances.sort(dim=1, stable=True)
    return ordered[:, :k], indices[:, :k]


def _check(queries: Tensor, bank: Tensor, k: int, precision: str) -> None:
    for name, tensor in (("queries", queries), ("bank", bank)):
        if tensor.dim() != 2:
            raise RuntimeError(f"knn: {name} must have 2 dimensions, got {tensor.dim()}")
        if tensor.dtype != torch.float32:
            raise RuntimeError(f"knn: {name} must be float32, got {tensor.dtype}")
    if queries.device != bank.device:
        raise RuntimeError("knn: queries and bank must be on one device")
    if queries.size(1) < 1:
        raise RuntimeError("knn: queries must have a width of at least 1, got 0")
    if queries.size(1) != bank.size(1):
        raise RuntimeError(f"knn: bank must have the width of queries, {queries.size(1)}, got {bank.size(1)}")
    if bank.size(0) < 1:
        raise RuntimeError("knn: bank must have at least 1 row, got 0")
    if not 1 <= k <= bank.size(0):
        raise RuntimeError(f"knn: k must be between 1 and the {bank.size(0)} rows of bank, got {k}")
    if precision not in ("float32", "bf16"):
        raise RuntimeError(f"knn: precision must be 'float32' or 'bf16', got '{precision}'")
