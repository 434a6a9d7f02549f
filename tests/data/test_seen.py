from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest

from pydefect.data import seen as module
from pydefect.data.images import Image, SkippedImage
from pydefect.data.seen import FilePrints, SeenImages, file_print, seen_before, short_names


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ([], []),
        (["/data/line/7.png"], ["7.png"]),
        (["/data/line/7.png", "/data/line/8.png"], ["7.png", "8.png"]),
        (["/data/mon/1.png", "/data/tue/1.png"], ["mon/1.png", "tue/1.png"]),
        (["/data/mon/1.png", "/data/1.png"], ["mon/1.png", "data/1.png"]),
        (["/data/mon/x/1.png", "/data/tue/x/1.png", "/2.png"], ["mon/x/1.png", "tue/x/1.png", "2.png"]),
        (["a/1.png", "b/c/1.png", "a/1.png"], ["a/1.png", "c/1.png", "a/1.png"]),
        (["a/1.png", "/home/somebody/a/1.png"], ["a/1.png", "somebody/a/1.png"]),
        (["image-00000", "image-00001"], ["image-00000", "image-00001"]),
    ],
)
def test_names_are_as_short_as_tells_them_apart(given, expected):
    assert short_names(given) == expected


def test_what_is_kept_of_images(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(b"abc")
    seen = SeenImages()
    pixels = np.arange(12, dtype=np.uint8).reshape(2, 2, 3)
    seen.add(Image(pixels, "x/mon/a.png", tmp_path / "a.png"))
    seen.add(Image(pixels.transpose(1, 0, 2), "x/tue/a.png", None))
    seen.add(Image(pixels, "x/tue/b.png", tmp_path / "removed.png"))
    seen.skip([SkippedImage("x/tue/c.png", "damaged")])
    assert seen.names == ["mon/a.png", "tue/a.png", "b.png"]
    assert seen.skipped == ["c.png"]
    assert seen.pixels == ["uint8"]
    assert seen.prints == [f"3-{hashlib.blake2b(b'abc', digest_size=8).hexdigest()}"]
    expected = hashlib.sha256()
    for one in (pixels, pixels.transpose(1, 0, 2), pixels):
        expected.update(b"(2, 2, 3)" + one.tobytes())
    assert seen.digest == expected.hexdigest()


def test_files_are_known_again_by_their_content(tmp_path: Path):
    contents = {"a": b"abc", "moved": b"abc", "of the same size": b"abd", "longer": b"abcd"}
    contents["large"] = b"x" * 3_000_000
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    paths = [tmp_path / name for name in [*contents, "missing"]]
    assert seen_before([file_print(tmp_path / "a")], paths) == [tmp_path / "a", tmp_path / "moved"]
    assert seen_before([file_print(tmp_path / "large")], paths) == [tmp_path / "large"]
    assert seen_before([], paths) == []
    # What another package has put there.
    assert seen_before(["a.png", 7, file_print(tmp_path / "a")], paths[:1]) == [tmp_path / "a"]


def test_a_film_is_looked_at_once(tmp_path: Path, monkeypatch):
    looked = []

    def counted(path):
        looked.append(path)
        return file_print(path)

    monkeypatch.setattr(module, "file_print", counted)
    for name in ("film.mp4", "copy.mp4", "locked.mp4"):
        (tmp_path / name).write_bytes(b"abc")
    pixels, prints = np.zeros((2, 2, 3), dtype=np.uint8), FilePrints()
    for frame in range(4):
        prints.add(Image(pixels, f"frame {frame}", tmp_path / "film.mp4"))
    prints.add(Image(pixels, "copy", tmp_path / "copy.mp4"))
    assert looked == [tmp_path / "film.mp4", tmp_path / "copy.mp4"]
    assert list(prints) == [file_print(tmp_path / "film.mp4")]

    def fails(path):
        raise PermissionError(path)

    monkeypatch.setattr(module, "file_print", fails)
    prints.add(Image(pixels, "locked", tmp_path / "locked.mp4"))
    assert len(list(prints)) == 1
