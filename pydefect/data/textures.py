"""Procedural images of many kinds: textures, patterns, fractals, drawings, objects and mixtures of them.

They stand in for photographs where none may be used: a teacher is distilled on them, and the dual
autoencoder's penalty takes them for images of anything else. Nothing in them means anything; what counts is
that their local statistics are as broad as those of photographs: edges of every contrast and sharpness,
corners, junctions, gradients, fine and coarse texture, repetition, writing, shading, noise and compression.
"""

# Scalars of NumPy's types turn whole expressions into Any for the type checker.
# mypy: disable-error-code="no-any-return"

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import cv2
import numpy as np

from pydefect.errors import InputError

__all__ = ["TEXTURE_KINDS", "texture"]

Floats: TypeAlias = np.ndarray[Any, Any]  # float32
Bytes: TypeAlias = np.ndarray[Any, np.dtype[np.uint8]]
Size: TypeAlias = tuple[int, int]
Rng: TypeAlias = np.random.Generator

_MIN_SIZE = 16
_FONTS = (
    cv2.FONT_HERSHEY_SIMPLEX,
    cv2.FONT_HERSHEY_PLAIN,
    cv2.FONT_HERSHEY_DUPLEX,
    cv2.FONT_HERSHEY_COMPLEX,
    cv2.FONT_HERSHEY_TRIPLEX,
    cv2.FONT_HERSHEY_SCRIPT_SIMPLEX,
    cv2.FONT_HERSHEY_SCRIPT_COMPLEX,
)
_SIGNS = list("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789.,:;-+*/=%&#@!?()")


def texture(seed: int | Sequence[int], size: int | tuple[int, int] = 256, kind: str | None = None) -> Bytes:
    """Draw one procedural image.

    Parameters
    ----------
    seed
        One whole number >= 0 or several, such as (seed of a run, number of the image). Equal seeds give equal
        images.
    size
        Height and width in pixels, one number for a square; at least 16. Most structures have sizes in
        pixels, so a larger image shows more of them, not the same ones larger.
    kind
        One of :data:`TEXTURE_KINDS`; None draws the kind too.

    Returns
    -------
    numpy.ndarray
        [H, W, 3] uint8 RGB.

    Raises
    ------
    InputError
        If the seed or the size is not allowed, or the kind is not known.

    Notes
    -----
    Equal on one machine. Another processor or version of NumPy and OpenCV may round differently: pixels then
    differ by a grey level or two, seldom more.

    Examples
    --------
    >>> texture(7).shape
    (256, 256, 3)
    >>> texture((0, 12), (64, 96), kind="dead_leaves").dtype
    dtype('uint8')
    """
    height, width = _checked_size(size)
    if kind is not None and kind not in TEXTURE_KINDS:
        raise InputError(f"kind is {kind!r}; it must be one of {', '.join(TEXTURE_KINDS)}, or None")
    rng = _checked_generator(seed)
    if kind is None:
        kind = str(rng.choice(TEXTURE_KINDS, p=_SHARES))
    return _photographed(rng, _KINDS[kind][1](rng, (height, width)))


# ---------------------------------------------------------------------------------------------------------
# Fields: one number a pixel, float32 in 0..1


def _spectral(rng: Rng, size: Size) -> Floats:
    """Gaussian noise with a power-law spectrum, from nearly white to cloudy, along a direction or not."""
    rows, columns = (cv2.getOptimalDFTSize(edge) for edge in size)
    y: Floats = np.fft.fftfreq(rows).astype(np.float32)[:, None]
    x: Floats = np.fft.rfftfreq(columns).astype(np.float32)[None]
    if rng.random() < 0.4:
        angle, stretch = rng.uniform(0, math.pi), math.exp(rng.uniform(0, 3))
        along, across = (
            x * math.cos(angle) + y * math.sin(angle),
            y * math.cos(angle) - x * math.sin(angle),
        )
        x, y = along * stretch, across
    frequency = np.sqrt(x * x + y * y)
    frequency[0, 0] = 1
    gain = (frequency + np.float32(1 / 256)) ** np.float32(-rng.uniform(0.2, 2.6))
    if rng.random() < 0.25:  # a band of frequencies: grain of one size
        centre, width = math.exp(rng.uniform(math.log(0.01), math.log(0.3))), rng.uniform(0.15, 0.6)
        gain = np.exp(-((np.log(frequency / centre) / width) ** 2))
    gain[0, 0] = 0
    spectrum = rng.standard_normal((*gain.shape, 2), dtype=np.float32).view(np.complex64)[..., 0] * gain
    field = np.fft.irfft2(spectrum, s=(rows, columns))[: size[0], : size[1]]
    return _spread(field.astype(np.float32))


def _octaves(rng: Rng, size: Size) -> Floats:
    """Smooth noise on coarse grids, added up from coarse to fine; ridges and billows from its folds."""
    cell = math.exp(rng.uniform(math.log(6), math.log(max(size) / 1.5)))
    persistence, fold = rng.uniform(0.3, 0.85), rng.random() < 0.3
    stretch = math.exp(rng.normal(0, 0.4))
    field, weight = np.zeros(size, np.float32), 1.0
    while cell > 1.5 and weight > 0.05:
        grid = (max(2, round(size[0] / cell * stretch) + 2), max(2, round(size[1] / cell / stretch) + 2))
        noise = cv2.resize(
            rng.standard_normal(grid, dtype=np.float32), size[::-1], interpolation=cv2.INTER_CUBIC
        )
        field += np.float32(weight) * (np.abs(noise) if fold else noise)
        cell, weight = cell / 2, weight * persistence
    return _spread(field)


def _waves(rng: Rng, size: Size) -> Floats:
    """Gratings: lines, squares, plaids, rings, waves of several forms, straight or bent."""
    y, x = _grid(size)
    if rng.random() < 0.5:
        bend = math.exp(rng.uniform(math.log(0.5), math.log(12)))
        y, x = y + bend * (_octaves(rng, size) - np.float32(0.5)), x + bend * (_octaves(rng, size) - 0.5)
    period = math.exp(rng.uniform(math.log(2.5), math.log(70)))
    angle = rng.uniform(0, math.pi)
    first = x * math.cos(angle) + y * math.sin(angle)
    second = y * math.cos(angle) - x * math.sin(angle)
    form = rng.integers(6)
    if form <= 1:
        return _wave(rng, first / period)
    if form == 2:
        return 0.5 * (_wave(rng, first / period) + _wave(rng, second / period))
    if form == 3:
        return np.abs(_wave(rng, first / period) - _wave(rng, second / period))
    if form == 4:
        other = period * math.exp(rng.uniform(-1.5, 1.5))
        return _wave(rng, first / period) * _wave(rng, second / other)
    row, column = rng.uniform(-0.3, 1.3, 2) * size
    return _wave(rng, np.hypot(y - np.float32(row), x - np.float32(column)) / np.float32(period))


def _wave(rng: Rng, phase: Floats) -> Floats:
    """A periodic function of period 1 in 0..1: sine, soft or hard rectangle, saw tooth, triangle."""
    phase = (phase + np.float32(rng.random())) % np.float32(1)
    form = rng.integers(4)
    if form == 0:
        return 0.5 + 0.5 * np.sin(np.float32(2 * math.pi) * phase)
    if form == 1:
        sharp, share = math.exp(rng.uniform(1, 4)), rng.uniform(0.1, 0.9)
        return np.clip(0.5 + np.float32(sharp) * (np.abs(2 * phase - 1) - np.float32(share)), 0, 1)
    if form == 2:
        return phase
    return np.abs(2 * phase - 1)


def _cells(rng: Rng, size: Size) -> Floats:
    """Voronoi cells: distances from the seeds, walls between cells, or one value a cell."""
    labels, distances = _voronoi(rng, size)
    form = rng.integers(4)
    if form == 0:
        return _spread(distances)
    values = rng.random(int(labels.max()) + 1, dtype=np.float32)[labels]
    if form == 1:
        return values
    walls = np.zeros(size, np.uint8)
    walls[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    walls[1:] |= labels[1:] != labels[:-1]
    reach = math.exp(rng.uniform(0, 2))
    depth = cv2.distanceTransform(1 - walls, cv2.DIST_L2, 5)
    wall = np.clip(depth / np.float32(reach), 0, 1)
    return wall if form == 2 else wall * (0.5 + 0.5 * values)


def _voronoi(rng: Rng, size: Size) -> tuple[np.ndarray[Any, np.dtype[np.int32]], Floats]:
    """The nearest of some random points for every pixel (its label) and how far it is."""
    spacing = math.exp(rng.uniform(math.log(4), math.log(60)))
    free = np.ones(size, np.uint8)
    if rng.random() < 0.6:
        count = max(3, round(size[0] * size[1] / spacing**2))
        rows, columns = rng.integers(0, size[0], count), rng.integers(0, size[1], count)
    else:  # a disturbed grid: bricks, scales, honeycombs
        jitter = rng.uniform(0, 0.5)
        rows, columns = np.meshgrid(
            np.arange(0, size[0], spacing), np.arange(0, size[1], spacing), indexing="ij"
        )
        columns = columns + 0.5 * spacing * (np.arange(len(columns)) % 2)[:, None]
        rows, columns = (
            np.clip(place + jitter * spacing * rng.standard_normal(place.shape), 0, edge - 1).astype(int)
            for place, edge in ((rows, size[0]), (columns, size[1]))
        )
    free[rows, columns] = 0
    distances, labels = cv2.distanceTransformWithLabels(free, cv2.DIST_L2, 5, labelType=cv2.DIST_LABEL_PIXEL)
    return np.asarray(labels), np.asarray(distances)


def _labyrinth(rng: Rng, size: Size) -> Floats:
    """Noise of one grain size, cut off: spots, stripes and labyrinths as of a reaction and a diffusion."""
    fine = math.exp(rng.uniform(math.log(0.8), math.log(8)))
    noise = rng.standard_normal(size, dtype=np.float32)
    across = fine * math.exp(abs(rng.normal(0, 0.6)))
    band = cv2.GaussianBlur(noise, (0, 0), fine, sigmaY=across)
    band = band - cv2.GaussianBlur(band, (0, 0), 1.6 * fine, sigmaY=1.6 * across)
    band /= band.std() + np.float32(1e-9)
    sharp = math.exp(rng.uniform(-0.5, 2.5))
    return np.clip(np.float32(0.5 + rng.normal(0, 0.4)) + np.float32(sharp) * band, 0, 1)


def _attractor(rng: Rng, size: Size) -> Floats:
    """How often an iterated function system of affine maps, some of them bent, visits each pixel."""
    maps, points, rounds = int(rng.integers(2, 6)), 1500, 24
    angles = rng.uniform(-math.pi, math.pi, (maps, 2))
    scales = rng.uniform(0.25, 0.85, (maps, 2))
    left, right = (
        np.stack([np.cos(a), -np.sin(a), np.sin(a), np.cos(a)], -1).reshape(-1, 2, 2) for a in angles.T
    )
    matrices = (left * scales[:, None]) @ right
    shifts, bent = rng.uniform(-1, 1, (maps, 2)), rng.random(maps) < 0.3
    place, visits = rng.uniform(-1, 1, (points, 2)), []
    for step in range(rounds):
        chosen = rng.integers(0, maps, points)
        place = np.einsum("pij,pj->pi", matrices[chosen], place) + shifts[chosen]
        place = np.where(bent[chosen, None], np.sin(place), place)
        if step >= 6:
            visits.append(place)
    cloud = np.concatenate(visits)
    low, high = np.quantile(cloud, [0.02, 0.98], axis=0)
    inside = (cloud - low) / (high - low + 1e-6) * (np.array(size) - 1)
    rows, columns = np.rint(inside).astype(np.int64).T
    kept = (rows >= 0) & (rows < size[0]) & (columns >= 0) & (columns < size[1])
    counts = np.bincount(rows[kept] * size[1] + columns[kept], minlength=size[0] * size[1])
    density = np.log1p(counts.reshape(size).astype(np.float32))
    return _spread(cv2.GaussianBlur(density, (0, 0), math.exp(rng.uniform(-0.7, 1))))


_FIELDS: tuple[tuple[float, Callable[[Rng, Size], Floats]], ...] = (
    (0.30, _spectral),
    (0.25, _octaves),
    (0.18, _waves),
    (0.15, _cells),
    (0.12, _labyrinth),
)
_FIELD_SHARES = [share for share, _ in _FIELDS]


def _field(rng: Rng, size: Size) -> Floats:
    field = _FIELDS[int(rng.choice(len(_FIELDS), p=_FIELD_SHARES))][1](rng, size)
    if rng.random() < 0.15:
        other = _octaves(rng, size)
        field = field * other if rng.random() < 0.5 else np.maximum(field, other)
    return field


# ---------------------------------------------------------------------------------------------------------
# Surfaces: fields in colour, float32 [H, W, 3] in 0..1


def _colour(rng: Rng) -> Floats:
    """One colour; dull ones are more frequent than bright ones, as in photographs."""
    hue, saturation, value = rng.random(), rng.beta(1.2, 2), rng.beta(1.6, 1.1)
    wheel = np.clip(np.abs((hue * 6 + np.array([0.0, 4, 2])) % 6 - 3) - 1, 0, 1)
    colour: Floats = (value * (1 - saturation * (1 - wheel))).astype(np.float32)
    return colour


def _palette(rng: Rng) -> Floats:
    """[256, 3] colours through two to six of one family, with or without steps."""
    count = int(rng.integers(2, 7))
    base, spread = _colour(rng), math.exp(rng.uniform(math.log(0.1), math.log(1.0)))
    colours = np.stack([(1 - spread) * base + spread * _colour(rng) for _ in range(count)])
    if rng.random() < 0.35:
        colours = colours[np.argsort(colours.sum(1))]
    places = np.sort(rng.random(count))
    places = (places - places[0]) / (places[-1] - places[0] + 1e-6)
    steps = np.linspace(0, 1, 256)
    if rng.random() < 0.15:
        return np.asarray(colours[np.minimum((steps * count).astype(int), count - 1)], np.float32)
    return np.stack([np.interp(steps, places, colours[:, c]) for c in range(3)], -1).astype(np.float32)


def _coloured(rng: Rng, field: Floats) -> Floats:
    table = np.ascontiguousarray(_palette(rng)[None])
    index = np.clip(field * 255, 0, 255).astype(np.uint8)
    return cv2.LUT(cv2.merge([index, index, index]), table)


def _surface(rng: Rng, size: Size) -> Floats:
    """One material: a plain colour, a gradient, a field in colour, or noise in each channel."""
    form = rng.random()
    if form < 0.12:
        return np.broadcast_to(_colour(rng), (*size, 3)).copy()
    if form < 0.24:
        corners = np.stack([_colour(rng) for _ in range(4)]).reshape(2, 2, 3)
        base = _colour(rng)
        keep = np.float32(rng.uniform(0, 0.9))
        return cv2.resize(keep * base + (1 - keep) * corners, size[::-1], interpolation=cv2.INTER_LINEAR)
    if form < 0.36:  # coloured noise: one spectrum, channels mixed more or less
        noise = cv2.merge([_spectral(np.random.default_rng(rng.integers(2**32)), size) for _ in range(3)])
        mix = np.float32(rng.uniform(0, 1))
        noise = mix * noise.mean(2, keepdims=True) + (1 - mix) * noise
        return np.clip(_colour(rng) + np.float32(rng.uniform(0.1, 1)) * (noise - np.float32(0.5)), 0, 1)
    surface = _coloured(rng, _field(rng, size))
    if rng.random() < 0.35:  # fine grain on top, lighter and darker only
        grain = _field(rng, size)[..., None] - np.float32(0.5)
        surface = np.clip(surface * (1 + np.float32(rng.uniform(0.05, 0.8)) * grain), 0, 1)
    return surface


def _pair(rng: Rng, size: Size) -> Floats:
    """Two surfaces, one through holes of the other, with a soft or hard border."""
    sharp = math.exp(rng.uniform(0.5, 4.5))
    mask = np.clip(0.5 + np.float32(sharp) * (_field(rng, size) - np.float32(rng.uniform(0.3, 0.7))), 0, 1)
    return _over(_surface(rng, size), _surface(rng, size), mask)


def _over(below: Floats, above: Floats, mask: Floats) -> Floats:
    return below + mask[..., None] * (above - below)


# ---------------------------------------------------------------------------------------------------------
# Scenes: surfaces, and what lies on them


def _outline(rng: Rng, radius: float) -> Floats:
    """[n, 2] corners (x, y) of a shape around 0: ellipse, polygon, rectangle, star, blob."""
    form = rng.integers(5)
    if form == 0:
        angles, radii = np.linspace(0, 2 * math.pi, 32, endpoint=False), np.ones(32)
    elif form == 1:
        count = int(rng.integers(3, 8))
        angles, radii = np.sort(rng.uniform(0, 2 * math.pi, count)), np.ones(count)
    elif form == 2:
        flat = rng.uniform(0.1, math.pi / 4)
        angles = np.array([flat, math.pi - flat, math.pi + flat, -flat])
        radii = np.ones(4)
    elif form == 3:
        tips = int(rng.integers(3, 9))
        angles = np.linspace(0, 2 * math.pi, 2 * tips, endpoint=False)
        radii = np.tile([1, rng.uniform(0.2, 0.9)], tips)
    else:
        angles = np.linspace(0, 2 * math.pi, 48, endpoint=False)
        radii = np.ones(48)
        for order in range(2, 6):
            radii += rng.normal(0, 0.25 / order) * np.cos(order * angles + rng.uniform(0, 2 * math.pi))
    turn, stretch = rng.uniform(0, 2 * math.pi), math.exp(rng.normal(0, 0.35))
    points = np.stack([radii * np.cos(angles) * stretch, radii * np.sin(angles) / stretch], 1)
    rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
    outline: Floats = (radius * points @ rotation).astype(np.float32)
    return outline


_SHIFT = 4  # bits of a pixel's fraction in OpenCV's drawing


def _filled(shape: Size, corners: Floats) -> Floats:
    """[H, W] in 0..1: an anti-aliased polygon."""
    mask = np.zeros(shape, np.uint8)
    points = np.rint(corners * (1 << _SHIFT)).astype(np.int32)
    cv2.fillPoly(mask, [points], 255, cv2.LINE_AA, _SHIFT)
    return mask.astype(np.float32) / np.float32(255)


def _stack_of_shapes(rng: Rng, size: Size, surfaces: Sequence[Floats], count: int, image: Floats) -> None:
    """Dead leaves on an image, in its memory: shapes of power-law sizes that cover each other, each with a
    piece of a surface, tinted and shaded; some with a shadow."""
    largest = 0.4 * max(size)
    smallest = max(2.0, math.exp(rng.uniform(-4.5, -2.5)) * max(size))
    shadowy, shaded, tinted = rng.random() < 0.4, rng.random() < 0.4, rng.uniform(0, 0.9)
    for _ in range(count):
        # Cumulative power law of exponent -2, as in images that look alike at every scale.
        share = rng.random()
        radius = 1 / math.sqrt(1 / smallest**2 + share * (1 / largest**2 - 1 / smallest**2))
        outline = _outline(rng, radius)
        centre = (rng.uniform(0, size[1]), rng.uniform(0, size[0]))
        low = np.floor(outline.min(0) + centre).astype(int) - 1
        high = np.ceil(outline.max(0) + centre).astype(int) + 2
        left, top = np.maximum(low, 0)
        right, bottom = np.minimum(high, size[::-1])
        if right - left < 2 or bottom - top < 2:
            continue
        corners = outline + (np.array(centre) - (left, top)).astype(np.float32)
        part = (slice(top, bottom), slice(left, right))
        shape = (int(bottom - top), int(right - left))
        mask = _filled(shape, corners)
        if shadowy and radius > 4:
            shadow = _filled(shape, corners + np.float32(0.12 * radius))
            shadow = cv2.GaussianBlur(shadow, (0, 0), 0.08 * radius + 0.5)
            image[part] *= 1 - np.float32(0.6) * shadow[..., None]
        source = surfaces[int(rng.integers(len(surfaces)))]
        y, x = rng.integers(0, size[0] - shape[0] + 1), rng.integers(0, size[1] - shape[1] + 1)
        piece = source[y : y + shape[0], x : x + shape[1]]
        piece = np.float32(1 - tinted) * piece + np.float32(tinted) * _colour(rng)
        if shaded and radius > 4:
            slope = np.linspace(-1, 1, shape[0], dtype=np.float32)[:, None] * np.float32(rng.normal(0, 0.3))
            piece = (
                piece
                * (1 + slope + np.linspace(0, rng.normal(0, 0.4), shape[1], dtype=np.float32))[..., None]
            )
        image[part] += mask[..., None] * (piece - image[part])


def _dead_leaves(rng: Rng, size: Size) -> Floats:
    surfaces = [_surface(rng, size) for _ in range(int(rng.integers(2, 4)))]
    image = _surface(rng, size)
    area = size[0] * size[1] / 256**2
    _stack_of_shapes(
        rng, size, surfaces, round(math.exp(rng.uniform(math.log(15), math.log(320))) * area) + 3, image
    )
    return image


def _drawing(rng: Rng, size: Size) -> Floats:
    """Lines, curves, outlines, filled shapes, writing, bars and grids on a surface."""
    below = _surface(rng, size) if rng.random() < 0.7 else _pair(rng, size)
    layers = int(rng.integers(1, 4))
    for _ in range(layers):
        mask = np.zeros(size, np.uint8)
        draw = (_draw_strokes, _draw_writing, _draw_outlines, _draw_bars)[int(rng.integers(4))]
        draw(rng, mask)
        ink: Floats = mask.astype(np.float32) / np.float32(255)
        if rng.random() < 0.3:
            ink = cv2.GaussianBlur(ink, (0, 0), math.exp(rng.uniform(-0.7, 1.2)))
        ink *= np.float32(rng.uniform(0.3, 1))
        above = _surface(rng, size) if rng.random() < 0.3 else _colour(rng)[None, None]
        below = _over(below, np.broadcast_to(above, below.shape), ink)
    return below


def _thickness(rng: Rng) -> int:
    return max(1, round(math.exp(rng.uniform(0, 2.3))))


def _draw_strokes(rng: Rng, mask: Bytes) -> None:
    edge = max(mask.shape)
    for _ in range(round(math.exp(rng.uniform(0.5, 3.3)))):
        steps, start = int(rng.integers(2, 14)), rng.uniform(0, 1, 2) * mask.shape[::-1]
        turns = rng.uniform(0, 2 * math.pi) + np.cumsum(rng.normal(0, rng.uniform(0.05, 1.2), steps))
        length = edge * math.exp(rng.uniform(-4, -1.2))
        points = start + np.cumsum(length * np.stack([np.cos(turns), np.sin(turns)], 1), 0)
        fixed = np.rint(points * (1 << _SHIFT)).astype(np.int32)
        cv2.polylines(mask, [fixed], False, 255, _thickness(rng), cv2.LINE_AA, _SHIFT)


def _draw_writing(rng: Rng, mask: Bytes) -> None:
    height = math.exp(rng.uniform(math.log(7), math.log(60)))
    font, thickness = int(rng.choice(_FONTS)), max(1, round(height * rng.uniform(0.04, 0.16)))
    scale, row = height / 22, rng.uniform(0, height)
    while row < mask.shape[0] + height:
        line = "".join(rng.choice(_SIGNS, int(rng.integers(3, 30))))
        cv2.putText(
            mask,
            line,
            (round(rng.uniform(-40, 0.6 * mask.shape[1])), round(row)),
            font,
            scale,
            255,
            thickness,
            cv2.LINE_AA,
        )
        row += height * rng.uniform(1.2, 3)
    if rng.random() < 0.4:
        centre = (mask.shape[1] / 2, mask.shape[0] / 2)
        turn = cv2.getRotationMatrix2D(centre, rng.uniform(-180, 180), rng.uniform(0.8, 1.5))
        mask[:] = cv2.warpAffine(mask, turn, mask.shape[::-1])


def _draw_outlines(rng: Rng, mask: Bytes) -> None:
    edge = max(mask.shape)
    filled = rng.random() < 0.4
    for _ in range(round(math.exp(rng.uniform(0.5, 3.3)))):
        outline = _outline(rng, edge * math.exp(rng.uniform(-4, -0.9)))
        fixed = np.rint((outline + rng.uniform(0, 1, 2) * mask.shape[::-1]) * (1 << _SHIFT)).astype(np.int32)
        if filled:
            cv2.fillPoly(mask, [fixed], int(rng.integers(80, 256)), cv2.LINE_AA, _SHIFT)
        else:
            cv2.polylines(
                mask, [fixed], True, int(rng.integers(80, 256)), _thickness(rng), cv2.LINE_AA, _SHIFT
            )


def _draw_bars(rng: Rng, mask: Bytes) -> None:
    """Bars of random widths within a box; twice over a grid of squares, as printed codes have them."""
    height, width = mask.shape
    top, left = int(rng.uniform(0, 0.7) * height), int(rng.uniform(0, 0.7) * width)
    box = mask[
        top : top + max(4, int(rng.uniform(0.2, 1) * height)),
        left : left + max(4, int(rng.uniform(0.2, 1) * width)),
    ]
    module = max(1, round(math.exp(rng.uniform(0, 2.8))))
    cells = (box.shape[0] // module + 1, box.shape[1] // module + 1)
    form = rng.integers(3)
    bits = rng.random((1 if form < 1 else cells[0], cells[1])) < 0.5
    if form == 1:
        bits = np.indices(cells).sum(0) % 2 == 0
    pattern = np.kron(np.broadcast_to(bits, cells), np.ones((module, module), bool))
    box[pattern[: box.shape[0], : box.shape[1]]] = 255
    if rng.random() < 0.5:
        mask[:] = mask.T if height == width else mask[::-1]


def _objects(rng: Rng, size: Size) -> Floats:
    """Rounded, shaded bodies with highlights and shadows on a background; some are of glass."""
    image = _surface(rng, size) if rng.random() < 0.7 else _pair(rng, size)
    light = rng.normal(size=3)
    light[2] = abs(light[2]) + 0.6
    light /= np.linalg.norm(light)
    ambient = np.float32(rng.uniform(0.1, 0.6))
    repeated = rng.random() < 0.4
    edge = max(size)
    outline, material = _outline(rng, edge * math.exp(rng.uniform(-2.8, -1.0))), _surface(rng, size)
    for _ in range(int(rng.integers(2, 14))):
        if not repeated:
            outline = _outline(rng, edge * math.exp(rng.uniform(-3, -0.8)))
            if rng.random() < 0.5:
                material = _surface(rng, size)
        place = np.float32(rng.uniform(0, 1, 2) * size[::-1])
        mask = _filled(size, outline + place)
        if mask.max() < 0.5:
            continue
        shadow = cv2.GaussianBlur(
            _filled(size, outline + place - np.float32(light[:2] * 0.08 * edge)), (0, 0), 0.015 * edge + 0.5
        )
        image *= 1 - np.float32(0.5) * shadow[..., None]
        # A height that rises from the border: sqrt of the distance rounds it as a bevel or a ball.
        depth = cv2.distanceTransform((mask > 0.5).astype(np.uint8), cv2.DIST_L2, 5)
        reach = np.float32(depth.max() * rng.uniform(0.15, 1) + 1)
        inner = np.clip(depth / reach, 0, 1)
        relief = cv2.GaussianBlur(reach * np.sqrt(1 - (1 - inner) ** 2), (0, 0), 1.0 + 0.01 * edge)
        shade, shine = _shading(relief, light, rng)
        body = material * (ambient + (1 - ambient) * shade[..., None]) + shine[..., None]
        opacity = 1.0 if rng.random() < 0.8 else rng.uniform(0.2, 0.7)
        image = _over(image, np.clip(body, 0, 1), np.float32(opacity) * mask)
    return image


def _shading(relief: Floats, light: np.ndarray[Any, Any], rng: Rng) -> tuple[Floats, Floats]:
    """Diffuse light and highlight of a height field."""
    across = cv2.Sobel(relief, cv2.CV_32F, 1, 0, ksize=3, scale=1 / 8)
    down = cv2.Sobel(relief, cv2.CV_32F, 0, 1, ksize=3, scale=1 / 8)
    length = np.sqrt(across**2 + down**2 + 1)
    x, y, z = (np.float32(part) for part in light)
    diffuse = np.clip((z - x * across - y * down) / length, 0, 1)
    half = light + np.array([0, 0, 1])
    half /= np.linalg.norm(half)
    x, y, z = (np.float32(part) for part in half)
    mirror = np.clip((z - x * across - y * down) / length, 0, 1)
    shine = np.float32(rng.uniform(0, 0.8)) * mirror ** np.float32(math.exp(rng.uniform(1.5, 4.5)))
    return diffuse, shine


def _relief(rng: Rng, size: Size) -> Floats:
    """A rough surface in slanting light: stone, leather, hammered or cast metal."""
    light = rng.normal(size=3)
    light[2] = abs(light[2]) + 0.3
    light /= np.linalg.norm(light)
    shade, shine = _shading(np.float32(math.exp(rng.uniform(1, 4.5))) * _field(rng, size), light, rng)
    ambient = np.float32(rng.uniform(0, 0.5))
    lit = _surface(rng, size) * (ambient + (1 - ambient) * shade[..., None]) + shine[..., None]
    return np.clip(lit, 0, 1)


def _fractal(rng: Rng, size: Size) -> Floats:
    above = _coloured(rng, _attractor(rng, size))
    if rng.random() < 0.5:
        return above
    return _over(_surface(rng, size), above, _attractor(rng, size))


def _repeated(rng: Rng, size: Size) -> Floats:
    """A small scene in rows and columns, as fabric, grids, boards and packed parts have it."""
    edges = [int(np.clip(math.exp(rng.uniform(math.log(8), math.log(90))), 8, edge)) for edge in size]
    tile = _SCENES[int(rng.integers(len(_SCENES)))](rng, (max(_MIN_SIZE, edges[0]), max(_MIN_SIZE, edges[1])))
    if rng.random() < 0.4:
        tile = np.concatenate([tile, tile[::-1]])
        tile = np.concatenate([tile, tile[:, ::-1]], 1)
    repeats = (size[0] // tile.shape[0] + 2, size[1] // tile.shape[1] + 2, 1)
    row, column = int(rng.integers(tile.shape[0])), int(rng.integers(tile.shape[1]))
    image = np.tile(tile, repeats)[row : row + size[0], column : column + size[1]].copy()
    if rng.random() < 0.5:
        image *= np.float32(0.7) + np.float32(0.3) * _octaves(rng, size)[..., None]
    return image


def _mixture(rng: Rng, size: Size) -> Floats:
    """Two scenes: side by side, one through the other, or shapes of one on the other."""
    first, second = (_SCENES[int(rng.integers(len(_SCENES)))](rng, size) for _ in range(2))
    form = rng.integers(3)
    if form == 0:
        return _over(first, second, np.full(size, rng.uniform(0.2, 0.8), np.float32))
    if form == 1:
        sharp = math.exp(rng.uniform(1, 5))
        mask = np.clip(0.5 + np.float32(sharp) * (_octaves(rng, size) - np.float32(0.5)), 0, 1)
        return _over(first, second, mask)
    image = first.copy()
    _stack_of_shapes(rng, size, [second], int(rng.integers(2, 30)), image)
    return image


_SCENES: tuple[Callable[[Rng, Size], Floats], ...] = (
    _pair,
    _dead_leaves,
    _drawing,
    _objects,
    _relief,
    _fractal,
)

# How often each kind is drawn when none is asked for; shapes and objects most, because edges between
# different things are what a texture alone never has.
_KINDS: dict[str, tuple[float, Callable[[Rng, Size], Floats]]] = {
    "surface": (0.10, _surface),
    "pair": (0.08, _pair),
    "dead_leaves": (0.22, _dead_leaves),
    "drawing": (0.14, _drawing),
    "objects": (0.16, _objects),
    "relief": (0.08, _relief),
    "fractal": (0.05, _fractal),
    "repeated": (0.09, _repeated),
    "mixture": (0.08, _mixture),
}
TEXTURE_KINDS: tuple[str, ...] = tuple(_KINDS)
"""The kinds of images that :func:`texture` draws."""
_SHARES = [share for share, _ in _KINDS.values()]


# ---------------------------------------------------------------------------------------------------------
# The camera


def _photographed(rng: Rng, image: Floats) -> Bytes:
    """What lies between scene and file, each now and then: geometry, light, lens, sensor, compression."""
    size: Size = (image.shape[0], image.shape[1])
    image = np.ascontiguousarray(image, np.float32)
    if rng.random() < 0.3:
        image = _bent(rng, image)
    if rng.random() < 0.3:
        slope = cv2.resize(
            rng.uniform(0.4, 1.1, (2, 2)).astype(np.float32), size[::-1], interpolation=cv2.INTER_LINEAR
        )
        image = image * slope[..., None]
    if rng.random() < 0.5:
        sigma = math.exp(rng.uniform(math.log(0.3), math.log(2.5)))
        image = cv2.GaussianBlur(image, (0, 0), sigma, sigmaY=sigma if rng.random() < 0.8 else 3 * sigma)
    if rng.random() < 0.2:
        image = np.broadcast_to(image.mean(2, keepdims=True), image.shape)
    if rng.random() < 0.8:
        # Exposed so that the image fills most of the range: few photographs are flat, dark or pale.
        low, high = np.quantile(image[::4, ::4], [0.02, 0.98])
        darkest, lightest = rng.uniform(-0.1, 0.35), rng.uniform(0.55, 1.1)
        gain = min((lightest - darkest) / (high - low + 1e-3), math.exp(rng.uniform(0, 2.5)))
        image = np.float32(gain) * (image - np.float32(0.5 * (low + high)))
        image += np.float32(0.5 * (darkest + lightest))
    if rng.random() < 0.5:
        image = np.clip(image, 0, 1) ** np.float32(math.exp(rng.normal(0, 0.4)))
    if rng.random() < 0.4:
        noise = rng.standard_normal(image.shape if rng.random() < 0.6 else (*size, 1), dtype=np.float32)
        image = image + np.float32(math.exp(rng.uniform(math.log(0.003), math.log(0.08)))) * noise
    pixels: Bytes = np.rint(np.clip(image, 0, 1) * 255).astype(np.uint8)
    if rng.random() < 0.15:
        _, encoded = cv2.imencode(".jpg", pixels, [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(30, 96))])
        pixels = np.asarray(cv2.imdecode(encoded, cv2.IMREAD_COLOR), np.uint8)
    return np.ascontiguousarray(pixels)


def _bent(rng: Rng, image: Floats) -> Floats:
    """Turned, scaled and waved a little; what was outside is mirrored in."""
    size: Size = (image.shape[0], image.shape[1])
    y, x = _grid(size)
    if rng.random() < 0.5:
        strength = math.exp(rng.uniform(0, math.log(25)))
        y, x = (place + np.float32(strength) * (_octaves(rng, size) - np.float32(0.5)) for place in (y, x))
    angle, scale = rng.uniform(-math.pi, math.pi), math.exp(rng.uniform(-0.7, 0.4))
    cosine, sine = np.float32(scale * math.cos(angle)), np.float32(scale * math.sin(angle))
    row, column = np.float32(size[0] / 2), np.float32(size[1] / 2)
    across, down = x - column, y - row
    return cv2.remap(
        image,
        cosine * across - sine * down + column,
        sine * across + cosine * down + row,
        cv2.INTER_LINEAR,
        borderMode=cv2.BORDER_REFLECT,
    )


# ---------------------------------------------------------------------------------------------------------
# Small things


def _grid(size: Size) -> tuple[Floats, Floats]:
    """Row and column of every pixel, each [H, W]."""
    y, x = np.mgrid[: size[0], : size[1]].astype(np.float32)
    return y, x


def _spread(field: Floats) -> Floats:
    """Stretch a field so that nearly all of it lies in 0..1, and cut off the rest."""
    mean, deviation = field.mean(), field.std()
    return np.clip((field - mean) / (5 * deviation + np.float32(1e-9)) + np.float32(0.5), 0, 1)


def _checked_size(size: int | tuple[int, int]) -> Size:
    edges = tuple(size) if isinstance(size, Sequence) else (size, size)
    if len(edges) != 2 or any(
        isinstance(edge, bool) or not isinstance(edge, int | np.integer) or edge < _MIN_SIZE for edge in edges
    ):
        raise InputError(
            f"size is {size!r}; it must be one whole number or (height, width), at least {_MIN_SIZE} pixels "
            "each"
        )
    return int(edges[0]), int(edges[1])


def _checked_generator(seed: int | Sequence[int]) -> Rng:
    numbers = list(seed) if isinstance(seed, Sequence) else [seed]
    if not numbers or any(
        isinstance(number, bool) or not isinstance(number, int | np.integer) or number < 0
        for number in numbers
    ):
        raise InputError(f"seed is {seed!r}; it must be a whole number >= 0, or several")
    return np.random.default_rng([int(number) for number in numbers])
