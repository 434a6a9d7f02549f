"""What a fit keeps of its images: names to find them by, and prints by which their files are known again."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Sequence
from pathlib import Path, PurePath

import numpy as np

from pydefect.data.images import Image, SkippedImage

__all__ = ["SeenImages", "below_common_folder", "file_print", "prints_of", "seen_before"]


class SeenImages:
    """The images that a fit has read, in order, without their pixels."""

    def __init__(self) -> None:
        self._digest = hashlib.sha256()
        self._names: list[str] = []
        self._skipped: list[str] = []
        self._kinds: set[str] = set()
        self.prints: list[str] = []
        """:func:`file_print` of those that came from files."""

    def add(self, image: Image) -> None:
        """Take an image that was read."""
        self._digest.update(str(image.pixels.shape).encode())
        self._digest.update(np.ascontiguousarray(image.pixels).data)  # its bytes, not a copy of them
        self._names.append(image.name)
        self._kinds.add(image.pixels.dtype.name)
        self.prints += prints_of(image)

    def skip(self, images: Sequence[SkippedImage]) -> None:
        """Take the names of images that could not be read."""
        self._skipped += [image.name for image in images]

    @property
    def digest(self) -> str:
        """SHA-256 of all pixels, in order."""
        return self._digest.hexdigest()

    @property
    def pixels(self) -> list[str]:
        """Types of the pixels: ``"uint8"``, ``"float32"`` (of 16-bit and floating point images) or both."""
        return sorted(self._kinds)

    @property
    def names(self) -> list[str]:
        """Those of the images, without the folders that all of them share.

        A model file is handed on, and where it was made is nobody's business; but ``001.png`` alone would not
        say of which folder.
        """
        return below_common_folder([*self._names, *self._skipped])[: len(self._names)]

    @property
    def skipped(self) -> list[str]:
        """Likewise, of what could not be read."""
        return below_common_folder([*self._names, *self._skipped])[len(self._names) :]


def below_common_folder(names: Sequence[str]) -> list[str]:
    """Leave out of paths the folders that all of them begin with.

    Parameters
    ----------
    names
        Paths, or names without a folder.

    Returns
    -------
    list of str
        With ``/`` between folders; of one path, its file's name.

    Examples
    --------
    >>> below_common_folder(["line/monday/1.png", "line/tuesday/1.png"])
    ['monday/1.png', 'tuesday/1.png']
    """
    paths = [PurePath(name) for name in names]
    shared = 0
    for level in zip(*(path.parent.parts for path in paths), strict=False):
        if len(set(level)) > 1:
            break
        shared += 1
    return [PurePath(*path.parts[shared:]).as_posix() for path in paths]


def prints_of(image: Image) -> list[str]:
    """:func:`file_print` of an image's file; none of one without, or whose generator has removed it."""
    return [file_print(image.path)] if image.path is not None and image.path.is_file() else []


def file_print(path: Path) -> str:
    """Return by what a file is known again: its size and a hash of 64 bits of its content."""
    content = hashlib.blake2b(digest_size=8)
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            content.update(block)
        return f"{file.tell():x}-{content.hexdigest()}"


def seen_before(prints: Collection[str], paths: Sequence[Path]) -> list[Path]:
    """Which files have one of these prints. Only those are read that have one's size."""
    known = frozenset(prints)
    sizes = {int(one.partition("-")[0], 16) for one in known}
    return [
        path
        for path in paths
        if path.is_file() and path.stat().st_size in sizes and file_print(path) in known
    ]
