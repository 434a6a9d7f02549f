"""Colour jitter and penalty images."""

from __future__ import annotations

import cv2
import numpy as np
import pytest
import torch

from pydefect.dual_ae import augmentation
from pydefect.dual_ae.augmentation import PenaltyImages, jittered
from pydefect.errors import InputError
from pydefect.preprocessing import Preprocessing

PREPROCESSING = Preprocessing()


def pixels_of(image: torch.Tensor) -> torch.Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (PREPROCESSING.mean, PREPROCESSING.std))
    return image * std + mean


def test_one_of_three_changes_with_a_factor_in_range():
    image = PREPROCESSING(np.random.default_rng(0).integers(60, 180, (20, 24, 3)).astype(np.uint8))
    before = pixels_of(image)
    grey = (before * torch.tensor([0.299, 0.587, 0.114])[:, None, None]).sum(0)
    seen = set()
    for seed in range(24):
        after = pixels_of(jittered(image[None], PREPROCESSING, 0.2, np.random.default_rng(seed))[0])
        for kind, centre in enumerate((torch.zeros(()), grey.mean(), grey)):
            away = before - centre
            factor = float(((after - centre) * away).sum() / away.square().sum())
            if torch.allclose(after, centre + factor * away, atol=1e-5):
                seen.add(kind)
                assert 0.8 <= factor <= 1.2
                break
        else:
            pytest.fail(f"seed {seed} changed the image in another way")
    assert seen == {0, 1, 2}


def test_images_of_a_batch_change_apart_and_the_original_stays():
    image = torch.rand(1, 3, 8, 8)
    batch = image.expand(6, -1, -1, -1).clone()
    changed = jittered(batch, PREPROCESSING, 0.2, np.random.default_rng(1))
    assert torch.equal(batch[3], image[0])
    assert len({tuple(one.flatten().tolist()) for one in changed}) == 6
    assert torch.equal(changed, jittered(batch, PREPROCESSING, 0.2, np.random.default_rng(1)))


def test_black_and_white_stay_in_range():
    extremes = torch.stack([torch.zeros(3, 4, 4), torch.ones(3, 4, 4)]) * 50 - 20
    changed = pixels_of(jittered(extremes, PREPROCESSING, 0.5, np.random.default_rng(0))[0])
    assert changed.min() >= -1e-6
    assert changed.max() <= 1 + 1e-6


def test_procedural_penalty_images_depend_on_seed_and_draw_alone():
    source = PenaltyImages("procedural", PREPROCESSING, (48, 40), 5, 100)
    both = source(3, 2)
    assert both.shape == (2, 3, 48, 40)
    # Batches of one see the same images in the same order.
    assert torch.equal(torch.cat([source(6, 1), source(7, 1)]), both)
    assert not torch.equal(both[0], both[1])
    assert not torch.equal(PenaltyImages("procedural", PREPROCESSING, (48, 40), 6, 100)(3, 2), both)


def test_a_pool_of_procedural_images_is_drawn_once(monkeypatch):
    drawn = []
    real = augmentation.texture

    def texture(seed, size):
        drawn.append(seed)
        return real(seed, size)

    monkeypatch.setattr(augmentation, "texture", texture)
    source = PenaltyImages("procedural", PREPROCESSING, (40, 48), 5, 3)
    images = torch.cat(list(source.stream(range(4), 2)))
    assert drawn == [(5, 0), (5, 1), (5, 2)]
    assert torch.equal(images[3:6], images[:3])
    assert torch.equal(source(2, 2), images[4:6])
    # A later run begins anywhere.
    later = PenaltyImages("procedural", PREPROCESSING, (40, 48), 5, 3)
    assert torch.equal(torch.cat(list(later.stream(range(2, 4), 2))), images[4:])


@pytest.mark.parametrize("procedural", [True, False])
def test_workers_draw_the_same_images(tmp_path, procedural):
    if not procedural:
        rng = np.random.default_rng(0)
        for number in range(3):
            cv2.imwrite(str(tmp_path / f"{number}.png"), rng.integers(0, 256, (30, 20, 3)).astype(np.uint8))
    name = "procedural" if procedural else str(tmp_path)
    here, ahead = (
        list(PenaltyImages(name, PREPROCESSING, (40, 48), 5, 4).stream(range(1, 4), 2, workers))
        for workers in (0, 2)
    )
    assert all(torch.equal(*pair) for pair in zip(here, ahead, strict=True))


def test_penalty_images_of_a_folder(tmp_path):
    rng = np.random.default_rng(0)
    for number in range(3):
        path = tmp_path / "deep" / f"{number}.png"
        path.parent.mkdir(exist_ok=True)
        cv2.imwrite(str(path), rng.integers(0, 256, (30 + number, 20, 3)).astype(np.uint8))
    source = PenaltyImages(str(tmp_path), PREPROCESSING, (32, 40), 0, 1)
    images = torch.cat([source(step, 1) for step in range(40)])
    assert images.shape == (40, 3, 32, 40)
    assert torch.isfinite(images).all()
    channels = pixels_of(images)
    grey = [(one.amax(0) - one.amin(0)).max() < 1e-5 for one in channels]
    assert 4 <= sum(grey) <= 22
    assert torch.equal(source(7, 1), images[7:8])
    before = source.identity
    assert before == PenaltyImages(str(tmp_path), PREPROCESSING, (16, 16), 3, 1).identity
    (tmp_path / "2.png").write_bytes(path.read_bytes())
    assert before != PenaltyImages(str(tmp_path), PREPROCESSING, (32, 40), 0, 1).identity


def test_a_damaged_penalty_image_is_named_and_another_taken(tmp_path):
    cv2.imwrite(str(tmp_path / "good.png"), np.full((30, 20, 3), 90, np.uint8))
    (tmp_path / "broken.png").write_bytes(b"nothing")
    source = PenaltyImages(str(tmp_path), PREPROCESSING, (32, 40), 0, 1)
    with pytest.warns(UserWarning, match=r"broken\.png.*another image is taken"):
        images = torch.cat([source(step, 1) for step in range(8)])
    torch.testing.assert_close(pixels_of(images), torch.full_like(images, 90 / 255))


def test_folders_that_will_not_do(tmp_path):
    with pytest.raises(InputError, match=r"penalty.*is no folder"):
        PenaltyImages(str(tmp_path / "none"), PREPROCESSING, (32, 32), 0, 1)
    with pytest.raises(InputError, match=r"penalty.*holds no images"):
        PenaltyImages(str(tmp_path), PREPROCESSING, (32, 32), 0, 1)
