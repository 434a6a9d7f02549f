from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest

from pydefect.data.textures import TEXTURE_KINDS, texture
from pydefect.errors import InputError


@pytest.mark.parametrize("kind", TEXTURE_KINDS)
def test_equal_seeds_give_equal_images_whatever_the_number_of_threads(kind: str) -> None:
    threads = cv2.getNumThreads()
    for seed in range(4):
        first = texture(seed, 96, kind)
        try:
            cv2.setNumThreads(1)
            np.testing.assert_array_equal(first, texture(seed, 96, kind))
        finally:
            cv2.setNumThreads(threads)
    assert (texture(0, 96, kind) != texture(1, 96, kind)).mean() > 0.5


def test_the_global_generator_is_left_alone() -> None:
    np.random.seed(5)  # noqa: NPY002 - its state is what is looked at
    before = np.random.get_state()[1].copy()  # noqa: NPY002
    texture(1, 64)
    np.testing.assert_array_equal(before, np.random.get_state()[1])  # noqa: NPY002


@pytest.mark.parametrize("size", [(16, 16), (17, 150), (150, 16), (31, 64), (200, 120)])
@pytest.mark.parametrize("kind", TEXTURE_KINDS)
def test_any_size(kind: str, size: tuple[int, int]) -> None:
    for seed in range(6):
        image = texture((seed, 3), size, kind)
        assert image.shape == (*size, 3)
        assert image.dtype == np.uint8
        assert image.flags.c_contiguous


def test_one_number_is_a_square() -> None:
    np.testing.assert_array_equal(texture(3, 48), texture(3, (48, 48)))


def test_the_images_are_as_varied_as_they_are_meant_to_be() -> None:
    """Bounds far from the measured values (in brackets, of 400 images), to catch a kind that went flat."""
    images = [texture((9, number), 96) for number in range(150)]
    contrast = np.array([image.std() for image in images])
    assert (contrast < 2).mean() < 0.1  # nearly plain [0.003]
    assert 20 < contrast.mean() < 80  # [40]
    means = np.stack([image.mean((0, 1)) for image in images])
    assert means.std(0).min() > 25  # [42]
    saturated = np.mean([((image == 0) | (image == 255)).mean() for image in images])
    assert saturated < 0.15  # [0.02]
    grey = np.mean([(np.ptp(image.astype(int), axis=2) <= 2).all() for image in images])
    assert 0.03 < grey < 0.4  # [0.14]
    # From almost no to almost only fine structure.
    fine = np.array([np.abs(np.diff(image.astype(float), axis=1)).mean() for image in images]) / contrast
    assert np.quantile(fine, 0.9) > 3.5 * np.quantile(fine, 0.1)  # [7.4]


@pytest.mark.parametrize("size", [15, 0, -3, (64,), (64, 64, 3), (64, 8), 64.0, True, "64"])
def test_wrong_sizes(size: Any) -> None:
    with pytest.raises(InputError, match="size is"):
        texture(0, size)


@pytest.mark.parametrize("seed", [-1, (0, -2), (), 1.5, "7", True, None])
def test_wrong_seeds(seed: Any) -> None:
    with pytest.raises(InputError, match="seed is"):
        texture(seed, 32)


def test_unknown_kind() -> None:
    with pytest.raises(InputError, match=r"'marble'.*dead_leaves"):
        texture(0, 32, "marble")
