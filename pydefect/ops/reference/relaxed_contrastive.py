"""The relaxed contrastive loss over pairwise and global similarity (ConPatch, equations 1 to 5)."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pydefect.ops._precision import compute_dtype

__all__ = ["global_similarity", "relaxed_contrastive"]

# Rows handled at a time: a chunk's [rows, N] temporaries stay near 64 MB each.
_CHUNK_ELEMENTS = 1 << 24

Reduction = Literal["paper", "mean"]
PairSource = Literal["target", "cross"]
SimilarityPower = Literal[1, 2]


def check_settings(
    z: Tensor,
    z_target: Tensor,
    alpha: float,
    sigma: float,
    margin: float,
    neighbors: int,
    similarity_power: int,
    pair_source: str,
    reduction: str,
) -> None:
    """Raise for arguments outside their range, before any work.

    Raises
    ------
    ValueError
        A setting outside its range.
    RuntimeError
        Tensors of the wrong shape, dtype or device.
    """
    if z.dim() != 2 or 0 in z.shape or z.shape != z_target.shape:
        raise RuntimeError(
            f"relaxed_contrastive: z and z_target have shapes {tuple(z.shape)} and {tuple(z_target.shape)}; "
            "allowed is one shape [N, D] with N, D >= 1"
        )
    if max(z.shape) >= 2**30:
        raise RuntimeError(
            f"relaxed_contrastive: z has the shape {tuple(z.shape)}; "
            "allowed are fewer than 2^30 rows and columns"
        )
    if z.dtype != z_target.dtype or not z.is_floating_point():
        raise RuntimeError(
            f"relaxed_contrastive: z is {z.dtype}, z_target {z_target.dtype}; allowed is one floating dtype"
        )
    if z.device != z_target.device:
        raise RuntimeError(
            f"relaxed_contrastive: z is on {z.device}, z_target on {z_target.device}; allowed is one device"
        )
    ranges = {
        "alpha": (alpha, 0 <= alpha <= 1, "0..1"),
        "sigma": (sigma, 0 < sigma < math.inf, "> 0 and finite"),
        "margin": (margin, 0 <= margin < math.inf, ">= 0 and finite"),
        "neighbors": (neighbors, 1 <= neighbors <= len(z), f"1..{len(z)}, the number of patches"),
        "similarity_power": (similarity_power, similarity_power in (1, 2), "1 and 2"),
        "pair_source": (pair_source, pair_source in ("target", "cross"), "'target' and 'cross'"),
        "reduction": (reduction, reduction in ("paper", "mean"), "'paper' and 'mean'"),
    }
    for name, (given, right, allowed) in ranges.items():
        if not right:
            raise ValueError(f"relaxed_contrastive: {name}: {given!r} given; allowed: {allowed}")


def _chunk_rows(n: int) -> int:
    return max(1, min(n, _CHUNK_ELEMENTS // max(n, 1)))


def _distances(rows: Tensor, columns: Tensor) -> Tensor:
    # |x - y|^2 = |x|^2 + |y|^2 - 2xy as one matrix product; the clamp keeps rounding from going below zero
    # and stops the square root's gradient where two points coincide.
    squared = rows.square().sum(1, keepdim=True) + columns.square().sum(1) - 2 * (rows @ columns.T)
    return squared.clamp_min(1e-30).sqrt()


def global_similarity(target: Tensor, neighbors: int) -> tuple[Tensor, Tensor]:
    """Share of common neighbours between every point and each of its nearest points, equation (2).

    Parameters
    ----------
    target
        [N, D] projections of the target branch.
    neighbors
        k: the size of N_k(i), point i itself included.

    Returns
    -------
    indices
        [N, k] int64: N_k(i), point i first.
    similarity
        [N, k]: |N_k(i) & N_k(j)| / k for j = indices[i, .]; every other pair has similarity 0.
    """
    n = target.shape[0]
    indices = torch.empty(n, neighbors, dtype=torch.int64, device=target.device)
    for start in range(0, n, _chunk_rows(n)):
        rows = torch.arange(start, min(start + _chunk_rows(n), n), device=target.device)
        distances = _distances(target[rows], target)
        # Below every distance: the set holds the point itself even when others coincide with it.
        distances[torch.arange(len(rows), device=target.device), rows] = -1
        indices[rows] = distances.topk(neighbors, largest=False).indices
    similarity = target.new_empty(n, neighbors)
    for start in range(0, n, _chunk_rows(n)):
        rows = torch.arange(start, min(start + _chunk_rows(n), n), device=target.device)
        own = torch.zeros(len(rows), n, dtype=torch.bool, device=target.device)
        own.scatter_(1, indices[rows], True)
        # A column at a time: [rows, k] instead of [rows, k, k], whatever k is.
        for column in range(neighbors):
            common = own.gather(1, indices[indices[rows, column]]).sum(1)
            similarity[rows, column] = common.to(target.dtype) / neighbors
    return indices, similarity


def relaxed_contrastive(
    z: Tensor,
    z_target: Tensor,
    *,
    alpha: float = 0.8,
    sigma: float = 4.0,
    margin: float = 0.2,
    neighbors: int = 5,
    similarity_power: SimilarityPower = 1,
    pair_source: PairSource = "target",
    reduction: Reduction = "mean",
) -> Tensor:
    """Pull patches together that the target branch finds similar, push the others apart.

    Parameters
    ----------
    z
        [N, D] float: online projections g(F(p)); the gradient flows through them only, also through the row
        mean of (4).
    z_target
        [N, D]: target projections g'(F'(p)), taken as constants.
    alpha
        Share of the pairwise similarity in the pseudo label (3), 0..1; 1 - alpha is the global similarity's.
    sigma
        Bandwidth of the pairwise similarity (1), > 0, in units of the projections.
    margin
        m of (5): relative distance from which dissimilar pairs are left alone.
    neighbors
        k of the global similarity (2), the patch itself included.
    similarity_power
        1: exp(-distance / sigma) as printed in (1); 2: exp(-distance^2 / sigma), ReConPatch's.
    pair_source
        ``"target"``: both vectors of (1) come from the target branch; ``"cross"``: z_i online, z'_j target.
    reduction
        ``"paper"``: the printed 1/N of (5); ``"mean"``: 1/N^2, the mean over pairs.

    Returns
    -------
    Tensor
        Scalar loss >= 0. Rows are handled in chunks that are recomputed in the backward pass: memory is
        O(chunk x N), about 0.5 GB at any N, never N x N. Half precision is computed in float32 and rounded
        once.

    References
    ----------
    Luo et al., Computer Science 52(1), 2025, equations (1) to (5).
    """
    check_settings(z, z_target, alpha, sigma, margin, neighbors, similarity_power, pair_source, reduction)
    n = z.shape[0]
    dtype = z.dtype
    z, z_target = z.to(compute_dtype(z)), z_target.detach().to(compute_dtype(z_target))
    # Distances do not change under a shift; near the origin the matrix product loses fewer digits.
    centre = z_target.mean(0)
    online, target = z - centre, z_target - centre
    indices, overlap = global_similarity(target, neighbors)

    def chunk_loss(online: Tensor, rows: slice) -> Tensor:
        with torch.no_grad():
            source = target if pair_source == "target" else online
            pairwise = torch.exp(-_distances(source[rows], target).pow(similarity_power) / sigma)
            label = (alpha * pairwise).scatter_add_(1, indices[rows], (1 - alpha) * overlap[rows])
        distances = _distances(online[rows], online)
        relative = distances / distances.mean(1, keepdim=True)
        repulsion = (margin - relative).clamp_min(0).square()
        return (label * (relative.square() - repulsion) + repulsion).sum()

    total = z.new_zeros(())
    for start in range(0, n, _chunk_rows(n)):
        rows = slice(start, min(start + _chunk_rows(n), n))
        if _chunk_rows(n) == n:  # one chunk: what the backward pass needs fits, so nothing is computed twice
            total = total + chunk_loss(online, rows)
        else:
            total = total + checkpoint(chunk_loss, online, rows, use_reentrant=False)
    return (total / (n if reduction == "paper" else n * n)).to(dtype)
