"""SPADE's two searches against slow ones."""

from __future__ import annotations

import pytest
import torch

from pydefect.baselines import spade
from pydefect.baselines.detector import Context
from pydefect.baselines.spade import Spade, SpadeConfig
from pydefect.errors import InputError
from pydefect.features import patch_vectors


@pytest.mark.parametrize("kappa", [1, 3])
@pytest.mark.parametrize("k", [1, 4, 50])
def test_scores_follow_equations_2_and_3(cache, monkeypatch, k, kappa):
    # The gallery in several parts: 2, 2 and what is left.
    monkeypatch.setattr(spade, "_GALLERY", 2)
    config = SpadeConfig(image_neighbors=k, pixel_neighbors=kappa, smoothing=0.0)
    model = Spade.fit(cache, range(5), config, Context())
    levels = cache.get([5, 6])
    scores, maps = model.score(levels, (6, 5))

    descriptors = cache.get(range(5))[2].double().mean((2, 3))
    gallery = patch_vectors(cache.get(range(5))).double()
    for image in range(2):
        described = levels[2][image].double().mean((1, 2))
        to_images = (descriptors - described).square().sum(1)
        nearest = to_images.argsort()[: min(k, 5)]
        assert float(scores[image]) == pytest.approx(float(to_images[nearest].mean()), rel=1e-4)
        patches = patch_vectors([level[image : image + 1] for level in levels])[0].double()
        distances = torch.cdist(patches, gallery[nearest].flatten(0, 1)).sort(1).values
        expected = distances[:, :kappa].mean(1)
        torch.testing.assert_close(maps[image].flatten().double(), expected, rtol=1e-5, atol=1e-6)


def test_the_image_score_may_be_the_maps_maximum(cache):
    model = Spade.fit(cache, range(5), SpadeConfig(image_score="max_map"), Context())
    scores, maps = model.score(cache.get([5, 6]), (24, 20))
    assert torch.equal(scores, maps.flatten(1).amax(1))


def test_a_normal_image_of_the_gallery_has_distance_zero(cache):
    model = Spade.fit(cache, range(5), SpadeConfig(image_neighbors=1), Context())
    scores, maps = model.score(cache.get([2]), (24, 20))
    assert float(scores) == 0
    assert float(maps.max()) == 0


def test_features_of_other_widths_are_refused(cache):
    model = Spade.fit(cache, range(2), SpadeConfig(), Context())
    with pytest.raises(InputError, match="the features have other widths than those of the gallery"):
        model.score([torch.zeros(1, 3, 4, 4)] * 3, (16, 16))
