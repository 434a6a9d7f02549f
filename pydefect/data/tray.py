"""A procedural scene with a fixed arrangement: a tray with six compartments, each with a part of its own,
drawn with NumPy and OpenCV.

What is wrong with most of the defects is not how a part looks but that it is there, that it is not, or that
it is elsewhere: logical defects. Parts lie a little differently in every image, and light and noise vary. All
random numbers of the scene are drawn before those of its defect, so one seed gives the same scene with and
without a defect.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeAlias

import cv2
import numpy as np

from pydefect.errors import InputError

__all__ = ["TRAY_DEFECTS", "render_tray"]

Floats: TypeAlias = np.ndarray[Any, np.dtype[np.floating[Any]]]
Bools: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]
Bytes: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]

_SUPERSAMPLING = 2
_MIN_SIZE = 64
_ROWS, _COLUMNS = 2, 3
_MARGIN = 0.06  # of the image's edges around all compartments
_WALL = 0.012  # half the width of a wall between two, as part of the shorter edge

# What belongs where, row by row.
_ARRANGEMENT = ("washer", "nut", "cap", "block", "pin", "washer")

TRAY_DEFECTS = ("missing", "surplus", "swapped", "soiled")
"""The first three are logical defects, the last one is structural."""


@dataclass(frozen=True)
class _Lying:
    """A part on the tray; lengths in shares of the compartment's shorter edge."""

    kind: str
    compartment: int
    x: float
    y: float
    turn: float
    size: float = 1.0


@dataclass(frozen=True)
class _View:
    """Pixels of the supersampled image in a part's own frame, 1 being its largest radius."""

    x: Floats
    y: Floats
    soft: float

    @property
    def r(self) -> Floats:
        distance: Floats = np.hypot(self.x, self.y)
        return distance


def render_tray(
    rng: np.random.Generator, size: int | tuple[int, int], defect: str | None = None
) -> tuple[Bytes, Bools]:
    """Draw one photograph of the tray.

    Parameters
    ----------
    rng
        Source of all that varies. Equal states give equal images.
    size
        Height and width in pixels, one number for a square; at least 64.
    defect
        None for a good tray, or one of :data:`TRAY_DEFECTS`: ``"missing"``, an empty compartment;
        ``"surplus"``, a second part in one; ``"swapped"``, two parts in each other's place; ``"soiled"``, a
        dark spot on a part.

    Returns
    -------
    image : numpy.ndarray
        [H, W, 3] uint8 RGB.
    mask : numpy.ndarray
        [H, W] bool: where a part is missing, too many, wrong or soiled; all False for a good tray.

    Raises
    ------
    InputError
        If the size is too small or there is no such defect.

    Examples
    --------
    >>> image, mask = render_tray(np.random.default_rng(0), 96, "missing")
    >>> image.shape, image.dtype.name, bool(mask.any())
    ((96, 96, 3), 'uint8', True)
    """
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < _MIN_SIZE:
        raise InputError(f"size is {height} x {width}; both must be at least {_MIN_SIZE} pixels")
    if defect is not None and defect not in TRAY_DEFECTS:
        raise InputError(f"defect is {defect!r}; allowed are None, {', '.join(TRAY_DEFECTS)}")
    large = (height * _SUPERSAMPLING, width * _SUPERSAMPLING)
    parts = [
        _Lying(
            kind,
            compartment,
            x=float(rng.uniform(-0.05, 0.05)),
            y=float(rng.uniform(-0.05, 0.05)),
            turn=float(rng.uniform(-0.35, 0.35)),
        )
        for compartment, kind in enumerate(_ARRANGEMENT)
    ]
    image = _empty_tray(rng, large)
    brightness, slope = rng.uniform(0.94, 1.06), rng.uniform(-0.06, 0.06, 2)
    noise = rng.standard_normal((height, width, 3), dtype=np.float32)
    wrong: list[_Lying] = []
    if defect in ("missing", "swapped", "surplus"):
        parts, wrong = _rearranged(rng, parts, defect)
    mask = np.zeros(large, dtype=np.bool_)
    for part in parts:
        _put(image, part)
    for part in wrong:
        mask |= _footprint(large, part)
    if defect == "soiled":
        mask |= _soil(rng, image, parts[int(rng.integers(len(parts)))])
    y, x = np.mgrid[-1 : 1 : large[0] * 1j, -1 : 1 : large[1] * 1j]
    light = brightness * (1 + slope[0] * x + slope[1] * y)
    return _photograph(image * light[..., None].astype(np.float32), noise), _shrunk(mask, (height, width))


def _rearranged(
    rng: np.random.Generator, parts: list[_Lying], defect: str
) -> tuple[list[_Lying], list[_Lying]]:
    """All parts of a defective tray, and what is wrong about it: missing parts where they should be."""
    if defect == "missing":
        gone = parts[int(rng.integers(len(parts)))]
        return [part for part in parts if part is not gone], [gone]
    if defect == "swapped":
        while True:
            first, second = (parts[int(i)] for i in rng.choice(len(parts), 2, replace=False))
            if first.kind != second.kind:
                break
        moved = [
            _Lying(one.kind, to.compartment, to.x, to.y, one.turn)
            for one, to in ((first, second), (second, first))
        ]
        return [part for part in parts if part not in (first, second)] + moved, moved
    crowded = parts[int(rng.integers(len(parts)))]
    side = 1 if rng.random() < 0.5 else -1
    kind = str(rng.choice(sorted(set(_ARRANGEMENT))))
    extra = _Lying(kind, crowded.compartment, side * 0.27, crowded.y, float(rng.uniform(-0.35, 0.35)), 0.62)
    aside = _Lying(crowded.kind, crowded.compartment, -side * 0.22, crowded.y, crowded.turn, 0.8)
    return [part for part in parts if part is not crowded] + [aside, extra], [extra]


def _compartment(size: tuple[int, int], number: int) -> tuple[float, float, float, float]:
    """(top, left, bottom, right) in pixels."""
    height, width = size
    margin = _MARGIN * min(size)
    row, column = divmod(number, _COLUMNS)
    tall, wide = (height - 2 * margin) / _ROWS, (width - 2 * margin) / _COLUMNS
    return (
        margin + row * tall,
        margin + column * wide,
        margin + (row + 1) * tall,
        margin + (column + 1) * wide,
    )


def _empty_tray(rng: np.random.Generator, size: tuple[int, int]) -> Floats:
    """Grey foam with a shade along the walls of every compartment."""
    grain = cv2.GaussianBlur(rng.standard_normal(size, dtype=np.float32), (0, 0), 1.3)
    value = 0.62 + 0.02 * grain
    y, x = np.mgrid[0.5 : size[0], 0.5 : size[1]]
    wall = _WALL * min(size)
    for number in range(_ROWS * _COLUMNS):
        top, left, bottom, right = _compartment(size, number)
        inside = np.minimum.reduce([x - left - wall, right - wall - x, y - top - wall, bottom - wall - y])
        floor = 0.34 + 0.05 * np.clip(inside / (6 * wall), 0, 1) + 0.012 * grain
        share = np.clip(inside + 0.5, 0, 1)
        value = value * (1 - share) + floor * share
    image: Floats = (value[..., None] * np.array([0.98, 1.0, 1.03])).astype(np.float32)
    return image


def _view(size: tuple[int, int], part: _Lying) -> _View:
    top, left, bottom, right = _compartment(size, part.compartment)
    edge = min(bottom - top, right - left)
    radius = 0.36 * edge * part.size
    y, x = np.mgrid[0.5 : size[0], 0.5 : size[1]]
    dx = (x - (left + right) / 2 - part.x * edge) / radius
    dy = (y - (top + bottom) / 2 - part.y * edge) / radius
    cos, sin = math.cos(part.turn), math.sin(part.turn)
    return _View(cos * dx + sin * dy, -sin * dx + cos * dy, 1 / radius)


def _shape(view: _View, kind: str) -> Floats:
    """How far inside the part each pixel lies, in its radii; negative outside."""
    r = view.r
    if kind == "washer":
        depth = np.minimum(1 - r, r - 0.45)
    elif kind == "nut":
        angles = np.arange(3) * math.pi / 3
        across = np.max([np.abs(view.x * math.cos(a) + view.y * math.sin(a)) for a in angles], axis=0)
        depth = np.minimum(0.87 - across, r - 0.42)
    elif kind == "cap":
        depth = 0.9 - r
    elif kind == "block":
        depth = np.minimum(0.95 - np.abs(view.x), 0.62 - np.abs(view.y))
    else:  # a pin: a capsule
        depth = 0.28 - np.hypot(np.clip(np.abs(view.x) - 0.75, 0, None), view.y)
    found: Floats = depth.astype(np.float32)
    return found


_COLOURS = {
    "washer": (0.72, 0.73, 0.75),
    "nut": (0.80, 0.62, 0.26),
    "cap": (0.74, 0.16, 0.13),
    "block": (0.16, 0.33, 0.72),
    "pin": (0.20, 0.58, 0.30),
}


def _put(image: Floats, part: _Lying) -> None:
    """Draw a part with its shadow; light comes from the upper left."""
    size = (image.shape[0], image.shape[1])
    view = _view(size, part)
    depth = _shape(view, part.kind)
    shifted = np.roll(depth, (round(0.06 / view.soft), round(0.06 / view.soft)), (0, 1))
    shadow = cv2.GaussianBlur(np.clip(shifted / view.soft + 0.5, 0, 1), (0, 0), 0.05 / view.soft)
    image *= 1 - 0.45 * shadow[..., None]
    # A bevel: the gradient of the depth near the outline, turned back into the image's frame.
    gradient_y, gradient_x = np.gradient(depth, view.soft)
    bevel = np.clip(1 - depth / 0.14, 0, 1) * -(gradient_x + gradient_y) * -0.16
    shine = 0.10 * np.exp(-((view.x + 0.35) ** 2 + (view.y + 0.35) ** 2) / 0.12)
    colour = np.array(_COLOURS[part.kind]) * (0.92 + bevel)[..., None] + shine[..., None]
    share = np.clip(depth / view.soft + 0.5, 0, 1)[..., None]
    image[...] = image * (1 - share) + colour.astype(np.float32) * share


def _footprint(size: tuple[int, int], part: _Lying) -> Bools:
    covered: Bools = _shape(_view(size, part), part.kind) > 0
    return covered


def _soil(rng: np.random.Generator, image: Floats, part: _Lying) -> Bools:
    """A dark greasy spot somewhere on the part."""
    size = (image.shape[0], image.shape[1])
    view = _view(size, part)
    inside = _shape(view, part.kind) > 0.1
    rows, columns = np.nonzero(inside)
    chosen = int(rng.integers(len(rows)))
    x, y = view.x[rows[chosen], columns[chosen]], view.y[rows[chosen], columns[chosen]]
    ragged = cv2.GaussianBlur(rng.standard_normal(size, dtype=np.float32), (0, 0), 0.12 / view.soft)
    distance = np.hypot(view.x - x, view.y - y) + 0.06 * ragged / max(float(ragged.std()), 1e-6)
    spot = np.clip((0.30 - distance) / 0.08 + 0.5, 0, 1) * np.clip(_shape(view, part.kind) / view.soft, 0, 1)
    image *= (1 - 0.8 * spot)[..., None]
    covered: Bools = spot > 0.5
    return covered


def _photograph(image: Floats, noise: Floats) -> Bytes:
    height, width = noise.shape[:2]
    small = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    exposed = cv2.GaussianBlur(small, (0, 0), 0.5) + 0.012 * noise
    pixels: Bytes = np.clip(np.rint(exposed * 255), 0, 255).astype(np.uint8)
    return pixels


def _shrunk(mask: Bools, size: tuple[int, int]) -> Bools:
    share = cv2.resize(mask.astype(np.float32), (size[1], size[0]), interpolation=cv2.INTER_AREA)
    covered: Bools = share >= 0.25
    return covered
