"""Patch scores (9) and anomaly maps (12)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.ndimage import gaussian_filter

from pydefect import ops
from pydefect.buildinfo import build_info
from pydefect.ops import reference
from pydefect.ops.reference.score_maps import patch_scores

IMPLEMENTATIONS = [pytest.param(ops.score_maps, id="ops"), pytest.param(reference.score_maps, id="reference")]


def test_equation_9_by_hand():
    # S = 1; certainty = e^-1 / (e^-1 + e^-2 + e^-4) = 1 / (1 + e^-1 + e^-3).
    expected = 1 / (1 + math.exp(-1) + math.exp(-3))
    assert float(patch_scores(torch.tensor([1.0, 2.0, 4.0], dtype=torch.float64))) == pytest.approx(
        expected, rel=1e-15
    )


@pytest.mark.parametrize("k", [1, 2, 3, 9])
def test_equation_9_as_printed(k):
    distances = torch.rand(4, 5, k, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) * 3
    nearest = distances.amin(-1)
    certainty = torch.exp(-nearest) / torch.exp(-distances).sum(-1)
    torch.testing.assert_close(patch_scores(distances), certainty * nearest, rtol=1e-14, atol=0)


def test_one_neighbour_is_certain():
    distances = torch.tensor([[0.0], [0.5], [7.0]])
    assert torch.equal(patch_scores(distances), distances[:, 0])


def test_without_certainty_the_nearest_distance():
    assert torch.equal(patch_scores(torch.tensor([[2.0, 1.0, 3.0]]), certainty=False), torch.tensor([1.0]))


@pytest.mark.parametrize(
    ("distances", "expected"),
    [
        ([0.0, 0.0, 0.0], 0.0),  # on three coinciding centres
        ([0.0, 5.0, 9.0], 0.0),
        ([1e4, 1e4, 1e4], 1e4 / 3),  # exp(-1e4) is 0 even in float64: as printed this is 0 / 0
        ([1e4, 2e4, 3e4], 1e4),
        ([1e30, 1e30, 2e30], 1e30 / 2),
    ],
)
def test_extreme_distances(distances, expected):
    assert float(patch_scores(torch.tensor(distances))) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("grid", "size", "sigma"),
    [
        ((7, 7), (28, 28), 4.0),
        ((4, 6), (33, 50), 2.5),
        ((5, 3), (20, 12), 0.0),
        ((1, 1), (4, 4), 4.0),
        ((9, 2), (5, 2), 1.0),
    ],
)
def test_equation_12_in_separate_steps(implementation, grid, size, sigma):
    distances = torch.rand(2, *grid, 3, generator=torch.Generator().manual_seed(1)) * 4
    scores, maps = implementation(distances, size, sigma)
    assert scores.shape == (2, *grid)
    assert scores.dtype == maps.dtype == torch.float32
    upsampled = F.interpolate(
        patch_scores(distances.double())[:, None], size=size, mode="bilinear", align_corners=False
    )[:, 0]
    expected = np.stack(
        [gaussian_filter(one, sigma, mode="reflect", truncate=4.0) for one in upsampled.numpy()]
    )
    # Two weighted means of positive values in float32, with at most 2 * 37 weights that sum to 1 each.
    torch.testing.assert_close(maps, torch.from_numpy(expected).float(), rtol=74 * 2.0**-24, atol=1e-7)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_constant_stays_constant(implementation):
    """Smoothing and upsampling are means: nothing is lost at the border."""
    maps = implementation(torch.full((1, 5, 8, 1), 2.5), (40, 64), 4.0)[1]
    torch.testing.assert_close(maps, torch.full((1, 40, 64), 2.5), rtol=1e-5, atol=0)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_huge_distances_stay_finite(implementation):
    scores, maps = implementation(torch.full((1, 3, 3, 3), 1e6), (12, 12), 2.0)
    assert torch.isfinite(scores).all()
    assert torch.isfinite(maps).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_image(implementation):
    scores, maps = implementation(torch.zeros(0, 3, 4, 2), (12, 16), 4.0)
    assert scores.shape == (0, 3, 4)
    assert maps.shape == (0, 12, 16)


# Rows around the blocks of 16 pixels and of 4, 8 and 16 patches; upsampling, downsampling, odd ratios, and
# Gaussians wider than the image.
NATIVE = [
    ((1, 1), (1, 1), 3, 0.0),
    ((15, 17), (15, 17), 1, 1.0),
    ((16, 4), (64, 16), 2, 4.0),
    ((17, 33), (31, 130), 3, 2.2),
    ((40, 33), (7, 9), 9, 0.0),
    ((40, 33), (7, 9), 9, 3.0),
    ((3, 5), (200, 18), 3, 60.0),
    ((28, 21), (224, 168), 3, 4.0),
    ((56, 56), (224, 224), 3, 4.0),
]


def random_distances(grid, k, batch=2):
    return torch.rand(batch, *grid, k, generator=torch.Generator().manual_seed(k)) * 4


def assert_as_accurate(actual, expected, patches):
    """Weighted means of positive values: relative errors only, one rounding a weight, a product and a sum.

    A pixel has at most as many weights along an axis as there are patches; a score takes three roundings of
    its own and the exponentials' 2 ulp.
    """
    for one, other in zip(actual, expected, strict=True):
        assert one.dtype == torch.float32
        torch.testing.assert_close(one.double(), other, rtol=(3 * patches + 20) * 2.0**-24, atol=0)


def in_double(distances, size, sigma, certainty=True):
    """The separate steps in float64."""
    return reference.score_maps(distances.double(), size, sigma, certainty=certainty)


@pytest.mark.parametrize("certainty", [True, False])
@pytest.mark.parametrize(("grid", "size", "k", "sigma"), NATIVE)
def test_native_agrees_with_reference(grid, size, k, sigma, certainty):
    distances = random_distances(grid, k)
    actual = ops.score_maps(distances, size, sigma, certainty=certainty)
    assert_as_accurate(actual, in_double(distances, size, sigma, certainty), sum(grid))


@pytest.mark.parametrize(("grid", "size", "k", "sigma"), NATIVE[2:6])
def test_float64_takes_matrix_products(grid, size, k, sigma):
    distances = random_distances(grid, k).double()
    for one, other in zip(
        ops.score_maps(distances, size, sigma), in_double(distances, size, sigma), strict=True
    ):
        assert one.dtype == torch.float64
        torch.testing.assert_close(one, other, rtol=1e-12, atol=0)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_small_problem(data):
    side = st.integers(1, 40)
    grid = data.draw(side, label="rows"), data.draw(side, label="columns")
    size = data.draw(side, label="height"), data.draw(side, label="width")
    sigma = data.draw(st.sampled_from([0.0, 0.3, 1.0, 4.0, 9.5]), label="sigma")
    distances = random_distances(
        grid, data.draw(st.integers(1, 5), label="k"), data.draw(st.integers(0, 3), label="batch")
    )
    assert_as_accurate(ops.score_maps(distances, size, sigma), in_double(distances, size, sigma), sum(grid))


def test_maps_are_never_negative():
    distances = random_distances((20, 20), 3) - 2
    assert (ops.score_maps(distances.clamp_min(0), (80, 80), 1.0)[1] >= 0).all()


def test_not_contiguous_distances():
    distances = random_distances((9, 8), 3)
    expected = ops.score_maps(distances, (36, 32), 2.0)
    for given_as in (
        distances.transpose(1, 2).contiguous().transpose(1, 2),
        F.pad(distances, (1, 2))[..., 1:-2],
    ):
        actual = ops.score_maps(given_as, (36, 32), 2.0)
        assert all(torch.equal(one, other) for one, other in zip(actual, expected, strict=True))


def test_same_for_every_thread_count():
    distances = random_distances((23, 19), 3, batch=5)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            # Downsampling as well: then a thread's rows stand for scores that its map does not need.
            results.append(
                [*ops.score_maps(distances, (91, 75), 4.0), *ops.score_maps(distances, (7, 75), 0.0)]
            )
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(one, other) for one, other in zip(result, results[0], strict=True))


@pytest.mark.parametrize("level", build_info().cpu_levels_usable)
def test_every_instruction_set(level, tmp_path, at_level):
    """Levels differ by fused multiply-adds and by nothing else, so the bounds are those of the reference."""
    inputs = [(random_distances(grid, k), size, sigma) for grid, size, k, sigma in NATIVE]
    torch.save(inputs, tmp_path / "inputs.pt")
    code = f"""
import torch
from pydefect.ops import score_maps
inputs = torch.load({str(tmp_path / "inputs.pt")!r})
torch.save([score_maps(*given) for given in inputs], {str(tmp_path / "results.pt")!r})
"""
    at_level(level, code)
    for arguments, result in zip(inputs, torch.load(tmp_path / "results.pt"), strict=True):
        assert_as_accurate(result, in_double(*arguments), sum(arguments[0].shape[1:3]))


@pytest.mark.parametrize("certainty", [True, False])
def test_not_finite_distances(certainty):
    distances = random_distances((40, 40), 3, batch=1)
    clean = ops.score_maps(distances, (160, 160), 1.0, certainty=certainty)
    distances[0, 20, 20, 1] = torch.nan
    distances[0, 3, 36] = torch.inf
    distances[0, 30, 5, 1] = torch.inf  # one of three: no weight in the certainty, never the nearest
    scores, maps = ops.score_maps(distances, (160, 160), 1.0, certainty=certainty)
    expected = patch_scores(distances, certainty)
    torch.testing.assert_close(scores, expected, rtol=1e-6, atol=0, equal_nan=True)
    assert torch.isnan(scores[0, 20, 20])
    assert not torch.isfinite(scores[0, 3, 36])
    assert torch.isfinite(scores[0, 30, 5])
    # A patch reaches 4 pixels and 2 of interpolation beside its own 4, and 15 more within its lines.
    untouched = torch.ones(160, 160, dtype=torch.bool)
    untouched[74:90, 59:105] = False
    untouched[6:22, 123:169] = False
    untouched[114:130, 0:45] = False  # the score that is another, but finite
    assert torch.equal(maps[0][untouched], clean[1][0][untouched])
    assert not torch.isfinite(maps[0, 80:84, 80:84]).any()
    assert torch.isfinite(maps[0, 120:124, 20:24]).all()


D = torch.zeros(2, 3, 4, 5)
ERRORS = {
    "3-D": (D[0], (8, 8), 1.0, "distances must have 4 dimensions, got 3"),
    "half": (D.half(), (8, 8), 1.0, "distances must be float32, got"),
    "integer": (D.int(), (8, 8), 1.0, "distances must be float32, got"),
    "no neighbour": (D[..., :0], (8, 8), 1.0, "distances must have between 1 and .* got 3, 4 and 0"),
    "no row": (D[:, :0], (8, 8), 1.0, "distances must have between 1 and .* got 0, 4 and 5"),
    "no pixel": (D, (8, 0), 1.0, "size must be between 1 and .* got 8 and 0"),
    "negative size": (D, (-3, 8), 1.0, "size must be between 1 and .* got -3 and 8"),
    "sigma negative": (D, (8, 8), -1.0, "sigma must be between 0 and 2.20 pixels, got -1"),
    "sigma nan": (D, (8, 8), math.nan, "sigma must be between 0 and 2.20 pixels, got"),
    "sigma huge": (D, (8, 8), math.inf, "sigma must be between 0 and 2.20 pixels, got inf"),
}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", ERRORS)
def test_wrong_arguments(case, implementation):
    distances, size, sigma, message = ERRORS[case]
    with pytest.raises(RuntimeError, match=f"score_maps: {message}"):
        implementation(distances, size, sigma)


def test_results_carry_no_gradient():
    for dtype in (torch.float32, torch.float64):
        distances = random_distances((3, 4), 2).to(dtype).requires_grad_()
        assert not any(result.requires_grad for result in ops.score_maps(distances, (6, 8), 1.0))


@pytest.mark.parametrize("batch", [0, 2])
def test_opcheck(batch):
    arguments = random_distances((5, 6), 3, batch), 20, 24, 1.5, True
    torch.library.opcheck(torch.ops.pydefect.score_maps.default, arguments)


def test_compiles():
    def highest(distances):
        scores, maps = ops.score_maps(distances * 2, (20, 24), 1.5)
        return scores.amax((1, 2)), maps + 1

    distances = random_distances((5, 6), 3)
    compiled = torch.compile(highest, backend="aot_eager", fullgraph=True)
    for actual, expected in zip(compiled(distances), highest(distances), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
