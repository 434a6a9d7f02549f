from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import pytest

from pydefect.data.images import read_image
from pydefect.data.layouts import read_dataset, read_mask
from pydefect.data.procedural import DEFECTS, render_product, write_dataset
from pydefect.errors import InputError


def draw(
    seed: int, defect: str | None = None, size: int | tuple[int, int] = 128
) -> tuple[np.ndarray, np.ndarray]:
    return render_product(np.random.default_rng(seed), size, defect)


@pytest.mark.parametrize("defect", [None, *DEFECTS])
def test_equal_seeds_give_equal_images(defect: str | None) -> None:
    first, second = draw(3, defect), draw(3, defect)
    np.testing.assert_array_equal(first[0], second[0])
    np.testing.assert_array_equal(first[1], second[1])
    assert (draw(4, defect)[0] != first[0]).mean() > 0.5


@pytest.mark.parametrize("size", [64, (96, 160)])
def test_shape_and_type(size: int | tuple[int, int]) -> None:
    image, mask = draw(0, size=size)
    height, width = (size, size) if isinstance(size, int) else size
    assert (image.shape, image.dtype) == ((height, width, 3), np.uint8)
    assert (mask.shape, mask.dtype) == ((height, width), np.bool_)
    assert not mask.any()


@pytest.mark.parametrize("defect", DEFECTS)
def test_a_defect_changes_the_part_inside_its_mask_only(defect: str) -> None:
    for seed in range(8):
        good, _ = draw(seed)
        bad, mask = draw(seed, defect)
        difference = np.abs(bad.astype(int) - good).max(axis=2)
        assert 0.0005 < mask.mean() < 0.06
        assert np.quantile(difference[mask], 0.8) > 12
        # The lens blurs a defect over its outline by a pixel or two.
        far = cv2.dilate(mask.astype(np.uint8), np.ones((9, 9), np.uint8)) == 0
        assert difference[far].max() <= 8


def test_data_set(tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "flange", n_train=2, n_test_good=1, n_per_defect=1, size=64, seed=5)
    dataset = read_dataset(root)
    assert (dataset.layout, len(dataset.train), len(dataset.test)) == ("mvtec_ad", 2, 1 + len(DEFECTS))
    for sample in dataset.test:
        assert read_image(sample.image).shape == (64, 64, 3)
        assert read_mask(sample, (64, 64)).any() == bool(sample.label)
    images = [path.read_bytes() for path in sorted(root.rglob("*/*/*.png"))]
    assert len(set(images)) == len(images)
    assert [path.name for path in tmp_path.iterdir()] == ["flange"]

    larger = write_dataset(tmp_path / "larger", n_train=3, n_test_good=2, n_per_defect=1, size=64, seed=5)
    for path in root.rglob("*.png"):
        assert (larger / path.relative_to(root)).read_bytes() == path.read_bytes()


def test_nothing_is_overwritten_or_left_half_done(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "kept.txt").write_text("kept")
    with pytest.raises(InputError, match="not empty"):
        write_dataset(tmp_path)

    def fail(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pydefect.data.procedural.cv2.imencode", fail)
    with pytest.raises(KeyboardInterrupt):
        write_dataset(tmp_path / "new", size=64)
    assert [path.name for path in tmp_path.iterdir()] == ["kept.txt"]


def test_a_folder_is_named_relative_to_the_current_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "current").mkdir()
    monkeypatch.chdir(tmp_path / "current")
    for root in (".", "../current"):
        with pytest.raises(InputError, match="is the current folder, which cannot be replaced"):
            write_dataset(root, 1, 0, 0, 64)
    write_dataset("../other/deep", 1, 0, 0, 64)
    assert (tmp_path / "other/deep/train/good/000.png").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["current", "other"]


def test_wrong_arguments(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="defect is 'rust'; allowed are None, scratch"):
        draw(0, "rust")
    with pytest.raises(InputError, match="size is 32 x 200"):
        draw(0, size=(32, 200))
    with pytest.raises(InputError, match="scene is 'plate'; allowed are 'flange', 'tray'"):
        write_dataset(tmp_path / "a", scene="plate")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="n_train is 0; it must be at least 1"):
        write_dataset(tmp_path / "a", n_train=0)
    with pytest.raises(InputError, match="n_per_defect is -1"):
        write_dataset(tmp_path / "a", n_per_defect=-1)
