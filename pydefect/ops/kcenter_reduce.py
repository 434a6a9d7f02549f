"""Streaming k-centre: centres and new points reduced to m centres again."""

from __future__ import annotations

import torch
from torch import Tensor

from pydefect.ops._library import has_kernels, load_cpu_library, load_cuda_library
from pydefect.ops.reference.kcenter_reduce import kcenter_reduce as compose

__all__ = ["kcenter_reduce"]

load_cpu_library()
load_cuda_library()


def kcenter_reduce(
    centres: Tensor, added: Tensor, m: int, distances: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Choose m of the centres and the added points, each the farthest from those chosen before it.

    The choice is :func:`pydefect.ops.kcenter_greedy`'s among ``cat([centres, added])``. It gives back the
    distances between the chosen points, which the next reduction begins with: what is measured anew is each
    chosen point against the added ones, and each chosen one of those against the centres.

    Parameters
    ----------
    centres : Tensor
        Shape ``[M, D]``, ``M >= 1``. The kernels are for float32 on the CPU and on CUDA; float64 takes the
        composition of PyTorch's operators in :mod:`pydefect.ops.reference`.
    added : Tensor
        Shape ``[n, D]``, on the same device and of the same dtype. ``n`` may be 0.
    m : int
        Number of points to choose, between 1 and ``M + n``.
    distances : Tensor, optional
        Shape ``[M, M]``: squared distances between the centres, from the reduction that chose them. None:
        they are measured.

    Returns
    -------
    chosen : Tensor
        ``[m]`` int64 in the order of choice, rows of ``cat([centres, added])``, beginning with row 0; ties go
        to the lower index.
    squared_radius : Tensor
        Scalar: squared distance of the farthest point from its nearest chosen one; 0 when every point is
        chosen.
    chosen_distances : Tensor
        ``[m, m]``: squared distances between the chosen points. No gradient flows through any result.

    Raises
    ------
    RuntimeError
        If an argument has the wrong shape, dtype, device or range.

    Notes
    -----
    Distances are measured directly in float32, the same bit for bit for every number of threads, on every
    instruction set and on CUDA, where `distances` is not needed; one that is not a number counts as infinite.
    Memory beyond inputs and outputs: m (M + n) float32, on CUDA M + n.

    References
    ----------
    Gonzalez, Clustering to minimize the maximum intercluster distance, 1985; Charikar et al., Incremental
    clustering and dynamic information retrieval, STOC 1997.

    Examples
    --------
    >>> import torch
    >>> from pydefect.ops import kcenter_reduce
    >>> chosen, squared_radius, distances = kcenter_reduce(
    ...     torch.tensor([[0.0], [1.0]]), torch.tensor([[9.0], [7.0]]), m=2
    ... )
    >>> chosen, squared_radius
    (tensor([0, 2]), tensor(4.))
    """
    if not has_kernels(centres.device) or centres.dtype != torch.float32:
        return compose(centres, added, m, distances)
    chosen, squared_radius, chosen_distances = torch.ops.pydefect.kcenter_reduce(
        centres.detach(), added.detach(), m, None if distances is None else distances.detach()
    )
    return chosen, squared_radius, chosen_distances


@torch.library.register_fake("pydefect::kcenter_reduce")
def _kcenter_reduce_fake(
    centres: Tensor, added: Tensor, m: int, distances: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    torch._check(
        centres.dim() == 2 and added.dim() == 2,
        lambda: "kcenter_reduce: centres and added must have 2 dimensions",
    )
    torch._check(
        centres.size(1) == added.size(1), lambda: "kcenter_reduce: added must have the width of centres"
    )
    return centres.new_empty(m, dtype=torch.int64), centres.new_empty(()), centres.new_empty(m, m)
