"""Greedy k-centre: PatchCore's coreset and the streaming reduction, beside one matrix-vector product a step.

Run with ``pytest benchmarks/bench_kcenter_greedy.py``; ``OMP_NUM_THREADS=1`` in front gives single-thread
figures. The coreset at full size, 1,637 of 163,856, takes minutes with the loops, which are left out there;
``norm`` measures as anomalib's KCenterGreedy does.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pydefect.ops import kcenter_greedy, kcenter_reduce, knn, reference

Choose = Callable[[Tensor, int], Tensor]


def product_a_step(features: Tensor, m: int) -> Tensor:
    norms = features.square().sum(1)
    chosen = torch.zeros(m, dtype=torch.int64, device=features.device)
    nearest = torch.full_like(norms, torch.inf)
    for step in range(1, m):
        point = chosen[step - 1]
        torch.minimum(nearest, norms + norms[point] - 2 * (features @ features[point]), out=nearest)
        nearest[point] = -torch.inf
        chosen[step] = nearest.argmax()
    return chosen


def norm_a_step(features: Tensor, m: int) -> Tensor:
    """As anomalib's KCenterGreedy measures."""
    chosen = torch.zeros(m, dtype=torch.int64, device=features.device)
    nearest = torch.full((len(features),), torch.inf, device=features.device)
    for step in range(1, m):
        point = chosen[step - 1]
        torch.minimum(nearest, torch.linalg.norm(features - features[point], dim=1), out=nearest)
        nearest[point] = -torch.inf
        chosen[step] = nearest.argmax()
    return chosen


def gaussian(n: int, d: int) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(0))


def smooth(n: int, d: int) -> Tensor:
    """Clusters of vectors with falling variances, as patches of one product have."""
    generator = torch.Generator().manual_seed(0)
    scale = torch.arange(1, d + 1).pow(-0.7)
    middles = torch.randn(200, d, generator=generator) * scale
    which = torch.randint(200, (n,), generator=generator)
    return middles[which] + 0.5 * torch.randn(n, d, generator=generator) * scale


def compare(choose: Choose, features: Tensor) -> None:
    some = features[:2000]
    assert torch.equal(choose(some, 100), reference.kcenter_greedy(some, 100))


# Points x width, points to choose: a tenth of the full coreset's points, and all of them.
SHAPES = [(16384, 384, 163), pytest.param(163856, 384, 1637, marks=pytest.mark.slow)]


@pytest.mark.parametrize(
    "choose", [kcenter_greedy, product_a_step, norm_a_step], ids=["pydefect", "product", "norm"]
)
@pytest.mark.parametrize("data", [smooth, gaussian])
@pytest.mark.parametrize(("n", "d", "m"), SHAPES)
def bench_kcenter_greedy(
    choose: Choose,
    data: Callable[[int, int], Tensor],
    n: int,
    d: int,
    m: int,
    device: str,
    measure: Callable[..., None],
) -> None:
    if n > 100_000 and choose is not kcenter_greedy:
        pytest.skip("takes minutes")
    features = data(n, d).to(device)
    compare(choose, features)
    measure(
        f"kcenter_greedy {m} of {n}x{d} {data.__name__}",
        lambda: choose(features, m),
        flops=2 * n * m * d,
        traffic=4 * n * d + 8 * m,
    )


M, ADDED, WIDTH = 784, 3136, 448


@pytest.mark.parametrize("contender", ["pydefect", "product", "norm"])
def bench_kcenter_reduce(contender: str, device: str, measure: Callable[..., None]) -> None:
    points = smooth(M + ADDED, WIDTH).to(device)
    centres, added = points[:M], points[M:]
    distances, indices = knn(centres.cpu(), centres.cpu(), M)
    known = torch.empty_like(distances).scatter_(1, indices, distances).to(device)
    loops = {"product": product_a_step, "norm": norm_a_step}
    calls: dict[str, Callable[[], Tensor]] = {
        "pydefect": lambda: kcenter_reduce(centres, added, M, known)[0],
        **{name: lambda loop=loop: loop(points, M) for name, loop in loops.items()},  # type: ignore[misc]
    }
    # The loops' rounding may turn a near tie, and with it the choices after it.
    same = calls[contender]()[:100] == reference.kcenter_greedy(points, 100)
    assert same.float().mean() > 0.9
    measure(
        f"kcenter_reduce {M}+{ADDED} to {M}",
        calls[contender],
        flops=2 * (M + ADDED) * M * WIDTH,
        traffic=4 * (M + ADDED) * WIDTH + 4 * 2 * M * M,
    )
