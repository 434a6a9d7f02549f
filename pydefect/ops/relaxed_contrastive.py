"""The relaxed contrastive loss over pairwise and global similarity (ConPatch, equations 1 to 5)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pydefect.ops import reference
from pydefect.ops._autograd import differentiable_once
from pydefect.ops._library import has_kernels, load_cpu_library, load_cuda_library
from pydefect.ops.knn import MOST_NEIGHBORS_ON_CUDA, knn
from pydefect.ops.reference.relaxed_contrastive import PairSource, Reduction, SimilarityPower, check_settings

__all__ = ["relaxed_contrastive"]

load_cpu_library()
load_cuda_library()


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

    Nothing of size N x N is ever kept: distances are computed tile by tile, once for the row means of (4),
    once for the loss, and once more in the backward pass. Memory beyond inputs and gradient is O(N) plus some
    megabytes on the CPU; on CUDA it is two copies of the inputs, N / 128 floats a patch and 256 MB. Half
    precision is computed in float32 and rounded once. Float64, and on CUDA more than 64 neighbours, run the
    reference, chunk by chunk.

    Parameters
    ----------
    z
        [N, D] float: online projections g(F(p)); the gradient flows through them only, also through the row
        mean of (4).
    z_target
        [N, D], same dtype and device: target projections g'(F'(p)), taken as constants.
    alpha
        Share of the pairwise similarity in the pseudo label (3), 0..1; 1 - alpha is the global similarity's.
    sigma
        Bandwidth of the pairwise similarity (1), > 0, in units of the projections.
    margin
        m of (5), >= 0: relative distance from which dissimilar pairs are left alone.
    neighbors
        k of the global similarity (2), 1..N, the patch itself included.
    similarity_power
        1: exp(-distance / sigma) as printed in (1); 2: exp(-distance^2 / sigma), ReConPatch's.
    pair_source
        ``"target"``: both vectors of (1) come from the target branch; ``"cross"``: z_i online, z'_j target.
    reduction
        ``"paper"``: the printed 1/N of (5); ``"mean"``: 1/N^2, the mean over pairs.

    Returns
    -------
    Tensor
        Scalar loss >= 0, the same for every number of threads. Differentiable once.

    Raises
    ------
    ValueError
        A setting outside its range.
    RuntimeError
        A tensor of the wrong shape, dtype or device.

    Notes
    -----
    Distances of projections come from products, and are as exact as in float32 PyTorch. The forces between
    near duplicates grow with their nearness: with `alpha` below 1, where the global similarity takes back a
    part of them, they are as exact as PyTorch's on the CPU, and less so on CUDA.

    References
    ----------
    Luo et al., Computer Science 52(1), 2025, equations (1) to (5).
    """
    check_settings(z, z_target, alpha, sigma, margin, neighbors, similarity_power, pair_source, reduction)
    z_target = z_target.detach()
    if not _takes_kernels(z, neighbors if alpha < 1 else 0):
        return reference.relaxed_contrastive(
            z,
            z_target,
            alpha=alpha,
            sigma=sigma,
            margin=margin,
            neighbors=neighbors,
            similarity_power=similarity_power,
            pair_source=pair_source,
            reduction=reduction,
        )
    # With alpha = 1 the global similarity counts for nothing.
    online, target = z.float(), z_target.float()
    nearest = _nearest_and_itself(target, neighbors if alpha < 1 else 0)
    loss: Tensor = torch.ops.pydefect.relaxed_contrastive(
        online,
        target,
        nearest,
        alpha,
        sigma,
        margin,
        similarity_power,
        pair_source == "cross",
        reduction == "mean",
    )[0]
    return loss.to(z.dtype)


def _takes_kernels(z: Tensor, neighbors: int) -> bool:
    if not has_kernels(z.device):
        return False
    return z.dtype != torch.float64 and not (z.is_cuda and neighbors > MOST_NEIGHBORS_ON_CUDA)


def _nearest_and_itself(points: Tensor, k: int) -> Tensor:
    """N_k(i) of equation (2), [N, k]: the nearest points of every point, itself always among them."""
    if k == 0:
        return torch.empty(len(points), 0, dtype=torch.int64, device=points.device)
    nearest = knn(points, points, k, precision="bf16")[1]
    # Where k others coincide with a point, the search may not name the point itself.
    itself = torch.arange(len(points), device=points.device)
    nearest[:, -1] = torch.where((nearest == itself.unsqueeze(1)).any(1), nearest[:, -1], itself)
    return nearest


@torch.library.register_fake("pydefect::relaxed_contrastive")
def _fake(
    z: Tensor,
    z_target: Tensor,
    neighbors: Tensor,
    alpha: float,
    sigma: float,
    margin: float,
    similarity_power: int,
    cross: bool,
    mean: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    torch._check(z.dim() == 2, lambda: "relaxed_contrastive: z must have 2 dimensions")
    return z.new_empty(()), z.new_empty(z.shape[0]), z.new_empty(z.shape[0])


@torch.library.register_fake("pydefect::relaxed_contrastive_backward")
def _backward_fake(grad: Tensor, z: Tensor, *others: Any) -> Tensor:
    return torch.empty_like(z, memory_format=torch.contiguous_format)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    z, z_target, neighbors, *settings = inputs
    _, inverse_means, slopes = output
    ctx.save_for_backward(z, z_target, neighbors, inverse_means, slopes)
    ctx.settings = settings


def _backward(ctx: Any, grad: Tensor, *_unused: Any) -> tuple[Tensor | None, ...]:
    gradient = torch.ops.pydefect.relaxed_contrastive_backward(grad, *ctx.saved_tensors, *ctx.settings)
    return (gradient, *[None] * 8)


torch.library.register_autograd("pydefect::relaxed_contrastive", _backward, setup_context=_setup_context)
differentiable_once("relaxed_contrastive", "relaxed_contrastive_backward")
