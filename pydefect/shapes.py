"""Parts of an image in pixels, as people write them and JSON holds them: boxes and polygons."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias, TypeGuard

import cv2
import numpy as np

from pydefect.errors import InputError

__all__ = [
    "Box",
    "Mask",
    "Polygon",
    "Shape",
    "bounding_box",
    "check_shape",
    "check_shapes",
    "drawn",
    "is_box",
    "listed",
]

Box: TypeAlias = tuple[int, int, int, int]
"""(top, left, bottom, right), half open."""
Polygon: TypeAlias = tuple[tuple[int, int], ...]
"""Three or more corners, pixels (row, column), which belong to it."""
Shape: TypeAlias = Box | Polygon
Mask: TypeAlias = np.ndarray[Any, np.dtype[np.bool_]]
"""[H, W] bool."""


def check_shape(name: str, shape: Sequence[Any]) -> Shape:
    """Read a box or a polygon as people write it.

    Parameters
    ----------
    name
        Of the argument, for the message.
    shape
        (top, left, bottom, right) in pixels, half open, or three and more pixels (row, column).

    Returns
    -------
    tuple

    Raises
    ------
    InputError
        It is none of these, is empty, or begins above or left of the image.
    """
    found = _as_shape(shape)
    if found is None:
        raise InputError(
            f"{name}: {shape!r} given; allowed are (top, left, bottom, right), top < bottom and left < "
            "right, or three and more corners (row, column), in whole pixels >= 0 of the original image"
        )
    return found


def check_shapes(name: str, shapes: Sequence[Sequence[Any]]) -> tuple[Shape, ...]:
    """Read several boxes and polygons, a list of them; see :func:`check_shape`."""
    if not isinstance(shapes, list | tuple | np.ndarray) or _as_shape(shapes) is not None:
        raise InputError(
            f"{name}: {shapes!r} given; allowed is a list of boxes and polygons, also of one: "
            "[(top, left, bottom, right)]"
        )
    return tuple(check_shape(f"{name}[{index}]", shape) for index, shape in enumerate(shapes))


def _as_shape(value: Any) -> Shape | None:
    parts = _plain(value)
    if not isinstance(parts, tuple):
        return None
    if len(parts) == 4 and _are_pixels(parts) and parts[0] < parts[2] and parts[1] < parts[3]:
        return parts[0], parts[1], parts[2], parts[3]
    if len(parts) >= 3 and all(isinstance(part, tuple) and len(part) == 2 for part in parts):
        return parts if all(map(_are_pixels, parts)) else None
    return None


def _plain(value: Any) -> Any:
    """Tuples for lists and arrays, and Python's numbers for NumPy's, in which masks give their places."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    return tuple(map(_plain, value)) if isinstance(value, list | tuple) else value


def _are_pixels(values: Sequence[Any]) -> bool:
    return all(isinstance(value, int) and not isinstance(value, bool) and value >= 0 for value in values)


def is_box(shape: Shape) -> TypeGuard[Box]:
    """Whether a shape is a box; else it is a polygon."""
    return isinstance(shape[0], int)


def bounding_box(shape: Shape) -> Box:
    """The smallest box round a shape."""
    if is_box(shape):
        return shape
    rows, columns = zip(*shape, strict=True)
    return min(rows), min(columns), max(rows) + 1, max(columns) + 1


def listed(shape: Shape) -> list[Any]:
    """The shape as JSON has it."""
    return [list(part) if isinstance(part, tuple) else part for part in shape]


def drawn(shape: Shape, size: tuple[int, int], begin: tuple[int, int]) -> Mask:
    """Draw a shape.

    Parameters
    ----------
    shape
        In pixels of the image.
    size
        (height, width) of the part of the image that is drawn; what lies outside is cut off.
    begin
        (row, column) of the image where that part begins.

    Returns
    -------
    numpy.ndarray
        [height, width] bool.
    """
    pixels = np.zeros(size, dtype=np.uint8)
    if is_box(shape):
        top, left, bottom, right = (
            max(0, edge - start) for edge, start in zip(shape, begin * 2, strict=True)
        )
        pixels[top:bottom, left:right] = 1
    else:
        corners = np.array(shape, dtype=np.int32) - np.array(begin, dtype=np.int32)
        cv2.fillPoly(pixels, [corners[:, ::-1]], 1)
    return pixels.astype(np.bool_)
