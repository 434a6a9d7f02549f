"""PatchCore's coreset and its equations (6) and (7) against slow ones."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pydefect.baselines.detector import Context
from pydefect.baselines.patchcore import PatchCore, PatchCoreConfig, coreset, reweighted_scores
from pydefect.errors import InputError
from pydefect.features import patch_vectors
from pydefect.ops import reference


def slow_score(patches: torch.Tensor, bank: torch.Tensor, neighbors: int) -> float:
    """Equations (6) and (7), word for word, of one image, in float64."""
    patches, bank = patches.double(), bank.double()
    distances = torch.cdist(patches, bank)
    test = int(distances.min(1).values.argmax())
    star = int(distances[test].argmin())
    s_star = float(distances[test, star])
    if neighbors == 1:
        return s_star
    around = torch.cdist(bank[star : star + 1], bank)[0].argsort(stable=True)[:neighbors]
    total = sum(math.exp(float(distances[test, m])) for m in around)
    return (1 - math.exp(s_star) / total) * s_star


@settings(deadline=None, max_examples=40)
@given(
    seed=st.integers(0, 1000),
    images=st.integers(1, 3),
    size=st.integers(1, 12),
    neighbors=st.sampled_from([1, 2, 9]),
)
def test_image_scores_follow_equations_6_and_7(seed, images, size, neighbors):
    generator = torch.Generator().manual_seed(seed)
    patches = torch.randn(images, 6, 4, generator=generator)
    bank = torch.randn(size, 4, generator=generator)
    squared, nearest = reference.knn(patches.flatten(0, 1), bank, 1)
    scores = reweighted_scores(
        patches, squared.sqrt().reshape(images, 6), nearest.reshape(images, 6), bank, neighbors
    )
    expected = torch.tensor([slow_score(image, bank, min(neighbors, size)) for image in patches])
    # float32 distances of about 3: 1e-6 of them, and 1 - share loses as much again.
    torch.testing.assert_close(scores, expected, rtol=1e-5, atol=1e-5)


def test_large_distances_do_not_overflow():
    bank = torch.zeros(3, 2)
    patches = torch.full((1, 1, 2), 1e4)
    score = reweighted_scores(
        patches, torch.full((1, 1), 1.5e4), torch.zeros(1, 1, dtype=torch.int64), bank, 3
    )
    assert torch.isfinite(score).all()


def test_the_map_holds_the_distances_to_the_nearest_member(cache):
    config = PatchCoreConfig(coreset_ratio=0.1, projection_dim=None, smoothing=0.0)
    model = PatchCore.fit(cache, [0, 1, 2, 3], config, Context())
    levels = cache.get([5, 6])
    # At the patch grid's own size nothing is interpolated.
    _, maps = model.score(levels, (6, 5))
    expected = torch.cdist(patch_vectors(levels).double(), model.bank.double()).min(2).values
    torch.testing.assert_close(maps.flatten(1).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("ratio", "count"), [(1e-6, 1), (0.1, 3), (0.25, 8), (1.0, 30)])
def test_the_coreset_has_the_share_asked_for_and_covers(ratio, count):
    patches = torch.randn(30, 12, generator=torch.Generator().manual_seed(0))
    chosen = coreset(patches, ratio, None, Context())
    assert torch.equal(chosen, patches[reference.kcenter_greedy(patches, count)])
    projected = coreset(patches, ratio, 6, Context())
    assert projected.shape == chosen.shape
    # Searched in the projection, but the patches themselves are kept.
    assert (projected.unsqueeze(1) == patches).all(2).any(1).all()


def test_the_projection_keeps_distances_on_average():
    """Johnson and Lindenstrauss: relative errors of about sqrt(2 / 128) = 0.125, and 0.5 is four of them."""
    patches = torch.randn(40, 300, generator=torch.Generator().manual_seed(0))
    whole = coreset(patches, 0.5, None, Context())
    projected = coreset(patches, 0.5, 128, Context(seed=4))
    radius = [float(torch.cdist(patches, bank).min(1).values.max()) for bank in (whole, projected)]
    assert radius[1] < 1.5 * radius[0]


def test_features_of_another_width_are_refused(cache):
    model = PatchCore(torch.zeros(4, 7), PatchCoreConfig())
    with pytest.raises(InputError, match="model: the bank has width 7, the features 24"):
        model.score(cache.get([0]), (6, 5))
