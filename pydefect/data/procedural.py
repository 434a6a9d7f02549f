"""A procedural product with structural defects: photographs of a turned steel flange, drawn with NumPy and
OpenCV.

Every image shows another part under the same camera: its place, rotation and size vary a little, and so do
light, turning marks and sensor noise, while bore, keyway, groove and the six bolt holes are the same. All
random numbers of the part are drawn before those of its defect, so one seed gives the same part with and
without a defect.
"""

from __future__ import annotations

import math
import os
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, TypeAlias

import cv2
import numpy as np

from pydefect.data.tray import TRAY_DEFECTS, render_tray
from pydefect.errors import InputError
from pydefect.places import check_not_current

__all__ = ["DEFECTS", "Scene", "render_product", "write_dataset"]

Scene = Literal["flange", "tray"]

Floats: TypeAlias = np.ndarray[Any, np.dtype[np.floating[Any]]]
Bools: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]
Bytes: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]

_SUPERSAMPLING = 2
_MIN_SIZE = 64

# Lengths of the part, as shares of its radius.
_BORE = 0.19
_HUB = 0.37
_GROOVE = 0.56
_BOLT_CIRCLE = 0.755
_BOLT_HOLE = 0.072
_RIM = 0.93
_HOLES = 6


@dataclass(frozen=True)
class _Part:
    """One part before the camera; lengths in pixels of the supersampled image, angles in radians."""

    x: Floats  # [H, W] place in the part's own frame, 0 at its centre, 1 at its radius
    y: Floats
    radius: float
    light: float  # direction of the light in the part's frame
    marks: Floats  # [H, W] turning marks, mean 0
    background: Floats  # [H, W, 3]
    tint: Floats  # [3]
    illumination: Floats  # [H, W, 1]


def render_product(
    rng: np.random.Generator, size: int | tuple[int, int], defect: str | None = None
) -> tuple[Bytes, Bools]:
    """Draw one photograph of the product.

    Parameters
    ----------
    rng
        Source of all that varies. Equal states give equal images.
    size
        Height and width in pixels, one number for a square; at least 64.
    defect
        None for a good part, or one of :data:`DEFECTS`.

    Returns
    -------
    image : numpy.ndarray
        [H, W, 3] uint8 RGB.
    mask : numpy.ndarray
        [H, W] bool, the defective pixels; all False for a good part.

    Raises
    ------
    InputError
        If the size is too small or there is no such defect.

    Examples
    --------
    >>> image, mask = render_product(np.random.default_rng(0), 128, "scratch")
    >>> image.shape, image.dtype.name, bool(mask.any())
    ((128, 128, 3), 'uint8', True)
    """
    height, width = (size, size) if isinstance(size, int) else size
    if min(height, width) < _MIN_SIZE:
        raise InputError(f"size is {height} x {width}; both must be at least {_MIN_SIZE} pixels")
    if defect is not None and defect not in _PAINTERS:
        raise InputError(f"defect is {defect!r}; allowed are None, {', '.join(DEFECTS)}")
    large = (height * _SUPERSAMPLING, width * _SUPERSAMPLING)
    part = _new_part(rng, large)
    noise = rng.standard_normal((height, width, 3), dtype=np.float32)
    holes = list(range(_HOLES))
    image, mask = _paint_part(part, holes), np.zeros(large, dtype=np.bool_)
    if defect is not None:
        image, mask = _PAINTERS[defect](rng, part, image)
    return _photograph(image * part.illumination, noise), _shrink_mask(mask, (height, width))


def write_dataset(
    root: str | os.PathLike[str],
    n_train: int = 60,
    n_test_good: int = 20,
    n_per_defect: int = 5,
    size: int | tuple[int, int] = 256,
    seed: int = 0,
    scene: Scene = "flange",
) -> Path:
    """Write a data set of a procedural scene in MVTec AD's layout.

    The data set is drawn beside `root` and moved there when it is complete, so no half data set is ever found
    there.

    Parameters
    ----------
    root
        Folder to create; it must not exist, or be empty.
    n_train, n_test_good
        How many good parts to draw for ``train/good`` and ``test/good``.
    n_per_defect
        How many parts to draw with each of the scene's defects, for ``test`` and ``ground_truth``.
    size
        As for :func:`render_product`.
    seed
        Equal seeds give equal files. Every image has random numbers of its own: it does not depend on the
        counts.
    scene
        ``"flange"``: this module's product with structural defects; ``"tray"``: the arrangement of
        :mod:`pydefect.data.tray` with logical ones.

    Returns
    -------
    pathlib.Path
        `root`.

    Raises
    ------
    InputError
        If a count is negative, there is no training image, the size is too small, there is no such scene, or
        `root` holds something already or is the current folder.
    """
    root = Path(root)
    counts = {"n_train": n_train, "n_test_good": n_test_good, "n_per_defect": n_per_defect}
    for name, count in counts.items():
        least = 1 if name == "n_train" else 0
        if count < least:
            raise InputError(f"{name} is {count}; it must be at least {least}")
    if scene not in ("flange", "tray"):
        raise InputError(f"scene is {scene!r}; allowed are 'flange', 'tray'")
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise InputError(f"root: {root} exists and is not empty; choose a new folder")
    check_not_current(root, "root")
    # A rename takes ".." for another folder: draw beside the folder's own name.
    place = Path(os.path.realpath(root))
    place.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{place.name}-", dir=place.parent))
    try:
        render, defects = (render_tray, TRAY_DEFECTS) if scene == "tray" else (render_product, tuple(DEFECTS))
        parts: list[tuple[str, str | None, int]]
        parts = [("train/good", None, n_train), ("test/good", None, n_test_good)]
        parts += [(f"test/{defect}", defect, n_per_defect) for defect in defects]
        for stream, (folder, defect, count) in enumerate(parts):
            for number in range(count):
                image, mask = render(np.random.default_rng([seed, stream, number]), size, defect)
                _write_png(draft / folder / f"{number:03d}.png", image[..., ::-1])
                if defect is not None:
                    values = mask.astype(np.uint8) * np.uint8(255)
                    _write_png(draft / "ground_truth" / defect / f"{number:03d}_mask.png", values)
        draft.chmod(0o755)
        draft.replace(place)
    finally:
        shutil.rmtree(draft, ignore_errors=True)
    return root


def _write_png(path: Path, pixels: Bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    encoded, data = cv2.imencode(".png", pixels)
    if not encoded:
        raise OSError(f"{path}: OpenCV could not encode the image as PNG")
    path.write_bytes(data.tobytes())


def _new_part(rng: np.random.Generator, size: tuple[int, int]) -> _Part:
    height, width = size
    edge = min(size)
    radius = edge * 0.43 * rng.uniform(0.985, 1.015)
    centre = np.array([width, height]) / 2 + rng.uniform(-0.012, 0.012, 2) * edge
    turn = np.deg2rad(rng.uniform(-4, 4))
    columns, rows = np.meshgrid(np.arange(width, dtype=np.float32), np.arange(height, dtype=np.float32))
    dx, dy = (columns + 0.5 - centre[0]) / radius, (rows + 0.5 - centre[1]) / radius
    x = (np.cos(turn) * dx + np.sin(turn) * dy).astype(np.float32)
    y = (-np.sin(turn) * dx + np.cos(turn) * dy).astype(np.float32)
    lamp = np.deg2rad(-125 + rng.uniform(-5, 5))
    slope = np.cos(lamp) * dx + np.sin(lamp) * dy
    brightness = rng.uniform(0.95, 1.05)
    illumination = brightness * (1 + 0.09 * slope - 0.05 * (dx**2 + dy**2))
    return _Part(
        x=x,
        y=y,
        radius=radius,
        light=float(lamp - turn),
        marks=_turning_marks(rng, x, y, edge),
        background=_mat(rng, size, dx, dy, lamp),
        tint=np.array([0.985, 1.0, 1.015], dtype=np.float32) * rng.uniform(0.99, 1.01, 3).astype(np.float32),
        illumination=illumination.astype(np.float32)[..., None],
    )


def _turning_marks(rng: np.random.Generator, x: Floats, y: Floats, edge: int) -> Floats:
    """Fine marks along circles, as a lathe leaves them: noise stretched along the angle."""
    rings, angles, stroke = edge // 2, 512, 61
    noise = rng.standard_normal((rings, angles), dtype=np.float32)
    # The marks close around the circle: the filter must see what lies beyond the first and the last angle.
    around = cv2.copyMakeBorder(noise, 0, 0, stroke, stroke, cv2.BORDER_WRAP)
    strokes = cv2.blur(around, (stroke, 1))[:, stroke : stroke + angles + 1] * math.sqrt(stroke)
    grooves = rng.standard_normal((rings, 1), dtype=np.float32)
    polar = cv2.GaussianBlur(0.5 * strokes + 0.8 * grooves, (1, 3), 0.6)
    ring = np.hypot(x, y) * (rings - 1)
    angle = np.arctan2(y, x) / (2 * math.pi) % 1 * angles
    return np.asarray(
        cv2.remap(polar, angle, ring, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE), np.float32
    )


def _mat(rng: np.random.Generator, size: tuple[int, int], dx: Floats, dy: Floats, lamp: float) -> Floats:
    """The dark rubber mat under the part, with the part's shadow on it."""
    grain = rng.standard_normal(size, dtype=np.float32)
    fine = cv2.GaussianBlur(grain, (0, 0), 1.2) * 3
    coarse = cv2.GaussianBlur(grain, (0, 0), min(size) / 24) * min(size) / 24 * 2
    away = 0.045
    distance = np.hypot(dx + away * np.cos(lamp), dy + away * np.sin(lamp))
    shadow = 1 - 0.6 * _step(1.04 - distance, 0.07)
    value = (0.17 + 0.012 * fine + 0.006 * coarse) * shadow
    return value[..., None] * np.array([0.94, 1.0, 1.08], dtype=np.float32)


def _step(distance: Floats, softness: float) -> Floats:
    """0 below -softness, 1 above softness, smooth between."""
    share = np.clip(distance / (2 * softness) + 0.5, 0, 1)
    result: Floats = (share * share * (3 - 2 * share)).astype(np.float32)
    return result


def _edge(part: _Part) -> float:
    """Softness of a sharp edge: about a pixel of the supersampled image."""
    return 0.8 / part.radius


def _blend(below: Floats, above: Floats, share: Floats) -> Floats:
    result: Floats = below + (above - below) * share[..., None]
    return result


def _paint_part(part: _Part, holes: list[int]) -> Floats:
    r, angle = np.hypot(part.x, part.y), np.arctan2(part.y, part.x)
    towards = np.cos(angle - part.light)
    soft = _edge(part)

    # Turning marks reflect the lamp as a bow tie: brightest where they run across the light's direction.
    bow_tie = np.abs(towards) ** 5 + 0.45 * np.abs(np.cos(angle - part.light - 1.1)) ** 14
    face = 0.50 + 0.17 * bow_tie + part.marks * (0.016 + 0.028 * bow_tie)

    hub = _step(_HUB - r, soft)
    face = face + hub * 0.05
    face = face + 0.16 * towards * np.exp(-(((r - _HUB) / 0.012) ** 2))
    in_groove = _step(0.024 - np.abs(r - _GROOVE), soft)
    face = face * (1 - 0.45 * in_groove) - 0.12 * towards * in_groove * np.sign(r - _GROOVE)
    on_rim = _step(r - _RIM, soft)
    face = face * (1 - on_rim) + on_rim * (0.46 + 0.24 * towards + 0.5 * 0.02 * part.marks)

    image = _blend(part.background, face[..., None] * part.tint, _step(1 - r, soft))
    for hole in holes:
        _drill(image, part, _hole_centre(hole), _BOLT_HOLE)
    _drill(image, part, (0.0, 0.0), _BORE)
    keyway = (
        _step(0.034 - np.abs(part.x), soft)
        * _step(-part.y - 0.9 * _BORE, soft)
        * _step(_BORE + 0.062 + part.y, soft)
    )
    return _blend(image, part.background * 0.05, keyway)


def _hole_centre(hole: int) -> tuple[float, float]:
    angle = 2 * math.pi * hole / _HOLES + math.pi / _HOLES
    return _BOLT_CIRCLE * math.cos(angle), _BOLT_CIRCLE * math.sin(angle)


def _drill(image: Floats, part: _Part, centre: tuple[float, float], radius: float) -> None:
    """Paint a through hole with a chamfer, which is dark towards the lamp and bright opposite to it."""
    soft = _edge(part)
    chamfer = 0.022
    # Only the hole's surroundings are computed: seven holes over the whole image were most of the drawing
    # time.
    near = np.hypot(part.x - centre[0], part.y - centre[1]) < radius + chamfer + 2 * soft
    window = np.ix_(near.any(axis=1), near.any(axis=0))
    x, y = part.x[window] - centre[0], part.y[window] - centre[1]
    r = np.hypot(x, y)
    towards = np.cos(np.arctan2(y, x) - part.light)
    shine = (0.50 - 0.30 * towards)[..., None] * part.tint
    painted = _blend(image[window], shine, _step(radius + chamfer - r, soft))
    wall = 0.36 - 0.55 * _step(np.clip(towards, 0, 1) * 0.05 + radius * 0.9 - r, 0.03)
    inside = part.background[window] * 0.5 * np.clip(0.35 + wall, 0.1, 1)[..., None]
    image[window] = _blend(painted, inside, _step(radius - r, soft))


def _photograph(image: Floats, noise: Floats) -> Bytes:
    """What the camera makes of it: a slightly soft lens, shot and read noise, 8 bits."""
    height, width = noise.shape[:2]
    small = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    soft = cv2.GaussianBlur(small, (0, 0), 0.55)
    exposed = soft + noise * np.sqrt(np.clip(soft, 0, 1) * 0.00022 + 0.00003)
    pixels: Bytes = np.clip(np.rint(exposed * 255), 0, 255).astype(np.uint8)
    return pixels


def _shrink_mask(mask: Bools, size: tuple[int, int]) -> Bools:
    share = cv2.resize(mask.astype(np.float32), (size[1], size[0]), interpolation=cv2.INTER_AREA)
    shrunk: Bools = share >= 0.25
    return shrunk


_Painted: TypeAlias = tuple[Floats, Bools]


def _point_on_face(rng: np.random.Generator, inner: float = 0.42, outer: float = 0.88) -> tuple[float, float]:
    """A place on the ring of the face, uniform over its area."""
    r = np.sqrt(rng.uniform(inner**2, outer**2))
    angle = rng.uniform(0, 2 * np.pi)
    return float(r * np.cos(angle)), float(r * np.sin(angle))


def _on_metal(part: _Part) -> Bools:
    """Where there is metal to be damaged: not in the holes, nor beside the part."""
    r = np.hypot(part.x, part.y)
    metal: Bools = (r < 0.985) & (r > _BORE + 0.02)
    for centre_x, centre_y in (_hole_centre(hole) for hole in range(_HOLES)):
        metal &= np.hypot(part.x - centre_x, part.y - centre_y) > _BOLT_HOLE + 0.01
    return metal


def _ragged(rng: np.random.Generator, shape: tuple[int, ...], scale: float) -> Floats:
    """Smooth noise of about unit variance with features of `scale` pixels; makes outlines irregular."""
    coarse = tuple(int(np.ceil(edge / scale)) + 3 for edge in shape[:2])
    noise = rng.standard_normal(coarse, dtype=np.float32)
    return np.asarray(cv2.resize(noise, (shape[1], shape[0]), interpolation=cv2.INTER_CUBIC), np.float32)


def _curve(rng: np.random.Generator, part: _Part, length: float, bend: float) -> list[tuple[float, float]]:
    """Points of a slightly bent stroke that begins on the face, in the part's frame."""
    x, y = _point_on_face(rng)
    heading, turn = rng.uniform(0, 2 * np.pi), rng.uniform(-bend, bend)
    steps = 24
    points = []
    for _ in range(steps):
        points.append((x, y))
        x, y = x + np.cos(heading) * length / steps, y + np.sin(heading) * length / steps
        heading += turn / steps
        if np.hypot(x, y) > 0.9 or np.hypot(x, y) < _BORE + 0.06:
            heading += np.pi / 6
    return points


def _distance_to_curve(part: _Part, points: list[tuple[float, float]]) -> tuple[Floats, Floats]:
    """Distance of every pixel to a polyline, and the share of its length at the nearest point."""
    best = np.full(part.x.shape, np.inf, dtype=np.float32)
    along = np.zeros_like(best)
    for number, ((x0, y0), (x1, y1)) in enumerate(pairwise(points)):
        dx, dy = x1 - x0, y1 - y0
        share = np.clip(((part.x - x0) * dx + (part.y - y0) * dy) / (dx * dx + dy * dy), 0, 1)
        distance = np.hypot(part.x - x0 - share * dx, part.y - y0 - share * dy).astype(np.float32)
        nearer = distance < best
        best = np.where(nearer, distance, best)
        along = np.where(nearer, (number + share) / (len(points) - 1), along).astype(np.float32)
    return best, along


def _scratch(rng: np.random.Generator, part: _Part, image: Floats) -> _Painted:
    distance, along = _distance_to_curve(part, _curve(rng, part, rng.uniform(0.35, 0.8), 1.2))
    width = rng.uniform(0.008, 0.014) * (1 - np.abs(2 * along - 1) ** 3 * 0.7)
    metal = _on_metal(part)
    core = np.exp(-((distance / width) ** 2)) * metal
    burr = np.exp(-(((distance - 1.9 * width) / width) ** 2)) * metal
    sign = 1 if rng.random() < 0.6 else -1
    strength = rng.uniform(0.22, 0.34)
    image = image + sign * (strength * core - 0.4 * strength * burr)[..., None] * part.tint
    return image, (distance < 2 * width) & metal


def _dent(rng: np.random.Generator, part: _Part, image: Floats) -> _Painted:
    x, y = _point_on_face(rng, 0.40, 0.86)
    radius, stretch = rng.uniform(0.06, 0.10), rng.uniform(0.75, 1.3)
    u = (part.x - x) / (radius * stretch) + 0.12 * _ragged(rng, part.x.shape, 0.12 * part.radius)
    v = (part.y - y) / (radius / stretch)
    squared = u * u + v * v
    slope = (u * np.cos(part.light) + v * np.sin(part.light)) * np.exp(-squared)
    metal = _on_metal(part)
    # The wall that faces the lamp lies opposite to it.
    shade = -rng.uniform(0.42, 0.60) * slope - 0.10 * np.exp(-2 * squared)
    return image + (shade * metal)[..., None] * part.tint, (squared < 2.6) & metal


def _stain(rng: np.random.Generator, part: _Part, image: Floats) -> _Painted:
    x, y = _point_on_face(rng, 0.30, 0.86)
    radius = rng.uniform(0.09, 0.17)
    ragged = _ragged(rng, part.x.shape, 0.09 * part.radius)
    depth = 1 - np.hypot(part.x - x, part.y - y) / radius + 0.16 * ragged
    metal = _on_metal(part)
    body = _step(depth, 0.09) * metal
    # A dried drop is darkest at its border.
    border = np.exp(-(((depth - 0.08) / 0.09) ** 2)) * metal
    colours = [[0.80, 0.62, 0.42], [0.62, 0.66, 0.72], [0.72, 0.60, 0.50]]
    colour = np.array(colours[int(rng.integers(len(colours)))], dtype=np.float32)
    share = (0.45 * body + 0.45 * border) * rng.uniform(0.75, 1.0)
    return _blend(image, image * colour, np.clip(share, 0, 1)), (depth > -0.07) & metal


def _missing_hole(rng: np.random.Generator, part: _Part, _image: Floats) -> _Painted:
    missing = int(rng.integers(_HOLES))
    centre_x, centre_y = _hole_centre(missing)
    mask = np.hypot(part.x - centre_x, part.y - centre_y) < _BOLT_HOLE + 0.022
    return _paint_part(part, [hole for hole in range(_HOLES) if hole != missing]), mask


def _broken_edge(rng: np.random.Generator, part: _Part, image: Floats) -> _Painted:
    angle = rng.uniform(0, 2 * np.pi)
    x, y = np.cos(angle), np.sin(angle)
    across = np.hypot(part.x - x, part.y - y)
    ragged = _ragged(rng, part.x.shape, 0.06 * part.radius)
    depth = rng.uniform(0.10, 0.17) + 0.022 * ragged - across
    inside = np.hypot(part.x, part.y) < 1.005
    gone = _step(depth, _edge(part)) * inside
    # The fracture itself: a narrow, grainy, matt face along the border of what is gone.
    grain = _ragged(rng, part.x.shape, 3)
    fracture = _step(depth + 0.035, _edge(part)) * inside
    surface = (0.36 + 0.07 * grain)[..., None] * part.tint
    image = _blend(image, surface, fracture)
    return _blend(image, part.background * 0.8, gone), (depth > -0.035) & inside


def _contamination(rng: np.random.Generator, part: _Part, image: Floats) -> _Painted:
    mask = np.zeros(part.x.shape, dtype=np.bool_)
    soft = _edge(part)
    shadow_x, shadow_y = 0.02 * np.cos(part.light), 0.02 * np.sin(part.light)
    for _ in range(int(rng.integers(1, 4))):
        points = _curve(rng, part, rng.uniform(0.12, 0.34), 5.0)
        distance, along = _distance_to_curve(part, points)
        width = rng.uniform(0.011, 0.02)
        shade, _ = _distance_to_curve(part, [(px - shadow_x, py - shadow_y) for px, py in points])
        image = image * (1 - 0.45 * _step(width * 1.3 - shade, 0.018))[..., None]
        curl = np.cos(along * rng.uniform(5, 11) + rng.uniform(0, 2 * np.pi))
        glint = 0.58 + 0.14 * curl + 0.28 * np.exp(-((2.2 * distance / width) ** 2))
        colours = [[1.0, 0.98, 0.94], [0.95, 0.72, 0.40], [0.30, 0.36, 0.62]]
        colour = np.array(colours[int(rng.integers(len(colours)))], dtype=np.float32)
        body = _step(width - distance, soft)
        image = _blend(image, (glint[..., None] * colour).astype(np.float32), body)
        mask |= (distance < width * 1.15) | (shade < width * 1.3)
    return image, mask


_PAINTERS: dict[str, Callable[[np.random.Generator, _Part, Floats], _Painted]] = {
    "scratch": _scratch,
    "dent": _dent,
    "stain": _stain,
    "missing_hole": _missing_hole,
    "broken_edge": _broken_edge,
    "contamination": _contamination,
}
DEFECTS = tuple(_PAINTERS)
"""The defects that :func:`render_product` can draw."""
