"""Algorithm 1's choice of patches: the operator and Python loops over a distance matrix, with and without
PyTorch's argmin in them. The twin takes minutes of float64 differences: it checks the first centres only.

Run with ``pytest benchmarks/bench_assign_unique.py``; ``OMP_NUM_THREADS=1`` in front gives single-thread
figures.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pydefect.ops import assign_unique, reference

Assign = Callable[[Tensor, Tensor], Tensor]

# Centres x patches x width: gamma 4 and gamma 1 of a 56 x 56 map.
SHAPES = [(784, 3136, 448), (3136, 3136, 448)]


def matrix_and_loop(bank: Tensor, patches: Tensor) -> Tensor:
    squared = bank.square().sum(1, keepdim=True) + patches.square().sum(1) - 2 * (bank @ patches.T)
    taken = torch.empty(len(bank), dtype=torch.int64, device=bank.device)
    for centre in range(len(bank)):
        patch = squared[centre].argmin()
        taken[centre] = patch
        squared[:, patch] = torch.inf
    return taken


def matrix_and_python(bank: Tensor, patches: Tensor) -> Tensor:
    """As the paper writes it: for every centre, the smallest of what is left of its row."""
    rows = (bank.square().sum(1, keepdim=True) + patches.square().sum(1) - 2 * (bank @ patches.T)).tolist()
    free = list(range(len(patches)))
    taken = []
    for row in rows:
        taken.append(min(free, key=row.__getitem__))
        free.remove(taken[-1])
    return torch.tensor(taken, device=bank.device)


def smooth_patches(n: int, d: int, seed: int) -> Tensor:
    """Vectors with falling variances, as principal components have."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator) * torch.arange(1, d + 1).pow(-0.7)


@pytest.mark.parametrize(
    "assign",
    [assign_unique, matrix_and_loop, matrix_and_python],
    ids=["pydefect", "matrix+argmin", "matrix+python"],
)
@pytest.mark.parametrize(("m", "n", "d"), SHAPES)
def bench_assign_unique(
    assign: Assign, m: int, n: int, d: int, device: str, measure: Callable[..., None]
) -> None:
    patches = smooth_patches(n, d, 0).to(device)
    bank = smooth_patches(m, d, 1).to(device)
    some = bank[:100]
    assert torch.equal(assign(some, patches), reference.assign_unique(some, patches))
    # The expanded form of the matrix may turn a near tie, and with it what later centres find.
    assert (assign(bank, patches) == assign_unique(bank, patches)).float().mean() > 0.95
    measure(
        f"assign_unique {m}x{n}x{d}",
        lambda: assign(bank, patches),
        flops=2 * m * n * d,
        traffic=4 * (m * d + n * d) + 8 * m,
    )
