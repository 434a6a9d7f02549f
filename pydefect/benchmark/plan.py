"""What a benchmark consists of: categories, variants of methods, and the pairs of both."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pydefect.backbones import BACKBONE_NAMES
from pydefect.data.images import list_image_files, natural_order
from pydefect.data.layouts import DEFECTS_CONFIG, Dataset, is_category, read_dataset
from pydefect.errors import InputError
from pydefect.registry import METHOD_NAMES, detector_type

__all__ = ["Category", "Pair", "Variant", "Weights", "find_categories", "without_places"]

_DEPTH = 3


@dataclass(frozen=True)
class Category:
    """A data set's category with labelled test images.

    Attributes
    ----------
    name
        Its folder's name, or its path below the root where two have the same.
    dataset
        Its images.
    """

    name: str
    dataset: Dataset

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all images and masks, their places and labels, and of MVTec LOCO AD's saturation areas.

        The names are relative: a copy elsewhere has the same fingerprint.
        """
        digest = hashlib.sha256()
        for part in ("train", "validation", "test"):
            for sample in getattr(self.dataset, part):
                for role, path in (("image", sample.image), *(("mask", mask) for mask in sample.masks)):
                    name = os.path.relpath(path, self.dataset.root).replace(os.sep, "/")
                    line = f"{part}\0{role}\0{sample.defect}\0{name}\0{_sha256(path)}\n"
                    digest.update(os.fsencode(line))
        saturation = self.dataset.root / DEFECTS_CONFIG
        if saturation.is_file():
            digest.update(_sha256(saturation).encode())
        return digest.hexdigest()


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def find_categories(
    roots: Iterable[str | os.PathLike[str]], names: Sequence[str] | None = None
) -> list[Category]:
    """Find the categories in folders of data sets.

    Parameters
    ----------
    roots
        A category's folder, or folders that hold some, up to three levels deep; in any layout of
        :func:`pydefect.data.layouts.read_dataset` that has labelled test images.
    names
        Those to take, in this order; None: all, in natural order.

    Returns
    -------
    list of Category

    Raises
    ------
    InputError
        A root is missing or holds no category, a category to take cannot be read, or a name is none of
        theirs.
    """
    found: list[tuple[str, Dataset]] = []
    for root in map(Path, roots):
        if not root.is_dir():
            raise InputError(f"data: {str(root)!r} is no folder")
        inside = list(_search(root, root, _DEPTH, names, {}))
        if not inside:
            raise InputError(
                f"data: {str(root)!r} holds no data set with training images and labelled test images"
            )
        found += inside
    count = Counter(dataset.name for _, dataset in found)
    categories = [
        Category(dataset.name if count[dataset.name] == 1 else relative, dataset)
        for relative, dataset in found
    ]
    by_name = {category.name: category for category in categories}
    if len(by_name) < len(categories):
        raise InputError("data: two categories have the same name and place below their roots")
    if names is None:
        return categories
    for name in names:
        if name not in by_name:
            raise InputError(f"categories: {name!r} is not there; found are {', '.join(by_name)}")
    return [by_name[name] for name in dict.fromkeys(names)]


def _search(
    folder: Path, root: Path, depth: int, names: Sequence[str] | None, searched: dict[str, int]
) -> Iterable[tuple[str, Dataset]]:
    # Links may lead to a folder more than once, and back; again only if it has not been searched as deep.
    real = os.path.realpath(folder)
    if searched.get(real, -1) >= depth:
        return
    searched[real] = depth
    try:
        dataset = read_dataset(folder)
    except InputError:
        # Otherwise there are several data sets in one folder, or none: the folders inside will say.
        if is_category(folder) and (names is None or folder.name in names):
            raise
    else:
        if dataset.train and {0, 1} <= {sample.label for sample in dataset.test}:
            searched[real] = _DEPTH
            yield folder.relative_to(root).as_posix() if folder != root else dataset.name, dataset
            return
    # Inside a category the folder test could pass for a data set, and be learned from.
    if depth and not is_category(folder):
        for inside in natural_order(path for path in folder.iterdir() if path.is_dir()):
            if not inside.name.startswith("."):
                yield from _search(inside, root, depth - 1, names, searched)


@dataclass(frozen=True)
class Weights:
    """Backbone weights: what to load, and what to write down about it.

    Attributes
    ----------
    source
        See :func:`pydefect.fit`.
    """

    source: str

    def __post_init__(self) -> None:
        """Refuse a file that is not there before any work is done."""
        if self.source not in ("imagenet", "random") and not Path(self.source).is_file():
            raise InputError(f"weights: no file {self.source!r}; allowed are imagenet, random, or a file")

    @cached_property
    def facts(self) -> dict[str, Any]:
        """Name without folder, and a file's SHA-256."""
        if self.source in ("imagenet", "random"):
            return {"name": self.source, "sha256": None}
        return _named(self.source)


@dataclass(frozen=True)
class Variant:
    """A method with its settings: a row of a table.

    Attributes
    ----------
    method
        One of :data:`pydefect.registry.METHOD_NAMES`.
    preset
        Of its settings.
    settings
        Changes of the preset.
    label
        The row's name; empty: method and preset.
    """

    method: str
    preset: str = "default"
    settings: Mapping[str, Any] = field(default_factory=dict)
    label: str = ""

    def __post_init__(self) -> None:
        """Name the row, and check method, preset and settings."""
        if not self.label:
            label = self.method if self.preset == "default" else f"{self.method} ({self.preset})"
            object.__setattr__(self, "label", label)
        self.configuration  # noqa: B018 - raises InputError

    @property
    def configuration(self) -> dict[str, Any]:
        """Every setting as JSON values."""
        config_type = detector_type(self.method).config_type
        return config_type.from_preset(self.preset, **self.settings).to_dict()

    def with_known(self, settings: Mapping[str, Any]) -> Variant:
        """Take over those of some settings that this method has."""
        names = {one.name for one in dataclasses.fields(detector_type(self.method).config_type)}
        known = {name: value for name, value in settings.items() if name in names}
        return dataclasses.replace(self, settings={**self.settings, **known})


# Settings that may be a file's or folder's bare name.
_PLACES = ("teacher", "penalty")


def without_places(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Write a name and a SHA-256 in the place of every path: it says more, and on every machine.

    A folder's is that of its files' names and sizes.
    """
    return {
        name: _named(value)
        if isinstance(value, str) and (os.sep in value or name in _PLACES) and Path(value).exists()
        else value
        for name, value in settings.items()
    }


def _named(source: str) -> dict[str, Any]:
    path = Path(source)
    if path.is_file():
        return {"name": path.name, "sha256": _sha256(path)}
    files = [[str(file.relative_to(path)), file.stat().st_size] for file in list_image_files(path)]
    return {"name": path.name, "sha256": hashlib.sha256(json.dumps(files).encode()).hexdigest()}


@dataclass(frozen=True)
class Pair:
    """One fit and its evaluation.

    Attributes
    ----------
    variant, category, seed, weights
        What is fitted on what.
    device
        Where.
    """

    variant: Variant
    category: Category
    seed: int
    weights: Weights
    device: str

    @property
    def place(self) -> Path:
        """A relative path of its own."""
        safe = "".join(
            letter if letter.isalnum() or letter in "-_." else "-" for letter in self.variant.label
        )
        name = self.category.name.replace("/", "--")
        # Labels that differ in other characters only must not meet, nor settings of one label.
        return Path(safe) / name / f"seed-{self.seed}-{self.key[:8]}"

    @property
    def facts(self) -> dict[str, Any]:
        """What its figures follow from, as JSON values without any place of this machine."""
        package = METHOD_NAMES.package_of(self.variant.method)
        backbone = self.variant.configuration.get("backbone")
        backbone_package = BACKBONE_NAMES.package_of(backbone) if isinstance(backbone, str) else None
        return {
            "method": self.variant.method,
            # Another version of them may give other figures.
            **({} if package is None else {"package": package}),
            **({} if backbone_package is None else {"backbone_package": backbone_package}),
            "configuration": without_places(self.variant.configuration),
            "category": self.category.name,
            "data_sha256": self.category.fingerprint,
            "seed": self.seed,
            "weights": self.weights.facts,
            "device": self.device.partition(":")[0],
        }

    @cached_property
    def key(self) -> str:
        """SHA-256 of :attr:`facts`."""
        return hashlib.sha256(json.dumps(self.facts, sort_keys=True).encode()).hexdigest()
