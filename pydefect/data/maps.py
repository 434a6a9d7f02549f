"""Anomaly maps that another program has written, a file for every image, and its image scores."""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from pydefect.data.images import read_values
from pydefect.data.layouts import Dataset, Sample
from pydefect.errors import InputError

__all__ = ["ENDINGS", "find_maps", "read_image_scores", "read_map"]

ENDINGS = (".tiff", ".tif", ".npy")
"""Of files that hold a map, in the order in which they are looked for."""


def find_maps(
    folder: str | os.PathLike[str], dataset: Dataset, samples: Sequence[Sample]
) -> dict[Path, Path]:
    """Find every image's map. No map is opened.

    Parameters
    ----------
    folder
        The maps lie in it as the images do in the data set's folder or in its ``test``, or as
        ``<defect>/<name>``, with one of :data:`ENDINGS` in place of the image's ending or after it. That is
        what MVTec's evaluation code takes, and what ``pydefect score --maps`` writes.
    dataset
        Whose images they are of.
    samples
        Those that must have one.

    Returns
    -------
    dict of Path to Path
        From image to map.

    Raises
    ------
    InputError
        The folder is missing, an image has no map, or two images have the same.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"maps: {str(folder)!r} is {'a file' if folder.exists() else 'missing'}, no folder")
    found: dict[Path, Path] = {}
    missing: list[str] = []
    image_of: dict[Path, Path] = {}
    for sample in samples:
        places = [folder / place for place in _places(sample, dataset.root)]
        file = next(filter(Path.is_file, places), None)
        if file is None:
            missing.append(f"{sample.defect}/{sample.image.stem}")
            continue
        if file in image_of:
            raise InputError(
                f"maps: {file} is the map of {image_of[file]} and of {sample.image}; give every image its own"
            )
        image_of[file], found[sample.image] = sample.image, file
    if missing:
        raise InputError(
            f"maps: {len(missing)} of {len(samples)} labelled test images have no map in {str(folder)!r}: "
            f"{', '.join(missing[:3])}{', ...' if len(missing) > 3 else ''} (.tiff, .tif and .npy are read)"
        )
    return found


def _places(sample: Sample, root: Path) -> list[Path]:
    """Where a map may lie in the folder of maps."""
    names = [Path(sample.defect) / sample.image.name]
    if sample.image.is_relative_to(root):
        inside = sample.image.relative_to(root)
        names = [inside, *([Path(*inside.parts[1:])] if inside.parts[0] == "test" else []), *names]
    # Of a.png and a.jpg in one folder the maps are a.tiff and a.jpg.tiff.
    stems = [stem for name in names for stem in (name, name.with_suffix(""))]
    return [stem.with_name(stem.name + ending) for stem in stems for ending in ENDINGS]


def read_map(file: Path) -> np.ndarray[Any, np.dtype[Any]]:
    """Read the values of a map.

    Returns
    -------
    numpy.ndarray
        As they lie in the file: [H, W] where it is one, of any type of numbers.

    Raises
    ------
    InputError
        The file cannot be read. The message names it.
    """
    if file.suffix.lower() != ".npy":
        return read_values(file)
    try:
        return np.asarray(np.load(file, allow_pickle=False))
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{file}: cannot be read as an array: {error}") from error


def read_image_scores(file: str | os.PathLike[str]) -> dict[str, float]:
    """Read the score of every image.

    Parameters
    ----------
    file
        CSV in UTF-8 whose first line names the columns, ``path`` and ``score`` among them, such as the
        ``scores.csv`` of a folder of scores. Relative paths begin in the current folder.

    Returns
    -------
    dict of str to float
        From the image's path as it is written there.

    Raises
    ------
    InputError
        The file cannot be read, lacks a column, or has a path twice or a score that is no number. The message
        names file and line.
    """
    file = Path(file)
    scores: dict[str, float] = {}
    try:
        with file.open(newline="", encoding="utf-8-sig") as lines:
            rows = csv.DictReader(lines, strict=True)
            missing = {"path", "score"} - set(rows.fieldnames or ())
            if missing:
                raise InputError(f"image_scores: {file} has no column {' and none '.join(sorted(missing))}")
            for row in rows:
                path, score = row["path"], row["score"]
                where = f"image_scores: {file}, line {rows.line_num}"
                if not path:
                    raise InputError(f"{where}: there is no path")
                if path in scores:
                    raise InputError(f"{where}: {path} is there twice")
                try:
                    scores[path] = float(score or "")
                except ValueError:
                    raise InputError(f"{where}: the score is {score!r}; a number is needed") from None
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"image_scores: {file} cannot be read: {error}") from error
    return scores
