"""What check_dataset finds in a data set that was spoilt on purpose, and nothing in a clean one."""

from __future__ import annotations

import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest

from pydefect.data.checks import DataWarning, check_dataset
from pydefect.data.layouts import read_dataset
from pydefect.data.procedural import write_dataset
from pydefect.errors import InputError


@pytest.fixture
def product(tmp_path: Path) -> Path:
    """Twelve photographs to learn from and eight and more to test, of products in the same place."""
    return write_dataset(tmp_path / "flange", 12, 8, 1, 128, seed=5)


def found(root: Path) -> dict[str, DataWarning]:
    warnings = check_dataset(read_dataset(root))
    assert len({warning.kind for warning in warnings}) == len(warnings)
    return {warning.kind: warning for warning in warnings}


def test_a_clean_data_set_gives_no_warning(product):
    assert found(product) == {}


def test_a_copied_image_is_a_leak_even_in_another_file_format(product):
    shutil.copy(product / "train/good/003.png", product / "test/good/100.png")
    pixels = cv2.imread(str(product / "train/good/004.png"))
    cv2.imwrite(str(product / "test/good/101.bmp"), pixels)
    warnings = found(product)
    assert warnings.keys() == {"leak"}
    assert warnings["leak"].images == (
        ("test/good/100.png", "train/good/003.png"),
        ("test/good/101.bmp", "train/good/004.png"),
    )
    assert warnings["leak"].message == "2 test images can be found among the training images."


def compressed(pixels: np.ndarray) -> np.ndarray:
    return cv2.imdecode(cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, 80])[1], cv2.IMREAD_COLOR)


@pytest.mark.parametrize(
    "change",
    [
        compressed,
        lambda pixels: np.clip(pixels * 1.08 + 4, 0, 255).astype(np.uint8),
        lambda pixels: cv2.resize(pixels, (102, 102), interpolation=cv2.INTER_AREA),
    ],
    ids=["compressed", "brighter", "smaller"],
)
def test_the_same_photograph_in_another_form_is_found(product, change):
    pixels = cv2.imread(str(product / "train/good/007.png"))
    cv2.imwrite(str(product / "test/good/100.png"), change(pixels))
    assert found(product)["near_leak"].images == (("test/good/100.png", "train/good/007.png"),)


def smaller_copy(photograph: Path, path: Path) -> None:
    pixels = cv2.resize(cv2.imread(str(photograph)), (102, 102), interpolation=cv2.INTER_AREA)
    cv2.imwrite(str(path), pixels, [cv2.IMWRITE_JPEG_QUALITY, 80])


def named(numbers: list[int]) -> tuple[tuple[str, str], ...]:
    return tuple((f"test/good/{100 + number}.jpg", f"train/good/{number:03}.png") for number in numbers)


def test_copies_are_found_where_all_good_test_images_are_copies(product):
    for path in (product / "test/good").iterdir():
        path.unlink()
    for number in range(10):
        smaller_copy(product / f"train/good/{number:03}.png", product / f"test/good/{100 + number}.jpg")
    assert found(product)["near_leak"].images == named(list(range(10)))


def test_one_test_image_is_enough_to_be_found(product):
    for path in (product / "test").rglob("*.png"):
        path.unlink()
    smaller_copy(product / "train/good/004.png", product / "test/good/104.jpg")
    assert found(product)["near_leak"].images == named([4])


def test_exact_copies_do_not_hide_near_ones(product):
    for number in range(12):
        shutil.copy(product / f"train/good/{number:03}.png", product / f"test/good/{200 + number}.png")
    # Nor do training images that are there twice.
    shutil.copytree(product / "train/good", product / "train/good/again")
    for number in range(3):
        smaller_copy(product / f"train/good/{number:03}.png", product / f"test/good/{100 + number}.jpg")
    warnings = found(product)
    assert len(warnings["leak"].images) == 12
    assert warnings["near_leak"].images == named([0, 1, 2])


def test_frames_of_a_film_are_not_taken_for_copies(product):
    """Training images that nearly repeat one another, and test images as near to them as these are."""
    rng = np.random.default_rng(0)
    for number in range(8):
        pixels = cv2.imread(str(product / f"train/good/{number:03}.png"))
        for frame in range(4):
            moved = np.roll(pixels, rng.integers(-2, 3, 2), (0, 1)) * rng.uniform(0.97, 1.03)
            moved = np.clip(moved + rng.normal(0, 2, moved.shape), 0, 255).astype(np.uint8)
            part = "test" if frame == 0 else "train"
            cv2.imwrite(str(product / part / f"good/frame-{number}-{frame}.png"), moved)
    for path in (product / "test").rglob("*.png"):
        if not path.name.startswith("frame"):
            path.unlink()
    assert found(product) == {}


def test_one_training_image_is_compared_too(product):
    for number in range(1, 12):
        (product / f"train/good/{number:03}.png").unlink()
    assert found(product) == {}
    smaller_copy(product / "train/good/000.png", product / "test/good/100.jpg")
    assert found(product)["near_leak"].images == named([0])


def test_damaged_files_are_named_and_do_not_stop_the_check(product):
    for name in ("train/good/000.png", "test/good/001.png"):
        (product / name).write_bytes((product / name).read_bytes()[:50])
    warnings = found(product)
    assert warnings.keys() == {"unreadable"}
    assert warnings["unreadable"].images == (("train/good/000.png",), ("test/good/001.png",))


def test_a_kind_of_image_that_is_not_read_is_one_that_cannot_be(product):
    pil = pytest.importorskip("PIL.Image")
    whole_numbers = pil.fromarray(np.full((128, 128), 70_000, np.int32))
    whole_numbers.save(product / "test/good/100.tif")
    assert cv2.imwrite(str(product / "test/good/101.tif"), np.full((128, 128), 2, np.float32))
    warnings = found(product)
    assert warnings.keys() == {"unreadable"}
    assert warnings["unreadable"].images == (("test/good/100.tif",), ("test/good/101.tif",))


def test_one_image_under_two_labels_is_a_contradiction(product):
    defect = sorted((product / "test").glob("[!g]*"))[0]
    shutil.copy(product / "test/good/002.png", defect / "000.png")
    warnings = found(product)
    assert warnings["contradiction"].images == ((f"test/{defect.name}/000.png", "test/good/002.png"),)
    assert warnings["repeated"].message == "1 test image repeats another one."


def test_repeated_training_images(product):
    shutil.copy(product / "train/good/002.png", product / "train/good/090.png")
    shutil.copy(product / "train/good/002.png", product / "train/good/091.png")
    warnings = found(product)
    assert warnings.keys() == {"repeated"}
    assert warnings["repeated"].message == "2 training images repeat others."


def test_one_image_of_another_size_is_named_and_many_are_counted(product):
    def resize(name: str, size: tuple[int, int]) -> None:
        path = str(product / name)
        cv2.imwrite(path, cv2.resize(cv2.imread(path), size))

    resize("train/good/000.png", (144, 128))
    warning = found(product)["size"]
    assert warning.images == (("train/good/000.png",),)
    assert "1 image has another size" in warning.message
    assert "128 x 128 pixels" in warning.message
    for number in range(12):
        resize(f"train/good/{number:03}.png", (130 + number, 128))
    warning = found(product)["size"]
    assert warning.images == ()
    assert warning.message == "The images have 13 sizes, from 128 x 128 to 141 x 128 pixels."


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (np.zeros((128, 128), np.uint8), "The mask of 1 defective image is empty."),
        (
            np.full((64, 128), 255, np.uint8),
            "The mask of 1 defective image is of another size than its image.",
        ),
        (None, "The mask of 1 defective image is unreadable."),
    ],
)
def test_masks_that_mark_nothing(product, spoil, message):
    mask = sorted((product / "ground_truth").rglob("*.png"))[0]
    if spoil is None:
        mask.write_bytes(b"no mask")
    else:
        cv2.imwrite(str(mask), spoil)
    assert found(product)["mask"].message == message


def test_images_of_one_colour_are_no_trouble(tmp_path):
    for part in ("train/good", "test/good", "test/bad"):
        (tmp_path / part).mkdir(parents=True)
        for number in range(3):
            value = 20 * number + len(part)
            cv2.imwrite(str(tmp_path / part / f"{number}.png"), np.full((8, 8), value, np.uint8))
    assert found(tmp_path) == {}


def test_a_folder_is_read(tmp_path):
    dataset = write_dataset(tmp_path / "flange", 2, 1, 1, 64)
    assert check_dataset(dataset) == check_dataset(read_dataset(dataset))
    with pytest.raises(InputError):
        check_dataset(tmp_path / "none")
