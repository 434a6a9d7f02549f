"""Nearest neighbours in a bank of vectors."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pydefect.ops._library import load_cpu_library, load_cuda_library, require_kernels
from pydefect.ops.reference.knn import knn as compose

load_cpu_library()
load_cuda_library()

# kMostNeighbours of csrc/cuda/knn.cu.
MOST_NEIGHBORS_ON_CUDA = 64

# While torch.export traces: what the estimates of some queries may take, and into how many parts they are
# divided at most, each of which makes the graph longer.
_ESTIMATES_BYTES = 16 << 20
_MOST_PARTS = 64


def knn(
    queries: Tensor, bank: Tensor, k: int, *, precision: Literal["float32", "bf16"] = "float32"
) -> tuple[Tensor, Tensor]:
    """Find the `k` rows of `bank` that are nearest to each row of `queries`.

    The answer is that of measuring every pair directly as ``((query - row) ** 2).sum()`` in float32, although
    most pairs are only estimated on the way: wherever the estimate's rounding could matter, the pair is
    measured. So vectors that nearly coincide keep their small distances, and the result is the same bit for
    bit for every number of threads, on every instruction set and on every device.

    Parameters
    ----------
    queries : Tensor
        Float32, shape ``[N, D]``, on the CPU or a CUDA device. ``N`` may be 0. Half-precision tensors are
        refused: convert them with ``.float()``.
    bank : Tensor
        Float32, shape ``[M, D]``, on the same device; fewer than 2**30 rows.
    k : int
        Number of neighbours, between 1 and ``M``. On CUDA more than 64 take the twin, which measures every
        pair in float64: far slower, and neighbours that rounding alone tells apart may come in another order.
    precision : {"float32", "bf16"}
        How candidates are found; the answer is the same bit for bit. "bf16" scores them by bfloat16
        products, at up to twice the rate (more on processors with AMX), and measures every row whose
        score the roundings leave in question (by a rigorous bound, ``csrc/knn_certificate.h``). Some of the
        queries are tried first: where too many rows stay in question, which dense clusters bring about, the
        search is made in float32. So it is on processors without AVX512_BF16 and on CUDA.

    Returns
    -------
    distances : Tensor
        Squared Euclidean distances, float32, shape ``[N, k]``, ascending. NaN counts as the largest.
    indices : Tensor
        Rows of `bank`, int64, shape ``[N, k]``. Of equally distant rows the lower index comes first.

    Raises
    ------
    RuntimeError
        If an argument has the wrong shape, dtype, device or range, or if this build has no kernels for the
        device.

    Notes
    -----
    No gradient flows through this operator: both results are detached. Where one is needed, measure the
    neighbours again: ``(queries[:, None] - bank[indices]).square().sum(-1)``.

    While ``torch.export`` traces a call, the neighbours are chosen by matrix products and then measured: of
    two rows whose distances float32 products cannot tell apart either may be taken.

    On CUDA, vectors whose common offset is large against their distances (a mean of 1000 with a spread of 1,
    say) make the estimates useless and the search slow, though never wrong: subtract the offset from both
    sides first. The CPU's kernels do that themselves.

    Examples
    --------
    >>> import torch
    >>> from pydefect.ops import knn
    >>> bank = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 1.0]])
    >>> distances, indices = knn(torch.tensor([[0.0, 0.0]]), bank, k=2)
    >>> distances
    tensor([[0., 1.]])
    >>> indices
    tensor([[0, 2]])
    """
    if torch.compiler.is_exporting():
        return _by_products(queries, bank, k)
    require_kernels(queries.device)
    if queries.is_cuda and k > MOST_NEIGHBORS_ON_CUDA:
        return compose(queries, bank, k, precision=precision)
    distances, indices = torch.ops.pydefect.knn(queries.detach(), bank.detach(), k, precision=precision)
    return distances, indices


def _by_products(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Choose by matrix products, which every runtime has and is fast at, and measure what was chosen."""
    # Products of long vectors cancel: only what differs among the rows is multiplied.
    offset = bank.mean(0)
    rows = bank - offset
    norms = rows.square().sum(1)
    found = []
    together = max(_ESTIMATES_BYTES // (4 * len(bank)), -(-len(queries) // _MOST_PARTS), 1)
    for some in queries.split(together):
        estimates = torch.addmm(norms, some - offset, rows.T, alpha=-2)
        _, chosen = estimates.topk(k, dim=1, largest=False)
        distances = (some[:, None] - bank[chosen]).square().sum(-1)
        distances, order = distances.sort(dim=1)
        found.append((distances, chosen.gather(1, order)))
    distances, indices = (torch.cat(parts) for parts in zip(*found, strict=True))
    return distances, indices


@torch.library.register_fake("pydefect::knn")
def _knn_fake(queries: Tensor, bank: Tensor, k: int, *, precision: str = "float32") -> tuple[Tensor, Tensor]:
    torch._check(
        queries.dim() == 2 and bank.dim() == 2, lambda: "knn: queries and bank must have 2 dimensions"
    )
    torch._check(
        queries.dtype == bank.dtype == torch.float32, lambda: "knn: queries and bank must be float32"
    )
    torch._check(queries.size(1) == bank.size(1), lambda: "knn: bank must have the width of queries")
    shape = (queries.size(0), k)
    return queries.new_empty(shape), queries.new_empty(shape, dtype=torch.int64)
