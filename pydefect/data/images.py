"""Reading images: files, folders, arrays, tensors and any iterable of them, one image at a time.

Every source ends as :class:`Image` objects with three RGB channels. 8-bit sources stay uint8; 16-bit and
floating point sources become float32 in 0..1. The scale is fixed by the type of the source (1/255, 1/65535,
1), never stretched to the contrast of the single image: a darker product must stay darker, since that may be
the defect.
"""

from __future__ import annotations

import os
import stat
import struct
import threading
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeAlias

import cv2
import numpy as np
import torch
from natsort import natsort_keygen, ns

from pydefect.errors import InputError

__all__ = [
    "IMAGE_EXTENSIONS",
    "Image",
    "ImageCollection",
    "SkippedImage",
    "draw_image",
    "is_image_file",
    "list_image_files",
    "natural_order",
    "open_images",
    "read_image",
    "read_mask_values",
    "read_values",
]

IMAGE_EXTENSIONS = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp", ".pgm", ".ppm"})
"""File name endings that are read, in lower case; the case of a file's own ending does not matter."""

Pixels: TypeAlias = np.ndarray[Any, np.dtype[Any]]

_Encoded: TypeAlias = bytes | bytearray | memoryview  # the content of an image file

_ALLOWED_SOURCES = (
    "a folder, an image file, a list of paths, a uint8, uint16, bool or float array [H, W], [H, W, 1|3|4], "
    "[N, H, W] or [N, H, W, 1|3|4], a torch tensor, the bytes of an image file, or an iterable of these"
)
_CHANNELS = (1, 3, 4)
# Draws of draw_image, of which the last must give a file that can be read.
_DRAWS = 10
_FLOAT_SLACK = 1e-6  # rounding of a resize or a mean in float32 may leave 0..1 by this much

_SILENT = 0  # a log level of OpenCV

_natural_key = natsort_keygen(alg=ns.IGNORECASE)


@dataclass(frozen=True, eq=False)
class Image:
    """One image as every later step sees it.

    Parameters
    ----------
    pixels
        [H, W, 3] RGB; uint8 in 0..255 for 8-bit sources, float32 in 0..1 for 16-bit and floating point ones.
    name
        The path relative to the folder that was read; for a list of paths, the path as given; ``image-00003``
        for the image number 3 (counted from 0) of arrays, tensors and bytes.
    path
        The file, or None for an image that came from memory.
    """

    pixels: Pixels
    name: str
    path: Path | None

    def __post_init__(self) -> None:
        """Take a path in the form of text, too."""
        if self.path is not None:
            object.__setattr__(self, "path", Path(self.path))


@dataclass(frozen=True)
class SkippedImage:
    """An image that could not be read under ``on_error="skip"``, and why; `path` as in :class:`Image`."""

    name: str
    reason: str
    path: Path | None = None


class ImageCollection:
    """Images of one source, read one at a time while iterating; made by :func:`open_images`.

    Iterating again reads again. A generator can be iterated once only: the second time raises
    :class:`~pydefect.errors.InputError` instead of silently giving no images.

    Attributes
    ----------
    skipped : list of SkippedImage
        What could not be read in the latest iteration; stays empty with ``on_error="raise"``.
    """

    def __init__(
        self,
        items: Iterable[Any],
        *,
        on_error: Literal["raise", "skip"],
        folder: Path | None = None,
        length: int | None = None,
    ) -> None:
        self.skipped: list[SkippedImage] = []
        self._items = items
        self._on_error = on_error
        self._folder = folder
        self._length = length
        self._spent = False

    def __len__(self) -> int:
        """Number of images in the source, those included that turn out to be unreadable.

        Raises
        ------
        TypeError
            If the source is an iterable whose length is unknown before it has been read.
        """
        if self._length is None:
            raise TypeError("the number of images of this iterable is not known before it has been read")
        return self._length

    def refuse(self, image: Image, reason: str) -> None:
        """Treat an image of the latest iteration that turned out to be of no use as one that cannot be read.

        Parameters
        ----------
        image
            One that the iteration gave.
        reason
            What is wrong with it.

        Raises
        ------
        InputError
            With ``on_error="raise"``; with ``"skip"`` it is listed in :attr:`skipped`.
        """
        if self._on_error == "raise":
            raise InputError(f"{image.name}: {reason}")
        self.skipped.append(SkippedImage(image.name, reason, image.path))

    def __iter__(self) -> Iterator[Image]:
        one_pass = isinstance(self._items, Iterator)
        if one_pass and self._spent:
            raise InputError(
                "the images come from a generator that has already been read; pass a list, a folder or "
                "another source that can be read more than once"
            )
        self._spent = True
        self.skipped = []
        return self._read_all(self.skipped)

    def _read_all(self, skipped: list[SkippedImage]) -> Iterator[Image]:
        number = 0
        for position, item in enumerate(self._items):
            for name, path, read in _open_item(item, position, number, self._folder):
                number += 1
                try:
                    pixels = read()
                except InputError as error:
                    if self._on_error == "raise":
                        raise
                    skipped.append(SkippedImage(name, str(error), path))
                    continue
                yield Image(pixels, name, path)


def open_images(source: Any, *, on_error: Literal["raise", "skip"] = "raise") -> ImageCollection:
    """Open images of any kind for reading one at a time.

    Parameters
    ----------
    source
        One of

        - a folder, read recursively in natural order (``2.png`` before ``10.png``); hidden files and folders
          and files with other endings than :data:`IMAGE_EXTENSIONS` are passed over,
        - the path of one image file,
        - a NumPy array: [H, W]; [H, W, C] with C 1, 3 or 4; [N, H, W, C]; every other 3-D shape is N grey
          images [N, H, W],
        - a torch tensor: [H, W], [C, H, W] or [N, C, H, W]; [H, W, C] and [N, H, W, C] only where the
          channel-first reading is impossible; every other 3-D shape is N grey images,
        - a PIL image, or an :class:`Image`,
        - bytes (also a bytearray or memoryview), or a file opened for reading bytes: the content of one image
          file, as cameras and web requests bring it,
        - a list, tuple, generator, 1-D array or other iterable of paths, arrays, tensors, PIL images,
          :class:`Image` objects, bytes or open files, their sizes free to differ. It is streamed: one item at
          a time is asked for. Items of several images (batches) are taken apart.

        Arrays and tensors are uint8 in 0..255, uint16 in 0..65535, bool, or floating point in 0..1. One
        channel is grey, three are RGB, four RGBA; transparent pixels are shown over white. OpenCV's frames
        are BGR: pass ``frame[..., ::-1]``.
    on_error
        ``"raise"`` stops at the first image that cannot be read; ``"skip"`` passes over it and lists it in
        :attr:`ImageCollection.skipped`.

    Returns
    -------
    ImageCollection
        An iterable of :class:`Image`. An ImageCollection given as `source` is returned as it is.

    Raises
    ------
    InputError
        If the source is missing, empty or of another kind; while iterating, if an image cannot be read.

    Examples
    --------
    >>> import numpy as np
    >>> images = open_images(np.zeros((5, 32, 48), dtype=np.uint8))
    >>> len(images)
    5
    >>> first = next(iter(images))
    >>> first.name, first.pixels.shape, first.pixels.dtype.name
    ('image-00000', (32, 48, 3), 'uint8')
    """
    if on_error not in ("raise", "skip"):
        raise InputError(f'on_error is {on_error!r}; allowed are "raise" and "skip"')
    if isinstance(source, ImageCollection):
        return source
    if isinstance(source, str | os.PathLike):
        return _open_path(source, on_error)
    if isinstance(source, Image | _Encoded) or _is_open_file(source):
        source = [source]
    source = _as_array_if_pil(source, "source")
    if isinstance(source, np.ndarray) and source.ndim == 1 and source.dtype.kind in "UO":
        source = source.tolist()  # of paths
    if isinstance(source, np.ndarray | torch.Tensor):
        # Taken apart where it is read: a part of it could be taken for a batch once more.
        return ImageCollection([source], on_error=on_error, length=len(_split_array(source, "source")))
    if isinstance(source, list | tuple):
        if not source:
            raise InputError(f"source is an empty {type(source).__name__}; it must hold at least one image")
        length = sum(_count(item, position) for position, item in enumerate(source))
        return ImageCollection(source, on_error=on_error, length=length)
    if isinstance(source, Iterable) and not isinstance(source, dict):
        return ImageCollection(source, on_error=on_error)
    raise InputError(f"source is of type {type(source).__name__}; allowed are {_ALLOWED_SOURCES}")


def read_image(path: str | os.PathLike[str]) -> Pixels:
    """Read the pixels of one image file.

    Grey becomes three equal channels, transparent pixels are shown over white, the orientation of EXIF (TIFF:
    of the file's own tag) is applied, 16-bit values are divided by 65535. TIFF files in which zero is white
    are no negatives. Of a file with several pages the first is read.

    Parameters
    ----------
    path
        An image file; its ending does not matter, its content decides.

    Returns
    -------
    numpy.ndarray
        [H, W, 3] RGB; uint8 in 0..255, or float32 in 0..1 for 16-bit and floating point files.

    Raises
    ------
    InputError
        If the file is missing, empty, truncated, or no image. The message names the file.
    """
    path = Path(path)
    return _decoded_rgb(_read_bytes(path), str(path))


def _decoded_rgb(data: bytes, name: str) -> Pixels:
    pixels = _decode(data, name)
    if _is_png(data) and pixels.ndim == 2:
        pixels = _without_transparent_grey(pixels, data)
    if pixels.ndim == 3:
        if pixels.shape[2] not in (3, 4):
            raise InputError(f"{name}: has {pixels.shape[2]} channels; allowed are grey, RGB and RGBA")
        pixels = pixels[..., [2, 1, 0, 3][: pixels.shape[2]]]
    return _to_rgb(pixels, name, premultiplied=_is_premultiplied(pixels, data))


def draw_image(paths: Sequence[Path], rng: np.random.Generator) -> Pixels:
    """Read an image drawn from many, for a training that one damaged file of a million must not end.

    A file that cannot be read is named in a warning and another one is drawn.

    Parameters
    ----------
    paths
        Image files, at least one.
    rng
        Of the draw: one number, and one more for every file that cannot be read.

    Returns
    -------
    numpy.ndarray
        As :func:`read_image`.

    Raises
    ------
    InputError
        If none of ten drawn files can be read. The message names the last.
    """
    for _ in range(_DRAWS - 1):
        try:
            return read_image(paths[int(rng.integers(len(paths)))])
        except InputError as error:
            warnings.warn(f"{error}; another image is taken", stacklevel=2)
    return read_image(paths[int(rng.integers(len(paths)))])


def read_mask_values(path: Path) -> Pixels:
    """Read the values of a mask file: above zero where something is marked.

    The orientation of EXIF is applied. Of several channels the largest value counts. What is wholly
    transparent is not marked, whatever colour is hidden there. Files that are not kept exactly (JPEG, WebP by
    quality) have traces around every mark: only their values in the upper half are marks.

    Parameters
    ----------
    path
        An image file.

    Returns
    -------
    numpy.ndarray
        [H, W] of the file's type, 8 or 16 bits or floating point.

    Raises
    ------
    InputError
        If the file is missing, empty, truncated, or no image.
    """
    data = _read_bytes(path)
    pixels = _decode(data, str(path))
    values = pixels
    if pixels.ndim == 3:
        colours = pixels.shape[2] - (pixels.shape[2] in (2, 4))
        values = pixels[..., :colours].max(axis=2)
        if colours < pixels.shape[2]:
            values[pixels[..., -1] == 0] = 0
    if _is_lossy(data):
        values[values < 128] = 0
    return values


def read_values(path: Path) -> Pixels:
    """Read the values of an image file that are no colours, such as a map's.

    Parameters
    ----------
    path
        An image file.

    Returns
    -------
    numpy.ndarray
        [H, W] or [H, W, C] as they lie in the file, of its type.

    Raises
    ------
    InputError
        If the file is missing, empty, truncated, no image, or a TIFF of float16, which OpenCV does not read.
    """
    data = _read_bytes(path)
    bits, floating = _tiff_short(data, _BITS_PER_SAMPLE), _tiff_short(data, _SAMPLE_FORMAT) == 3
    if _is_tiff(data) and bits == 16 and floating:
        raise InputError(f"{path}: a TIFF of float16 is not read; write float32, or an .npy file")
    return _decode(data, str(path))


def is_image_file(path: Path) -> bool:
    """Whether the name says that this is an image file, and no hidden one."""
    return path.suffix.lower() in IMAGE_EXTENSIONS and not path.name.startswith(".")


def list_image_files(folder: Path) -> list[Path]:
    """All image files below a folder, in natural order; hidden files and folders are passed over.

    Parameters
    ----------
    folder
        An existing folder. Links to folders are followed, a folder that links back to itself is read once.
        Pipes, sockets and devices are passed over.

    Returns
    -------
    list of Path
        Paths that begin with `folder`.
    """
    files: list[Path] = []
    visited: set[str] = set()
    for where, folders, names in os.walk(folder, followlinks=True, onerror=_refuse_folder):
        real = os.path.realpath(where)
        if real in visited:
            folders.clear()
            continue
        visited.add(real)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        paths = (Path(where, name) for name in names)
        files.extend(path for path in paths if is_image_file(path) and not _is_special(path))
    return natural_order(files)


def _is_special(path: Path) -> bool:
    """Whether this is a pipe, a socket or a device, which might be read for ever."""
    try:
        return not stat.S_ISREG(path.stat().st_mode)
    except OSError:
        return False  # such as a link to nothing: its reader will say so


def _refuse_folder(error: OSError) -> None:
    # os.walk would pass over the folder, and its images would be missing without a word.
    raise InputError(f"{error.filename}: the folder cannot be read ({error.strerror})") from None


def natural_order(paths: Iterable[Path]) -> list[Path]:
    """Paths in the order a person counts, ``2.png`` before ``10.png``, whatever the case of letters."""
    # The plain path breaks ties, so that "a.png" and "A.png" come in the same order on every file system.
    return sorted(paths, key=lambda path: (tuple(map(_natural_key, path.parts)), path.as_posix()))


def _open_path(source: str | os.PathLike[str], on_error: Literal["raise", "skip"]) -> ImageCollection:
    path = Path(source)
    if not str(source):
        raise InputError("source is an empty path; it must name a folder or an image file")
    if path.is_dir():
        files = list_image_files(path)
        if not files:
            endings = " ".join(sorted(IMAGE_EXTENSIONS))
            raise InputError(f"source: no image in the folder {path} (looked recursively for {endings})")
        return ImageCollection(files, on_error=on_error, folder=path, length=len(files))
    if not path.exists():
        raise InputError(f"source: there is no file or folder {path}")
    return ImageCollection([source], on_error=on_error, length=1)


_Array: TypeAlias = Pixels | torch.Tensor
_Opened: TypeAlias = tuple[str, Path | None, Callable[[], Pixels]]


def _open_item(item: Any, position: int, number: int, folder: Path | None) -> Iterator[_Opened]:
    """Name, path and reader of each image in one item of a source: one, or several for a batch."""
    if isinstance(item, Image):
        yield item.name, item.path, partial(_checked, item)
    elif isinstance(item, str | os.PathLike):
        path = Path(item)
        name = path.relative_to(folder).as_posix() if folder else os.fspath(item)
        yield name, path, lambda: read_image(path)
    elif isinstance(item, _Encoded):
        name = f"image-{number:05d}"
        yield name, None, lambda: _decoded_rgb(bytes(item), name)
    elif _is_open_file(item):
        name = f"image-{number:05d}"
        yield name, None, lambda: _decoded_rgb(_read_open_file(item, name), name)
    else:
        for offset, array in enumerate(_arrays_of_item(item, position)):
            name = f"image-{number + offset:05d}"
            yield name, None, partial(_array_to_rgb, array, name)


def _is_open_file(item: Any) -> bool:
    # Its lines could be iterated over, and each would be taken for an image.
    return callable(getattr(item, "read", None))


def _read_open_file(file: Any, name: str) -> bytes:
    content = file.read()
    if not isinstance(content, _Encoded):
        raise InputError(
            f"{name}: read() of the {type(file).__name__} gave an object of type {type(content).__name__}; "
            "it must give bytes (open the file with 'rb', await what is to be awaited)"
        )
    return bytes(content)


def _checked(image: Image) -> Pixels:
    """The pixels of an image that somebody else made: NaN would pass for good with some methods."""
    pixels: Any = image.pixels
    if not isinstance(pixels, np.ndarray) or pixels.ndim != 3 or pixels.shape[2] != 3 or 0 in pixels.shape:
        given = f"of shape {list(pixels.shape)}" if hasattr(pixels, "shape") else f"a {type(pixels).__name__}"
        raise InputError(f"{image.name}: pixels are {given}; they must be an array [H, W, 3]")
    if pixels.dtype not in (np.uint8, np.float32):
        raise InputError(f"{image.name}: pixels are of type {pixels.dtype}; allowed are uint8 and float32")
    return _to_standard_type(pixels, image.name)


def _count(item: Any, position: int) -> int:
    single = isinstance(item, Image | str | os.PathLike | _Encoded) or _is_open_file(item)
    return 1 if single else len(_arrays_of_item(item, position))


def _arrays_of_item(item: Any, position: int) -> list[_Array]:
    item = _as_array_if_pil(item, f"item {position} of source")
    if isinstance(item, np.ndarray | torch.Tensor):
        return _split_array(item, f"item {position} of source")
    raise InputError(
        f"item {position} of source is of type {type(item).__name__}; allowed in an iterable are paths, "
        "arrays, tensors, PIL images, pydefect images and bytes of image files"
    )


def _as_array_if_pil(item: Any, what: str) -> Any:
    if not (hasattr(item, "__array_interface__") and hasattr(item, "mode") and hasattr(item, "convert")):
        return item
    # The other modes hold palette indices, inks or luma planes, which would pass for grey, RGBA or RGB.
    plain = item.mode in ("1", "L", "RGB", "RGBA", "F", "I", "I;16", "I;16B", "I;16L", "I;16N")
    try:
        return np.asarray(item if plain else item.convert("RGBA"))
    except ValueError as error:
        raise InputError(f"{what} is a PIL image of mode {item.mode}, which is not read: {error}") from None


def _split_array(array: _Array, what: str) -> list[_Array]:
    """Views of the single images [H, W] or [H, W, C] of an array or tensor."""
    given = list(array.shape)
    if isinstance(array, torch.Tensor) and array.ndim in (3, 4) and given[-3] in _CHANNELS:
        array = array.movedim(-3, -1)
    is_single = array.ndim == 2 or (array.ndim == 3 and array.shape[-1] in _CHANNELS)
    is_batch = array.ndim == 3 or (array.ndim == 4 and array.shape[-1] in _CHANNELS)
    if not (is_single or is_batch):
        raise InputError(
            f"{what} has the shape {given}; allowed are [H, W], [H, W, C], [N, H, W] and [N, H, W, C] with "
            "C 1, 3 or 4, and for tensors [C, H, W] and [N, C, H, W]"
        )
    if 0 in given:
        raise InputError(f"{what} has the shape {given}; an image has at least one pixel")
    return [array] if is_single else list(array)


def _array_to_rgb(array: _Array, name: str) -> Pixels:
    if isinstance(array, torch.Tensor):
        # NumPy has no bfloat16, and no tensors whose values are to be negated yet.
        try:
            plain = array.float() if array.dtype == torch.bfloat16 else array
            array = plain.detach().cpu().resolve_neg().numpy()
        except (TypeError, NotImplementedError) as error:  # sparse, quantised, without data
            raise InputError(f"{name}: the tensor cannot be read as an array: {error}") from None
    return _to_rgb(array, name)


def _to_rgb(pixels: Pixels, name: str, *, premultiplied: bool = False) -> Pixels:
    """[H, W] or [H, W, 1|3|4] RGB(A) of an allowed type to [H, W, 3] uint8 or float32 in 0..1."""
    pixels = _to_standard_type(pixels, name)
    if pixels.ndim == 2:
        pixels = pixels[..., np.newaxis]
    if pixels.shape[2] == 4:
        pixels = _over_white(pixels, premultiplied)
    elif pixels.shape[2] == 1:
        pixels = np.repeat(pixels, 3, axis=2)
    return np.ascontiguousarray(pixels)


def _to_standard_type(pixels: Pixels, name: str) -> Pixels:
    if not pixels.dtype.isnative:
        pixels = pixels.astype(pixels.dtype.newbyteorder("="))
    if pixels.dtype == np.uint8:
        return pixels
    if pixels.dtype == np.bool_:
        return pixels.astype(np.uint8) * np.uint8(255)
    if pixels.dtype == np.uint16:
        return pixels.astype(np.float32) / np.float32(65535)
    if not np.issubdtype(pixels.dtype, np.floating):
        raise InputError(
            f"{name}: pixels are of type {pixels.dtype}; allowed are uint8, uint16, bool and floating point"
        )
    low, high = float(pixels.min()), float(pixels.max())
    if not (np.isfinite(low) and np.isfinite(high)):
        raise InputError(f"{name}: there are NaN or infinite values among the pixels")
    if low < -_FLOAT_SLACK or high > 1 + _FLOAT_SLACK:
        raise InputError(
            f"{name}: floating point pixels lie in {low:.6g}..{high:.6g}; they must lie in 0..1 (divide by "
            "255, or pass uint8)"
        )
    return np.clip(pixels.astype(np.float32), 0, 1)


def _over_white(rgba: Pixels, premultiplied: bool) -> Pixels:
    is_bytes = rgba.dtype == np.uint8
    wide = rgba.astype(np.uint16) if is_bytes else rgba
    color, alpha = wide[..., :3], wide[..., 3:]
    if premultiplied:
        white = 255 if is_bytes else 1
        composed: Pixels = np.minimum(color + (white - alpha), white)
    elif is_bytes:
        composed = (color * alpha + 255 * (255 - alpha) + 127) // 255
    else:
        composed = color * alpha + (1 - alpha)
    return composed.astype(rgba.dtype)


def _without_transparent_grey(pixels: Pixels, data: bytes) -> Pixels:
    """[H, W] of a grey PNG file, white where the one value is that the file calls transparent.

    OpenCV makes an alpha channel of such a colour and of palettes, but not of such a grey value.
    """
    chunks = dict(_png_chunks(data))
    value, depth = chunks.get(b"tRNS", b""), chunks[b"IHDR"][8]
    if len(value) != 2:
        return pixels
    (transparent,) = struct.unpack(">H", value)
    # Values of 1, 2 and 4 bits come spread over 0..255.
    transparent *= 255 // (2**depth - 1) if depth < 8 else 1
    return np.where(pixels == transparent, np.iinfo(pixels.dtype).max, pixels).astype(pixels.dtype)


def _is_premultiplied(pixels: Pixels, data: bytes) -> bool:
    """Whether the colours of a decoded file are already multiplied by alpha, which only TIFF has.

    Associated alpha is; with unassociated one libtiff multiplies colours of 8 bits while it decodes, and no
    others. Where the file does not say which alpha it has, colours are taken as they come.
    """
    if not _is_tiff(data):
        return False
    extra_samples, associated, unassociated = 338, 1, 2
    kind = _tiff_short(data, extra_samples)
    return kind == associated or (kind == unassociated and pixels.dtype == np.uint8)


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except IsADirectoryError:
        raise InputError(f"{path}: is a folder; pass one folder alone, or a list of image files") from None
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror or error})") from None


def _decode(data: bytes, name: str) -> Pixels:
    """[H, W] or [H, W, C] BGR or BGRA of the file's type, with the EXIF orientation applied."""
    if not data:
        raise InputError(f"{name}: the file is empty (0 bytes)")
    # ANYDEPTH | ANYCOLOR keeps depth and grey and applies the EXIF orientation, but drops alpha. UNCHANGED
    # keeps alpha, and is asked for only in formats whose fourth channel is one: in BMP it is mostly unused
    # and zero.
    flags = cv2.IMREAD_ANYDEPTH | cv2.IMREAD_ANYCOLOR
    if _is_png(data) or _is_webp(data) or (_is_tiff(data) and not _is_cmyk_tiff(data)):
        flags = cv2.IMREAD_UNCHANGED
    if (_is_png(data) and not _png_ends(data)) or (_is_jpeg(data) and not _jpeg_ends(data)):
        # The decoders would not do: libpng writes to stderr, and OpenCV 4.10 fills up a JPEG with grey.
        raise InputError(f"{name}: the file is damaged: it is cut off before its end ({len(data)} bytes)")
    try:
        with _silent_opencv:
            pixels = cv2.imdecode(np.frombuffer(data, np.uint8), flags)
    except cv2.error as error:
        raise InputError(f"{name}: cannot be decoded ({error.err or error})") from None
    if pixels is None:
        reason = "the file is damaged or cut off" if _has_known_signature(data) else "the file is no image"
        raise InputError(f"{name}: {reason} ({len(data)} bytes, could not be decoded)")
    if _is_png(data) or _is_webp(data):
        # Where alpha is kept, OpenCV applies the orientation of a TIFF, but not that of PNG and WebP.
        pixels = _oriented(np.asarray(pixels), _exif_orientation(data))
    if _is_white_zero_tiff(data) and pixels.ndim == 2 and pixels.dtype != np.uint8:
        # Of 1 and 8 bits libtiff has made black 0; all others come as they lie in the file.
        pixels = _negative(np.asarray(pixels))
    return np.asarray(pixels)


# OpenCV 4.10 and older have it at the top.
_set_opencv_log_level = getattr(cv2, "setLogLevel", None) or cv2.utils.logging.setLogLevel


class _SilentOpenCV:
    """No log lines of OpenCV about a broken file: the InputError says all a user needs.

    The level is OpenCV's own, for all threads: the first reader lowers it, the last one puts it back.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._readers = 0
        self._level = 0

    def __enter__(self) -> None:
        with self._lock:
            if self._readers == 0:
                self._level = _set_opencv_log_level(_SILENT)
            self._readers += 1

    def __exit__(self, *_: object) -> None:
        with self._lock:
            self._readers -= 1
            if self._readers == 0:
                _set_opencv_log_level(self._level)


_silent_opencv = _SilentOpenCV()


def _is_png(data: bytes) -> bool:
    return data.startswith(b"\x89PNG\r\n\x1a\n")


def _is_jpeg(data: bytes) -> bool:
    return data.startswith(b"\xff\xd8")


def _is_webp(data: bytes) -> bool:
    return data[:4] == b"RIFF" and data[8:12] == b"WEBP"


def _is_lossy(data: bytes) -> bool:
    return _is_jpeg(data) or (_is_webp(data) and any(name == b"VP8 " for name, _ in _webp_chunks(data)))


def _is_tiff(data: bytes) -> bool:
    return data[:4] in (b"II*\0", b"MM\0*")


_BITS_PER_SAMPLE, _PHOTOMETRIC_INTERPRETATION, _SAMPLE_FORMAT = 258, 262, 339


def _is_cmyk_tiff(data: bytes) -> bool:
    separated = 5
    return _tiff_short(data, _PHOTOMETRIC_INTERPRETATION) == separated


def _is_white_zero_tiff(data: bytes) -> bool:
    white_is_zero = 0
    return _is_tiff(data) and _tiff_short(data, _PHOTOMETRIC_INTERPRETATION) == white_is_zero


def _has_known_signature(data: bytes) -> bool:
    others = (b"BM", b"P1", b"P2", b"P3", b"P4", b"P5", b"P6", b"II+\0", b"MM\0+")
    return data.startswith(others) or any(known(data) for known in (_is_png, _is_jpeg, _is_webp, _is_tiff))


def _png_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Type and content of each complete chunk."""
    start = 8
    while start + 12 <= len(data):
        (length,) = struct.unpack_from(">I", data, start)
        end = start + 12 + length
        if end > len(data):
            return
        yield data[start + 4 : start + 8], data[start + 8 : end - 4]
        start = end


def _png_ends(data: bytes) -> bool:
    return any(kind == b"IEND" for kind, _ in _png_chunks(data))


def _jpeg_ends(data: bytes) -> bool:
    """Whether the image itself has an end marker; a thumbnail in the EXIF data may have one too."""
    start_of_scan, end_of_image = b"\xff\xda", b"\xff\xd9"
    start = 2
    while start + 4 <= len(data) and data[start : start + 2] != start_of_scan:
        if data[start + 1] == 0xFF:  # padding
            start += 1
            continue
        (length,) = struct.unpack_from(">H", data, start + 2)
        start += 2 + length
    return data.find(end_of_image, start) >= 0


def _webp_chunks(data: bytes) -> Iterator[tuple[bytes, bytes]]:
    start = 12
    while start + 8 <= len(data):
        (length,) = struct.unpack_from("<I", data, start + 4)
        yield data[start : start + 4], data[start + 8 : start + 8 + length]
        start += 8 + length + length % 2


def _exif_orientation(data: bytes) -> int:
    """The EXIF orientation of a PNG or WebP file, 1 (upright) to 8; 1 where none is given."""
    chunks = _png_chunks(data) if _is_png(data) else _webp_chunks(data)
    orientation_tag = 274
    for kind, content in chunks:
        if kind in (b"eXIf", b"EXIF"):
            return _tiff_short(content.removeprefix(b"Exif\0\0"), orientation_tag) or 1
    return 1


def _tiff_short(data: bytes, tag: int) -> int | None:
    """A 16-bit entry of the first directory of a TIFF file; EXIF data has the same form."""
    order = "<" if data[:2] == b"II" else ">"
    try:
        (start,) = struct.unpack_from(order + "I", data, 4)
        (entries,) = struct.unpack_from(order + "H", data, start)
        for entry in range(entries):
            found, _, _, value = struct.unpack_from(order + "HHIH", data, start + 2 + 12 * entry)
            if found == tag:
                return int(value)
    except struct.error:
        return None
    return None


def _negative(pixels: Pixels) -> Pixels:
    white = 1 if pixels.dtype.kind == "f" else np.iinfo(pixels.dtype).max
    return np.asarray(white - pixels)


def _oriented(pixels: Pixels, orientation: int) -> Pixels:
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    # After the transposition of 5..8 the same two flips remain as for 2..4.
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return pixels
