from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from pydefect.data.layouts import read_dataset, read_mask
from pydefect.data.procedural import write_dataset
from pydefect.data.tray import TRAY_DEFECTS, render_tray
from pydefect.errors import InputError


def draw(seed: int, defect: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    return render_tray(np.random.default_rng(seed), (96, 120), defect)


@pytest.mark.parametrize("defect", [None, *TRAY_DEFECTS])
def test_equal_seeds_give_equal_images(defect: str | None) -> None:
    first, second = draw(3, defect), draw(3, defect)
    assert (first[0].shape, first[0].dtype, first[1].dtype) == ((96, 120, 3), np.uint8, np.bool_)
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])
    assert (draw(4, defect)[0] != first[0]).mean() > 0.5
    assert first[1].any() == (defect is not None)


@pytest.mark.parametrize("defect", TRAY_DEFECTS)
def test_a_defect_changes_the_tray_where_its_mask_is(defect: str) -> None:
    for seed in range(5):
        good, _ = draw(seed)
        bad, mask = draw(seed, defect)
        difference = np.abs(bad.astype(int) - good).max(axis=2)
        assert 0.001 < mask.mean() < 0.15
        assert np.quantile(difference[mask], 0.6) > 12
        if defect in ("missing", "soiled"):
            # Shadow and lens reach a few pixels over the outline.
            far = cv2.dilate(mask.astype(np.uint8), np.ones((15, 15), np.uint8)) == 0
            assert difference[far].max() <= 8


def test_bad_arguments() -> None:
    with pytest.raises(InputError, match="size"):
        render_tray(np.random.default_rng(0), 40)
    with pytest.raises(InputError, match="defect"):
        render_tray(np.random.default_rng(0), 64, "scratch")


def test_data_set(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "tray", n_train=2, n_test_good=1, n_per_defect=1, size=64, scene="tray")
    dataset = read_dataset(root)
    assert {sample.defect for sample in dataset.test} == {"good", *TRAY_DEFECTS}
    for sample in dataset.test:
        assert read_mask(sample, (64, 64)).any() == bool(sample.label)
