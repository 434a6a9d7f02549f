"""Each centre takes its nearest patch that no earlier centre has taken (ConPatch, algorithm 1)."""

from __future__ import annotations

import torch
from torch import Tensor

from pydefect.ops._library import has_kernels, load_cpu_library, load_cuda_library
from pydefect.ops.knn import knn
from pydefect.ops.reference.assign_unique import assign_unique as compose
from pydefect.ops.reference.assign_unique import check_assign_unique

__all__ = ["assign_unique"]

load_cpu_library()
load_cuda_library()

# How many nearest patches of each centre are searched for at once. On product images almost every centre
# finds a free one among them; the others are compared with all free patches, by bounds where that pays.
_CANDIDATES = 4


def assign_unique(bank: Tensor, patches: Tensor) -> Tensor:
    """Find the patches C^NN of algorithm 1, lines 4 to 7.

    The answer is that of measuring every pair directly as ``((centre - patch) ** 2).sum()`` in float32, the
    same bit for bit for every number of threads and on every instruction set. Distances that are not a number
    count as the largest.

    Parameters
    ----------
    bank : Tensor
        Shape ``[M, D]``: centres, in the order in which they choose. ``M`` may be 0. The kernels are for
        float32 on the CPU and on CUDA; float64 takes the composition of PyTorch's operators in
        :mod:`pydefect.ops.reference`.
    patches : Tensor
        Shape ``[N, D]``, ``N >= M`` and ``N >= 1``, on the same device and of the same dtype: patch
        representations of one image; fewer than 2**30 rows.

    Returns
    -------
    Tensor
        ``[M]`` int64, all different: the patch that each centre takes; ties go to the lower patch index.
        No gradient flows.

    Raises
    ------
    RuntimeError
        If an argument has the wrong shape, dtype, device or range.

    Notes
    -----
    Each centre walks along its nearest patches, from a k-NN search; centres that find all of them taken are
    measured against the free patches, many centres at a time. At worst, with centres that all want the same
    patches, every centre is measured against every patch once.

    References
    ----------
    Luo et al., Computer Science 52(1), 2025, algorithm 1.

    Examples
    --------
    >>> import torch
    >>> from pydefect.ops import assign_unique
    >>> assign_unique(torch.tensor([[1.0], [0.0]]), torch.tensor([[0.0], [10.0]]))
    tensor([0, 1])
    """
    if not has_kernels(bank.device) or bank.dtype != torch.float32:
        return compose(bank, patches)
    check_assign_unique(bank, patches)
    bank, patches = bank.detach(), patches.detach()
    candidates = knn(bank, patches, min(_CANDIDATES, len(patches)), precision="bf16")[1]
    taken: Tensor = torch.ops.pydefect.assign_unique(bank, patches, candidates)
    return taken


@torch.library.register_fake("pydefect::assign_unique")
def _assign_unique_fake(bank: Tensor, patches: Tensor, candidates: Tensor) -> Tensor:
    torch._check(
        bank.dim() == 2 and patches.dim() == 2 and candidates.dim() == 2,
        lambda: "assign_unique: bank, patches and candidates must have 2 dimensions",
    )
    torch._check(
        bank.size(1) == patches.size(1), lambda: "assign_unique: bank must have the width of patches"
    )
    return candidates.new_empty(bank.size(0))
