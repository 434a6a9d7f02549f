"""Pictures of anomaly maps: heat maps, overlays, red contours and comparison sheets.

Everything here takes and gives NumPy arrays and needs nothing but OpenCV. Pictures are uint8 RGB.

One scale of colours is shared by all pictures that are to be compared (:func:`shared_scale`): a colour then
means the same anomaly score in every one of them. Stretching each map to its own range, as is often seen,
paints the noise of a good product as red as the defect of a bad one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import cv2
import numpy as np
from numpy.typing import NDArray

from pydefect.errors import InputError, as_array
from pydefect.shapes import Box

__all__ = [
    "comparison_sheet",
    "draw_contours",
    "fade_unscored",
    "heat_map",
    "map_range",
    "outlines",
    "overlay",
    "scale_of_ranges",
    "scored_values",
    "shared_scale",
    "shrink",
    "shrink_mask",
    "to_rgb8",
]

Picture: TypeAlias = NDArray[np.uint8]
Colour: TypeAlias = tuple[int, int, int]

RED: Colour = (255, 0, 0)

_LINE_PER_EDGE = 1 / 128  # a contour's width as part of the image's shorter edge: 2 pixels at 256, 8 at 1024
_THINNEST_LINE = 2  # antialiasing takes the colour out of thinner ones
_WIDEST_LINE = 32767  # that OpenCV draws
_FOG = 128  # what unscored pixels fade to: mid grey shows on black and on white backgrounds


def to_rgb8(image: NDArray[Any]) -> Picture:
    """Make a picture that can be shown or written out of an image of any kind.

    Parameters
    ----------
    image
        [H, W] grey or [H, W, C] with C 1 (grey), 3 (RGB) or 4 (RGBA, whose alpha is left out); uint8, uint16,
        bool, or floating point in 0..1 (what lies outside is clipped, NaN is shown black).

    Returns
    -------
    numpy.ndarray
        [H, W, 3] uint8, an array of its own.

    Raises
    ------
    InputError
        The shape or the type is another.
    """
    pixels = as_array("image", image)
    if pixels.ndim == 2:
        pixels = pixels[..., np.newaxis]
    if pixels.ndim != 3 or pixels.shape[2] not in (1, 3, 4) or 0 in pixels.shape:
        raise InputError(f"image has the shape {list(np.shape(image))}; allowed are [H, W] and [H, W, 1|3|4]")
    pixels = pixels[..., :3]
    if pixels.dtype == np.bool_:
        pixels = pixels.astype(np.uint8) * 255
    elif pixels.dtype.newbyteorder("=") == np.uint16:
        pixels = np.rint(pixels * (255 / 65535)).astype(np.uint8)
    elif np.issubdtype(pixels.dtype, np.floating):
        pixels = np.rint(np.clip(np.nan_to_num(pixels, nan=0.0), 0, 1) * 255).astype(np.uint8)
    elif pixels.dtype != np.uint8:
        raise InputError(
            f"image is of type {pixels.dtype}; allowed are uint8, uint16, bool and floating point"
        )
    if pixels.shape[2] == 1:
        return np.repeat(pixels, 3, axis=2)
    return np.array(pixels, order="C")


def shared_scale(
    anomaly_maps: Sequence[NDArray[Any]],
    *,
    pixel_threshold: float | None = None,
    scored_boxes: Sequence[Box] | None = None,
    ignored: Sequence[NDArray[Any] | None] | None = None,
) -> tuple[float, float]:
    """The scores that get the first and the last colour in a set of pictures that belong together.

    Parameters
    ----------
    anomaly_maps
        [H, W] each; may be empty when `pixel_threshold` is given.
    pixel_threshold
        The score from which a pixel counts as defective. With one the scale goes from half to one and a half
        times the threshold, whatever the maps are: the threshold sits in the middle of the colours (green),
        pictures of different days can be compared, and none has to wait until the last one is known.
    scored_boxes
        (top, left, bottom, right) of each map, for maps of cropped images: the zeros outside say nothing.
    ignored
        [H, W] of each map, or None: where they are true, likewise.

    Returns
    -------
    tuple of float
        (low, high). Without a threshold: the median of the maps' medians, and the maximum of all scores.

    Raises
    ------
    InputError
        There is neither a map nor a threshold.
    """
    if pixel_threshold is not None and pixel_threshold > 0:
        return 0.5 * float(pixel_threshold), 1.5 * float(pixel_threshold)
    if not len(anomaly_maps):
        raise InputError("a scale of colours needs at least one anomaly map or a pixel threshold")
    boxes = scored_boxes
    if boxes is None:
        boxes = [(0, 0, *np.shape(anomaly_map)) for anomaly_map in anomaly_maps]
    unseen = [None] * len(anomaly_maps) if ignored is None else ignored
    return scale_of_ranges([map_range(*one) for one in zip(anomaly_maps, boxes, unseen, strict=True)])


def map_range(
    anomaly_map: NDArray[Any], scored_box: Box, ignored: NDArray[Any] | None
) -> tuple[float, float]:
    """Median and maximum of what was looked at: all that :func:`scale_of_ranges` needs of a map.

    Parameters
    ----------
    anomaly_map, scored_box, ignored
        See :func:`scored_values`.

    Returns
    -------
    tuple of float
        (median, maximum).
    """
    scores = scored_values(anomaly_map, scored_box, ignored)
    return float(np.median(scores)), float(np.max(scores))


def scale_of_ranges(ranges: Sequence[tuple[float, float]]) -> tuple[float, float]:
    """The scale of :func:`shared_scale` without a threshold, for more maps than fit into memory.

    Parameters
    ----------
    ranges
        Of every map, at least one; see :func:`map_range`.

    Returns
    -------
    tuple of float
        (low, high).
    """
    low = float(np.median([median for median, _ in ranges]))
    high = max(highest for _, highest in ranges)
    return low, high if high > low else low + 1.0


def scored_values(anomaly_map: NDArray[Any], scored_box: Box, ignored: NDArray[Any] | None) -> NDArray[Any]:
    """The scores of what was looked at; zeros elsewhere say nothing.

    Parameters
    ----------
    anomaly_map
        [H, W].
    scored_box
        (top, left, bottom, right) in pixels, half open.
    ignored
        [H, W]; where it is true nothing was looked at. None: nowhere.

    Returns
    -------
    numpy.ndarray
        [N], of the map's type.
    """
    top, left, bottom, right = scored_box
    inside = np.asarray(anomaly_map)[top:bottom, left:right]
    return inside.ravel() if ignored is None else inside[np.asarray(ignored)[top:bottom, left:right] == 0]


def heat_map(anomaly_map: NDArray[Any], low: float, high: float) -> Picture:
    """Paint an anomaly map, from dark blue over green to dark red.

    Scores of `low` and below are dark blue, of `high` and above dark red. The colours are Google's
    Turbo, which is ordered like a rainbow without the false edges of jet.

    Parameters
    ----------
    anomaly_map
        [H, W], larger is more anomalous.
    low, high
        The scores of the first and the last colour, the same for all pictures to be compared; see
        :func:`shared_scale`.

    Returns
    -------
    numpy.ndarray
        [H, W, 3] uint8 RGB.

    Raises
    ------
    InputError
        The map is not 2-D, or `high` is not above `low`.
    """
    levels = np.rint(_normalised(anomaly_map, low, high) * 255).astype(np.uint8)
    return _as_picture(cv2.cvtColor(cv2.applyColorMap(levels, cv2.COLORMAP_TURBO), cv2.COLOR_BGR2RGB))


def overlay(
    image: NDArray[Any],
    anomaly_map: NDArray[Any],
    low: float,
    high: float,
    *,
    strength: float = 0.7,
    scored_box: Box | None = None,
    ignored: NDArray[Any] | None = None,
) -> Picture:
    """Lay the heat map of an image over it: the higher the score, the less of the image shines through.

    Where the score is `low` or less the image stays as it is, so that a good product still looks like itself.

    Parameters
    ----------
    image
        As :func:`to_rgb8` takes it.
    anomaly_map
        [H, W] of the image's size.
    low, high
        See :func:`heat_map`.
    strength
        The share of the heat map where the score is `high` or more, in 0..1.
    scored_box
        (top, left, bottom, right); what lies outside is shown faded, see :func:`fade_unscored`.
    ignored
        [H, W]; where it is true, likewise.

    Returns
    -------
    numpy.ndarray
        [H, W, 3] uint8 RGB.

    Raises
    ------
    InputError
        Image and map differ in size, or a value is not allowed.
    """
    picture = to_rgb8(image)
    _check_size("anomaly_map", anomaly_map, picture)
    if not 0 <= strength <= 1:
        raise InputError(f"strength is {strength!r}; it must lie in 0..1")
    level = _normalised(anomaly_map, low, high)
    opacity = (strength * level * level * (3 - 2 * level))[..., np.newaxis]
    colours = heat_map(anomaly_map, low, high)
    mixed = np.rint(picture + opacity * (colours.astype(np.float32) - picture)).astype(np.uint8)
    return fade_unscored(mixed, scored_box, ignored)


def draw_contours(
    image: NDArray[Any], mask: NDArray[Any], *, colour: Colour = RED, width: int | None = None
) -> Picture:
    """Draw a curve round every region of a mask, holes included, as in figures 8 and 9 of the ConPatch paper.

    Parameters
    ----------
    image
        As :func:`to_rgb8` takes it.
    mask
        [H, W] of the image's size; true or non-zero is defective.
    colour
        RGB, 0 to 255 each.
    width
        In pixels, 1 or more; None for 1/128 of the image's shorter edge, at least 2.

    Returns
    -------
    numpy.ndarray
        [H, W, 3] uint8 RGB.

    Raises
    ------
    InputError
        Image and mask differ in size, or a value is not allowed.
    """
    ink = as_array("colour", colour)
    if ink.shape != (3,) or ink.dtype.kind not in "iuf" or not (ink.min() >= 0 and ink.max() <= 255):
        raise InputError(f"colour: {colour!r} given; allowed are three numbers of 0 to 255")
    if width is not None and (not isinstance(width, int | np.integer) or not 1 <= width <= _WIDEST_LINE):
        raise InputError(f"width: {width!r} given; allowed are whole numbers of 1 to {_WIDEST_LINE}, or None")
    picture, marked = to_rgb8(image), as_array("mask", mask)
    _check_size("mask", marked, picture)
    if marked.dtype.kind not in "biuf":
        raise InputError(f"mask is of type {marked.dtype}; allowed are bool and numbers")
    if width is None:
        width = max(_THINNEST_LINE, round(min(picture.shape[:2]) * _LINE_PER_EDGE))
    curves, shade = outlines(marked), [float(part) for part in ink]
    cv2.polylines(picture, curves, isClosed=True, color=shade, thickness=int(width), lineType=cv2.LINE_AA)
    return picture


def outlines(mask: NDArray[Any]) -> list[NDArray[np.int32]]:
    """The curves round every region of a mask, holes included.

    Parameters
    ----------
    mask
        [H, W]; true or non-zero is defective.

    Returns
    -------
    list of numpy.ndarray
        [n, 2] int32 each: (x, y) of pixels on the border, of a closed curve.
    """
    regions = (np.asarray(mask) != 0).astype(np.uint8)
    contours, _ = cv2.findContours(regions, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
    return [np.asarray(contour[:, 0], dtype=np.int32) for contour in contours]


def shrink(
    picture: Picture, anomaly_map: NDArray[Any], scored_box: Box, edge: int
) -> tuple[Picture, NDArray[np.float32], Box]:
    """Make an image and its map smaller for a sheet or a page, without losing small defects.

    Parameters
    ----------
    picture
        [H, W, 3] uint8.
    anomaly_map
        [H, W].
    scored_box
        (top, left, bottom, right) in pixels, half open.
    edge
        What the longer edge is made of; an image that is no larger stays as it is.

    Returns
    -------
    picture, anomaly_map, scored_box
        Pixels are averaged. Of the map's scores the highest one of each block stays: an average would lose
        small defects.
    """
    height, width = picture.shape[:2]
    factor = edge / max(height, width)
    scores = np.asarray(anomaly_map, dtype=np.float32)
    if factor >= 1:
        return picture, scores, scored_box
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    # Blocks go right and down from where they begin. That is counted in whole numbers: INTER_NEAREST rounds
    # its factor, and a block that begins one too early may leave out the last before the next.
    rows, columns = np.arange(size[1]) * height // size[1], np.arange(size[0]) * width // size[0]
    block = np.ones((math.ceil(height / size[1]), math.ceil(width / size[0])), dtype=np.uint8)
    highest = cv2.dilate(scores, block, anchor=(0, 0))[np.ix_(rows, columns)]
    top, left, bottom, right = scored_box
    return (
        _as_picture(cv2.resize(picture, size, interpolation=cv2.INTER_AREA)),
        np.asarray(highest, dtype=np.float32),
        (
            round(top * size[1] / height),
            round(left * size[0] / width),
            round(bottom * size[1] / height),
            round(right * size[0] / width),
        ),
    )


def shrink_mask(mask: NDArray[Any], size: tuple[int, int]) -> NDArray[np.bool_]:
    """Make a mask smaller, as :func:`shrink` does a map: a block with any marked pixel is marked.

    Parameters
    ----------
    mask
        [H, W]; true or non-zero is marked.
    size
        (height, width) to make of it, no larger.

    Returns
    -------
    numpy.ndarray
        [height, width] bool.
    """
    marked = (np.asarray(mask) != 0).astype(np.float32)
    smaller = cv2.resize(marked, size[::-1], interpolation=cv2.INTER_AREA)
    return np.asarray(smaller > 0, dtype=np.bool_)


def fade_unscored(
    image: NDArray[Any], scored_box: Box | None, ignored: NDArray[Any] | None = None
) -> Picture:
    """Fade to grey what a region, crop or `ignore` left out: nobody shall take it for inspected and good.

    Parameters
    ----------
    image
        As :func:`to_rgb8` takes it.
    scored_box
        (top, left, bottom, right) in pixels, half open; None: the whole image.
    ignored
        [H, W]; where it is true nothing was looked at. None: nowhere.

    Returns
    -------
    numpy.ndarray
        [H, W, 3] uint8 RGB; the other pixels as they were.

    Raises
    ------
    InputError
        Image and mask differ in size.
    """
    picture = to_rgb8(image)
    if scored_box is None and ignored is None:
        return picture
    faded = ((picture.astype(np.uint16) + 2 * _FOG) // 3).astype(np.uint8)
    top, left, bottom, right = (0, 0, *picture.shape[:2]) if scored_box is None else scored_box
    inside = picture[top:bottom, left:right]
    if ignored is not None:
        _check_size("ignored", ignored, picture)
        hidden = np.asarray(ignored)[top:bottom, left:right, np.newaxis] != 0
        inside = np.where(hidden, faded[top:bottom, left:right], inside)
    faded[top:bottom, left:right] = inside
    return faded


_INK: Colour = (40, 40, 40)
_FAINT: Colour = (110, 110, 110)
_FONT = cv2.FONT_HERSHEY_SIMPLEX
# Before OpenCV 5 its fonts know no others.
_LETTERS = "utf-8" if int(cv2.__version__.partition(".")[0]) >= 5 else "ascii"


def comparison_sheet(
    images: Sequence[NDArray[Any]],
    anomaly_maps: Sequence[NDArray[Any]],
    *,
    masks: Sequence[NDArray[Any]] | None = None,
    ground_truth: Sequence[NDArray[Any]] | None = None,
    captions: Sequence[str] | None = None,
    scale: tuple[float, float] | None = None,
    pixel_threshold: float | None = None,
    scored_boxes: Sequence[Box] | None = None,
    ignored: Sequence[NDArray[Any] | None] | None = None,
    part_maps: Mapping[str, Sequence[NDArray[Any]]] | None = None,
    cell: int = 224,
) -> Picture:
    """Show images in columns: input, ground truth, heat map, segmentation (the ConPatch paper's figure 8).

    Of methods with parts of the map (:attr:`pydefect.Result.part_maps`) these stand over the heat map, as in
    the dual autoencoder paper's figures 5 to 8.

    Parameters
    ----------
    images
        n images as :func:`to_rgb8` takes them, of any sizes.
    anomaly_maps
        n of [H, W] at the images' sizes.
    masks
        n of [H, W], what was found, drawn as a red curve; None leaves out the row.
    ground_truth
        n of [H, W], what was to be found, drawn white on black; None leaves out the row.
    captions
        n texts over the columns, of one or more lines; cut in the middle where they are too long. A narrow
        column is made wide enough for all lines but the first, up to `cell`.
    scale
        (low, high) of the colours; None for :func:`shared_scale` of these maps.
    pixel_threshold
        Marked beside the scale of colours.
    scored_boxes
        n of (top, left, bottom, right); what lies outside is shown faded.
    ignored
        n of [H, W], or None; where they are true, likewise.
    part_maps
        By title n of [H, W], shown in the heat map's colours.
    cell
        The longer edge of every picture on the sheet in pixels.

    Returns
    -------
    numpy.ndarray
        [height, width, 3] uint8 RGB on white.

    Raises
    ------
    InputError
        There is no image, or the lists differ in length or the images from their maps in size.
    """
    count = len(images)
    if count == 0:
        raise InputError("a comparison sheet needs at least one image")
    if cell < 16:
        raise InputError(f"cell is {cell!r}; it must be at least 16 pixels")
    for name, values in (
        ("anomaly_maps", anomaly_maps),
        ("masks", masks),
        ("ground_truth", ground_truth),
        ("captions", captions),
        ("scored_boxes", scored_boxes),
        ("ignored", ignored),
        *(part_maps or {}).items(),
    ):
        if values is not None and len(values) != count:
            raise InputError(f"{name} has {len(values)} entries for {count} images")
    if scale is None:
        scale = shared_scale(
            anomaly_maps, pixel_threshold=pixel_threshold, scored_boxes=scored_boxes, ignored=ignored
        )
    low, high = scale

    titles = ["input"]
    titles += ["ground truth"] if ground_truth is not None else []
    titles += list(part_maps or {})
    titles += ["heat map"]
    titles += ["segmentation"] if masks is not None else []
    columns: list[list[Picture]] = []
    for index in range(count):
        picture = to_rgb8(images[index])
        box = None if scored_boxes is None else scored_boxes[index]
        unseen = None if ignored is None else ignored[index]
        shown = fade_unscored(picture, box, unseen)
        column = [_fitted(shown, cell)]
        if ground_truth is not None:
            _check_size(f"ground_truth[{index}]", ground_truth[index], picture)
            column.append(_fitted(to_rgb8(np.asarray(ground_truth[index]) != 0), cell))
        for name, maps in [*(part_maps or {}).items(), ("anomaly_maps", anomaly_maps)]:
            _check_size(f"{name}[{index}]", maps[index], picture)
            colours = fade_unscored(heat_map(maps[index], low, high), box, unseen)
            column.append(_fitted(colours, cell))
        if masks is not None:
            _check_size(f"masks[{index}]", masks[index], picture)
            column.append(_with_contours(shown, masks[index], cell))
        columns.append(column)
    return _typeset(columns, titles, captions, (low, high), pixel_threshold, cell)


def _typeset(
    columns: list[list[Picture]],
    titles: list[str],
    captions: Sequence[str] | None,
    scale: tuple[float, float],
    pixel_threshold: float | None,
    cell: int,
) -> Picture:
    """Put the pictures on white paper: captions above, titles to the left, the scale to the right."""
    size = max(cell / 224 * 0.45, 0.3)
    line = round(size * 40)
    gap = max(4, cell // 28)
    heights = [max(column[row].shape[0] for column in columns) for row in range(len(titles))]
    lines = [
        [] if captions is None else caption.encode(_LETTERS, "replace").decode().split("\n")
        for caption in (captions or [""] * len(columns))
    ]
    widths = [
        max(
            cell // 2,
            *(picture.shape[1] for picture in column),
            # A name that is cut can still be told, a score cannot.
            *(min(cell, _text_width(text, size)) for text in caption[1:]),
        )
        for column, caption in zip(columns, lines, strict=True)
    ]
    left = max(_text_width(title, size) for title in titles) + 2 * gap
    top = gap + max(len(caption) for caption in lines) * line + (gap if captions is not None else 0)
    bar = max(8, cell // 16)
    ticks = [scale[1], scale[0]]
    if pixel_threshold is not None and scale[0] < pixel_threshold < scale[1]:
        ticks.append(pixel_threshold)
    right = bar + 3 * gap + max(_text_width(f"{value:.3g}", size) for value in ticks)

    width = left + sum(widths) + gap * (len(widths) - 1) + gap + right
    height = top + sum(heights) + gap * len(heights)
    sheet = np.full((height, width, 3), 255, dtype=np.uint8)

    x = left
    for column, column_width, caption in zip(columns, widths, lines, strict=True):
        for number, text in enumerate(caption):
            _write(
                sheet,
                _shortened(text, column_width, size),
                (x, gap + number * line + line // 2),
                size,
                _INK if number == 0 else _FAINT,
                column_width,
            )
        y = top
        for picture, row_height in zip(column, heights, strict=True):
            at_y, at_x = y + (row_height - picture.shape[0]) // 2, x + (column_width - picture.shape[1]) // 2
            sheet[at_y : at_y + picture.shape[0], at_x : at_x + picture.shape[1]] = picture
            y += row_height + gap
        x += column_width + gap

    y = top
    for title, row_height in zip(titles, heights, strict=True):
        _write(sheet, title, (gap, y + row_height // 2), size, _INK)
        if title == "heat map":
            ramp = np.linspace(scale[1], scale[0], row_height)[:, np.newaxis].repeat(bar, axis=1)
            sheet[y : y + row_height, x : x + bar] = heat_map(ramp, *scale)
            for value in ticks:
                at_y = y + round((scale[1] - value) / (scale[1] - scale[0]) * (row_height - 1))
                cv2.line(sheet, (x, at_y), (x + bar + gap // 2, at_y), _INK, max(1, cell // 224))
                # The numbers at the ends move inwards, so that they do not stick out over the row.
                middle = min(max(at_y, y + line // 3), y + row_height - line // 3)
                _write(sheet, f"{value:.3g}", (x + bar + gap, middle), size, _INK)
        y += row_height + gap
    return sheet


def _with_contours(picture: Picture, mask: NDArray[Any], cell: int) -> Picture:
    """Contours on a picture for a cell, drawn at the larger of both sizes: no line gets coarse."""
    if max(picture.shape[:2]) >= cell:
        return _fitted(draw_contours(picture, mask), cell)
    enlarged = _fitted(picture, cell)
    regions = cv2.resize((np.asarray(mask) != 0).astype(np.float32), enlarged.shape[1::-1]) > 0.5
    return draw_contours(enlarged, regions)


def _fitted(picture: Picture, cell: int) -> Picture:
    """The picture with a longer edge of `cell` pixels."""
    height, width = picture.shape[:2]
    factor = cell / max(height, width)
    size = (max(1, round(width * factor)), max(1, round(height * factor)))
    return _as_picture(
        cv2.resize(picture, size, interpolation=cv2.INTER_AREA if factor < 1 else cv2.INTER_LINEAR)
    )


def _write(
    sheet: Picture, text: str, at: tuple[int, int], size: float, colour: Colour, width: int | None = None
) -> None:
    """Write one line with its vertical middle at `at`; centred if a width is given."""
    (text_width, text_height), _ = cv2.getTextSize(text, _FONT, size, 1)
    x = at[0] + (0 if width is None else max(0, (width - text_width) // 2))
    cv2.putText(sheet, text, (x, at[1] + text_height // 2), _FONT, size, colour, 1, cv2.LINE_AA)


def _text_width(text: str, size: float) -> int:
    return int(cv2.getTextSize(text, _FONT, size, 1)[0][0])


def _shortened(text: str, width: int, size: float) -> str:
    """Cut out the middle of a text until it fits: the ends of a path tell more than its beginning alone."""
    kept = len(text)
    shown = text
    while kept > 4 and _text_width(shown, size) > width:
        kept -= 1
        shown = f"{text[: kept // 3]}..{text[-(kept - kept // 3) :]}"
    return shown


def _normalised(anomaly_map: NDArray[Any], low: float, high: float) -> NDArray[np.float32]:
    scores = np.asarray(anomaly_map, dtype=np.float32)
    if scores.ndim != 2 or 0 in scores.shape:
        raise InputError(f"anomaly_map has the shape {list(scores.shape)}; it must be [H, W]")
    if not (np.isfinite(low) and np.isfinite(high) and high > low):
        raise InputError(f"the scale of colours is {low!r} to {high!r}; high must be above low, both finite")
    # Infinite scores keep their end of the scale; NaN says nothing and gets the low end.
    level: NDArray[np.float32] = np.clip((scores - np.float32(low)) / np.float32(high - low), 0, 1)
    return np.nan_to_num(level, copy=False, nan=0.0)


def _check_size(name: str, array: NDArray[Any], picture: Picture) -> None:
    if np.shape(array) != picture.shape[:2]:
        raise InputError(
            f"{name} has the shape {list(np.shape(array))}, its image {list(picture.shape[:2])} "
            "(height, width); they must be the same"
        )


def _as_picture(array: Any) -> Picture:
    return np.asarray(array, dtype=np.uint8)
