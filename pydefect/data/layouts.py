"""Readers of data set folders: MVTec AD, MVTec LOCO AD, VisA, magnetic tiles and plain folders."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np

from pydefect.data.images import is_image_file, list_image_files, natural_order, read_mask_values
from pydefect.errors import InputError

__all__ = [
    "LAYOUTS",
    "Dataset",
    "DefectKind",
    "Region",
    "Sample",
    "defective_images",
    "held_out_images",
    "is_category",
    "read_dataset",
    "read_defects_config",
    "read_mask",
    "read_regions",
    "training_images",
]

GOOD = "good"
UNKNOWN = "unknown"
# Names of folders, by their letters and digits in any case: of good images, all called GOOD here, ...
_GOOD_NAMES = frozenset({GOOD, "normal", "ok"})
# ... of good images where others are called the opposite, or in a part of a data set, ...
_GOOD_AMONG_OTHERS = frozenset({"io", "pass", "passed"})
# ... of good images that are held out, as anomalib's ``normal_test_dir``, where no split is drawn then, ...
_GOOD_TEST_NAMES = frozenset({"goodtest", "normaltest", "oktest", "testgood", "testnormal", "testok"})
# ... of images that are surely not good, whatever lies beside them, ...
_DEFECTIVE_NAMES = frozenset(
    {"abnormal", "anomalous", "anomaly", "bad", "defect", "defective", "defects", "ko", "ng", "nok"}
    | {"fail", "failed", "faulty", "nio", "notgood", "notok", "reject", "rejected", "rejects", "scrap"}
)
# ... and of masks.
_MASK_NAMES = frozenset({"groundtruth", "gt", "gtmask", "gtmasks", "mask", "maskdir", "masks"})
# Words that take back a name of good images beside them.
_NEGATIONS = frozenset({"ab", "ikke", "inte", "kein", "keine", "nicht", "niet", "no", "non", "not", "pas"})
TRAIN_SHARE = 0.8
"""Share of the good images that go to training where a data set has no official split."""

_VISA_SPLIT = Path("split_csv") / "1cls.csv"
_VISA_COLUMNS = ("object", "split", "label", "image", "mask")
_LIST_COLUMNS = ("image", "split", "label", "mask")
_PARTS = ("train", "validation", "test")
_MAGNETIC_TILE_GOOD = "MT_Free"
DEFECTS_CONFIG = "defects_config.json"
_LOOKED_FOR = (
    "looked for train/good with test (MVTec AD, MVTec LOCO AD and the like), a category beside "
    "split_csv/1cls.csv (VisA), MT_Free/Imgs (magnetic tiles), train with test, good (or ok, or normal) with "
    "folders of defects, and plain image files"
)


@dataclass(frozen=True)
class Sample:
    """One image of a data set, with what is known about it.

    Parameters
    ----------
    image
        The image file.
    defect
        ``"good"`` (as which ``"Good"``, ``"normal"``, ``"ok"``, ... are taken) or the name of the defect;
        ``"unknown"`` where no label is known.
    masks
        Files whose union marks the defect, or one file. Empty for a good image, and where no mask is known.

    Raises
    ------
    InputError
        If `defect` is no text.
    """

    image: Path
    defect: str
    masks: tuple[Path, ...] = ()

    def __post_init__(self) -> None:
        """Take paths as text too, and other names of good: splits of one's own come from lists of names."""
        if not isinstance(self.defect, str) or not self.defect:
            raise InputError(f"defect is {self.defect!r}; it must be 'good', 'unknown' or a defect's name")
        if _plain(self.defect) in _GOOD_NAMES | _GOOD_AMONG_OTHERS:
            object.__setattr__(self, "defect", GOOD)
        masks: str | Path | Iterable[str | Path] = self.masks
        masks = (masks,) if isinstance(masks, str | Path) else masks
        object.__setattr__(self, "image", Path(self.image))
        object.__setattr__(self, "masks", tuple(map(Path, masks)))

    @property
    def label(self) -> int | None:
        """0 for a good image, 1 for a defective one, None where it is not known."""
        return None if self.defect == UNKNOWN else int(self.defect != GOOD)


@dataclass(frozen=True)
class Dataset:
    """One category of a data set: its training, validation and test images.

    Parameters
    ----------
    name
        The name of the category, that of its folder.
    layout
        One of :data:`LAYOUTS`.
    root
        The folder that was read.
    train, validation
        Good images only. `validation` is empty where the data set has no such part.
    test
        Good and defective images, or images with unknown labels.

    Raises
    ------
    InputError
        If an image in `train` or `validation` has a defect.
    """

    name: str
    layout: str
    root: Path
    train: tuple[Sample, ...]
    validation: tuple[Sample, ...]
    test: tuple[Sample, ...]

    def __post_init__(self) -> None:
        """Take the root as text too; refuse defects where good images belong."""
        object.__setattr__(self, "root", Path(self.root))
        for sample in (*self.train, *self.validation):
            if sample.label == 1:
                raise InputError(
                    f"dataset: {sample.image} ({sample.defect}) is among the training or validation images "
                    f"of {self.name!r}; they must be good"
                )


@dataclass(frozen=True)
class DefectKind:
    """An entry of MVTec LOCO AD's ``defects_config.json``: how much of a region has to be found.

    Parameters
    ----------
    name
        The name of the kind of defect, such as ``"missing_fruit_icon"``.
    pixel_value
        The value by which masks mark it, 1 or more.
    saturation_threshold
        A number of pixels, or a share of the region's pixels, greater than 0 and at most 1.
    relative_saturation
        Whether it is a share.
    """

    name: str
    pixel_value: int
    saturation_threshold: float
    relative_saturation: bool


class Region(NamedTuple):
    """One annotated region of an image, for sPRO."""

    mask: np.ndarray[Any, np.dtype[np.bool_]]
    """[H, W] bool."""
    saturation: int
    """Pixels that must be found, 1 to the region's own number."""


def read_dataset(root: str | os.PathLike[str], *, layout: str = "auto", seed: int = 0) -> Dataset:
    """Find the images of a data set's category, their labels and masks. No image is opened.

    Parameters
    ----------
    root
        The folder of one category, such as ``mvtec_ad/bottle``; or a CSV file that lists its images.
    layout
        ``"auto"`` finds out, or one of

        - ``"mvtec_ad"``: ``train/good``, ``test/<defect or good>``,
          ``ground_truth/<defect>/<name>_mask.png``,
        - ``"mvtec_loco"``: the same with ``validation/good`` and ``ground_truth/<defect>/<name>/000.png``,
          ...,
        - ``"visa"``: a category's folder whose parent holds ``split_csv/1cls.csv``,
        - ``"magnetic_tile"``: ``MT_Free/Imgs`` and ``MT_<defect>/Imgs``, masks being PNG files beside the
          JPEG images; 20 % of the good images, drawn with `seed`, go to the test,
        - ``"folder"``: ``train`` and ``test`` folders (``test`` flat, its labels then being unknown, or with
          ``good`` and a folder for each defect); or ``good`` and a folder for each defect, split like the
          magnetic tiles; or just images, recursively, all taken for good training images,
        - ``"list"``: a CSV file with the columns ``image``, ``split`` (train, validation or test), ``label``
          (good, the name of a defect, or nothing: unknown in the test, good elsewhere) and, if need be,
          ``mask`` (several separated by ``;``); paths are absolute or relative to the file's folder.

        A folder ``ok`` or ``normal``, in any case, is one called ``good``, and so is ``pass`` or ``io`` in a
        part or beside ``fail``, ``nio`` and the like; ``mask``, ``masks`` or ``gt`` is one called
        ``ground_truth``. With a folder ``good_test`` (``normal_test``) no
        split is drawn: all of ``good`` is for training, and this for the test. All readers but VisA's and the
        magnetic tiles' take every form of mask named here, ``<name>.png``, and ``<name>_mask.png`` beside the
        image.
    seed
        Draws the split where the data set has none of its own.

    Returns
    -------
    Dataset

    Raises
    ------
    InputError
        If the folder is missing or not of this layout, a line of a list makes no sense, masks are there that
        fit no image, or a folder of defects is called ``good_2`` or holds good images itself.

    Examples
    --------
    >>> dataset = read_dataset("mvtec_ad/bottle")        # doctest: +SKIP
    >>> dataset.layout, len(dataset.train), len(dataset.test)    # doctest: +SKIP
    ('mvtec_ad', 209, 83)
    """
    if layout not in ("auto", *LAYOUTS):
        raise InputError(f"layout is {layout!r}; allowed are auto, {', '.join(LAYOUTS)}")
    folder = Path(root)
    if _is_list(folder) and layout in ("auto", "list"):
        train, validation, test = _read_list(folder)
        return Dataset(folder.stem, "list", folder.parent, tuple(train), tuple(validation), tuple(test))
    if layout == "list" or not folder.is_dir():
        kind = "a folder" if folder.is_dir() else "a file" if folder.exists() else "missing"
        wanted = "a CSV file" if layout == "list" else "a folder or a CSV file"
        raise InputError(f"root: {folder} is {kind}; it must be {wanted}")
    if layout == "auto":
        layout = _detect(folder)
    train, validation, test = _READERS[layout](folder, seed)
    if not train and not test:
        raise InputError(f"root: there are no images in {folder} (read as {layout})")
    return Dataset(folder.resolve().name, layout, folder, tuple(train), tuple(validation), tuple(test))


def training_images(path: str | os.PathLike[str], *, seed: int = 0) -> list[Path]:
    """The images to learn from: never the test images or the masks of a data set whose root was given.

    Parameters
    ----------
    path
        A category's folder, or a CSV file, in any layout of :func:`read_dataset` (its training part is
        taken), a plain folder (all images in it, recursively), or one image file.
    seed
        As for :func:`read_dataset`.

    Returns
    -------
    list of Path
        In natural order, without repetition.

    Raises
    ------
    InputError
        If there is nothing at `path`, it is a data set's ``test`` with ``train`` beside it, no training
        images are found, or the folder holds a ``test`` or ``ground_truth`` folder but no training part that
        could be told from it, or a folder of defective images (``NG``, ``bad``, ...) beside folders of which
        nothing is known.

    Examples
    --------
    >>> len(training_images("mvtec_ad/bottle"))                # doctest: +SKIP
    209
    """
    path = Path(path)
    if _is_image(path):
        return [path]
    if path.resolve().name.lower() == "test" and (path.resolve().parent / "train").is_dir():
        raise InputError(f"{path} is the test part of a data set; its training part lies beside it")
    dataset = read_dataset(path, seed=seed)
    if not dataset.train:
        raise InputError(f"{path} holds no training images (read as {dataset.layout})")
    return [sample.image for sample in dataset.train]


def validation_images(path: str | os.PathLike[str]) -> list[Path]:
    """The normal images that a data set keeps for choosing thresholds.

    Parameters
    ----------
    path
        A category's folder in any layout of :func:`read_dataset`, or any other folder or file.

    Returns
    -------
    list of Path
        In natural order; empty where there is no validation part.
    """
    if _is_image(Path(path)):
        return []
    return [sample.image for sample in read_dataset(path).validation]


def held_out_images(path: str | os.PathLike[str], argument: str = "normal") -> list[Path]:
    """The normal images in a folder by which a fitted detector may be calibrated.

    Parameters
    ----------
    path
        A plain folder of good images (all images in it, recursively), a category's folder with a validation
        part (MVTec LOCO AD; that part is taken), or one image file.
    argument
        Whose value this is, for the message.

    Returns
    -------
    list of Path
        In natural order.

    Raises
    ------
    InputError
        If there is nothing at `path`, or it holds a data set without a validation part: its training images
        were seen by the fit, and its test images are for measuring.
    """
    path = Path(path)
    if _is_image(path):
        return [path]
    dataset = read_dataset(path)
    if dataset.validation:
        return [sample.image for sample in dataset.validation]
    if dataset.test:
        raise InputError(
            f"{argument}: {path} is a data set ({dataset.layout}) without a validation part; name a folder "
            "of good images that the fit did not see"
        )
    return [sample.image for sample in dataset.train]


def defective_images(path: str | os.PathLike[str]) -> list[Path]:
    """The defective images in a folder, by which a calibration counts what is found.

    Parameters
    ----------
    path
        A plain folder of defective images (all images in it, recursively), a category's folder with a test
        part (its defective images are taken, not its masks), or one image file.

    Returns
    -------
    list of Path
        In natural order.

    Raises
    ------
    InputError
        If there is nothing at `path`, or it holds a data set in whose test part no image is known to be
        defective.
    """
    path = Path(path)
    if _is_image(path):
        return [path]
    dataset = read_dataset(path)
    if not dataset.test:
        return [sample.image for sample in dataset.train]
    found = [sample.image for sample in dataset.test if sample.label == 1]
    if not found:
        raise InputError(
            f"defective: {path} is a data set ({dataset.layout}) in whose test part no image is known to be "
            "defective; name a folder of defective images"
        )
    return found


def read_mask(sample: Sample, size: tuple[int, int]) -> np.ndarray[Any, np.dtype[np.bool_]]:
    """Read the defective pixels of an image.

    Parameters
    ----------
    sample
        From a :class:`Dataset`.
    size
        (height, width) of the image in pixels; smaller and larger masks of the same shape are resized to it,
        each pixel from the nearest.

    Returns
    -------
    numpy.ndarray
        [H, W] bool: the union of the sample's masks, every value above zero being a defect, 8-bit or 16-bit;
        see :func:`pydefect.data.images.read_mask_values` for alpha and JPEG files. All False for a good
        image.

    Raises
    ------
    InputError
        If a mask cannot be read or is of another shape, or none is known although the image is not known to
        be good.
    """
    union = np.zeros(size, dtype=np.bool_)
    if not sample.masks and sample.label != 0:
        raise InputError(f"{sample.image}: no mask is known for this image ({sample.defect})")
    for path in sample.masks:
        union |= _resized(read_mask_values(path) > 0, size, path)
    return union


def read_defects_config(root: str | os.PathLike[str]) -> dict[int, DefectKind] | None:
    """Read the kinds of defects of a category of MVTec LOCO AD, for sPRO.

    Parameters
    ----------
    root
        The category's folder.

    Returns
    -------
    dict of int to DefectKind, or None
        By the value that marks the kind in masks; None where the folder holds no ``defects_config.json``.

    Raises
    ------
    InputError
        If the file is not as the data set's own.
    """
    file = Path(root) / DEFECTS_CONFIG
    if not file.is_file():
        return None
    try:
        entries = json.loads(file.read_text(encoding="utf-8"))
        kinds = [_defect_kind(entry) for entry in entries]
    except (KeyError, TypeError, ValueError) as error:
        raise InputError(f"{file}: not a list of kinds of defects as MVTec LOCO AD's: {error}") from error
    found = {kind.pixel_value: kind for kind in kinds}
    if len(found) != len(kinds):
        raise InputError(f"{file}: two kinds of defects have the same pixel_value")
    return found


def read_regions(
    sample: Sample,
    size: tuple[int, int],
    kinds: dict[int, DefectKind],
    box: tuple[int, int, int, int] | None = None,
    ignored: np.ndarray[Any, np.dtype[np.bool_]] | None = None,
) -> list[Region]:
    """Read the annotated regions of an image, every mask file being one, with their saturation areas.

    A region's saturation area is a share of its pixels, rounded down, or an absolute number of pixels, but
    not more than it has [1]_.

    Parameters
    ----------
    sample
        From a :class:`Dataset`.
    size
        (height, width) of the image in pixels. Smaller and larger masks of the same shape are resized to it,
        each pixel from the nearest, and absolute numbers of pixels with them.
    kinds
        From :func:`read_defects_config`.
    box
        (top, left, bottom, right) in pixels, half open: what lies outside is cut off before areas are
        counted, and regions of which nothing is left are left out. None: the whole image.
    ignored
        [H, W] bool: pixels that belong to no region, likewise. None: there are none.

    Returns
    -------
    list of Region
        [h, w] of the box; empty for a good image.

    Raises
    ------
    InputError
        If a mask cannot be read, is of another shape, has values of no kind or of several, or none is known
        although the image is not known to be good.

    References
    ----------
    .. [1] Bergmann et al., "Beyond Dents and Scratches", IJCV 130, 2022, section 4.
    """
    if not sample.masks and sample.label != 0:
        raise InputError(f"{sample.image}: no mask is known for this image ({sample.defect})")
    top, left, bottom, right = box or (0, 0, *size)
    regions = []
    for path in sample.masks:
        values = read_mask_values(path)
        marks = [int(value) for value in np.unique(values) if value]
        if not marks:
            continue  # as an empty mask of the other layouts: that of a normal image
        if len(marks) != 1 or marks[0] not in kinds:
            raise InputError(
                f"{path}: marked with {', '.join(map(str, marks))}; a mask must have one value, "
                f"of those in {DEFECTS_CONFIG}: {', '.join(map(str, sorted(kinds)))}"
            )
        kind = kinds[marks[0]]
        mask = _resized(values > 0, size, path)
        if ignored is not None:
            mask = mask & ~ignored
        mask = mask[top:bottom, left:right]
        area = int(np.count_nonzero(mask))
        if not area:
            continue
        if kind.relative_saturation:
            saturation = kind.saturation_threshold * area
        else:
            saturation = kind.saturation_threshold * (size[0] * size[1] / values.size)
        regions.append(Region(mask, min(max(int(saturation), 1), area)))
    return regions


def _defect_kind(entry: dict[str, Any]) -> DefectKind:
    value, threshold = entry["pixel_value"], entry["saturation_threshold"]
    relative = entry["relative_saturation"]
    if not isinstance(value, int) or not 1 <= value <= 65535:
        raise ValueError(f"pixel_value is {value!r}; it must be a whole number from 1 to 65535")
    if not isinstance(relative, bool):
        raise ValueError(f"relative_saturation is {relative!r}; it must be true or false")
    if not isinstance(threshold, int | float) or threshold <= 0 or (relative and threshold > 1):
        allowed = "a share greater than 0 and at most 1" if relative else "a number of pixels"
        raise ValueError(f"saturation_threshold is {threshold!r}; it must be {allowed}")
    return DefectKind(entry["defect_name"], value, threshold, relative)


def _resized(
    mask: np.ndarray[Any, np.dtype[np.bool_]], size: tuple[int, int], path: Path
) -> np.ndarray[Any, np.dtype[np.bool_]]:
    if mask.shape == size:
        return mask
    (height, width), (to_height, to_width) = mask.shape, size
    # Up to a pixel by which a side of either was rounded. A mask of a picture that stood or was cut otherwise
    # would be stretched over the wrong pixels.
    if abs(height * to_width - width * to_height) > max(*size, *mask.shape):
        raise InputError(
            f"{path}: {width} x {height} pixels, where the image has {to_width} x {to_height}, upright as "
            "its EXIF orientation says; a mask may be smaller or larger than its image, but not of another "
            "shape"
        )
    resized = cv2.resize(mask.astype(np.uint8), (size[1], size[0]), interpolation=cv2.INTER_NEAREST_EXACT)
    return resized.astype(np.bool_)


_Split = tuple[list[Sample], list[Sample], list[Sample]]


def _detect(root: Path) -> str:
    if _visa_rows(root.resolve().parent, root.resolve().name):
        return "visa"
    # A flat test folder has no labels, which is the case of "folder".
    if _good_folders(root / "train") and (root / "test").is_dir() and _subfolders(root / "test"):
        return "mvtec_loco" if _has_loco_parts(root) else "mvtec_ad"
    if (root / _MAGNETIC_TILE_GOOD / "Imgs").is_dir():
        return "magnetic_tile"
    categories = [folder.name for folder in _subfolders(root) if is_category(folder)]
    if categories:
        raise InputError(
            f"root: {root} holds several data sets; choose one of its folders: {', '.join(categories)}"
        )
    return "folder"


def is_category(folder: Path) -> bool:
    """Whether a folder says by its name or its parts that it is one data set, whole or not."""
    has_parts = (folder / "train").is_dir() and (folder / "test").is_dir()
    return has_parts or bool(_visa_rows(folder.parent, folder.name))


def _has_loco_parts(root: Path) -> bool:
    return bool(_good_folders(root / "validation")) or any(
        _subfolders(defect) for masks in _mask_folders(root) for defect in _subfolders(masks)
    )


def _read_mvtec(root: Path, _seed: int) -> _Split:
    if not _good_folders(root / "train"):
        raise InputError(f"root: {root} holds no folder train/good")
    if not (root / "test").is_dir():
        raise InputError(f"root: {root} holds no folder test")
    train, validation = (_good(_images_in(_good_folders(root / part))) for part in ("train", "validation"))
    return train, validation, _labelled(root, _subfolders(root / "test"))


def _labelled(root: Path, folders: list[Path]) -> list[Sample]:
    """The images of folders named by what is in them, with the masks below `root`."""
    defective = [folder for folder in folders if not _is_good(folder)]
    for folder in defective:
        _refuse_good(root, folder)
    samples: list[Sample] = []
    for folder in folders:
        if _is_good(folder):
            samples += _good(list_image_files(folder))
            continue
        masks = [masks / folder.name for masks in _mask_folders(root)]
        if len(defective) == 1:
            # One kind of defect needs no folder of masks for itself.
            masks += [masks for masks in _mask_folders(root) if not _subfolders(masks)]
        samples += _with_masks(folder, next((place for place in masks if place.is_dir()), None))
    if any(sample.label for sample in samples) and not any(sample.masks for sample in samples):
        _refuse_unused_masks(root, defective)
    return samples


def _refuse_good(root: Path, folder: Path) -> None:
    """Good images under the name of a defect would be counted as missed."""
    words = set(re.findall(r"[^\W\d_]+", folder.name.lower()))
    # A word of another script may be a negation.
    says_so = _plain(folder.name) in _DEFECTIVE_NAMES or not all(map(str.isascii, words))
    if not says_so and words & _GOOD_NAMES and not words & _NEGATIONS:
        raise InputError(
            f"root: {root} holds a folder {folder.name}, which could be good images or a defect; call it "
            "good, or good_test beside good, or give the defect another name"
        )
    inside = next((inner.name for inner in _subfolders(folder) if _is_good(inner)), None)
    if inside is not None:
        raise InputError(
            f"root: {folder} would be a defect, but holds a folder {inside}: several products in one data "
            "set? Each needs a folder with train and test of its own"
        )


def _refuse_unused_masks(root: Path, defective: list[Path]) -> None:
    """Masks of no defect's folder are not passed over: there would be no figures over pixels."""
    for masks in _mask_folders(root):
        files = list_image_files(masks)
        for file, folders in zip(files, _folders_of(masks, files), strict=True):
            # Some data sets have masks of good images too, all black.
            if (_GOOD_NAMES | _GOOD_AMONG_OTHERS).isdisjoint(map(_plain, folders)):
                raise InputError(
                    f"{file}: no mask in {masks} fits an image; masks lie in folders named as those of the "
                    f"images: {', '.join(folder.name for folder in defective)}"
                )


def _with_masks(folder: Path, masks: Path | None) -> list[Sample]:
    """The images of one defect, with masks from a folder of them, or from beside the images."""
    files = list_image_files(folder)
    stems = {file.with_suffix("") for file in files}
    beside = [
        file
        for file in files
        if file.stem.endswith("_mask") and file.with_name(file.stem.removesuffix("_mask")) in stems
    ]
    images = [file for file in files if file not in set(beside)] if beside else files
    if masks is None and beside:
        masks, known = folder, beside
    else:
        known = list_image_files(masks) if masks is not None else []
    of_image: dict[Path, list[Path]] = {}
    for mask in known:
        place = mask.relative_to(masks or folder)
        # <name>_mask.png and <name>.png belong to the image <name>, and so does every file in the folder
        # <name>. _mask.png has no such name.
        named = place.stem.removesuffix("_mask") or place.stem
        for stem in {place.with_suffix(""), place.with_name(named), place.parent}:
            of_image.setdefault(stem, []).append(mask)
    samples = []
    for image in images:
        stem = image.relative_to(folder).with_suffix("")
        samples.append(Sample(image, folder.name, tuple(of_image.get(stem, ()))))
    if known and images and not any(sample.masks for sample in samples):
        raise InputError(
            f"{masks}: none of the masks fits an image of {folder}; they must be named like the image, "
            "<name>_mask.png or <name>.png, or lie in a folder <name>"
        )
    return samples


def _is_list(path: Path) -> bool:
    return path.suffix.lower() == ".csv" and path.is_file()


def _is_image(path: Path) -> bool:
    return path.is_file() and not _is_list(path)


def _read_list(file: Path) -> _Split:
    try:
        text = file.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(
            f"{file}: no UTF-8 ({error.reason} at byte {error.start}); save it as CSV UTF-8"
        ) from error
    head = text.partition("\n")[0]
    # Where the comma stands in numbers, Excel writes semicolons.
    delimiter = ";" if ";" in head and "," not in head else ","
    reader = csv.DictReader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
    try:
        reader.fieldnames = [name.strip().lower() for name in reader.fieldnames or ()]
        rows = [(reader.line_num, row) for row in reader]
    except csv.Error as error:
        # Where the row begins: a quote that is never closed takes all that follows for one field.
        raise InputError(f"{file}, line {reader.line_num + 1}: no CSV ({error})") from error
    missing = [column for column in _LIST_COLUMNS[:3] if column not in reader.fieldnames]
    if missing:
        raise InputError(
            f"{file}: the columns {', '.join(missing)} are missing; a list of images has "
            f"{', '.join(_LIST_COLUMNS)}, of which mask may be left out"
        )
    parts: dict[str, list[Sample]] = {part: [] for part in _PARTS}
    for line, row in rows:
        image, split, label, masks = ((row.get(column) or "").strip() for column in _LIST_COLUMNS)
        where = f"{file}, line {line}"
        if split not in parts:
            raise InputError(f"{where}: split is {split!r}; allowed are {', '.join(_PARTS)}")
        if not image:
            raise InputError(f"{where}: image is empty; it must be a path")
        if _is_no_name(label):
            raise InputError(f"{where}: label is {label!r}; it must be good, a defect's name or nothing")
        files = [file.parent / name.strip() for name in (image, *masks.split(";")) if name.strip()]
        for one in files:
            if not one.is_file():
                raise InputError(f"{where}: {one} is missing")
        sample = Sample(files[0], label or (UNKNOWN if split == "test" else GOOD), tuple(files[1:]))
        # Some data sets have masks of good images too, all black.
        parts[split].append(replace(sample, masks=()) if sample.label == 0 else sample)
    if not any(parts.values()):
        raise InputError(f"{file}: there are no images in it")
    return parts["train"], parts["validation"], parts["test"]


def _is_no_name(label: str) -> bool:
    """Whether it is a number or a truth value: 0 is good in some lists, and 1 in others."""
    return label.lower() in {"true", "false", "yes", "no"} or bool(re.fullmatch(r"[-+]?\d+(\.\d*)?", label))


def _read_visa(root: Path, _seed: int) -> _Split:
    category, base = root.resolve().name, root.resolve().parent
    rows = _visa_rows(base, category)
    if not rows:
        raise InputError(
            f"root: {root} is no category of VisA: no rows for {category!r} in {base / _VISA_SPLIT}"
        )

    def place(name: str) -> Path:
        # Below the folder in the way it was given: images are named relative to it.
        inside = Path(name).is_relative_to(category)
        return root / Path(name).relative_to(category) if inside else base / name

    train: list[Sample] = []
    test: list[Sample] = []
    for row in rows:
        image, is_good = place(row["image"]), row["label"] == "normal"
        masks = (place(row["mask"]),) if row["mask"] and not is_good else ()
        for file in (image, *masks):
            if not file.is_file():
                raise InputError(f"{file}: missing, though {base / _VISA_SPLIT} names it")
        sample = Sample(image, GOOD if is_good else row["label"], masks)
        (train if row["split"] == "train" else test).append(sample)
    return train, [], test


def _visa_rows(base: Path, category: str) -> list[dict[str, str]]:
    """The rows of one category in VisA's split file; none where there is no such file."""
    file = base / _VISA_SPLIT
    if not file.is_file():
        return []
    with file.open(newline="", encoding="utf-8-sig") as lines:
        reader = csv.DictReader(lines)
        missing = [column for column in _VISA_COLUMNS if column not in (reader.fieldnames or ())]
        if missing:
            raise InputError(f"{file}: the columns {', '.join(missing)} are missing")
        return [{key: row[key] or "" for key in _VISA_COLUMNS} for row in reader if row["object"] == category]


def _read_magnetic_tile(root: Path, seed: int) -> _Split:
    if not (root / _MAGNETIC_TILE_GOOD / "Imgs").is_dir():
        raise InputError(f"root: {root} holds no folder {_MAGNETIC_TILE_GOOD}/Imgs")
    train: list[Sample] = []
    test: list[Sample] = []
    for folder in _subfolders(root):
        if not (folder.name.startswith("MT_") and (folder / "Imgs").is_dir()):
            continue
        images = [file for file in list_image_files(folder / "Imgs") if file.suffix.lower() != ".png"]
        if folder.name == _MAGNETIC_TILE_GOOD:
            train, good_test = _split_good(root, images, seed)
            test += good_test
            continue
        for image in images:
            mask = image.with_suffix(".png")
            defect = folder.name.removeprefix("MT_").lower()
            test.append(Sample(image, defect, (mask,) if mask.is_file() else ()))
    return train, [], test


def _read_folder(root: Path, seed: int) -> _Split:
    train, test = root / "train", root / "test"
    if train.is_dir() and test.is_dir():
        good = _good_folders(train)
        seen = _images_in(good) if good else list_image_files(train)
        _refuse_held_out(train, seen)
        _refuse_defective(train, seen)
        unlabelled = [Sample(image, UNKNOWN) for image in _direct_images(test)]
        return _good(seen), [], unlabelled + _labelled(root, _subfolders(test))
    folders = [folder for folder in _subfolders(root) if list_image_files(folder)]
    good = [folder for folder in folders if _is_good(folder)]
    held_out = [folder for folder in folders if good and _plain(folder.name) in _GOOD_TEST_NAMES]
    defective = [folder for folder in folders if folder not in good + held_out and not _holds_masks(folder)]
    images = list_image_files(root)
    if not good or not defective + held_out:
        _refuse_held_out(root, images)
        _refuse_defective(root, images)
        return _good(images), [], []
    if _direct_images(root):
        raise InputError(
            f"root: {root} holds images beside its folder {good[0].name}; move them into it or into a "
            "defect's folder"
        )
    _refuse_held_out(root, _images_in([*good, *held_out, *defective]))
    if held_out:
        training, good_test = _good(_images_in(good)), _good(_images_in(held_out))
    else:
        training, good_test = _split_good(root, _images_in(good), seed)
    return training, [], good_test + _labelled(root, defective)


def _refuse_held_out(root: Path, images: list[Path]) -> None:
    """No image of a data set's test part, and no mask, may pass for a plain folder's image."""
    places = _folders_of(root, images)
    for part in sorted({part for place in places for part in place}):
        if part == "test" or _plain(part) in _MASK_NAMES:
            raise InputError(
                f"root: {root} holds folders named {part}, but no data set is known in it: {_LOOKED_FOR}"
            )
    below_good = sum(not _GOOD_NAMES.isdisjoint(map(_plain, place[1:])) for place in places)
    if 0 < below_good < len(places):
        raise InputError(
            f"root: {root} holds folders named good and others; choose the folder that holds good itself"
        )


def _refuse_defective(root: Path, images: list[Path]) -> None:
    """Nor may an image in a folder of defective ones pass for a good one of the folders beside it."""
    places = _folders_of(root, images)
    defective = {part for place in places for part in place if _plain(part) in _DEFECTIVE_NAMES}
    below_defective = sum(not defective.isdisjoint(place) for place in places)
    if 0 < below_defective < len(places):
        raise InputError(
            f"root: {root} holds folders named {', '.join(sorted(defective))} beside others; call the good "
            "images' folder good, or choose one folder"
        )


def _folders_of(root: Path, images: list[Path]) -> list[tuple[str, ...]]:
    """The names of the folders between `root` and each image, in small letters."""
    return [tuple(part.lower() for part in image.relative_to(root).parent.parts) for image in images]


def _good(images: Iterable[Path]) -> list[Sample]:
    return [Sample(image, GOOD) for image in images]


def _split_good(root: Path, images: list[Path], seed: int) -> tuple[list[Sample], list[Sample]]:
    """Training and test part, each in the order given.

    Every image has a place of its own in the draw: one that is added or removed moves few others to the other
    part, where a detector that was fitted before would be measured on images that it has seen.
    """

    def drawn(image: Path) -> bytes:
        return hashlib.sha256(f"{seed}/{image.relative_to(root).as_posix()}".encode()).digest()

    to_train = set(sorted(images, key=drawn)[: round(TRAIN_SHARE * len(images))])
    train = [image for image in images if image in to_train]
    test = [image for image in images if image not in to_train]
    return _good(train), _good(test)


def _plain(name: str) -> str:
    """Letters, of any script, and digits."""
    return re.sub(r"[\W_]", "", name.lower())


def _is_good(folder: Path) -> bool:
    name = _plain(folder.name)
    if name in _GOOD_AMONG_OTHERS:
        return folder.parent.name.lower() in _PARTS or any(
            _plain(beside.name) in _DEFECTIVE_NAMES for beside in _subfolders(folder.parent)
        )
    return name in _GOOD_NAMES


def _holds_masks(folder: Path) -> bool:
    return _plain(folder.name) in _MASK_NAMES


def _good_folders(folder: Path) -> list[Path]:
    return [inner for inner in _subfolders(folder) if _is_good(inner)] if folder.is_dir() else []


def _mask_folders(folder: Path) -> list[Path]:
    return [inner for inner in _subfolders(folder) if _holds_masks(inner)]


def _images_in(folders: list[Path]) -> list[Path]:
    return [image for folder in folders for image in list_image_files(folder)]


def _subfolders(folder: Path) -> list[Path]:
    return natural_order(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def _direct_images(folder: Path) -> list[Path]:
    return natural_order(path for path in folder.iterdir() if path.is_file() and is_image_file(path))


_READERS: dict[str, Callable[[Path, int], _Split]] = {
    "mvtec_ad": _read_mvtec,
    "mvtec_loco": _read_mvtec,
    "visa": _read_visa,
    "magnetic_tile": _read_magnetic_tile,
    "folder": _read_folder,
}
LAYOUTS = (*_READERS, "list")
"""The layouts that :func:`read_dataset` reads."""
