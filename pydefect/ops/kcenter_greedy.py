"""Greedy k-centre: a subset that covers all points (PatchCore's coreset)."""

from __future__ import annotations

import torch
from torch import Tensor

from pydefect.ops._library import has_kernels, load_cpu_library, load_cuda_library
from pydefect.ops.reference.kcenter_greedy import kcenter_greedy as compose

__all__ = ["kcenter_greedy"]

load_cpu_library()
load_cuda_library()


def kcenter_greedy(features: Tensor, m: int) -> Tensor:
    """Choose m points, each the farthest from those chosen before it.

    The choice is that of measuring every pair directly as ``((a - b) ** 2).sum()`` in float32, the same bit
    for bit for every number of threads, on every instruction set and on CUDA. A distance that is not a number
    counts as infinite.

    Parameters
    ----------
    features : Tensor
        Shape ``[N, D]``, 1 to 2**30 - 1 rows. The kernels are for float32 on the CPU and on CUDA; float64
        takes the composition of PyTorch's operators in :mod:`pydefect.ops.reference`.
    m : int
        Number of points to choose, between 1 and ``N``.

    Returns
    -------
    Tensor
        ``[m]`` int64, all different, in the order of choice, beginning with point 0; ties go to the lower
        index. No gradient flows.

    Raises
    ------
    RuntimeError
        If an argument has the wrong shape, dtype or range.

    Notes
    -----
    Memory beyond the features stays at some 20 bytes a point. Distances to the chosen points only fall, so a
    point is measured against new ones only while what is known of it could make it the farthest. On CUDA
    every point is measured against every new one, in m launches that never wait for the host.

    References
    ----------
    Gonzalez, Clustering to minimize the maximum intercluster distance, 1985; Roth et al., Towards total
    recall in industrial anomaly detection, CVPR 2022, algorithm 1; Minoux, Accelerated greedy algorithms for
    maximizing submodular set functions, 1978 (bounds instead of values).

    Examples
    --------
    >>> import torch
    >>> from pydefect.ops import kcenter_greedy
    >>> kcenter_greedy(torch.tensor([[0.0], [1.0], [5.0], [9.0]]), 3)
    tensor([0, 3, 2])
    """
    if not has_kernels(features.device) or features.dtype != torch.float32:
        return compose(features, m)
    chosen: Tensor = torch.ops.pydefect.kcenter_greedy(features.detach(), m)
    return chosen


@torch.library.register_fake("pydefect::kcenter_greedy")
def _kcenter_greedy_fake(features: Tensor, m: int) -> Tensor:
    torch._check(features.dim() == 2, lambda: "kcenter_greedy: features must have 2 dimensions")
    return features.new_empty(m, dtype=torch.int64)
