"""Greedy k-centre against a naive one, and the guarantee that makes it a cover."""

from __future__ import annotations

import importlib
import itertools
import math

import pytest
import torch
from torch import Tensor

from pydefect import ops
from pydefect.ops import reference

MODULE = importlib.import_module("pydefect.ops.kcenter_greedy")
IMPLEMENTATIONS = [
    pytest.param(ops.kcenter_greedy, id="ops"),
    pytest.param(reference.kcenter_greedy, id="reference"),
]
TABLES = [
    pytest.param(ops.kcenter_from_distances, id="ops"),
    pytest.param(reference.kcenter_from_distances, id="reference"),
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


def test_ties_go_to_the_lower_index():
    # Whole numbers with mean 0: every product is exact.
    points = torch.tensor([[0.0, 0.0], [2.0, 0.0], [-2.0, 0.0], [0.0, 2.0], [0.0, -2.0]])
    assert ops.kcenter_greedy(points, 3).tolist() == reference.kcenter_greedy(points, 3).tolist() == [0, 1, 2]


def test_the_path_for_many_points_chooses_the_same(monkeypatch):
    points = random_points(60, 4)
    table = ops.kcenter_greedy(points, 20)
    monkeypatch.setattr(MODULE, "_TABLE_ELEMENTS", 0)
    assert torch.equal(ops.kcenter_greedy(points, 20), table)


@pytest.mark.parametrize("seed", range(4))
def test_at_most_twice_the_best_radius(seed):
    """Gonzalez 1985. The best choice of m of the points is found by trying all."""
    points = random_points(11, 2, seed).tolist()
    for m in (2, 3, 4):
        best = min(covering_radius(points, chosen) for chosen in itertools.combinations(range(11), m))
        greedy = covering_radius(points, ops.kcenter_greedy(torch.tensor(points), m).tolist())
        assert greedy <= 2 * best * (1 + 1e-6)


@pytest.mark.parametrize("from_distances", TABLES)
@pytest.mark.parametrize("m", [1, 5, 29, 30])
def test_from_a_table(from_distances, m):
    points = random_points(30, 3)
    table = (points[:, None] - points[None]).square().sum(2)
    chosen, radius = from_distances(table, m)
    assert chosen.tolist() == naive(points.tolist(), m)
    assert radius == pytest.approx(covering_radius(points.tolist(), chosen.tolist()) ** 2, rel=1e-5)
    assert (radius == 0) == (m == 30)


@pytest.mark.parametrize("from_distances", TABLES)
def test_rounding_below_zero_in_the_table_is_harmless(from_distances):
    """Tables from matrix products hold tiny negative entries where points coincide."""
    table = torch.full((4, 4), -1e-7)
    chosen, radius = from_distances(table, 4)
    assert sorted(chosen.tolist()) == [0, 1, 2, 3]
    assert radius == 0
