"""Patch scores (9) and anomaly maps (12)."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.ndimage import gaussian_filter

from pydefect import ops
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
