"""Greedy k-centre against a naive one, and the guarantee that makes it a cover.

The kernel promises the choice of measuring every pair in float32, in the order of summation that `measured`
spells out: nothing is left to a tolerance. The twin measures in float64, which changes the choice only where
the two farthest points' distances agree to (D + 4) * 2**-24 of themselves; random points do not.
"""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pydefect import ops
from pydefect.buildinfo import build_info
from pydefect.ops import reference

IMPLEMENTATIONS = [
    pytest.param(ops.kcenter_greedy, id="ops"),
    pytest.param(reference.kcenter_greedy, id="reference"),
]


def naive(points: list[list[float]], m: int) -> list[int]:
    chosen = [0]
    while len(chosen) < m:
        rest = [i for i in range(len(points)) if i not in chosen]
        chosen.append(max(rest, key=lambda i: (min(math.dist(points[i], points[c]) for c in chosen), -i)))
    return chosen


def covering_radius(points: list[list[float]], chosen: list[int] | tuple[int, ...]) -> float:
    return max(min(math.dist(point, points[c]) for c in chosen) for point in points)


def random_points(n: int, d: int, seed: int = 0) -> Tensor:
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("kcenter", IMPLEMENTATIONS)
@pytest.mark.parametrize(("n", "m", "d"), [(1, 1, 1), (9, 1, 3), (30, 7, 2), (40, 40, 5), (50, 13, 16)])
def test_farthest_first(kcenter, n, m, d):
    """Random points have no ties, so rounding decides nothing."""
    points = random_points(n, d, seed=n)
    assert kcenter(points, m).tolist() == naive(points.tolist(), m)


@pytest.mark.parametrize("kcenter", IMPLEMENTATIONS)
def test_every_point_once_when_all_are_asked_for(kcenter):
    points = random_points(12, 2).repeat(2, 1)
    chosen = kcenter(points, 24).tolist()
    assert sorted(chosen) == list(range(24))
    # Copies add no cover: the first half of the choice already holds every place.
    assert {index % 12 for index in chosen[:12]} == set(range(12))


@pytest.mark.parametrize("kcenter", IMPLEMENTATIONS)
def test_nothing_but_one_point(kcenter):
    assert sorted(kcenter(torch.full((6, 3), 0.7), 6).tolist()) == list(range(6))


def falling(n: int, d: int) -> Tensor:
    """Variances that fall as those of principal components: distances are bounded before measured."""
    points = random_points(n, d) * torch.arange(1, d + 1).pow(-0.8)
    points[1::9] = points[0]
    # The same outlines' heads.
    points[2::9, :48] = points[0, :48]
    return points


@pytest.mark.parametrize(("n", "m", "d"), [(600, 300, 256), (1100, 700, 273), (520, 520, 448)])
@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e18])
def test_falling_variances(n, m, d, scale):
    points = falling(n, d) * scale
    assert ops.kcenter_greedy(points, m).tolist() == by_measuring(points, m)


def test_ties_go_to_the_lower_index():
    # Whole numbers with mean 0: every product is exact.
    points = torch.tensor([[0.0, 0.0], [2.0, 0.0], [-2.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
    assert ops.kcenter_greedy(points, 3).tolist() == reference.kcenter_greedy(points, 3).tolist() == [0, 1, 2]


@pytest.mark.parametrize("seed", range(4))
def test_at_most_twice_the_best_radius(seed):
    """Gonzalez 1985. The best choice of m of the points is found by trying all."""
    points = random_points(11, 2, seed).tolist()
    for m in (2, 3, 4):
        best = min(covering_radius(points, chosen) for chosen in itertools.combinations(range(11), m))
        greedy = covering_radius(points, ops.kcenter_greedy(torch.tensor(points), m).tolist())
        assert greedy <= 2 * best * (1 + 1e-6)


def measured(points: Tensor, point: Tensor) -> Tensor:
    """Squared distances to one point in float32: sixteen partial sums, then halves added to halves."""
    difference = torch.nn.functional.pad(points - point, (0, -points.shape[1] % 16))
    sums = torch.zeros(len(points), 16)
    for start in range(0, difference.shape[1], 16):
        part = difference[:, start : start + 16]
        sums = sums + part * part
    for half in (8, 4, 2, 1):
        sums = sums[:, :half] + sums[:, half : 2 * half]
    return sums[:, 0]


def by_measuring(points: Tensor, m: int) -> list[int]:
    chosen = [0]
    nearest = torch.full((len(points),), torch.inf)
    while len(chosen) < m:
        distances = measured(points, points[chosen[-1]])
        nearest = torch.where(distances < nearest, distances, nearest)
        nearest[chosen] = -1
        chosen.append(int((nearest == nearest.max()).nonzero()[0]))
    return chosen


def clustered(n: int, d: int, clusters: int, spread: float) -> Tensor:
    generator = torch.Generator().manual_seed(n)
    middles = torch.randn(clusters, d, generator=generator)
    which = torch.randint(clusters, (n,), generator=generator)
    return middles[which] + spread * torch.randn(n, d, generator=generator)


@pytest.mark.parametrize("d", [1, 5, 15, 16, 17, 48])
@pytest.mark.parametrize(("n", "m"), [(2, 2), (17, 16), (511, 40), (513, 513), (5000, 300)])
def test_is_direct_measurement(n, m, d):
    """Rounds of 512 points and more, samples of 4096 and tiles of 4 x 4 are crossed."""
    points = random_points(n, d)
    assert ops.kcenter_greedy(points, m).tolist() == by_measuring(points, m)


@pytest.mark.parametrize("spread", [0.0, 1e-3, 0.3])
def test_clusters(spread):
    """First one point a cluster, then a long way down: many rounds choose nothing. Spread 0 ends in ties."""
    points = clustered(6000, 8, 20, spread)
    assert ops.kcenter_greedy(points, 200).tolist() == by_measuring(points, 200)


def test_a_grid_full_of_ties():
    generator = torch.Generator().manual_seed(1)
    points = torch.randint(0, 3, (6000, 4), generator=generator).float()
    chosen = ops.kcenter_greedy(points, 300).tolist()
    assert chosen == by_measuring(points, 300)
    assert chosen[:100] == reference.kcenter_greedy(points, 100).tolist()


def test_points_far_from_the_origin():
    """|a|^2 - 2 a.b + |b|^2 keeps no correct digit of these distances."""
    points = random_points(600, 6) + 1e4
    assert ops.kcenter_greedy(points, 50).tolist() == by_measuring(points, 50)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_is_infinitely_far(value):
    points = random_points(700, 6)
    points[30, 2] = value
    points[600, 5] = value
    chosen = ops.kcenter_greedy(points, 40).tolist()
    assert chosen[:3] == [0, 30, 600]
    assert chosen == by_measuring(points, 40) == reference.kcenter_greedy(points, 40).tolist()


def test_inputs_that_are_not_contiguous_come_out_unchanged():
    points = random_points(900, 20)
    before = points.clone()
    expected = ops.kcenter_greedy(points[::3, 1::2].contiguous(), 40)
    assert torch.equal(ops.kcenter_greedy(points[::3, 1::2], 40), expected)
    assert torch.equal(points, before)


def test_same_for_every_thread_count():
    points = random_points(4000, 65)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(ops.kcenter_greedy(points, 200).tolist())
    finally:
        torch.set_num_threads(before)
    assert results == results[:1] * 4


@pytest.mark.parametrize("level", build_info().cpu_levels_usable)
def test_same_on_every_instruction_set(level, tmp_path, at_level):
    shapes = [(n, d) for n in (30, 700) for d in (1, 7, 16, 17, 33, 112)]
    file = tmp_path / "results.pt"
    code = f"""
import torch
from pydefect.ops import kcenter_greedy
results = []
for n, d in {shapes}:
    points = torch.randn(n, d, generator=torch.Generator().manual_seed(0))
    results.append(kcenter_greedy(points, 29))
torch.save(results, {str(file)!r})
"""
    at_level(level, code)
    for (n, d), result in zip(shapes, torch.load(file), strict=True):
        assert result.tolist() == by_measuring(random_points(n, d), 29)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_small_problem(data):
    n = data.draw(st.integers(1, 60), label="n")
    m = data.draw(st.integers(1, n), label="m")
    d = data.draw(st.integers(1, 40), label="d")
    levels = data.draw(st.sampled_from([1, 2, 5, 1000]), label="levels")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), label="seed"))
    points = torch.randint(levels, (n, d), generator=generator) / 7
    assert ops.kcenter_greedy(points, m).tolist() == by_measuring(points, m)


ERRORS = {
    "1-D": (torch.zeros(3), 1, "features must have 2 dimensions, got 1"),
    "half": (torch.zeros(2, 3).half(), 1, "features must be float32 or float64, got"),
    "empty": (torch.zeros(0, 3), 1, "features must have at least 1 row, got 0"),
    "no width": (torch.zeros(2, 0), 1, "features must have a width of at least 1, got 0"),
    "m zero": (torch.zeros(2, 3), 0, "m must be between 1 and the 2 rows of features, got 0"),
    "m large": (torch.zeros(2, 3), 3, "m must be between 1 and the 2 rows of features, got 3"),
}


@pytest.mark.parametrize("kcenter", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", ERRORS)
def test_wrong_arguments(kcenter, case):
    features, m, message = ERRORS[case]
    with pytest.raises(RuntimeError, match=f"kcenter_greedy: {message}"):
        kcenter(features, m)


def test_float64_takes_the_twin():
    points = random_points(50, 4).double()
    assert torch.equal(ops.kcenter_greedy(points, 9), reference.kcenter_greedy(points, 9))


def test_no_gradient():
    assert not ops.kcenter_greedy(random_points(9, 4).requires_grad_(), 3).requires_grad


@pytest.mark.parametrize(("n", "d", "m"), [(1, 1, 1), (50, 17, 12)])
def test_opcheck(n, d, m):
    torch.library.opcheck(torch.ops.pydefect.kcenter_greedy.default, (random_points(n, d), m))
