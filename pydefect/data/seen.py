"""What a fit keeps of its images: names to find them by, and prints by which their files are known again."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path, PurePath
from typing import Any

import numpy as np

from pydefect.data.images import Image, SkippedImage

__all__ = ["FilePrints", "SeenImages", "file_print", "seen_before", "short_names"]

_PRINT = re.compile("([0-9a-f]+)-[0-9a-f]{16}")


class FilePrints:
    """:func:`file_print` of the files that images came from, each once."""

    def __init__(self) -> None:
        self._of: dict[Path, str | None] = {}

    def add(self, image: Image) -> None:
        """Look at an image's file, if it has one that was not looked at: a film's is that of many images."""
        if image.path is None or image.path in self._of:
            return
        try:
            self._of[image.path] = file_print(image.path) if image.path.is_file() else None
        except OSError:
            # The image has been read. That its file, removed since, is not known again ends no fit.
            self._of[image.path] = None

    def __iter__(self) -> Iterator[str]:
        """The prints, in the order of the images."""
        return iter(dict.fromkeys(one for one in self._of.values() if one is not None))


class SeenImages:
    """The images that a fit has read, in order, without their pixels."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._names: list[str] = []
        self._skipped: list[str] = []
        self._kinds: set[str] = set()
        self._prints = FilePrints()

    def add(self, image: Image) -> None:
        """Take an image that was read."""
        self._digest.update(str(image.pixels.shape).encode())
        self._digest.update(np.ascontiguousarray(image.pixels).data)  # its bytes, not a copy of them
        self._names.append(image.name)
        self._kinds.add(image.pixels.dtype.name)
        self._prints.add(image)

    def skip(self, images: Sequence[SkippedImage]) -> None:
        """Take the names of images that could not be read."""
        self._skipped += [image.name for image in images]

    @property
    def digest(self) -> str:
        """SHA-256 of all pixels, in order."""
        return self._digest.hexdigest()

    @property
    def prints(self) -> list[str]:
        """:func:`file_print` of the images' files."""
        return list(self._prints)

    @property
    def pixels(self) -> list[str]:
        """Types of the pixels: ``"uint8"``, ``"float32"`` (of 16-bit and floating point images) or both."""
        return sorted(self._kinds)

    @property
    def names(self) -> list[str]:
        """:func:`short_names` of the images."""
        return short_names([*self._names, *self._skipped])[: len(self._names)]

    @property
    def skipped(self) -> list[str]:
        """Likewise, of what could not be read."""
        return short_names([*self._names, *self._skipped])[len(self._names) :]


def short_names(names: Sequence[str]) -> list[str]:
    """Leave of each path its file's name, and of its folders as many as tell equal ones apart.

    A model file is handed on, and where it was made is nobody's business; but ``001.png`` alone would not say
    of which folder.

    Parameters
    ----------
    names
        Paths, or names without a folder.

    Returns
    -------
    list of str
        With ``/`` between folders.

    Examples
    --------
    >>> short_names(["/line/monday/1.png", "/line/tuesday/1.png", "/line/tuesday/2.png"])
    ['monday/1.png', 'tuesday/1.png', '2.png']
    """
    shortened: dict[str, str] = {}
    left, kept = {name: PurePath(name).parts for name in names}, 1
    while left:
        alike = defaultdict(list)
        for name, parts in left.items():
            alike[parts[-kept:]].append(name)
        for end, group in alike.items():
            for name in group:
                if len(group) == 1 or kept >= len(left[name]):
                    shortened[name] = PurePath(*end).as_posix()
        left = {name: parts for name, parts in left.items() if name not in shortened}
        kept += 1
    return [shortened[name] for name in names]


def file_print(path: Path) -> str:
    """Return by what a file is known again: its size and a hash of 64 bits of its content."""
    content = hashlib.blake2b(digest_size=8)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            content.update(block)
        return f"{file.tell():x}-{content.hexdigest()}"


def seen_before(prints: Collection[Any], paths: Sequence[Path]) -> list[Path]:
    """Which files have one of these prints; what is none is passed over.

    Only files are read that have the size of one.
    """
    known = {one: match for one in prints if (match := _PRINT.fullmatch(str(one)))}
    sizes = {int(match[1], 16) for match in known.values()}
    return [
        path
        for path in paths
        if path.is_file() and path.stat().st_size in sizes and file_print(path) in known
    ]
