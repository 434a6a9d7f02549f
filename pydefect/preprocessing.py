"""From pixels to the network's input, and from maps at the input's size back to the original image.

The geometry is that of continuous image coordinates: pixel i covers [i, i + 1), its centre is i + 0.5, and a
resize from H to h pixels maps y to y * h / H. A centre crop of height c out of h begins at row (h - c) // 2.
A region is cut out of the original image before all that, and takes its place.
What is ignored is painted with the mean colour, where the network looks, and is 0 in maps.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import torch

from pydefect.errors import InputError
from pydefect.shapes import Box, Mask, Shape, bounding_box, check_shape, check_shapes, drawn, is_box, listed

__all__ = ["IMAGENET_MEAN", "IMAGENET_STD", "Preprocessing", "check_size"]

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

_BAND_PIXELS = 1 << 18  # 3 MB as float32, which stay in the processor's cache


@dataclass(frozen=True)
class Preprocessing:
    """How pixels become network input: region, resize, centre crop, normalisation; and how maps go back.

    Parameters
    ----------
    resize
        (height, width) in pixels to which every image, or its region, is resized, whatever its own shape;
        None keeps its size.
    crop
        (height, width) of the centre crop after the resize; None keeps all.
    mean, std
        Per RGB channel, for pixels in 0..1. The defaults are those of networks trained on ImageNet.
    region
        (top, left, bottom, right) in pixels of the original image, half open: what is cut out of every image
        before all else, where a camera sees more than the part. Or the corners of a polygon, three or more
        pixels (row, column): the box round it is cut out, and what lies outside it is ignored. None: the
        whole image.
    ignore
        Boxes or polygons likewise, of which nothing is looked at: a label, a clamp, a printed date. Network
        inputs have the mean colour there, at all pixels that would see anything of it, and maps 0.

    Raises
    ------
    InputError
        If a size is not positive, the crop is larger than the resize, a standard deviation is not positive,
        or the region or what is ignored is no such shape.

    Examples
    --------
    >>> import numpy as np
    >>> preprocessing = Preprocessing.create(resize=256, crop=224)
    >>> preprocessing(np.zeros((512, 512, 3), dtype=np.uint8)).shape
    torch.Size([3, 224, 224])
    >>> preprocessing.scored_box((512, 512))
    (32, 32, 480, 480)
    >>> Preprocessing.create(resize=256, region=(100, 0, 400, 300)).scored_box((512, 512))
    (100, 0, 400, 300)
    >>> int(Preprocessing.create(resize=256, ignore=[(0, 0, 20, 512)]).ignored((512, 512)).sum())
    10240
    """

    resize: tuple[int, int] | None = None
    crop: tuple[int, int] | None = None
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD
    region: Shape | None = None
    ignore: tuple[Shape, ...] = ()

    def __post_init__(self) -> None:
        for name, size in (("resize", self.resize), ("crop", self.crop)):
            _check_pair(name, size)
        if self.region is not None:
            object.__setattr__(self, "region", check_shape("region", self.region))
        object.__setattr__(self, "ignore", check_shapes("ignore", self.ignore))
        full = self.resize or self._region_size
        if full and self.crop and not _fits(self.crop, full):
            name = "resize" if self.resize else "region"
            raise InputError(f"crop is {_text(self.crop)}, larger than {name}, which is {_text(full)}")
        for name, values in (("mean", self.mean), ("std", self.std)):
            if len(values) != 3 or not np.isfinite(values).all():
                raise InputError(f"{name} is {values!r}; it must be three finite numbers")
        if min(self.std) <= 0:
            raise InputError(f"std is {self.std!r}; it must be three numbers above 0")

    @classmethod
    def create(
        cls,
        resize: int | Sequence[int] | None = None,
        crop: int | Sequence[int] | None = None,
        mean: Sequence[float] = IMAGENET_MEAN,
        std: Sequence[float] = IMAGENET_STD,
        region: Sequence[Any] | None = None,
        ignore: Sequence[Sequence[Any]] = (),
    ) -> Preprocessing:
        """Make a Preprocessing from sizes as people write them.

        Parameters
        ----------
        resize, crop
            One number for a square, (height, width) for a rectangle, None for neither resize nor crop.
        mean, std
            Three numbers each.
        region, ignore
            As for the class; lists will do.

        Returns
        -------
        Preprocessing

        Raises
        ------
        InputError
            As the class itself.
        """
        red, green, blue = _three("mean", mean)
        red_std, green_std, blue_std = _three("std", std)
        return cls(
            _as_size("resize", resize),
            _as_size("crop", crop),
            (red, green, blue),
            (red_std, green_std, blue_std),
            None if region is None else check_shape("region", region),
            check_shapes("ignore", ignore),
        )

    @property
    def input_size(self) -> tuple[int, int] | None:
        """(height, width) of every network input; None: each image's own."""
        return self.crop or self.resize or self._region_size

    @cached_property
    def least_size(self) -> tuple[int, int]:
        """(height, width) of the smallest image that holds the region and what is ignored."""
        shapes = self.ignore if self.region is None else (self.region, *self.ignore)
        edges = [bounding_box(shape)[2:] for shape in shapes]
        return max((edge[0] for edge in edges), default=1), max((edge[1] for edge in edges), default=1)

    def __call__(self, pixels: np.ndarray[Any, np.dtype[Any]]) -> torch.Tensor:
        """Cut out, resize, crop and normalise one image.

        Parameters
        ----------
        pixels
            [H, W, 3] RGB; uint8 in 0..255 or float32 in 0..1.

        Returns
        -------
        torch.Tensor
            [3, h, w] float32, normalised, channels last in memory; (h, w) is :meth:`output_size`.

        Raises
        ------
        InputError
            If the pixels have another shape or type, or the image is smaller than the crop or the region.
        """
        if pixels.ndim != 3 or pixels.shape[2] != 3 or pixels.dtype not in (np.uint8, np.float32):
            raise InputError(
                f"pixels are {pixels.dtype} of shape {list(pixels.shape)}; they must be uint8 or float32 "
                "[H, W, 3]"
            )
        # Pixels that may not be written to are copied: PyTorch, which knows no such memory, would warn.
        return self.apply(torch.from_numpy(np.require(pixels, requirements=["C", "W"]))[None])[0]

    def apply(self, images: torch.Tensor) -> torch.Tensor:
        """Cut out, resize, crop and normalise images of one size.

        Parameters
        ----------
        images
            [B, H, W, 3] RGB; uint8 in 0..255 or float32 in 0..1, contiguous.

        Returns
        -------
        torch.Tensor
            [B, 3, h, w] float32, as a call of this object makes of each.

        Raises
        ------
        InputError
            If the images are smaller than the crop or the region.
        """
        original = (images.shape[1], images.shape[2])
        self.output_size(original)
        if self._region_box is not None:
            top, left, bottom, right = self._region_box
            images = images[:, top:bottom, left:right]
        height, width = images.shape[1:3]
        # Channels stay last, as the pixels come and as the backbone reads.
        images = images.permute(0, 3, 1, 2)
        # A size that an exported graph leaves open is no int, and may be any.
        if self.resize is not None and not (isinstance(height, int) and self.resize == (height, width)):
            images = _resized(images, self.resize)
        images = _as_float(images)
        if self.crop is not None:
            top, left = self._crop_offset(original)
            images = images[:, :, top : top + self.crop[0], left : left + self.crop[1]]
        # Whole rows with a mean for each of their numbers: an inner loop over three would be slow.
        rows = images.permute(0, 2, 3, 1).flatten(2)
        mean, std = (
            torch.tensor(values, dtype=torch.float32, device="cpu").repeat(images.shape[3])
            for values in (self.mean, self.std)
        )
        normalised: torch.Tensor = rows.sub(mean).div_(std).unflatten(2, (-1, 3))
        # Without shapes the size may be one that an exported graph leaves open.
        hidden = _hidden(self, self._part_size(original)) if self._has_shapes else None
        if hidden is not None:
            normalised.masked_fill_(torch.from_numpy(hidden), 0)
        return normalised.permute(0, 3, 1, 2)

    def output_size(self, original_size: tuple[int, int]) -> tuple[int, int]:
        """Size of the network input for an image.

        Parameters
        ----------
        original_size
            (height, width) of the image in pixels.

        Returns
        -------
        tuple of int
            (height, width) of the network input.

        Raises
        ------
        InputError
            If the image is smaller than the crop or the region.
        """
        resized = self._resized(original_size)
        if self.crop is None:
            return resized
        if not _fits(self.crop, resized):
            raise InputError(
                f"the image is {_text(resized)} pixels (height x width), smaller than the crop of "
                f"{_text(self.crop)}; choose a smaller crop or a resize"
            )
        return self.crop

    def scored_box(self, original_size: tuple[int, int]) -> tuple[int, int, int, int]:
        """The part of the original image that the network sees.

        Parameters
        ----------
        original_size
            (height, width) of the image in pixels.

        Returns
        -------
        tuple of int
            (top, left, bottom, right) in original pixels, half open: all pixels of the region whose centres
            lie inside the crop.

        Raises
        ------
        InputError
            If the image is smaller than the crop or the region.
        """
        top, left, bottom, right = self._scored_part(original_size)
        begin = self._begin
        return top + begin[0], left + begin[1], bottom + begin[0], right + begin[1]

    def ignored(self, original_size: tuple[int, int]) -> Mask | None:
        """The pixels of the scored box that are ignored.

        Parameters
        ----------
        original_size
            (height, width) of the image in pixels.

        Returns
        -------
        numpy.ndarray or None
            [H, W] bool, one array for all images of a size and not to be written to; None: there are none.

        Raises
        ------
        InputError
            If the image does not hold the region or what is ignored, is smaller than the crop, or nothing is
            left of it.
        """
        return _ignored(self, original_size)

    def to_original(self, anomaly_map: torch.Tensor, original_size: tuple[int, int]) -> torch.Tensor:
        """Bring a map from the network input's size to the original image.

        Parameters
        ----------
        anomaly_map
            [h, w] floating point at :meth:`output_size`.
        original_size
            (H, W) of the image in pixels.

        Returns
        -------
        torch.Tensor
            [H, W] of the map's type and device: the map sampled bilinearly at the centre of every original
            pixel inside :meth:`scored_box`, 0 outside and where it is ignored. Between the outermost centres
            of the map and its border the outermost values go on.

        Raises
        ------
        InputError
            If the map has another size than the network input.
        """
        output = self.output_size(original_size)
        if tuple(anomaly_map.shape) != output or not anomaly_map.is_floating_point():
            raise InputError(
                f"anomaly_map is {anomaly_map.dtype} of shape {list(anomaly_map.shape)}; for an image of "
                f"{_text(original_size)} it must be floating point [{output[0]}, {output[1]}]"
            )
        part = self._part_size(original_size)
        resized, offset = self._resized(original_size), self._crop_offset(original_size)
        if output == part == resized:
            inside = anomaly_map.clone()
        else:
            top, left, bottom, right = self._scored_part(original_size)
            # Columns first: the larger second step then copies whole rows of the result.
            inside = _sample_rows(anomaly_map.T, left, right, resized[1] / part[1], offset[1]).T
            inside = _sample_rows(inside.contiguous(), top, bottom, resized[0] / part[0], offset[0])
        if tuple(inside.shape) == original_size:
            full = inside
        else:
            top, left, bottom, right = self.scored_box(original_size)
            full = anomaly_map.new_zeros(original_size)
            full[top:bottom, left:right] = inside
        ignored = self.ignored(original_size)
        return full if ignored is None else full.masked_fill_(torch.tensor(ignored, device=full.device), 0)

    def mask_to_input(self, mask: np.ndarray[Any, np.dtype[Any]]) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Bring a mask of the original image to the network input's size, each pixel from the nearest one.

        Parameters
        ----------
        mask
            [H, W] bool.

        Returns
        -------
        numpy.ndarray
            [h, w] bool at :meth:`output_size`.

        Raises
        ------
        InputError
            If the mask is not 2-D or smaller than the crop or the region.
        """
        if mask.ndim != 2:
            raise InputError(f"mask has the shape {list(mask.shape)}; it must be [H, W]")
        size = (mask.shape[0], mask.shape[1])
        output = self.output_size(size)
        rows, columns = (
            begin + (2 * (np.arange(length) + start) + 1) * part // (2 * full)
            for begin, length, start, part, full in zip(
                self._begin,
                output,
                self._crop_offset(size),
                self._part_size(size),
                self._resized(size),
                strict=True,
            )
        )
        return np.asarray(mask, dtype=np.bool_)[np.ix_(rows, columns)]

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain lists and numbers, for JSON; :meth:`from_dict` is the way back."""
        return {
            "resize": None if self.resize is None else list(self.resize),
            "crop": None if self.crop is None else list(self.crop),
            "mean": list(self.mean),
            "std": list(self.std),
            "region": None if self.region is None else listed(self.region),
            "ignore": [listed(shape) for shape in self.ignore],
        }

    @classmethod
    def from_dict(cls, settings: Mapping[str, Any]) -> Preprocessing:
        """Make a Preprocessing from the dictionary of :meth:`to_dict`.

        Raises
        ------
        InputError
            If a key is missing or unknown, or a value is not allowed.
        """
        later = {"region", "ignore"}
        keys = {"resize", "crop", "mean", "std"} | later
        # Runs of earlier versions know neither.
        if set(settings) | later != keys:
            raise InputError(f"preprocessing has the keys {sorted(settings)}; they must be {sorted(keys)}")
        return cls.create(**settings)

    @property
    def _has_shapes(self) -> bool:
        return bool(self.ignore) or (self.region is not None and not is_box(self.region))

    # Outlines that a program has drawn have thousands of corners: too many to look at for every image.
    @cached_property
    def _region_box(self) -> Box | None:
        return None if self.region is None else bounding_box(self.region)

    @property
    def _begin(self) -> tuple[int, int]:
        return (0, 0) if self._region_box is None else self._region_box[:2]

    @property
    def _region_size(self) -> tuple[int, int] | None:
        if self._region_box is None:
            return None
        top, left, bottom, right = self._region_box
        return bottom - top, right - left

    def _part_size(self, original_size: tuple[int, int]) -> tuple[int, int]:
        """What is left of an image before the resize."""
        if not _fits(self.least_size, original_size):
            raise InputError(
                f"the image is {_text(original_size)} pixels (height x width); region and ignore reach to "
                f"{_text(self.least_size)}"
            )
        return self._region_size or original_size

    def _scored_part(self, original_size: tuple[int, int]) -> tuple[int, int, int, int]:
        """:meth:`scored_box` in pixels of the region."""
        output = self.output_size(original_size)
        resized, offset = self._resized(original_size), self._crop_offset(original_size)
        (top, bottom), (left, right) = (
            (_first_centre(start, full, size), _first_centre(start + length, full, size))
            for start, length, full, size in zip(
                offset, output, resized, self._part_size(original_size), strict=True
            )
        )
        return top, left, bottom, right

    def _resized(self, original_size: tuple[int, int]) -> tuple[int, int]:
        part = self._part_size(original_size)
        return self.resize or part

    def _crop_offset(self, original_size: tuple[int, int]) -> tuple[int, int]:
        height, width = self._resized(original_size)
        crop_height, crop_width = self.output_size(original_size)
        return (height - crop_height) // 2, (width - crop_width) // 2


def _as_float(images: torch.Tensor) -> torch.Tensor:
    return images.float().div_(255) if images.dtype == torch.uint8 else images


def _resized(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """[B, 3, H, W] to [B, 3, h, w] float32.

    PyTorch makes rows shorter first and columns then, so bands of rows give the same numbers, and no float32
    copy of a photograph of many pixels goes through memory.
    """
    height, width = images.shape[2:]
    if torch.compiler.is_exporting():
        # There are runtimes that have a resize but take no notice of its antialiasing.
        return _resize_matrix(size[0], height) @ _as_float(images) @ _resize_matrix(size[1], width).T
    if height * width <= _BAND_PIXELS:
        return _interpolated(_as_float(images), size)
    rows = max(1, _BAND_PIXELS // width)
    narrow = torch.empty(*images.shape[:2], height, size[1], dtype=torch.float32, device="cpu")
    for band, part in zip(images.split(rows, 2), narrow.split(rows, 2), strict=True):
        part.copy_(_interpolated(_as_float(band), (band.shape[2], size[1])))
    return _interpolated(narrow, size)


def _interpolated(images: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return torch.nn.functional.interpolate(images, size, mode="bilinear", antialias=True, align_corners=False)


def _resize_matrix(size: int, length: int) -> torch.Tensor:
    """What :func:`_interpolated` does along one axis, as a [size, length] matrix.

    Distances between centres are whole numbers, in units of half a pixel of one by one of the other: runtimes
    that compute in bfloat16 by themselves have no half pixels beyond the 128th.
    """
    pixels = torch.arange(length, device="cpu")
    # Of the pixels, for a graph's open length is no number to compare with another.
    counted = pixels[-1] + 1
    centres = (2 * torch.arange(size, device="cpu") + 1) * counted
    distances = (centres[:, None] - (2 * pixels + 1) * size).abs()
    weights = (2 * counted.clamp(min=size) - distances).clamp(min=0)
    return weights.float() / weights.sum(1, keepdim=True).float()


def _first_centre(border: int, resized: int, original: int) -> int:
    """The first original pixel whose centre is not before a border given in resized pixels.

    i + 0.5 >= border * original / resized, solved in whole numbers: a centre on the border must not depend on
    rounding.
    """
    return -((resized - 2 * border * original) // (2 * resized))


def _sample_rows(values: torch.Tensor, first: int, end: int, scale: float, offset: int) -> torch.Tensor:
    """Linear samples of the rows at the centres of the original rows first..end."""
    last = values.shape[0] - 1
    centres = torch.arange(first, end, dtype=torch.float64, device="cpu") + 0.5
    position = (centres * scale - offset - 0.5).clamp(0, last)
    below = position.floor()
    weight = (position - below).to(values)
    lower = below.long().to(values.device)
    upper = (lower + 1).clamp(max=last)
    return values[lower].lerp_(values[upper], weight[:, None])


def check_size(name: str, size: int | Sequence[int] | None) -> tuple[int, int] | None:
    """Read a size as people write it.

    Parameters
    ----------
    name
        Of the argument, for the message.
    size
        One whole number for a square, (height, width) for a rectangle, or None.

    Returns
    -------
    tuple of int or None
        (height, width), >= 1 each.

    Raises
    ------
    InputError
        It is none of these.
    """
    pair = _as_size(name, size)
    _check_pair(name, pair)
    return pair


@lru_cache(maxsize=8)
def _unseen(preprocessing: Preprocessing, part: tuple[int, int]) -> Mask | None:
    """The ignored pixels of what is left before the resize; None: there are none."""
    region, begin = preprocessing.region, preprocessing._begin
    pixels = np.zeros(part, dtype=np.bool_)
    if region is not None and not is_box(region):
        pixels |= ~drawn(region, part, begin)
    for shape in preprocessing.ignore:
        pixels |= drawn(shape, part, begin)
    return pixels if pixels.any() else None


@lru_cache(maxsize=8)
def _ignored(preprocessing: Preprocessing, original_size: tuple[int, int]) -> Mask | None:
    """See :meth:`Preprocessing.ignored`."""
    pixels = _unseen(preprocessing, preprocessing._part_size(original_size))
    if pixels is None:
        return None
    ignored = np.zeros(original_size, dtype=np.bool_)
    (row, column), (top, left, bottom, right) = preprocessing._begin, preprocessing.scored_box(original_size)
    ignored[top:bottom, left:right] = pixels[top - row : bottom - row, left - column : right - column]
    ignored.flags.writeable = False
    return ignored


@lru_cache(maxsize=8)
def _hidden(preprocessing: Preprocessing, part: tuple[int, int]) -> Mask | None:
    """[h, w, 1]: the pixels of the network's input of which an ignored one is a part; None: there are none.

    Raises
    ------
    InputError
        All are.
    """
    pixels = _unseen(preprocessing, part)
    if pixels is None:
        return None
    full = preprocessing.resize or part
    if full != part:
        rows, columns = (_resize_matrix(*lengths).numpy() for lengths in zip(full, part, strict=True))
        pixels = rows @ pixels.astype(np.float32) @ columns.T > 0
    output = preprocessing.crop or full
    top, left = ((outer - inner) // 2 for outer, inner in zip(full, output, strict=True))
    pixels = pixels[top : top + output[0], left : left + output[1], None].copy()
    if pixels.all():
        raise InputError("region, ignore: nothing is left of the image to look at")
    return pixels


def _check_pair(name: str, pair: Any) -> None:
    if pair is not None and not _is_size(pair):
        raise InputError(f"{name} is {pair!r}; it must be (height, width), two whole numbers >= 1, or None")


def _is_size(size: Any) -> bool:
    return (
        isinstance(size, tuple)
        and len(size) == 2
        and all(isinstance(edge, int) and not isinstance(edge, bool) and edge >= 1 for edge in size)
    )


def _as_size(name: str, size: int | Sequence[int] | None) -> tuple[int, int] | None:
    if size is None:
        return None
    if isinstance(size, int) and not isinstance(size, bool):
        return (size, size)
    if isinstance(size, Sequence) and len(size) == 2:
        return (size[0], size[1])
    raise InputError(f"{name} is {size!r}; it must be one whole number, (height, width) or None")


def _three(name: str, values: Sequence[float]) -> tuple[float, float, float]:
    try:
        first, second, third = (float(value) for value in values)
    except (TypeError, ValueError):
        raise InputError(f"{name} is {values!r}; it must be three numbers") from None
    return first, second, third


def _fits(inner: tuple[int, int], outer: tuple[int, int]) -> bool:
    return inner[0] <= outer[0] and inner[1] <= outer[1]


def _text(size: tuple[int, int]) -> str:
    return f"{size[0]} x {size[1]}"
