"""Facts about pixels of the pictures; how they look is for people to judge."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np
import pytest

from pydefect.errors import InputError
from pydefect.visualization import (
    comparison_sheet,
    draw_contours,
    fade_unscored,
    heat_map,
    map_range,
    overlay,
    scale_of_ranges,
    shared_scale,
    shrink,
    shrink_mask,
    to_rgb8,
)

RED = (255, 0, 0)


def grey(height: int, width: int, value: int = 90) -> np.ndarray:
    return np.full((height, width, 3), value, dtype=np.uint8)


@pytest.mark.parametrize(
    ("image", "expected"),
    [
        (np.full((2, 3), 7, np.uint8), 7),
        (np.full((2, 3, 1), 7, np.uint8), 7),
        (np.full((2, 3, 3), 7, np.uint8), 7),
        (np.full((2, 3, 4), 7, np.uint8), 7),
        (np.full((2, 3), 65535, np.uint16), 255),
        (np.full((2, 3), 128 * 257, np.uint16), 128),
        (np.full((2, 3), 0.5, np.float32), 128),
        (np.full((2, 3), 3.0, np.float64), 255),
        (np.full((2, 3), -1.0, np.float16), 0),
        (np.full((2, 3), np.nan, np.float32), 0),
        (np.ones((2, 3), np.bool_), 255),
    ],
)
def test_images_of_every_kind_become_rgb(image: np.ndarray, expected: int) -> None:
    picture = to_rgb8(image)
    assert picture.dtype == np.uint8
    assert picture.shape == (2, 3, 3)
    assert np.all(picture == expected)


def test_channels_keep_their_order_and_the_input_stays_untouched() -> None:
    image = np.zeros((4, 4, 3), np.uint8)
    image[..., 2] = 200
    picture = to_rgb8(image)
    assert tuple(picture[0, 0]) == (0, 0, 200)
    picture[:] = 1
    assert tuple(image[0, 0]) == (0, 0, 200)


def test_either_order_of_bytes_is_shown_alike() -> None:
    image = np.array([[0, 257, 65535]], np.uint16)
    assert np.array_equal(to_rgb8(image.astype(">u2")), to_rgb8(image))


@pytest.mark.parametrize(
    "image", [np.zeros((2, 3, 2), np.uint8), np.zeros(5), np.zeros((0, 3)), np.zeros((2, 3), np.int32)]
)
def test_what_is_no_image_is_refused(image: np.ndarray) -> None:
    with pytest.raises(InputError):
        to_rgb8(image)


def test_the_scale_depends_on_the_threshold_alone_where_there_is_one() -> None:
    assert shared_scale([], pixel_threshold=0.6) == pytest.approx((0.3, 0.9))
    assert shared_scale([np.full((3, 3), 99.0)], pixel_threshold=0.6) == pytest.approx((0.3, 0.9))


def test_without_a_threshold_the_scale_ignores_what_was_not_scored() -> None:
    anomaly_map = np.zeros((10, 10), np.float32)
    anomaly_map[2:8, 2:8] = 3
    anomaly_map[5, 5] = 9
    assert shared_scale([anomaly_map], scored_boxes=[(2, 2, 8, 8)]) == (3.0, 9.0)
    assert shared_scale([anomaly_map]) == (0.0, 9.0)
    ignored = np.ones((10, 10), dtype=bool)
    ignored[2:8, 2:8] = False
    assert shared_scale([anomaly_map], ignored=[ignored]) == (3.0, 9.0)
    assert shared_scale([anomaly_map] * 3, ignored=[ignored, None, ignored]) == (3.0, 9.0)


def test_a_constant_map_still_has_a_scale() -> None:
    low, high = shared_scale([np.full((4, 4), 2.0, np.float32)])
    assert high > low == 2.0
    with pytest.raises(InputError):
        shared_scale([])


def test_heat_map_goes_from_blue_over_green_to_red_and_clips() -> None:
    colours = heat_map(np.array([[-5.0, 0.25, 1.0, 1.75, 99.0, np.inf]]), 0.0, 2.0)[0].astype(int)
    blue, green, red = colours[1], colours[2], colours[3]
    assert blue.argmax() == 2
    assert green.argmax() == 1
    assert red.argmax() == 0
    assert np.array_equal(colours[0], heat_map(np.zeros((1, 1)), 0, 2)[0, 0])
    assert np.array_equal(colours[4], heat_map(np.full((1, 1), 2.0), 0, 2)[0, 0])
    assert np.array_equal(colours[5], colours[4])


def test_heat_maps_of_one_scale_give_equal_scores_equal_colours() -> None:
    first = heat_map(np.array([[0.0, 1.0, 2.0]]), 0, 4)
    second = heat_map(np.array([[1.0, 4.0]]), 0, 4)
    assert np.array_equal(first[0, 1], second[0, 0])


@pytest.mark.parametrize(("low", "high"), [(1, 1), (2, 1), (0, np.nan), (-np.inf, 1)])
def test_a_scale_without_length_is_refused(low: float, high: float) -> None:
    with pytest.raises(InputError):
        heat_map(np.zeros((2, 2)), low, high)


def test_overlay_leaves_low_scores_alone_and_colours_high_ones() -> None:
    image = grey(32, 48)
    anomaly_map = np.zeros((32, 48), np.float32)
    anomaly_map[10:20, 10:20] = 5
    picture = overlay(image, anomaly_map, 0, 5)
    hot = anomaly_map > 0
    assert np.array_equal(picture[~hot], image[~hot])
    expected = np.rint(90 + 0.7 * (heat_map(anomaly_map, 0, 5)[15, 15].astype(float) - 90))
    assert np.abs(picture[15, 15] - expected).max() <= 1
    assert np.array_equal(overlay(image, anomaly_map, 0, 5, strength=0), image)


def test_overlay_fades_what_was_not_scored() -> None:
    image = grey(20, 20, 0)
    picture = overlay(image, np.zeros((20, 20)), 0, 1, scored_box=(5, 6, 15, 16))
    inside = np.zeros((20, 20), bool)
    inside[5:15, 6:16] = True
    assert np.all(picture[inside] == 0)
    assert np.all(picture[~inside] > 50)
    assert np.all(fade_unscored(grey(20, 20, 255), (5, 6, 15, 16))[~inside] < 200)


def test_what_was_ignored_is_faded_like_what_lies_outside_of_the_box() -> None:
    image, ignored = grey(20, 20, 255), np.zeros((20, 20), bool)
    ignored[3:8, 6:16] = True
    unseen = ignored.copy()
    unseen[:5] = unseen[15:] = unseen[:, :6] = unseen[:, 16:] = True
    for picture in (
        fade_unscored(image, (5, 6, 15, 16), ignored),
        overlay(image, np.zeros((20, 20)), 0, 1, scored_box=(5, 6, 15, 16), ignored=ignored),
    ):
        assert np.all(picture[unseen] < 200)
        assert np.all(picture[~unseen] == 255)
    alone = fade_unscored(image, None, ignored)
    assert np.array_equal(alone[..., 0] < 200, ignored)
    sheets = [
        comparison_sheet([image], [np.zeros((20, 20))], ignored=[some], cell=32, scale=(0, 1))
        for some in (None, ignored)
    ]
    assert (sheets[0] != sheets[1]).any()
    with pytest.raises(InputError, match="ignored"):
        fade_unscored(image, None, ignored[1:])
    with pytest.raises(InputError, match="ignored has 2 entries for 1 images"):
        comparison_sheet([image], [np.zeros((20, 20))], ignored=[None, None])


def test_a_smaller_mask_keeps_every_marked_pixel() -> None:
    mask = np.zeros((90, 70), np.uint8)
    mask[33, 44] = 255
    assert shrink_mask(mask, (90, 70)).sum() == 1
    assert np.argwhere(shrink_mask(mask, (9, 7))).tolist() == [[3, 4]]


def test_a_box_of_the_whole_image_changes_nothing() -> None:
    image = grey(20, 30)
    assert np.array_equal(fade_unscored(image, (0, 0, 20, 30)), image)


@pytest.mark.parametrize("call", [overlay, draw_contours])
def test_sizes_that_differ_are_refused(call: object) -> None:
    arguments = (0, 1) if call is overlay else ()
    with pytest.raises(InputError, match=r"\[8, 9\]"):
        call(grey(10, 10), np.zeros((8, 9)), *arguments)  # type: ignore[operator]


@pytest.mark.parametrize("image", [grey(256, 256), grey(256, 256)[..., 0], np.full((256, 256), 0.3)])
def test_contours_are_red_on_the_border_and_nowhere_far_from_it(image: np.ndarray) -> None:
    mask = np.zeros((256, 256), bool)
    mask[60:120, 80:200] = True
    picture = draw_contours(image, mask)
    border = mask & ~cv2.erode(mask.astype(np.uint8), np.ones((3, 3), np.uint8)).astype(bool)
    near = cv2.dilate(border.astype(np.uint8), np.ones((7, 7), np.uint8)).astype(bool)
    # Antialiasing rounds the corners.
    assert np.mean(np.all(picture[border] == RED, axis=1)) > 0.98
    assert np.array_equal(picture[~near], to_rgb8(image)[~near])


def test_holes_get_a_contour_of_their_own() -> None:
    mask = np.zeros((128, 128), bool)
    mask[20:100, 20:100] = True
    mask[50:70, 50:70] = False
    picture = draw_contours(grey(128, 128), mask, width=1)
    assert picture[49, 60, 0] > 200
    assert picture[49, 60, 1] < 40
    assert tuple(picture[60, 60]) == (90, 90, 90)


def test_a_single_pixel_is_still_seen() -> None:
    mask = np.zeros((64, 64), np.uint8)
    mask[30, 40] = 255
    assert np.any(np.all(draw_contours(grey(64, 64), mask) == RED, axis=2))


def test_lines_grow_with_the_image() -> None:
    def red_pixels_across(edge: int) -> int:
        mask = np.zeros((edge, edge), bool)
        mask[: edge // 2] = True
        column = draw_contours(grey(edge, edge), mask)[edge // 4 : 3 * edge // 4, edge // 2]
        return int(np.all(column == RED, axis=1).sum())

    assert red_pixels_across(1024) >= 3 * red_pixels_across(256) >= 3


def test_no_defect_no_line() -> None:
    image = grey(50, 40)
    assert np.array_equal(draw_contours(image, np.zeros((50, 40), bool)), image)


def sheet_parts(count: int, size: tuple[int, int] = (64, 64)) -> tuple[list[np.ndarray], list[np.ndarray]]:
    images = [grey(*size, 60 + 20 * index) for index in range(count)]
    maps = [np.zeros(size, np.float32) for _ in range(count)]
    for anomaly_map in maps:
        anomaly_map[20:40, 20:40] = 2
    return images, maps


def test_the_sheet_has_a_column_an_image_and_a_row_a_kind() -> None:
    images, maps = sheet_parts(3)
    masks = [anomaly_map > 1 for anomaly_map in maps]
    small = comparison_sheet(images, maps, pixel_threshold=1.0, cell=64)
    with_masks = comparison_sheet(images, maps, masks=masks, pixel_threshold=1.0, cell=64)
    full = comparison_sheet(images, maps, masks=masks, ground_truth=masks, pixel_threshold=1.0, cell=64)
    assert small.dtype == np.uint8
    row = with_masks.shape[0] - small.shape[0]
    assert 64 < row < 80
    assert full.shape[0] - with_masks.shape[0] == row
    one_less = comparison_sheet(images[:2], maps[:2], masks=masks[:2], pixel_threshold=1.0, cell=64)
    assert with_masks.shape[1] - one_less.shape[1] == row
    # The pictures themselves: greys of the inputs, white of the truth, red of the contours.
    for index in range(3):
        assert np.any(np.all(full == 60 + 20 * index, axis=2))
    assert np.sum(np.all(with_masks == RED, axis=2)) > 3 * 30
    assert not np.any(np.all(small == RED, axis=2))


def test_lists_may_be_arrays() -> None:
    images, maps = sheet_parts(3)
    maps = [anomaly_map[:48, :48] for anomaly_map in maps]
    images = [image[:48, :48] for image in images]
    boxes = [(0, 0, 48, 40)] * 3
    ranges = [map_range(one, box, None) for one, box in zip(maps, boxes, strict=True)]
    assert scale_of_ranges(ranges) == shared_scale(maps, scored_boxes=boxes)
    assert shared_scale(np.stack(maps), scored_boxes=np.array(boxes)) == shared_scale(
        maps, scored_boxes=boxes
    )
    assert np.array_equal(
        comparison_sheet(np.stack(images), np.stack(maps), scale=np.array([0.0, 2.0])),
        comparison_sheet(images, maps, scale=(0.0, 2.0)),
    )
    assert np.array_equal(comparison_sheet(images, np.stack(maps)), comparison_sheet(images, maps))


@pytest.mark.parametrize("size", [(20, 200), (200, 20), (1, 1), (500, 700)])
def test_the_sheet_takes_any_size_and_mixed_ones(size: tuple[int, int]) -> None:
    images = [np.zeros(size, np.uint8), np.zeros((33, 47, 3), np.float32)]
    maps = [np.ones(size, np.float32), np.ones((33, 47), np.float32)]
    masks = [anomaly_map > 0 for anomaly_map in maps]
    captions = ["a very long name/of a file in a folder/000.png\nscore 1", "Müller"]
    sheet = comparison_sheet(images, maps, masks=masks, captions=captions, cell=96)
    assert sheet.shape[0] > 3 * 33
    assert sheet.shape[1] < 1000


def test_the_sheet_refuses_lists_that_do_not_fit() -> None:
    images, maps = sheet_parts(2)
    for arguments in (
        {"masks": [maps[0] > 1]},
        {"captions": ["one"]},
        {"cell": 3},
        {"ground_truth": [np.zeros((3, 3)), np.zeros((3, 3))]},
    ):
        with pytest.raises(InputError):
            comparison_sheet(images, maps, **arguments)
    with pytest.raises(InputError):
        comparison_sheet([], [])
    with pytest.raises(InputError):
        comparison_sheet(images, [np.zeros((3, 3)), maps[1]])


def test_parts_of_the_map_stand_over_the_heat_map():
    images, maps = [np.full((20, 30, 3), 90, np.uint8)] * 2, [np.linspace(0, 1, 600).reshape(20, 30)] * 2
    without = comparison_sheet(images, maps, cell=64)
    parts = {"local": maps, "global": maps}
    sheet = comparison_sheet(images, maps, part_maps=parts, cell=64)
    row = (without.shape[0] - sheet.shape[0]) // -2
    assert row > 30
    with pytest.raises(InputError, match="global"):
        comparison_sheet(images, maps, part_maps={"global": maps[:1]}, cell=64)


def test_a_smaller_map_keeps_every_hot_pixel_where_it_belongs() -> None:
    rng = np.random.default_rng(0)
    for height, width, edge in rng.integers(1, 200, (1000, 3)).tolist():
        anomaly_map = np.zeros((height, width), np.float32)
        row, column = int(rng.integers(height)), int(rng.integers(width))
        anomaly_map[row, column] = 10
        picture, small, _ = shrink(grey(height, width), anomaly_map, (0, 0, height, width), edge)
        assert small.dtype == np.float32
        assert small.shape == picture.shape[:2]
        hot = np.argwhere(small == 10)
        assert 1 <= len(hot) <= 4
        assert np.count_nonzero(small) == len(hot)
        belongs = (np.array([row, column]) + 0.5) * small.shape / anomaly_map.shape
        assert np.abs(hot + 0.5 - belongs).max() <= 1


def test_a_narrow_column_keeps_its_score():
    image = np.zeros((400, 40, 3), dtype=np.uint8)
    sheets = [
        comparison_sheet([image], [image[..., 0]], captions=[caption])
        for caption in ("a very long name", "a very long name\nscore 0.304  defective")
    ]
    # Half a cell is too narrow for it.
    assert sheets[1].shape[1] > sheets[0].shape[1]


@pytest.mark.skipif(int(cv2.__version__[0]) < 5, reason="OpenCV 4 draws ASCII only")
def test_captions_keep_their_letters():
    image = np.zeros((64, 64, 3), dtype=np.uint8)
    for caption in ("Pr\u00fcfling", "\u65e5\u672c", "bad \udcff"):
        drawn, lost = (
            comparison_sheet([image], [image[..., 0]], captions=[text])
            for text in (caption, caption.encode("ascii", "replace").decode())
        )
        assert (drawn.shape == lost.shape and (drawn == lost).all()) == ("\udcff" in caption)


@pytest.mark.parametrize(("large", "small"), [(22, 18), (26, 10), (225, 25), (128, 127)])
def test_a_smaller_map_loses_no_row_and_no_column(large: int, small: int) -> None:
    # A factor that is rounded passes over one of 22 rows where 18 are to stay.
    for place in range(large):
        anomaly_map = np.zeros((large, large), np.float32)
        anomaly_map[place, large - 1 - place] = 10
        assert shrink(grey(large, large), anomaly_map, (0, 0, large, large), small)[1].max() == 10


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"colour": "red"}, "colour: 'red' given; allowed are three numbers of 0 to 255"),
        ({"colour": (300, -2, 3)}, r"colour: \(300, -2, 3\) given"),
        ({"width": -1}, "width: -1 given; allowed are whole numbers of 1 to 32767, or None"),
        ({"width": 2.5}, "width: 2.5 given"),
        ({"mask": [[1], [1, 2]]}, "mask: list given that is no array"),
        ({"mask": np.full((20, 20), "x")}, "mask is of type <U1; allowed are bool and numbers"),
        ({"image": [[1], [1, 2]]}, "image: list given that is no array"),
    ],
)
def test_contours_of_wrong_types_are_refused_in_our_words(arguments: dict[str, Any], message: str) -> None:
    good = {"image": np.zeros((20, 20), np.uint8), "mask": np.eye(20, dtype=bool)}
    with pytest.raises(InputError, match=message):
        draw_contours(**{**good, **arguments})
    in_an_array = draw_contours(**good, colour=np.array([0, 255, 0]), width=np.int64(2))
    assert np.array_equal(in_an_array, draw_contours(**good, colour=(0, 255, 0), width=2))
