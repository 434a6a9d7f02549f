"""The streaming k-centre's reduction against greedy k-centre over all points.

Distances are measured in float32 as `pydefect.ops.knn` measures them, so its results say bit for bit what
this operator's must be. The twin measures in float64: radius and distances agree to (D + 4) * 2**-24, the
rounding of a float32 sum of D squares, and the choice is the same unless two points tie to that.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from pydefect import ops
from pydefect.buildinfo import build_info
from pydefect.ops import reference

IMPLEMENTATIONS = [
    pytest.param(ops.kcenter_reduce, id="ops"),
    pytest.param(reference.kcenter_reduce, id="reference"),
]
# Centres, added points, width, m.
SHAPES = [(1, 0, 1, 1), (1, 30, 3, 7), (9, 1, 15, 9), (20, 20, 16, 20), (65, 40, 17, 64), (64, 200, 48, 64)]
# Wide and many enough for bounds, if the variances fall.
WIDE = (100, 600, 260, 100)


def random_points(m: int, n: int, d: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(m + n + d)
    return torch.randn(m, d, generator=generator), torch.randn(n, d, generator=generator)


def table(points: Tensor) -> Tensor:
    distances, indices = ops.knn(points, points, len(points))
    return torch.empty_like(distances).scatter_(1, indices, distances)


def assert_same(actual: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize(("m", "n", "d", "size"), SHAPES)
def test_chooses_as_greedy_k_centre_over_all_points(m, n, d, size):
    centres, added = random_points(m, n, d)
    points = torch.cat([centres, added])
    chosen, squared_radius, distances = ops.kcenter_reduce(centres, added, size)
    assert torch.equal(chosen, ops.kcenter_greedy(points, size))
    assert torch.equal(distances, table(points[chosen]))
    covered = ops.knn(points, points[chosen], 1)[0].amax()
    assert float(squared_radius) == (float(covered) if size < m + n else 0)
    # Known distances change nothing.
    assert_same(ops.kcenter_reduce(centres, added, size, table(centres)), (chosen, squared_radius, distances))


@pytest.mark.parametrize(("m", "n", "d", "size"), SHAPES)
def test_agrees_with_reference(m, n, d, size):
    centres, added = random_points(m, n, d)
    chosen, squared_radius, distances = ops.kcenter_reduce(centres, added, size)
    expected = reference.kcenter_reduce(centres, added, size)
    assert torch.equal(chosen, expected[0])
    tolerance = (d + 4) * 2.0**-24
    torch.testing.assert_close(squared_radius, expected[1], rtol=tolerance, atol=0)
    torch.testing.assert_close(distances, expected[2], rtol=tolerance, atol=0)


def test_bounded_distances_choose_as_measured_ones():
    m, n, d, size = WIDE
    scale = torch.arange(1, d + 1).pow(-0.8)
    centres, added = (points * scale for points in random_points(m, n, d))
    added[5] = centres[3]
    added[7, 100] = torch.nan
    points = torch.cat([centres, added])
    chosen, squared_radius, distances = ops.kcenter_reduce(centres, added, size)
    assert torch.equal(chosen, ops.kcenter_greedy(points, size))
    assert chosen.tolist()[:2] == [0, m + 7]
    kept = chosen != m + 7
    assert torch.equal(distances[kept][:, kept], table(points[chosen[kept]]))
    finite = torch.cat([points[: m + 7], points[m + 8 :]])
    assert float(squared_radius) == float(ops.knn(finite, points[chosen[kept]], 1)[0].amax())


def test_a_chain_of_reductions_needs_no_measuring_again():
    centres, added = random_points(30, 50, 12)
    chosen, _, distances = ops.kcenter_reduce(centres, added, 30)
    centres = torch.cat([centres, added])[chosen]
    more = random_points(1, 70, 12)[1]
    assert_same(
        ops.kcenter_reduce(centres, more, 30, distances),
        ops.kcenter_reduce(centres, more, 30),
    )


@pytest.mark.parametrize("reduce", IMPLEMENTATIONS)
def test_copies_of_one_point(reduce):
    chosen, squared_radius, distances = reduce(torch.ones(3, 2), torch.ones(5, 2), 4)
    assert len(set(chosen.tolist())) == 4
    assert squared_radius == 0
    assert torch.equal(distances, torch.zeros(4, 4))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_infinitely_far(value):
    centres, added = random_points(20, 40, 5)
    added[7, 1] = value
    added[9, 2] = value
    for reduce in (ops.kcenter_reduce, reference.kcenter_reduce):
        assert reduce(centres, added, 20)[0].tolist()[:3] == [0, 27, 29]
        assert reduce(centres, added, 2)[1] == torch.inf


def test_inputs_that_are_not_contiguous_come_out_unchanged():
    centres, added = random_points(40, 60, 32)
    known = table(centres[::2, 1::2].contiguous())
    before = centres.clone(), added.clone(), known.clone()
    expected = ops.kcenter_reduce(centres[::2, 1::2].contiguous(), added[::3, 1::2].contiguous(), 20, known)
    assert_same(
        ops.kcenter_reduce(centres[::2, 1::2], added[::3, 1::2], 20, known.T.contiguous().T), expected
    )
    assert_same((centres, added, known), before)


def test_same_for_every_thread_count():
    centres, added = random_points(100, 2500, 129)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(ops.kcenter_reduce(centres, added, 100))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert_same(result, results[0])


@pytest.mark.parametrize("level", build_info().cpu_levels_usable)
def test_same_on_every_instruction_set(level, tmp_path, at_level):
    file = tmp_path / "results.pt"
    code = f"""
import torch
from pydefect.ops import kcenter_reduce
results = []
for m, n, d, size in {SHAPES}:
    generator = torch.Generator().manual_seed(m + n + d)
    pair = torch.randn(m, d, generator=generator), torch.randn(n, d, generator=generator)
    results.append(kcenter_reduce(*pair, size))
torch.save(results, {str(file)!r})
"""
    at_level(level, code)
    for (m, n, d, size), result in zip(SHAPES, torch.load(file), strict=True):
        assert_same(result, ops.kcenter_reduce(*random_points(m, n, d), size))


F = torch.zeros
ERRORS = {
    "centres 1-D": (F(3), F(2, 3), 1, None, "centres must have 2 dimensions, got 1"),
    "added 1-D": (F(2, 3), F(3), 1, None, "added must have 2 dimensions, got 1"),
    "half": (F(2, 3).half(), F(2, 3).half(), 1, None, "centres must be float32"),
    "dtypes": (F(2, 3), F(2, 3).double(), 1, None, "added must be float32"),
    "no centres": (F(0, 3), F(2, 3), 1, None, "centres must have at least 1 row, got 0"),
    "no width": (F(2, 0), F(2, 0), 1, None, "centres must have a width of at least 1, got 0"),
    "widths": (F(2, 3), F(2, 4), 1, None, "added must have the width of centres, 3, got 4"),
    "m zero": (F(2, 3), F(2, 3), 0, None, "m must be between 1 and the 4 rows of centres and added, got 0"),
    "m large": (F(2, 3), F(2, 3), 5, None, "m must be between 1 and the 4 rows of centres and added, got 5"),
    "table": (F(2, 3), F(2, 3), 1, F(2, 4), "distances must be 2 x 2, got 2 x 4"),
    "table 1-D": (F(2, 3), F(2, 3), 1, F(4), "distances must have 2 dimensions, got 1"),
    "table int": (F(2, 3), F(2, 3), 1, F(2, 2).int(), "distances must be float32"),
}


@pytest.mark.parametrize("reduce", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", ERRORS)
def test_wrong_arguments(reduce, case):
    centres, added, m, distances, message = ERRORS[case]
    with pytest.raises(RuntimeError, match=f"kcenter_reduce: {message}"):
        reduce(centres, added, m, distances)


def test_float64_takes_the_twin():
    centres, added = (points.double() for points in random_points(9, 20, 4))
    assert_same(ops.kcenter_reduce(centres, added, 9), reference.kcenter_reduce(centres, added, 9))


def test_no_gradient():
    centres, added = (points.requires_grad_() for points in random_points(9, 20, 4))
    assert not any(result.requires_grad for result in ops.kcenter_reduce(centres, added, 9))


@pytest.mark.parametrize("known", [False, True])
def test_opcheck(known):
    centres, added = random_points(9, 20, 17)
    arguments = (centres, added, 9, table(centres) if known else None)
    torch.library.opcheck(torch.ops.pydefect.kcenter_reduce.default, arguments)
