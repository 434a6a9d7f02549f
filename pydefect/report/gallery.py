"""The cards of a report's gallery: every test image's pictures, outlines and outcome."""

from __future__ import annotations

import base64
import math
import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from pydefect.data.images import read_image
from pydefect.data.layouts import read_mask
from pydefect.errors import InputError
from pydefect.run import Run, RunImage
from pydefect.visualization import (
    Picture,
    fade_unscored,
    map_range,
    outlines,
    overlay,
    scale_of_ranges,
    shared_scale,
    shrink,
    shrink_mask,
    to_rgb8,
)

__all__ = ["OUTCOMES", "Card", "ColourScale", "Layer", "Thresholds", "cards", "outcome"]

OUTCOMES = {
    "miss": "Missed defect",
    "false_alarm": "False alarm",
    "found": "Found defect",
    "passed": "Passed as good",
}
"""What can come of an image, the errors first."""

# All pictures of a page share so many pixels: at 0.2 to 0.4 bytes each the page stays under about 15 MB. A
# single one has between these numbers: what is smaller shows nothing, so that the page grows from 3,900
# pictures on.
_PAGE_PIXELS = 36_000_000
_FEWEST_PIXELS, _MOST_PIXELS = 96**2, 512**2
_QUALITY = 80
# In pixels of the pictures: what an outline may leave out.
_OUTLINE_TOLERANCE = 0.6


@dataclass(frozen=True)
class Thresholds:
    """Where a report draws the line.

    Attributes
    ----------
    image, pixel
        A greater score is called defective. None: nothing is.
    chosen_on_test
        Whether they maximise F1 on the very images of the report, because the detector has none.
    """

    image: float | None
    pixel: float | None
    chosen_on_test: bool

    @classmethod
    def of(cls, run: Run) -> Thresholds:
        """Take those of the run's detector, or else those of its best F1."""
        if run.calibration is not None:
            return cls(run.calibration.image_threshold, run.calibration.pixel_threshold, False)
        return cls(run.evaluation["image_f1_threshold"], run.evaluation["pixel_f1_threshold"], True)


@dataclass(frozen=True)
class Layer:
    """One picture of an image: an address that holds its bytes, and what it shows."""

    title: str
    address: str


@dataclass(frozen=True)
class Card:
    """One image in the gallery.

    Attributes
    ----------
    image
        The run's row.
    outcome
        A key of :data:`OUTCOMES`.
    photograph
        Of the image, what was not scored faded; None where its file cannot be read any more.
    layers
        The heat map over the image, and the parts of which the method makes its map.
    found, truth
        SVG paths in the image's own pixels: outlines of what was found and of the ground truth; empty where
        there is none.
    note
        Why something is missing.
    """

    image: RunImage
    outcome: str
    photograph: str | None
    layers: tuple[Layer, ...]
    found: str
    truth: str
    note: str


@dataclass(frozen=True)
class ColourScale:
    """The scores of the first and the last colour of all heat maps, parts of maps included.

    Parts are in the terms of the map itself.
    """

    low: float
    high: float

    @classmethod
    def of(cls, run: Run, thresholds: Thresholds) -> ColourScale:
        """The scale round the pixel threshold, or else that of all maps."""
        if thresholds.pixel is not None and thresholds.pixel > 0:
            return cls(*shared_scale([], pixel_threshold=thresholds.pixel))
        maps = (run.network_map(index) for index in range(len(run.images)))
        return cls(*scale_of_ranges([map_range(one, (0, 0, *one.shape), None) for one in maps]))

    @property
    def address(self) -> str:
        """A bar of the colours as they lie over mid-grey, as the address of a picture."""
        ramp = np.linspace(self.low, self.high, 160, dtype=np.float32)[np.newaxis].repeat(16, axis=0)
        return _address(overlay(np.full((*ramp.shape, 3), 128, np.uint8), ramp, self.low, self.high))


def outcome(image: RunImage, threshold: float) -> str:
    """Compare the decision at a threshold with the label; a key of :data:`OUTCOMES`."""
    called = image.image_score > threshold
    if image.label:
        return "found" if called else "miss"
    return "false_alarm" if called else "passed"


def cards(
    run: Run,
    thresholds: Thresholds,
    scale: ColourScale,
    count: int,
    on_progress: Callable[[int, int], None],
) -> list[Card]:
    """Draw the gallery, errors first and each kind by falling score.

    Parameters
    ----------
    run
        With its data set's images still there.
    thresholds
        Of the decisions and outlines.
    scale
        Of the heat maps.
    count
        At most so many cards; what comes last is left out.
    on_progress
        Told how many of how many are drawn.

    Returns
    -------
    list of Card
    """
    order = sorted(range(len(run.images)), key=lambda index: _attention(run.images[index], thresholds))
    order = order[:count]
    pixels = _PAGE_PIXELS / max(1, len(order) * (1 + len(run.map_names)))
    pixels = min(max(pixels, _FEWEST_PIXELS), _MOST_PIXELS)
    drawn: list[Card] = []
    # OpenCV decodes and draws outside of Python's lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for card in pool.map(lambda index: _card(run, index, thresholds, scale, pixels), order):
            drawn.append(card)
            on_progress(len(drawn), len(order))
    return drawn


def _attention(image: RunImage, thresholds: Thresholds) -> tuple[bool, float]:
    threshold = thresholds.image
    wrong = threshold is not None and outcome(image, threshold) in ("miss", "false_alarm")
    return not wrong, -image.image_score


def _card(run: Run, index: int, thresholds: Thresholds, scale: ColourScale, pixels: float) -> Card:
    image = run.images[index]
    edge = round(max(image.size) * math.sqrt(pixels / (image.size[0] * image.size[1])))
    anomaly_map = run.map(index)
    picture, picture_note = _picture(run, index)
    backdrop = np.full((*image.size, 3), 128, dtype=np.uint8) if picture is None else picture
    ignored = run.preprocessing.ignored(image.size)
    photograph, layers = None, []
    for name in run.map_names:
        scores = anomaly_map if name == "anomaly" else run.map(index, name)
        small, small_map, box = shrink(backdrop, scores, image.scored_box, edge)
        unseen = None if ignored is None else shrink_mask(ignored, small.shape[:2])
        title = "Heat map" if name == "anomaly" else f"{name.replace('_', ' ').capitalize()} map"
        heat = overlay(small, small_map, scale.low, scale.high, scored_box=box, ignored=unseen)
        layers.append(Layer(title, _address(heat)))
        if photograph is None and picture is not None:
            photograph = _address(fade_unscored(small, box, unseen))
    tolerance = _OUTLINE_TOLERANCE * max(1.0, max(image.size) / edge)
    truth, truth_note = _truth(run, index, tolerance)
    return Card(
        image=image,
        outcome="" if thresholds.image is None else outcome(image, thresholds.image),
        photograph=photograph,
        layers=tuple(layers),
        found="" if thresholds.pixel is None else _path(anomaly_map > thresholds.pixel, tolerance),
        truth=truth,
        note=" ".join(note for note in (picture_note, truth_note) if note),
    )


def _picture(run: Run, index: int) -> tuple[Picture | None, str]:
    """The photograph, or why there is none."""
    size = run.images[index].size
    try:
        picture = to_rgb8(read_image(run.sample(index).image))
    except (InputError, OSError) as error:
        return None, f"The photograph cannot be shown: {error}."
    if picture.shape[:2] != size:
        return None, f"The photograph is not shown: it was {size[1]} x {size[0]} pixels and no longer is."
    return picture, ""


def _truth(run: Run, index: int, tolerance: float) -> tuple[str, str]:
    """The ground truth's outlines, or why a defective image has none."""
    image = run.images[index]
    if not image.label:
        return "", ""
    if not image.masks:
        return "", "There is no mask of its defect."
    try:
        return _path(read_mask(run.sample(index), image.size), tolerance), ""
    except (InputError, OSError) as error:
        return "", f"The ground truth cannot be shown: {error}."


def _path(mask: NDArray[Any], tolerance: float) -> str:
    """The outlines of a mask as an SVG path in its pixels."""
    parts = []
    for curve in outlines(mask):
        points = cv2.approxPolyDP(curve, tolerance, closed=True)[:, 0]
        if len(points) < 3:
            # A single pixel or a line would have no area to be drawn round.
            left, top, width, height = cv2.boundingRect(curve)
            corners = [(left, top), (left + width, top), (left + width, top + height), (left, top + height)]
            points = np.array(corners)
        parts.append("M" + "L".join(f"{x} {y}" for x, y in points.tolist()) + "Z")
    return "".join(parts)


def _address(picture: Picture) -> str:
    """The picture itself as an address: a page that holds it needs no other file."""
    settings = [cv2.IMWRITE_JPEG_QUALITY, _QUALITY]
    worked, data = cv2.imencode(".jpg", picture[..., ::-1], settings)
    if not worked:
        raise OSError("OpenCV could not encode a picture as JPEG")
    return "data:image/jpeg;base64," + base64.b64encode(data.tobytes()).decode()
