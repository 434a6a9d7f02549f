"""What is wrong with a data set: images that test and training share, damaged files, odd sizes, empty
masks."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from pydefect.data.images import read_image, read_mask_values
from pydefect.data.layouts import Dataset, Sample, read_dataset, read_mask
from pydefect.errors import InputError

__all__ = ["DataWarning", "check_dataset"]

Kind = Literal["unreadable", "leak", "near_leak", "contradiction", "repeated", "size", "mask"]

_THUMBNAIL = 32
# Of the distance that is usual between an image and the training image most like it. Another format, size
# or exposure of one photograph stays below it: 0.02 to 0.25 on the four shared sets. Photographs of different
# products that lie in the same place do not: 0.5 and more.
_NEAR = 0.25
# So many training images are enough to know what is usual among them.
_MOST_COMPARED = 1000
# Up to this share of the images, other sizes than the usual one are the exception and named one by one.
_ODD_SIZES = 0.1


@dataclass(frozen=True)
class DataWarning:
    """Something about a data set that a reader of its figures should know.

    Attributes
    ----------
    kind
        ``"unreadable"``: files that are damaged or of a kind that is not read. ``"leak"``: test images whose
        pixels are those of a training image. ``"near_leak"``: the same photographs by all appearance, in
        another size, format or exposure.
        ``"contradiction"``: equal test images with different labels. ``"repeated"``: equal images within the
        training or the test part. ``"size"``: sizes differ. ``"mask"``: a defective image's mask is empty,
        unreadable or of another size.
    message
        One sentence.
    images
        The names concerned, relative to the data set's folder; of a pair the test image and the other one.
    """

    kind: Kind
    message: str
    images: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class _Seen:
    """What is kept of a file: enough to recognise it, and no pixels."""

    name: str
    sample: Sample
    size: tuple[int, int] | None = None
    digest: bytes = b""
    thumbnail: NDArray[np.float32] = field(default_factory=lambda: np.zeros(0, dtype=np.float32))
    problem: str = ""
    mask_problem: str = ""


def check_dataset(dataset: Dataset | str | os.PathLike[str]) -> list[DataWarning]:
    """Look at every image of a data set and report what may spoil its figures.

    Parameters
    ----------
    dataset
        The folder of one category, or what :func:`pydefect.data.layouts.read_dataset` made of it.

    Returns
    -------
    list of DataWarning
        The most serious first; empty where nothing was found.

    Raises
    ------
    InputError
        The folder is no data set.

    Notes
    -----
    Nearly equal images are found by the distance of their grey thumbnails of 32x32 pixels, brought to mean 0
    and variance 1: a test image is reported where that distance to a training image is less than a quarter of
    what is usual. That is the median over the training images, each compared with the others, or over the
    test images, whichever is larger: the first holds where most of the test part leaks, the second where the
    training part is full of near copies itself. Where both is so (frames of a film), copies cannot be told
    from neighbours and are not found; nor are shifts and crops of one photograph.
    """
    if isinstance(dataset, str | os.PathLike):
        dataset = read_dataset(dataset)
    # OpenCV decodes outside of Python's lock.
    with ThreadPoolExecutor(os.cpu_count()) as pool:

        def seen(samples: Sequence[Sample]) -> list[_Seen]:
            return list(pool.map(lambda sample: _look(sample, dataset.root), samples))

        train = seen([*dataset.train, *dataset.validation])
        test = seen(dataset.test)
    return [
        *_unreadable([*train, *test]),
        *_leaks(train, test),
        *_contradictions(test),
        *_masks(test),
        *_sizes([*train, *test]),
        *_repeated(train, "training"),
        *_repeated(test, "test"),
    ]


def _look(sample: Sample, root: Path) -> _Seen:
    inside = sample.image.is_relative_to(root)
    name = sample.image.relative_to(root).as_posix() if inside else str(sample.image)
    try:
        pixels = read_image(sample.image)
    except (InputError, OSError) as error:
        return _Seen(name, sample, problem=str(error))
    size = (pixels.shape[0], pixels.shape[1])
    content = hashlib.blake2b(repr((pixels.shape, pixels.dtype.str)).encode(), digest_size=16)
    content.update(pixels.tobytes())
    return _Seen(
        name, sample, size, content.digest(), _thumbnail(pixels), mask_problem=_mask_problem(sample, size)
    )


def _thumbnail(pixels: NDArray[Any]) -> NDArray[np.float32]:
    small = cv2.resize(pixels, (_THUMBNAIL, _THUMBNAIL), interpolation=cv2.INTER_AREA).astype(np.float32)
    grey = small.mean(axis=2).ravel()
    grey -= grey.mean()
    # A picture of one colour stays 0.
    return np.asarray(grey / max(float(grey.std()), 1e-6), dtype=np.float32)


def _mask_problem(sample: Sample, size: tuple[int, int]) -> str:
    if not sample.masks:
        return ""
    try:
        if any(read_mask_values(mask).shape != size for mask in sample.masks):
            return "of another size than its image"
        return "" if read_mask(sample, size).any() else "empty"
    except (InputError, OSError):
        return "unreadable"


def _unreadable(images: list[_Seen]) -> Iterable[DataWarning]:
    broken = [image for image in images if image.problem]
    if broken:
        yield DataWarning(
            "unreadable",
            f"{_count(broken, 'file')} cannot be read.",
            tuple((image.name,) for image in broken),
        )


def _leaks(train: list[_Seen], test: list[_Seen]) -> Iterable[DataWarning]:
    train = [image for image in train if not image.problem]
    test = [image for image in test if not image.problem]
    known: dict[bytes, _Seen] = {}
    for image in train:
        known.setdefault(image.digest, image)
    equal = [(image.name, known[image.digest].name) for image in test if image.digest in known]
    if equal:
        yield DataWarning(
            "leak", f"{_count(equal, 'test image')} can be found among the training images.", tuple(equal)
        )
    near = _near_pairs(list(known.values()), [image for image in test if image.digest not in known])
    if near:
        yield DataWarning(
            "near_leak",
            f"{_count(near, 'test image')} seem{'s' if len(near) == 1 else ''} to show what a training image "
            "shows, in another size, format or exposure.",
            tuple(near),
        )


def _near_pairs(train: list[_Seen], test: list[_Seen]) -> list[tuple[str, str]]:
    """Test images, and the training image that each nearly is.

    Equal pixels must have been sorted out, within the training part too: they would pass for what is usual.
    """
    if not train or not test:
        return []
    there, here = (np.stack([image.thumbnail for image in images]) for images in (train, test))
    distance = _distance(here, there)
    nearest = distance.argmin(axis=1)
    found = distance[np.arange(len(test)), nearest]
    limit = _NEAR * max(float(np.median(found)), _usual_distance(there))
    return [
        (image.name, train[other].name)
        for image, other, its in zip(test, nearest.tolist(), found.tolist(), strict=True)
        if its < limit
    ]


def _usual_distance(thumbnails: NDArray[np.float32]) -> float:
    """The median distance of thumbnails [n, d] to the most like of the others; 0 where there is but one."""
    if len(thumbnails) < 2:
        return 0.0
    compared = np.arange(0, len(thumbnails), -(-len(thumbnails) // _MOST_COMPARED))
    distance = _distance(thumbnails[compared], thumbnails)
    distance[np.arange(len(compared)), compared] = np.inf
    return float(np.median(distance.min(axis=1)))


def _distance(one: NDArray[np.float32], other: NDArray[np.float32]) -> NDArray[np.float32]:
    # Both have mean 0 and variance 1, so that the mean squared difference is 2 - 2 * correlation.
    return np.asarray(np.sqrt(np.maximum(2 - 2 * (one @ other.T) / one.shape[1], 0)), dtype=np.float32)


def _contradictions(test: list[_Seen]) -> Iterable[DataWarning]:
    groups = [group for group in _equal_groups(test) if len({image.sample.label for image in group}) > 1]
    if groups:
        yield DataWarning(
            "contradiction",
            f"{_count(groups, 'test image')} {'is' if len(groups) == 1 else 'are'} there more than once, "
            "labelled good and defective.",
            tuple(tuple(image.name for image in group) for group in groups),
        )


def _repeated(images: list[_Seen], part: str) -> Iterable[DataWarning]:
    groups = _equal_groups(images)
    if groups:
        extra = sum(len(group) - 1 for group in groups)
        yield DataWarning(
            "repeated",
            f"{extra} {part} {'image repeats another one' if extra == 1 else 'images repeat others'}.",
            tuple(tuple(image.name for image in group) for group in groups),
        )


def _equal_groups(images: list[_Seen]) -> list[list[_Seen]]:
    groups: dict[bytes, list[_Seen]] = {}
    for image in images:
        if not image.problem:
            groups.setdefault(image.digest, []).append(image)
    return [group for group in groups.values() if len(group) > 1]


def _masks(test: list[_Seen]) -> Iterable[DataWarning]:
    for problem in ("unreadable", "empty", "of another size than its image"):
        found = [image for image in test if image.mask_problem == problem]
        if found:
            yield DataWarning(
                "mask",
                f"The mask of {_count(found, 'defective image')} is {problem}.",
                tuple((image.name,) for image in found),
            )


def _sizes(images: list[_Seen]) -> Iterable[DataWarning]:
    sizes = Counter(image.size for image in images if image.size is not None)
    if len(sizes) < 2:
        return
    usual, count = sizes.most_common(1)[0]
    odd = [image for image in images if image.size not in (usual, None)]
    if len(odd) <= _ODD_SIZES * len(images):
        yield DataWarning(
            "size",
            f"{_count(odd, 'image')} {'has' if len(odd) == 1 else 'have'} another size than the {count} "
            f"others, which are {_text(usual)} pixels.",
            tuple((image.name,) for image in odd),
        )
    else:
        by_area = sorted(sizes, key=lambda size: size[0] * size[1])
        yield DataWarning(
            "size",
            f"The images have {len(sizes)} sizes, from {_text(by_area[0])} to {_text(by_area[-1])} pixels.",
        )


def _count(things: Sequence[Any], what: str) -> str:
    return f"{len(things)} {what}{'' if len(things) == 1 else 's'}"


def _text(size: tuple[int, int]) -> str:
    return f"{size[1]} x {size[0]}"
