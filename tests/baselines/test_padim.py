"""PaDiM's equations (1) and (2) against slow ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pydefect.baselines import padim
from pydefect.baselines.detector import Context
from pydefect.baselines.padim import PaDiM, PaDiMConfig, mean_and_covariance, whitening
from pydefect.errors import InputError
from pydefect.features import FeatureCache, patch_vectors


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 1000), sizes=st.lists(st.integers(1, 4), min_size=1, max_size=4))
def test_the_streamed_covariance_is_that_of_all(seed, sizes):
    generator = torch.Generator().manual_seed(seed)
    # An offset a hundred times the spread: sums of squares would lose four digits.
    batches = [100 + torch.randn(size, 3, 5, generator=generator) for size in sizes]
    mean, covariance = mean_and_covariance(iter(batches))
    values = torch.cat(batches).double()
    torch.testing.assert_close(mean.double(), values.mean(0), rtol=1e-6, atol=1e-5)
    for position in range(3):
        expected = (
            torch.cov(values[:, position].T) if len(values) > 1 else torch.zeros(5, 5, dtype=torch.float64)
        )
        # Deviations carry the offset's float32 rounding, 4e-6, once.
        torch.testing.assert_close(covariance[position].double(), expected, rtol=1e-4, atol=1e-4)


def test_whitening_is_the_inverse_of_the_regularised_covariance(monkeypatch):
    monkeypatch.setattr(padim, "_POSITIONS", 2)
    values = torch.randn(5, 3, 8, generator=torch.Generator().manual_seed(0))
    covariance = values.transpose(1, 2) @ values  # of rank 3
    factors = whitening(covariance.clone(), 0.01)
    inverse = torch.linalg.inv(covariance.double() + 0.01 * torch.eye(8, dtype=torch.float64))
    torch.testing.assert_close((factors.transpose(1, 2) @ factors).double(), inverse, rtol=1e-3, atol=1e-3)
    assert torch.equal(factors, factors.tril())


def test_the_map_holds_mahalanobis_distances(cache):
    model = PaDiM.fit(cache, range(6), PaDiMConfig(channels=9, smoothing=0.0), Context(seed=1))
    assert model.channels.unique().numel() == 9
    levels = cache.get([6])
    scores, maps = model.score(levels, (6, 5))
    vectors = patch_vectors(cache.get(range(6)), "nearest")[:, :, model.channels].double()
    tested = patch_vectors(levels, "nearest")[0][:, model.channels].double()
    for position in range(30):
        covariance = torch.cov(vectors[:, position].T) + 0.01 * torch.eye(9)
        delta = tested[position] - vectors[:, position].mean(0)
        expected = (delta @ torch.linalg.inv(covariance) @ delta).sqrt()
        # The condition number is some 1e3, its root times float32's 6e-8 the error.
        assert float(maps.flatten()[position]) == pytest.approx(float(expected), rel=1e-3)
    assert float(scores) == float(maps.max())


def test_coarser_levels_are_repeated():
    """Section III-A: a patch takes the vector of the coarser patch that it lies in."""
    fine = torch.arange(16.0).reshape(1, 1, 4, 4)
    coarse = torch.tensor([[10.0, 20.0], [30.0, 40.0]]).reshape(1, 1, 2, 2)
    vectors = patch_vectors([fine, coarse], "nearest")
    assert vectors[0, :, 0].tolist() == list(range(16))
    rows = [[10, 10, 20, 20], [10, 10, 20, 20], [30, 30, 40, 40], [30, 30, 40, 40]]
    assert vectors[0, :, 1].tolist() == [value for row in rows for value in row]


def test_more_channels_than_there_are_means_all(cache):
    for channels in (None, 1000):
        model = PaDiM.fit(cache, range(3), PaDiMConfig(channels=channels), Context())
        assert model.channels.tolist() == list(range(24))


def test_another_grid_is_refused(cache):
    model = PaDiM.fit(cache, range(3), PaDiMConfig(), Context())
    other = FeatureCache()
    other.append([torch.zeros(1, 6, 4, 4), torch.zeros(1, 8, 2, 2), torch.zeros(1, 10, 1, 1)])
    with pytest.raises(InputError, match="a patch grid of 4 x 4, but PaDiM was fitted on 6 x 5"):
        model.score(other.get([0]), (16, 16))
