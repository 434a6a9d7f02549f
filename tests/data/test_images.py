from __future__ import annotations

import io
import os
import struct
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from pydefect.data.images import (
    Image,
    draw_image,
    list_image_files,
    open_images,
    read_image,
    read_mask_values,
)
from pydefect.errors import InputError

RGB = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)


def write(path: Path, rgb: np.ndarray) -> Path:
    """Write an image given in RGB(A) order."""
    pixels = rgb[..., [2, 1, 0, 3][: rgb.shape[2]]] if rgb.ndim == 3 else rgb
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(cv2.imencode(path.suffix.lower(), pixels)[1].tobytes())
    return path


def exif(orientation: int, order: str = "<") -> bytes:
    """A TIFF directory with the orientation as its only entry."""
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(order + "IHHHIHHI", 8, 1, 274, 3, 1, orientation, 0, 0)


def with_jpeg_exif(jpeg: bytes, directory: bytes) -> bytes:
    body = b"Exif\0\0" + directory
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(body) + 2) + body + jpeg[2:]


def png_chunk(kind: bytes, content: bytes) -> bytes:
    chunk = kind + content
    return struct.pack(">I", len(content)) + chunk + struct.pack(">I", zlib.crc32(chunk))


def with_png_exif(png: bytes, directory: bytes) -> bytes:
    return png[:33] + png_chunk(b"eXIf", directory) + png[33:]


def packed(row: np.ndarray, bits: int) -> bytes:
    """Values of 1 to 8 bits, the first of a byte in its highest bits."""
    every = np.unpackbits(row.astype(np.uint8)[:, None], axis=1)[:, 8 - bits :]
    return np.packbits(every.ravel()).tobytes()


def tiff(size: tuple[int, int], tags: dict[int, int | list[int]], content: bytes) -> bytes:
    """A TIFF file of one strip, little endian. Tags hold 16-bit numbers."""
    height, width = size
    start = 8 + 2 + 12 * (len(tags) + 6) + 4
    strip = start + sum(2 * len(value) for value in tags.values() if isinstance(value, list))
    tags |= {256: width, 257: height, 259: 1, 273: strip, 278: height, 279: len(content)}
    directory = values = b""
    for tag, value in sorted(tags.items()):
        if isinstance(value, list):
            directory += struct.pack("<HHII", tag, 3, len(value), start + len(values))
            values += struct.pack(f"<{len(value)}H", *value)
        else:
            directory += struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, value)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + directory + bytes(4) + values + content


def rgba_tiff(rgba: np.ndarray, extra_samples: int) -> bytes:
    """What OpenCV does not write: a TIFF file that says what its alpha is, associated (1) or not (2)."""
    formats = {"u": 1, "f": 3}[rgba.dtype.kind]
    depths = [8 * rgba.dtype.itemsize] * 4
    tags = {258: depths, 262: 2, 277: 4, 338: extra_samples, 339: [formats] * 4}
    return tiff(rgba.shape[:2], tags, rgba.tobytes())


def grey_tiff(grey: np.ndarray, bits: int, photometric: int) -> bytes:
    """What OpenCV does not write: a grey TIFF file whose zero is white (0) or black (1)."""
    formats = {"u": 1, "f": 3}[grey.dtype.kind]
    content = b"".join(packed(row, bits) for row in grey) if bits < 8 else grey.tobytes()
    return tiff(grey.shape, {258: bits, 262: photometric, 277: 1, 339: formats}, content)


# How an upright image is stored under each EXIF orientation.
STORED = {
    1: lambda a: a,
    2: lambda a: a[:, ::-1],
    3: lambda a: a[::-1, ::-1],
    4: lambda a: a[::-1],
    5: lambda a: a.swapaxes(0, 1),
    6: lambda a: np.rot90(a, 1),
    7: lambda a: np.rot90(a.swapaxes(0, 1), 2),
    8: lambda a: np.rot90(a, -1),
}


class TestFormats:
    @pytest.mark.parametrize("ending", [".png", ".bmp", ".tif", ".tiff", ".ppm", ".PNG"])
    def test_lossless_rgb(self, tmp_path: Path, ending: str) -> None:
        pixels = read_image(write(tmp_path / f"a{ending}", RGB))
        assert pixels.dtype == np.uint8
        np.testing.assert_array_equal(pixels, RGB)

    @pytest.mark.parametrize("ending", [".jpg", ".jpeg", ".webp", ".JPG"])
    def test_lossy_rgb_keeps_the_order_of_channels(self, tmp_path: Path, ending: str) -> None:
        red = np.zeros((16, 16, 3), dtype=np.uint8)
        red[..., 0] = 200
        mean = read_image(write(tmp_path / f"a{ending}", red)).mean(axis=(0, 1))
        np.testing.assert_allclose(mean, [200, 0, 0], atol=6)

    @pytest.mark.parametrize("ending", [".png", ".pgm", ".tif", ".bmp"])
    def test_grey_becomes_three_equal_channels(self, tmp_path: Path, ending: str) -> None:
        pixels = read_image(write(tmp_path / f"a{ending}", RGB[..., 0]))
        np.testing.assert_array_equal(pixels, np.repeat(RGB[..., :1], 3, axis=2))

    @pytest.mark.parametrize("ending", [".png", ".tif", ".pgm"])
    def test_sixteen_bits_are_divided_by_the_full_range(self, tmp_path: Path, ending: str) -> None:
        # 12-bit camera data in a 16-bit file stay dark: nothing is stretched to the image's own contrast.
        grey = np.array([[0, 1, 4095], [2048, 30000, 65535]], dtype=np.uint16)
        pixels = read_image(write(tmp_path / f"a{ending}", grey))
        assert pixels.dtype == np.float32
        np.testing.assert_array_equal(pixels[..., 1], grey.astype(np.float32) / np.float32(65535))

    def test_sixteen_bit_rgb(self, tmp_path: Path) -> None:
        wide = RGB.astype(np.uint16) * 257
        np.testing.assert_allclose(read_image(write(tmp_path / "a.png", wide)), RGB / 255, atol=1e-7)

    @pytest.mark.parametrize("ending", [".png", ".tif", ".webp"])
    def test_transparency_is_shown_over_white(self, tmp_path: Path, ending: str) -> None:
        rgba = np.zeros((8, 8, 4), dtype=np.uint8)
        rgba[..., 0], rgba[:4, :, 3], rgba[4:, :, 3] = 100, 255, 51
        path = tmp_path / f"a{ending}"
        lossless = [cv2.IMWRITE_WEBP_QUALITY, 101] if ending == ".webp" else []
        path.write_bytes(cv2.imencode(ending, rgba[..., [2, 1, 0, 3]], lossless)[1].tobytes())
        pixels = read_image(path)
        np.testing.assert_array_equal(pixels[0, 0], [100, 0, 0])
        np.testing.assert_array_equal(pixels[7, 7], [100 * 0.2 + 255 * 0.8, 204, 204])

    @pytest.mark.parametrize("kind", ["uint8", "uint16", "float32"])
    @pytest.mark.parametrize("associated", [True, False])
    def test_either_alpha_of_a_tiff_is_shown_over_white(
        self, tmp_path: Path, kind: str, associated: bool
    ) -> None:
        rgba = np.array([[[0.6, 0.4, 0.2, alpha] for alpha in (0, 0.2, 0.8, 1)]])
        expected = rgba[..., :3] * rgba[..., 3:] + (1 - rgba[..., 3:])
        if associated:
            rgba[..., :3] *= rgba[..., 3:]
        full = 1 if kind == "float32" else np.iinfo(kind).max
        (tmp_path / "a.tif").write_bytes(rgba_tiff((rgba * full).astype(kind), 1 if associated else 2))
        pixels = read_image(tmp_path / "a.tif")
        assert pixels.dtype == ("uint8" if kind == "uint8" else "float32")
        # Of 8 bits, colours and products are cut to whole numbers.
        full, tolerance = (255, 1.5) if kind == "uint8" else (1, 1e-4)
        np.testing.assert_allclose(pixels, full * expected, rtol=0, atol=tolerance)

    @pytest.mark.parametrize(
        ("kind", "bits", "full"),
        [("uint8", 1, 1), ("uint8", 8, 255), ("uint16", 16, 65535), ("float32", 32, 1), ("float64", 64, 1)],
    )
    def test_a_tiff_is_the_same_picture_whether_black_or_white_is_zero(
        self, tmp_path: Path, kind: str, bits: int, full: int
    ) -> None:
        grey = np.array([[0, 1, 0, 0, 1, 1, 0, 1], [0.2, 0.4, 0.6, 0.8, 1, 0, 0, 0]])[: 1 if bits == 1 else 2]
        for photometric, values in ((0, 1 - grey), (1, grey)):
            path = tmp_path / f"{photometric}.tif"
            path.write_bytes(grey_tiff((values * full).round(6).astype(kind), bits, photometric))
            pixels = read_image(path)
            assert pixels.dtype == ("uint8" if kind == "uint8" else "float32")
            np.testing.assert_allclose(pixels[..., 0], grey * (255 if kind == "uint8" else 1), atol=1e-6)
            # A mask marks what is not black.
            np.testing.assert_array_equal(read_mask_values(path) > 0, grey > 0)

    @pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
    def test_a_transparent_grey_of_a_png_is_shown_over_white(self, tmp_path: Path, bits: int) -> None:
        grey = np.zeros((4, 8), dtype=np.uint16)
        grey[1:] = 1
        # The rows of a file are filled up to whole bytes, after a byte that names their filter.
        stored = [row.astype(">u2").tobytes() if bits == 16 else packed(row, bits) for row in grey]
        content = [
            (b"IHDR", struct.pack(">IIBBBBB", 8, 4, bits, 0, 0, 0, 0)),
            (b"tRNS", struct.pack(">H", 0)),
            (b"IDAT", zlib.compress(b"".join(b"\0" + row for row in stored))),
            (b"IEND", b""),
        ]
        png = b"\x89PNG\r\n\x1a\n" + b"".join(png_chunk(*one) for one in content)
        (tmp_path / "zero.png").write_bytes(png)
        one = png.replace(png_chunk(*content[1]), png_chunk(b"tRNS", struct.pack(">H", 1)))
        (tmp_path / "one.png").write_bytes(one)
        full = 1.0 if bits == 16 else 255
        value = full / (2**bits - 1)
        zero_is_clear, one_is_clear = (read_image(tmp_path / f"{name}.png") for name in ("zero", "one"))
        np.testing.assert_allclose(zero_is_clear[:, 0, 1], [full, value, value, value], rtol=1e-6)
        np.testing.assert_allclose(one_is_clear[:, 7, 2], [0, full, full, full], rtol=1e-6)

    def test_sixteen_bit_transparency(self, tmp_path: Path) -> None:
        rgba = np.zeros((2, 2, 4), dtype=np.uint16)
        rgba[..., 3] = 65535 // 5
        np.testing.assert_allclose(read_image(write(tmp_path / "a.png", rgba)), 0.8, atol=1e-6)

    def test_unused_fourth_channel_of_a_bmp_is_no_transparency(self, tmp_path: Path) -> None:
        unused = np.concatenate([RGB, np.zeros((5, 7, 1), dtype=np.uint8)], axis=2)
        np.testing.assert_array_equal(read_image(write(tmp_path / "a.bmp", unused)), RGB)

    def test_floating_point_tiff(self, tmp_path: Path) -> None:
        values = np.linspace(0, 1, 12, dtype=np.float32).reshape(3, 4)
        np.testing.assert_array_equal(read_image(write(tmp_path / "a.tif", values))[..., 2], values)

    def test_content_decides_not_the_ending(self, tmp_path: Path) -> None:
        renamed = write(tmp_path / "a.png", RGB).rename(tmp_path / "a.jpg")
        np.testing.assert_array_equal(read_image(renamed), RGB)

    def test_unicode_path(self, tmp_path: Path) -> None:
        np.testing.assert_array_equal(read_image(write(tmp_path / "größe 瓶" / "é.png", RGB)), RGB)


class TestOrientation:
    @pytest.mark.parametrize("orientation", STORED)
    @pytest.mark.parametrize("order", ["<", ">"])
    def test_jpeg(self, tmp_path: Path, orientation: int, order: str) -> None:
        upright = np.zeros((16, 32, 3), dtype=np.uint8)
        upright[:8, :16] = 255
        jpeg = cv2.imencode(".jpg", np.ascontiguousarray(STORED[orientation](upright)))[1].tobytes()
        (tmp_path / "a.jpg").write_bytes(with_jpeg_exif(jpeg, exif(orientation, order)))
        pixels = read_image(tmp_path / "a.jpg")
        assert pixels.shape == upright.shape
        np.testing.assert_allclose(pixels, upright, atol=8)

    @pytest.mark.parametrize("orientation", STORED)
    @pytest.mark.parametrize("channels", [3, 4])
    def test_png(self, tmp_path: Path, orientation: int, channels: int) -> None:
        opaque = np.concatenate([RGB, np.full((5, 7, 1), 255, dtype=np.uint8)], axis=2)[..., :channels]
        path = write(tmp_path / "a.png", np.ascontiguousarray(STORED[orientation](opaque)))
        path.write_bytes(with_png_exif(path.read_bytes(), exif(orientation)))
        np.testing.assert_array_equal(read_image(path), RGB)

    @pytest.mark.parametrize("orientation", STORED)
    @pytest.mark.parametrize("channels", [1, 3, 4])
    def test_a_mask(self, tmp_path: Path, orientation: int, channels: int) -> None:
        drawn = np.zeros((5, 7, 1), dtype=np.uint8)
        drawn[0, 1:4] = drawn[3, 2] = 255
        stored = np.repeat(STORED[orientation](drawn), channels, axis=2).squeeze()
        path = write(tmp_path / "a.png", np.ascontiguousarray(stored))
        path.write_bytes(with_png_exif(path.read_bytes(), exif(orientation)))
        np.testing.assert_array_equal(read_mask_values(path), drawn[..., 0])

    @pytest.mark.parametrize("orientation", STORED)
    def test_webp(self, tmp_path: Path, orientation: int) -> None:
        stored = np.ascontiguousarray(STORED[orientation](RGB)[..., ::-1])
        simple = cv2.imencode(".webp", stored, [cv2.IMWRITE_WEBP_QUALITY, 101])[1].tobytes()
        height, width = stored.shape[:2]
        has_exif = 8
        extended = struct.pack("<4sIB3x", b"VP8X", 10, has_exif)
        extended += (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
        chunks = b"WEBP" + extended + simple[12:] + struct.pack("<4sI", b"EXIF", 26) + exif(orientation)
        (tmp_path / "a.webp").write_bytes(b"RIFF" + struct.pack("<I", len(chunks)) + chunks)
        np.testing.assert_array_equal(read_image(tmp_path / "a.webp"), RGB)

    def test_nonsense_in_exif_is_upright(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.png", RGB)
        png = path.read_bytes()
        for directory in (exif(0), exif(9), b"II*\0\xff\xff\xff\xff", b"", exif(6)[:-8]):
            path.write_bytes(with_png_exif(png, directory))
            np.testing.assert_array_equal(read_image(path), RGB)


class TestBrokenFiles:
    @pytest.mark.parametrize("ending", [".jpg", ".png", ".bmp", ".tif", ".webp", ".ppm"])
    @pytest.mark.parametrize("kept", [0.3, 0.98])
    def test_cut_off(
        self, tmp_path: Path, ending: str, kept: float, capfd: pytest.CaptureFixture[str]
    ) -> None:
        noise = np.random.default_rng(1).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        path = write(tmp_path / f"cut{ending}", noise)
        path.write_bytes(path.read_bytes()[: int(kept * path.stat().st_size)])
        with pytest.raises(InputError, match=rf"cut\{ending}: .*(damaged|cut off)"):
            read_image(path)
        assert capfd.readouterr().err == ""

    def test_the_end_of_a_thumbnail_is_not_the_end_of_a_jpeg(self, tmp_path: Path) -> None:
        jpeg = cv2.imencode(".jpg", np.zeros((64, 64, 3), dtype=np.uint8))[1].tobytes()
        whole = with_jpeg_exif(jpeg, exif(1) + jpeg)
        (tmp_path / "a.jpg").write_bytes(whole)
        assert read_image(tmp_path / "a.jpg").shape == (64, 64, 3)
        (tmp_path / "a.jpg").write_bytes(whole[:-2])
        with pytest.raises(InputError, match="cut off"):
            read_image(tmp_path / "a.jpg")

    @pytest.mark.parametrize(
        ("content", "reason"),
        [(b"", r"empty \(0 bytes\)"), (b"no image at all", "no image"), (b"\xff\xd8\xff", "damaged")],
    )
    def test_no_image(self, tmp_path: Path, content: bytes, reason: str) -> None:
        path = tmp_path / "bad.jpg"
        path.write_bytes(content)
        with pytest.raises(InputError, match=f"bad.jpg: .*{reason}"):
            read_image(path)

    def test_floating_point_file_out_of_range(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.tif", np.array([[0, 2.5]], dtype=np.float32))
        with pytest.raises(InputError, match=r"a.tif: .* 0\.\.2\.5"):
            read_image(path)

    def test_folder_and_missing_file(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match="is a folder"):
            read_image(tmp_path)
        with pytest.raises(InputError, match=r"gone\.png: cannot be read"):
            read_image(tmp_path / "gone.png")

    def test_skipped_files_are_listed(self, tmp_path: Path) -> None:
        write(tmp_path / "1.png", RGB)
        (tmp_path / "2.png").write_bytes(b"")
        write(tmp_path / "3.png", RGB)
        images = open_images(tmp_path, on_error="skip")
        for _ in range(2):  # reading again starts a new list
            assert [image.name for image in images] == ["1.png", "3.png"]
            assert [skipped.name for skipped in images.skipped] == ["2.png"]
            assert "empty" in images.skipped[0].reason
        assert len(images) == 3

    def test_the_first_bad_file_stops_by_default(self, tmp_path: Path) -> None:
        write(tmp_path / "1.png", RGB)
        (tmp_path / "2.png").write_bytes(b"")
        images = iter(open_images(tmp_path))
        next(images)
        with pytest.raises(InputError, match=r"2\.png"):
            next(images)

    def test_skipping_arrays_keeps_the_numbers(self) -> None:
        good, bad = np.zeros((4, 4)), np.full((4, 4), np.nan)
        images = open_images([good, bad, good], on_error="skip")
        assert [image.name for image in images] == ["image-00000", "image-00002"]
        assert images.skipped[0].name == "image-00001"

    def test_many_threads_leave_the_log_level_of_opencv_as_it_was(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.png", RGB)
        get_level = getattr(cv2, "getLogLevel", None) or cv2.utils.logging.getLogLevel
        level = get_level()
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(read_image, [path] * 200))
        assert get_level() == level


class TestFolders:
    def test_natural_order_endings_and_hidden_files(self, tmp_path: Path) -> None:
        wanted = ["1.png", "2.PNG", "10.jpg", "b2/3.tiff", "B10/3.bmp"]
        for name in [*wanted, ".hidden.png", ".cache/1.png", "b2/._3.png"]:
            write(tmp_path / name, RGB)
        (tmp_path / "notes.txt").write_text("no image")
        images = open_images(tmp_path)
        assert [image.name for image in images] == wanted
        assert len(images) == len(wanted)
        assert next(iter(images)).path == tmp_path / "1.png"

    def test_a_link_back_to_the_folder_ends(self, tmp_path: Path) -> None:
        write(tmp_path / "a" / "1.png", RGB)
        (tmp_path / "a" / "loop").symlink_to(tmp_path / "a", target_is_directory=True)
        assert [image.name for image in open_images(str(tmp_path))] == ["a/1.png"]

    def test_only_regular_files_and_links_are_images(self, tmp_path: Path) -> None:
        write(tmp_path / "1.png", RGB)
        os.mkfifo(tmp_path / "2.png")
        (tmp_path / "3.png").symlink_to(tmp_path / "1.png")
        (tmp_path / "4.png").symlink_to(tmp_path / "2.png")
        assert [path.name for path in list_image_files(tmp_path)] == ["1.png", "3.png"]
        # A link to nothing is no reason to pass over an image without a word.
        (tmp_path / "5.png").symlink_to(tmp_path / "gone.png")
        images = open_images(tmp_path, on_error="skip")
        assert [image.name for image in images] == ["1.png", "3.png"]
        assert [skipped.name for skipped in images.skipped] == ["5.png"]

    def test_a_folder_that_cannot_be_listed_is_no_empty_one(self, tmp_path: Path) -> None:
        with pytest.raises(InputError, match=r"gone: the folder cannot be read"):
            list_image_files(tmp_path / "gone")

    def test_files_are_opened_one_at_a_time(self, tmp_path: Path) -> None:
        for number in range(3):
            write(tmp_path / f"{number}.png", RGB)
        images = iter(open_images(tmp_path))
        next(images)
        (tmp_path / "2.png").unlink()
        next(images)
        with pytest.raises(InputError, match=r"2\.png"):
            next(images)

    def test_one_file(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.png", RGB)
        (image,) = open_images(path)
        assert (image.name, image.path) == (str(path), path)

    def test_list_of_paths_keeps_its_order_and_names(self, tmp_path: Path) -> None:
        paths = [str(write(tmp_path / name, RGB)) for name in ("10.png", "2.png")]
        assert [image.name for image in open_images(paths)] == paths
        assert [image.name for image in open_images(np.array(paths))] == paths
        as_paths = np.array([Path(path) for path in paths], dtype=object)
        assert [image.path for image in open_images(as_paths)] == list(as_paths)


class TestArrays:
    @pytest.mark.parametrize(
        ("shape", "count", "size"),
        [
            ((6, 8), 1, (6, 8)),
            ((6, 8, 1), 1, (6, 8)),
            ((6, 8, 3), 1, (6, 8)),
            ((6, 8, 4), 1, (6, 8)),
            ((5, 6, 8), 5, (6, 8)),
            ((3, 6, 8), 3, (6, 8)),
            ((5, 6, 8, 1), 5, (6, 8)),
            ((5, 6, 8, 3), 5, (6, 8)),
            ((5, 6, 8, 4), 5, (6, 8)),
        ],
    )
    def test_shapes(self, shape: tuple[int, ...], count: int, size: tuple[int, int]) -> None:
        images = open_images(np.zeros(shape, dtype=np.uint8))
        assert len(images) == count
        assert [image.pixels.shape for image in images] == [(*size, 3)] * count

    @pytest.mark.parametrize(
        ("shape", "count", "size"),
        [
            ((6, 8), 1, (6, 8)),
            ((1, 6, 8), 1, (6, 8)),
            ((3, 6, 8), 1, (6, 8)),
            ((4, 6, 8), 1, (6, 8)),
            ((6, 8, 3), 1, (6, 8)),
            ((3, 6, 3), 1, (6, 3)),  # channels first wins where both readings are possible
            ((5, 6, 8), 5, (6, 8)),
            ((5, 3, 6, 8), 5, (6, 8)),
            ((5, 6, 8, 3), 5, (6, 8)),
            ((5, 3, 6, 3), 5, (6, 3)),
        ],
    )
    def test_tensor_shapes(self, shape: tuple[int, ...], count: int, size: tuple[int, int]) -> None:
        images = open_images(torch.zeros(shape))
        assert len(images) == count
        assert [image.pixels.shape for image in images] == [(*size, 3)] * count

    @pytest.mark.parametrize(
        ("value", "expected"),
        [
            (np.uint8(200), np.uint8(200)),
            (np.uint16(65535), np.float32(1)),
            (np.bool_(True), np.uint8(255)),
            (np.float64(0.25), np.float32(0.25)),
            (np.float16(0.5), np.float32(0.5)),
            (np.float32(1 + 5e-7), np.float32(1)),
        ],
    )
    def test_types(self, value: np.generic, expected: np.generic) -> None:
        (image,) = open_images(np.full((2, 3), value))
        assert image.pixels.dtype == expected.dtype
        assert (image.pixels == expected).all()

    @pytest.mark.parametrize("dtype", [torch.uint8, torch.bool, torch.float16, torch.bfloat16, torch.float64])
    def test_tensor_types(self, dtype: torch.dtype) -> None:
        (image,) = open_images(torch.ones(3, 4, 5).to(dtype))
        assert image.pixels.dtype == (np.uint8 if dtype in (torch.uint8, torch.bool) else np.float32)

    @pytest.mark.parametrize(
        "tensor",
        [
            torch.ones(3, 4, 5).to_sparse(),
            torch.ones(3, 4, 5, device="meta"),
            torch.ones(3, 4, 5).to(torch.float8_e5m2),
        ],
        ids=["sparse", "meta", "float8"],
    )
    def test_tensors_that_numpy_does_not_know(self, tensor: torch.Tensor) -> None:
        with pytest.raises(InputError, match="image-00000: the tensor cannot be read as an array"):
            list(open_images(tensor))

    def test_tensor_values_keep_their_channels(self) -> None:
        tensor = torch.from_numpy(RGB).permute(2, 0, 1)
        (image,) = open_images(tensor)
        np.testing.assert_array_equal(image.pixels, RGB)
        (image,) = open_images((tensor / 255).requires_grad_())
        np.testing.assert_allclose(image.pixels, RGB / 255, atol=1e-7)

    def test_sizes_may_differ_and_batches_are_taken_apart(self) -> None:
        source = [np.zeros((4, 5)), np.zeros((2, 6, 7, 3)), torch.zeros(3, 8, 9)]
        images = open_images(source)
        assert len(images) == 4
        assert [image.pixels.shape[:2] for image in images] == [(4, 5), (6, 7), (6, 7), (8, 9)]
        assert [image.name for image in images][-1] == "image-00003"

    def test_images_pass_through(self) -> None:
        given = Image(RGB, "a", None)
        for source in (given, [given]):
            (image,) = open_images(source)
            assert (image.name, image.path) == ("a", None)
            assert image.pixels is RGB
        collection = open_images([given])
        assert open_images(collection) is collection

    @pytest.mark.parametrize("mode", ["1", "L", "RGB", "RGBA", "P", "CMYK", "LA", "I;16", "F"])
    def test_pil_images(self, mode: str) -> None:
        pil = pytest.importorskip("PIL.Image")
        (image,) = open_images(pil.new(mode, (7, 5)))
        assert image.pixels.shape == (5, 7, 3)

    def test_pil_modes_that_cannot_be_shown(self) -> None:
        pil = pytest.importorskip("PIL.Image")
        image = pil.new("LA", (7, 5)).convert("La")
        with pytest.raises(InputError, match="source is a PIL image of mode La, which is not read: "):
            open_images(image)
        with pytest.raises(InputError, match="item 1 of source is a PIL image of mode La"):
            open_images([RGB, image])

    def test_pil_palette_gives_colours(self) -> None:
        pil = pytest.importorskip("PIL.Image")
        (image,) = open_images(pil.new("RGB", (7, 5), (255, 0, 0)).quantize(4))
        assert (image.pixels == [255, 0, 0]).all()


class TestBytes:
    """Files that never were on a disk."""

    @pytest.mark.parametrize("ending", [".jpg", ".png", ".tif"])
    @pytest.mark.parametrize("kind", [bytes, bytearray, memoryview])
    def test_they_are_read_as_the_file_would_be(self, tmp_path: Path, ending: str, kind: type) -> None:
        path = write(tmp_path / f"a{ending}", RGB)
        content = path.read_bytes()
        if ending == ".jpg":
            content = with_jpeg_exif(content, exif(6))  # lies on its side
            path.write_bytes(content)
        images = open_images(kind(content))
        assert len(images) == 1
        for _ in range(2):
            (image,) = images
            assert (image.name, image.path) == ("image-00000", None)
            assert np.array_equal(image.pixels, read_image(path))

    def test_among_other_items(self, tmp_path: Path) -> None:
        path = write(tmp_path / "a.png", RGB)
        items = [np.zeros((2, 6, 7, 3)), path, path.read_bytes(), memoryview(path.read_bytes())]
        assert len(open_images(items)) == 5
        for source in (items, iter(items)):
            images = list(open_images(source))
            assert [image.name for image in images] == [
                *("image-00000", "image-00001", str(path), "image-00003", "image-00004")
            ]
            assert all(np.array_equal(image.pixels, RGB) for image in images[2:])

    @pytest.mark.parametrize(
        ("content", "reason"),
        [(b"", r"empty \(0 bytes\)"), (b"a.png", "the file is no image"), (b"\xff\xd8\xff", "is damaged")],
    )
    def test_what_cannot_be_decoded_is_named(self, content: bytes, reason: str) -> None:
        good = cv2.imencode(".png", RGB)[1].tobytes()
        with pytest.raises(InputError, match=f"image-00001: .*{reason}"):
            list(open_images([good, content]))
        images = open_images(iter([good, content, good]), on_error="skip")
        assert [image.name for image in images] == ["image-00000", "image-00002"]
        assert [skipped.name for skipped in images.skipped] == ["image-00001"]


class TestIterables:
    def test_a_generator_is_streamed(self) -> None:
        asked = 0

        def endless() -> Iterator[np.ndarray]:
            nonlocal asked
            while True:
                asked += 1
                yield np.zeros((4, 4), dtype=np.uint8)

        images = iter(open_images(endless()))
        for number in range(1, 4):
            next(images)
            assert asked == number

    def test_a_generator_has_no_length_and_is_read_once(self) -> None:
        images = open_images(np.zeros((4, 4)) for _ in range(2))
        with pytest.raises(TypeError, match="not known"):
            len(images)
        assert len(list(images)) == 2
        with pytest.raises(InputError, match="already been read"):
            list(images)

    def test_other_iterables_are_read_again(self, tmp_path: Path) -> None:
        paths = dict.fromkeys([write(tmp_path / "a.png", RGB), write(tmp_path / "b.png", RGB)])
        images = open_images(paths.keys())
        assert len(list(images)) == len(list(images)) == 2


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "source is of type NoneType; allowed are a folder"),
        (3, "source is of type int"),
        ({}, "source is of type dict"),
        ([], "source is an empty list"),
        ((), "source is an empty tuple"),
        ("", "empty path"),
        ("nowhere", "there is no file or folder nowhere"),
        ([None], "item 0 of source is of type NoneType"),
        ([np.zeros((2, 2)), [1, 2]], "item 1 of source is of type list"),
        (np.zeros(5), r"source has the shape \[5\]"),
        (np.zeros((2, 3, 4, 5)), r"source has the shape \[2, 3, 4, 5\]"),
        (np.zeros((0, 4, 4, 3)), "at least one pixel"),
        (np.zeros((4, 0), dtype=np.uint8), "at least one pixel"),
        (torch.zeros(1, 1, 3, 4, 5), "source has the shape"),
    ],
)
def test_wrong_sources(source: object, message: str) -> None:
    for on_error in ("raise", "skip"):
        with pytest.raises(InputError, match=message):
            open_images(source, on_error=on_error)


@pytest.mark.parametrize(
    ("array", "message"),
    [
        (np.zeros((2, 2), dtype=np.int64), "image-00000: pixels are of type int64"),
        (np.zeros((2, 2), dtype=complex), "complex128"),
        (np.array([[0.0, 255.0]]), r"image-00000: floating point pixels lie in 0\.\.255"),
        (np.array([[-0.5, 0.5]]), r"-0\.5\.\.0\.5"),
        (np.array([[np.nan, 0.5]]), "NaN"),
        (np.array([[np.inf, 0.5]]), "infinite"),
        (torch.zeros(2, 2, dtype=torch.int32), "int32"),
    ],
)
def test_wrong_pixels(array: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        list(open_images(array))


def test_wrong_item_of_a_generator_is_never_skipped() -> None:
    with pytest.raises(InputError, match="item 0 of source is of type int"):
        list(open_images(iter([7]), on_error="skip"))


def test_empty_folder(tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("no image")
    with pytest.raises(InputError, match=r"no image in the folder .*\.png"):
        open_images(tmp_path)


def test_wrong_on_error() -> None:
    with pytest.raises(InputError, match="on_error is 'ignore'"):
        open_images(np.zeros((2, 2)), on_error="ignore")  # type: ignore[arg-type]


# -- drawing
# -------------------------------------------------------------------------------------------------------


def test_a_drawn_image_is_any_of_them(tmp_path):
    paths = []
    for value in range(4):
        paths.append(tmp_path / f"{value}.png")
        cv2.imwrite(str(paths[-1]), np.full((5, 6, 3), value, np.uint8))
    rng = np.random.default_rng(0)
    assert {int(draw_image(paths, rng)[0, 0, 0]) for _ in range(40)} == {0, 1, 2, 3}


def test_a_damaged_file_is_named_and_another_drawn(tmp_path):
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    cv2.imwrite(str(good), np.zeros((5, 6, 3), np.uint8))
    bad.write_bytes(b"no image")
    with pytest.warns(UserWarning, match=r"bad\.png.*; another image is taken"):
        shapes = [draw_image([good, bad], np.random.default_rng(seed)).shape for seed in range(6)]
    assert shapes == [(5, 6, 3)] * 6


@pytest.mark.filterwarnings("ignore:.*another image is taken")
def test_damaged_files_alone_are_an_error(tmp_path):
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no image")
    with pytest.raises(InputError, match=r"bad\.png"):
        draw_image([bad], np.random.default_rng(0))


@pytest.mark.parametrize("dtype", [">u2", ">f4", "<u2"])
def test_pixels_of_either_byte_order(dtype):
    values = np.linspace(0, 1, 20, dtype=np.float32).reshape(4, 5)
    given = (values * 65535).round().astype(dtype) if dtype.endswith("u2") else values.astype(dtype)
    (image,) = open_images([given])
    np.testing.assert_allclose(image.pixels[..., 0], values, atol=1 / 65535)


def test_a_big_endian_pil_image_keeps_its_values():
    pil = pytest.importorskip("PIL.Image")
    values = np.array([[0, 13000], [40000, 65535]], dtype=">u2")
    opened = pil.frombytes("I;16B", (2, 2), values.tobytes())
    (image,) = open_images([opened])
    np.testing.assert_allclose(image.pixels[..., 0], values.astype(float) / 65535, atol=1e-6)


# -- images and files that somebody else made
# ----------------------------------------------------------------------------------


def not_finite() -> np.ndarray:
    pixels = np.full((4, 5, 3), 0.5, np.float32)
    pixels[1, 2] = np.nan
    return pixels


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (not_finite(), "frame: there are NaN or infinite values"),
        (np.full((4, 5, 3), 200, np.float32), r"frame: floating point pixels lie in 200\.\.200; they must"),
        (
            np.zeros((4, 5), np.uint8),
            r"frame: pixels are of shape \[4, 5\]; they must be an array \[H, W, 3\]",
        ),
        (np.zeros((4, 5, 3), np.int64), "frame: pixels are of type int64; allowed are uint8 and float32"),
        ([[0, 1]], "frame: pixels are a list; they must"),
    ],
    ids=["NaN", "0 to 255", "grey", "int64", "list"],
)
def test_pixels_of_an_image_are_looked_at(pixels, message):
    """NaN passed for good with methods whose teacher has never seen it."""
    with pytest.raises(InputError, match=message):
        list(open_images([Image(pixels, "frame", None)]))
    assert [one.name for one in list_skipped([Image(pixels, "frame", None), RGB])] == ["frame"]


def list_skipped(source):
    collection = open_images(source, on_error="skip")
    assert len(list(collection)) == 1
    return collection.skipped


def test_an_image_takes_a_path_as_text():
    assert Image(RGB, "x", "line/x.png").path == Path("line/x.png")


def test_open_files_are_read_and_not_iterated_over(tmp_path):
    content = cv2.imencode(".png", RGB[..., ::-1])[1].tobytes()
    path = tmp_path / "x.png"
    path.write_bytes(content)
    with path.open("rb") as file, path.open("rb") as other:
        for source in (io.BytesIO(content), file, [io.BytesIO(content)], (one for one in [other])):
            (image,) = open_images(source)
            assert np.array_equal(image.pixels, RGB)
            assert image.name == "image-00000"
    assert len(open_images([io.BytesIO(content), RGB])) == 2
    with path.open(encoding="latin-1") as file, pytest.raises(InputError, match="an object of type str; it"):
        list(open_images(file))
    with pytest.raises(InputError, match=r"read\(\) of the VideoCapture gave an object of type tuple"):
        list(open_images(cv2.VideoCapture()))


def test_a_tensor_that_is_still_to_be_negated():
    values = torch.rand(3, 4, 5, generator=torch.Generator().manual_seed(0))
    tensor = torch.complex(torch.zeros_like(values), -values).conj().imag
    assert tensor.is_neg()
    (image,) = open_images(tensor)
    assert np.array_equal(image.pixels, values.permute(1, 2, 0).numpy())


@pytest.mark.parametrize(
    "shape", [(3, 4, 5), (3, 1, 5), (1, 3, 4), (2, 3, 4, 7), (2, 1, 3, 6), (2, 3, 1, 9)], ids=str
)
@pytest.mark.parametrize("wrap", [lambda tensor: tensor, lambda tensor: [tensor]], ids=["alone", "in a list"])
def test_tensors_of_as_many_rows_as_channels(shape, wrap):
    """Of a line camera, for one: rows were taken for channels once more."""
    values = torch.rand(*shape, generator=torch.Generator().manual_seed(0))
    images = open_images(wrap(values))
    singles = values if len(shape) == 4 else values[None]
    assert len(images) == len(singles)
    for image, single in zip(images, singles, strict=True):
        expected = single.expand(3, -1, -1).permute(1, 2, 0)
        assert np.array_equal(image.pixels, expected.numpy())


@pytest.mark.parametrize("kind", ["uint8", "uint16", "float32"])
def test_a_colour_brighter_than_its_alpha_stays_white(tmp_path: Path, kind: str) -> None:
    full = 1 if kind == "float32" else np.iinfo(kind).max
    rgba = (np.array([[[0.8, 0.8, 0.8, 0.4]]]) * full).astype(kind)
    (tmp_path / "a.tif").write_bytes(rgba_tiff(rgba, 1))
    pixels = read_image(tmp_path / "a.tif")
    assert (pixels == (255 if kind == "uint8" else 1)).all()
