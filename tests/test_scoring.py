"""The list of defective regions, against a flood fill and by hand."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

import pydefect
from pydefect import Region, Result, scoring


def result_of(*anomaly_maps: np.ndarray, threshold: float | None = 1.0) -> Result:
    return Result(
        image_scores=np.array([one.max() for one in anomaly_maps], np.float32),
        anomaly_maps=list(anomaly_maps),
        paths=[None] * len(anomaly_maps),
        names=[f"image-{index:05}" for index in range(len(anomaly_maps))],
        scored_boxes=[(0, 0, *one.shape) for one in anomaly_maps],
        pixel_threshold=threshold,
    )


def regions_of(rows: list[str]) -> list[Region]:
    """Of a drawing, whose digits are scores."""
    return regions_in(np.array([list(row) for row in rows]).astype(np.float32))


def regions_in(anomaly_map: np.ndarray, threshold: float = 1.0) -> list[Region]:
    (regions,) = result_of(anomaly_map, threshold=threshold).regions
    return regions


def filled(mask: np.ndarray, start: tuple[int, int]) -> list[tuple[int, int]]:
    """The pixels that one connects with, row by row."""
    found, waiting = {start}, [start]
    while waiting:
        row, column = waiting.pop()
        for near in [(row + down, column + right) for down in (-1, 0, 1) for right in (-1, 0, 1)]:
            inside = 0 <= near[0] < mask.shape[0] and 0 <= near[1] < mask.shape[1]
            if inside and mask[near] and near not in found:
                found.add(near)
                waiting.append(near)
    return sorted(found)


def regions_pixels(anomaly_map: np.ndarray, mask: np.ndarray) -> list[tuple[Region, list[tuple[int, int]]]]:
    seen: set[tuple[int, int]] = set()
    found = []
    for start in map(tuple, np.argwhere(mask).tolist()):
        if start in seen:
            continue
        pixels = filled(mask, start)
        seen.update(pixels)
        rows, columns = zip(*pixels, strict=True)
        peak = max(pixels, key=lambda pixel: (anomaly_map[pixel], -pixel[0], -pixel[1]))
        box = (min(rows), min(columns), max(rows) + 1, max(columns) + 1)
        centroid = (float(np.mean(rows)) + 0.5, float(np.mean(columns)) + 0.5)
        found.append((Region(box, len(pixels), centroid, peak, float(anomaly_map[peak])), pixels))
    return sorted(found, key=lambda entry: (-entry[0].score, entry[0].peak))


@pytest.mark.parametrize("levels", [3, 1000])  # of scores: with and without ties
@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("size", [(1, 40), (40, 1), (2, 2), (23, 37), (64, 65)])
def test_regions_are_those_of_a_flood_fill(size: tuple[int, int], share: float, levels: int) -> None:
    rng = np.random.default_rng([*size, round(100 * share), levels])
    anomaly_map = rng.integers(1, levels, size, endpoint=True).astype(np.float32) / np.float32(7)
    anomaly_map[rng.random(size) > share] = 0
    (mask,) = result_of(anomaly_map, threshold=0.1).masks
    expected = regions_pixels(anomaly_map, mask)
    found = regions_in(anomaly_map, threshold=0.1)
    assert len(found) == len(expected)
    union = np.zeros(size, bool)
    for region, (other, pixels) in zip(found, expected, strict=True):
        assert (region.box, region.area, region.peak, region.score) == (
            other.box,
            other.area,
            other.peak,
            other.score,
        )
        assert region.centroid == pytest.approx(other.centroid, abs=1e-9)
        union[tuple(zip(*pixels, strict=True))] = True
    assert np.array_equal(union, mask)
    assert all(type(number) is int for region in found for number in (*region.box, region.area, *region.peak))


def test_what_touches_by_a_corner_is_one_region() -> None:
    assert regions_of(["2000", "0300", "0000", "0005"]) == [
        Region((3, 3, 4, 4), 1, (3.5, 3.5), (3, 3), 5.0),
        Region((0, 0, 2, 2), 2, (1.0, 1.0), (1, 1), 3.0),
    ]


def test_equal_scores_are_ordered_by_their_peaks() -> None:
    # The lower one begins further up, and at the left.
    found = regions_of(["000020", "200000", "200940", "209000", "000000", "900000"])
    assert [region.peak for region in found] == [(2, 3), (5, 0), (0, 4), (1, 0)]
    assert [region.score for region in found] == [9, 9, 2, 2]


def test_a_region_round_another_is_a_region_of_its_own() -> None:
    ring, middle = regions_of(["33333", "30003", "30203", "30003", "33333"])
    assert (ring.box, ring.area, ring.centroid, ring.peak) == ((0, 0, 5, 5), 16, (2.5, 2.5), (0, 0))
    assert (middle.box, middle.area) == ((2, 2, 3, 3), 1)


def test_nothing_everything_and_one_pixel() -> None:
    assert regions_of(["111", "010"]) == []  # the threshold itself is not over it
    assert regions_of(["222", "222"]) == [Region((0, 0, 2, 3), 6, (1.0, 1.5), (0, 0), 2.0)]
    assert regions_of(["2"]) == [Region((0, 0, 1, 1), 1, (0.5, 0.5), (0, 0), 2.0)]


def test_every_image_has_a_list_and_none_has_one_without_a_threshold() -> None:
    maps = [np.full((4, 6), 2, np.float32), np.zeros((3, 5), np.float32)]
    result = result_of(*maps)
    assert result.regions is not None
    assert [len(regions) for regions in result.regions] == [1, 0]
    assert result_of(*maps, threshold=None).regions is None
    assert result_of().regions == []


def test_maps_of_any_layout_in_memory() -> None:
    anomaly_map = np.random.default_rng(0).random((30, 40), np.float32)
    expected = regions_in(anomaly_map, 0.8)
    padded = np.zeros((60, 80), np.float32)
    padded[::2, ::2] = anomaly_map
    assert regions_in(np.asfortranarray(anomaly_map), 0.8) == expected
    assert regions_in(padded[::2, ::2], 0.8) == expected
    read_only = anomaly_map.copy()
    read_only.flags.writeable = False
    assert regions_in(read_only, 0.8) == expected


def test_many_specks_on_a_large_map_keep_their_places() -> None:
    anomaly_map = np.zeros((1944, 2592), np.float32)
    corners = [(row, column) for row in range(5, 1900, 80) for column in range(3, 2500, 120)]
    for index, (row, column) in enumerate(corners):
        anomaly_map[row : row + 3, column : column + 4] = 2 + index
    found = regions_in(anomaly_map)
    assert [region.box[:2] for region in found] == corners[::-1]
    assert {region.area for region in found} == {12}
    assert found[0].centroid == (corners[-1][0] + 1.5, corners[-1][1] + 2.0)


@pytest.mark.filterwarnings("ignore:.*held-out images support:UserWarning")
def test_a_detectors_regions_lie_in_the_scored_box() -> None:
    images = [np.random.default_rng(seed).integers(0, 256, (48, 64, 3), np.uint8) for seed in range(4)]
    detector = pydefect.fit(
        images,
        method="padim",
        backbone="resnet18",
        weights="random",
        resize=(48, 64),
        crop=32,
        calibration_folds=2,
        false_alarm_rate=0.4,
        progress=False,
    )
    result = pydefect.score(detector, [255 - image // 9 for image in images], progress=False)
    assert result.regions is not None
    assert sum(map(len, result.regions)) > 0
    for regions, anomaly_map in zip(result.regions, result.anomaly_maps, strict=True):
        # The image's own peak, as the folder of scores has it.
        peak = np.unravel_index(int(anomaly_map.argmax()), anomaly_map.shape)
        assert not regions or regions[0].peak == peak
        for region in regions:
            top, left, bottom, right = region.box
            assert 8 <= top < bottom <= 40
            assert 16 <= left < right <= 48
            assert region.score > result.pixel_threshold


def test_regions_are_found_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop over the images' regions took all images' time for each."""
    calls = []
    found = scoring._regions
    monkeypatch.setattr(scoring, "_regions", lambda *given: calls.append(given) or found(*given))
    result = result_of(np.eye(4, dtype=np.float32), np.zeros((4, 4), np.float32), threshold=0.5)
    for index in range(2):
        assert result.regions is not None
        assert len(result.regions[index]) == 1 - index
        assert result.masks is not None
    assert len(calls) == 2
    # Another threshold has regions of its own.
    assert dataclasses.replace(result, pixel_threshold=2.0).regions == [[], []]


@pytest.mark.parametrize(
    ("local", "whole", "kind"),
    [
        (2.0, 2.0, "both"),
        (2.0, 1.0, "structural"),
        (1.0, 2.0, "logical"),
        (1.0, 1.0, "structural"),
        (0.5, 0.75, "logical"),
    ],
)
def test_a_part_at_its_threshold_does_not_pass_over_it(local: float, whole: float, kind: str) -> None:
    result = Result(
        image_scores=np.array([1.0], np.float32),
        anomaly_maps=[np.zeros((1, 1), np.float32)],
        paths=[None],
        names=["a"],
        scored_boxes=[(0, 0, 1, 1)],
        image_threshold=0.5,
        part_scores={"local": np.array([local], np.float32), "global": np.array([whole], np.float32)},
        part_thresholds={"local": 1.0, "global": 1.0},
    )
    assert result.kind == [kind]
