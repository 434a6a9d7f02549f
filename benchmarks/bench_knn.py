"""k-NN: the operator, its pure-PyTorch twin and its rivals, per shape in one group.

Run with ``pytest benchmarks/bench_knn.py``; ``OMP_NUM_THREADS=1`` in front gives single-thread figures. Every
contender's result is compared with the twin's on some of the queries before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pydefect.ops import knn, reference

Search = Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]

K = 3
# Queries x bank x width: a 56 x 56 map, eight of 28 x 28 for a batch, and eight of 56 x 56.
SHAPES = [(3136, 784, 112), (3136, 784, 448), (3136, 3136, 448), (12544, 1568, 224), (25088, 784, 448)]
# Measuring 9 billion differences in float64 one by one takes minutes and tells nothing more.
SHAPES_FOR_THE_TWIN = SHAPES[:1]


def cdist_topk(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    distances, indices = torch.cdist(queries, bank).topk(k, largest=False)
    return distances.square(), indices


def addmm_topk(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    norms = bank.square().sum(1)
    distances, indices = torch.addmm(norms, queries, bank.T, alpha=-2).topk(k, largest=False)
    return (distances + queries.square().sum(1, keepdim=True)).clamp(min=0), indices


def faiss_flat(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    faiss = pytest.importorskip("faiss")
    faiss.omp_set_num_threads(torch.get_num_threads())
    index = faiss.IndexFlatL2(bank.size(1))
    index.add(bank.numpy())
    distances, indices = index.search(queries.numpy(), k)
    return torch.from_numpy(distances), torch.from_numpy(indices)


def knn_bf16(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    return knn(queries, bank, k, precision="bf16")


def compare_with_twin(search: Search, queries: Tensor, bank: Tensor) -> None:
    some = queries[:100]
    distances, indices = search(some, bank, K)
    expected, expected_indices = reference.knn(some, bank, K)
    # The rivals' expanded form keeps about four digits of these distances.
    torch.testing.assert_close(distances, expected, rtol=1e-3, atol=0)
    assert (indices == expected_indices).float().mean() > 0.99


@pytest.mark.parametrize(
    "search",
    [knn, knn_bf16, cdist_topk, addmm_topk, faiss_flat, reference.knn],
    ids=["pydefect", "pydefect bf16", "cdist+topk", "addmm+topk", "faiss", "reference"],
)
@pytest.mark.parametrize(("n", "m", "d"), SHAPES)
def bench_knn(search: Search, n: int, m: int, d: int, device: str, measure: Callable[..., None]) -> None:
    if search is reference.knn and (n, m, d) not in SHAPES_FOR_THE_TWIN:
        pytest.skip("too slow for this shape")
    if search is faiss_flat and device != "cpu":
        pytest.skip("faiss-cpu")
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(n, d, generator=generator).to(device)
    bank = torch.randn(m, d, generator=generator).to(device)
    compare_with_twin(search, queries, bank)
    measure(
        f"knn {n}x{m}x{d}",
        lambda: search(queries, bank, K),
        flops=2 * n * m * d,
        traffic=4 * (n * d + m * d + 3 * n * K),
    )
