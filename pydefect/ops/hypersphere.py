"""The hypersphere loss (ConPatch, equation 7)."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from pydefect.ops._autograd import differentiable_once
from pydefect.ops._library import has_kernels
from pydefect.ops._precision import compute_dtype
from pydefect.ops.knn import MOST_NEIGHBORS_ON_CUDA, knn
from pydefect.ops.reference.hypersphere import check_arguments

__all__ = ["hypersphere"]


def hypersphere(
    features: Tensor, bank: Tensor, k: int = 3, r: float = 1e-5, *, distance_power: Literal[1, 2] = 1
) -> Tensor:
    """Pull every patch into the spheres of radius r^2 around its k nearest centres.

    Float32 takes native kernels: the loss comes out of the search's own distances, and the gradient is made
    in one pass over the rows; both are the same for every number of threads. Half precision is computed in
    float32 too, and rounded once. Float64, and on CUDA more than 64 centres, take PyTorch's operators around
    :func:`pydefect.ops.knn`.

    Parameters
    ----------
    features : Tensor
        Representations F(p) of N = B * T patches, floating point, shape ``[N, D]``, N >= 0, D >= 1; the
        gradient flows through them only.
    bank : Tensor
        The memory bank, of the same dtype and on the same device, shape ``[M, D]``; taken as constant.
    k : int
        Number of centres K, between 1 and ``M``.
    r : float
        Radius, finite and at least 0; as printed, distances are compared with r^2.
    distance_power : {1, 2}
        1: Euclidean distances as printed; 2: squared distances, as in CFA's published code.

    Returns
    -------
    Tensor
        Scalar: mean over patches and centres of max(0, distance - r^2), in the units of the features; NaN
        without patches.

    Raises
    ------
    RuntimeError
        If an argument has the wrong shape, dtype, device or range.

    Notes
    -----
    Which centres are the nearest is decided in float32 whatever the dtype. A patch within 1e-15 of a centre
    is not pulled by it at `distance_power` 1, where the distance has no gradient. The native gradient cannot
    be differentiated again, and says so; float64's can.

    References
    ----------
    Luo et al., Computer Science 52(1), 2025, equation (7).

    Examples
    --------
    >>> import torch
    >>> from pydefect.ops import hypersphere
    >>> bank = torch.tensor([[0.0, 0.0], [3.0, 4.0]])
    >>> hypersphere(torch.tensor([[0.0, 2.0]]), bank, k=1, r=1.0)
    tensor(1.)
    """
    check_arguments(features, bank, k, r, distance_power)
    bank = bank.detach()
    native = has_kernels(features.device) and not (features.is_cuda and k > MOST_NEIGHBORS_ON_CUDA)
    precision = compute_dtype(features)
    points, centres = features.to(precision), bank.to(precision)
    loss: Tensor
    if native and precision == torch.float32:
        loss = torch.ops.pydefect.hypersphere(points, centres, k, r, distance_power)[0]
        return loss.to(features.dtype)
    indices = knn(points.float(), centres.float(), k)[1]
    loss = points.new_zeros(())
    # One centre at a time: [N, D] temporaries instead of [N, k, D].
    for column in range(k):
        squared = (points - centres[indices[:, column]]).square().sum(1)
        # The clamp stops the square root's gradient where a patch lies on its centre.
        distances = squared if distance_power == 2 else squared.clamp_min(1e-30).sqrt()
        loss = loss + torch.relu(distances - r**2).sum()
    return (loss / indices.numel()).to(features.dtype)


@torch.library.register_fake("pydefect::hypersphere")
def _hypersphere_fake(
    features: Tensor, bank: Tensor, k: int, r: float, distance_power: int
) -> tuple[Tensor, Tensor, Tensor]:
    torch._check(
        features.dim() == 2 and bank.dim() == 2,
        lambda: "hypersphere: features and bank must have 2 dimensions",
    )
    torch._check(
        features.size(1) == bank.size(1), lambda: "hypersphere: bank must have the width of features"
    )
    shape = (features.size(0), k)
    return features.new_empty(()), features.new_empty(shape), features.new_empty(shape, dtype=torch.int64)


@torch.library.register_fake("pydefect::hypersphere_backward")
def _hypersphere_backward_fake(
    grad: Tensor,
    features: Tensor,
    bank: Tensor,
    distances: Tensor,
    indices: Tensor,
    r: float,
    distance_power: int,
) -> Tensor:
    return features.new_empty(features.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    features, bank, _, ctx.r, ctx.distance_power = inputs
    _, distances, indices = output
    ctx.mark_non_differentiable(distances, indices)
    ctx.save_for_backward(features, bank, distances, indices)


def _backward(ctx: Any, grad: Tensor, *_: Tensor | None) -> tuple[Tensor | None, ...]:
    gradient = torch.ops.pydefect.hypersphere_backward(grad, *ctx.saved_tensors, ctx.r, ctx.distance_power)
    return gradient, None, None, None, None


torch.library.register_autograd("pydefect::hypersphere", _backward, setup_context=_setup_context)
differentiable_once("hypersphere", "hypersphere_backward")
