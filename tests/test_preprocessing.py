from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pydefect.errors import InputError
from pydefect.preprocessing import IMAGENET_MEAN, IMAGENET_STD, Preprocessing

RNG = np.random.default_rng(0)


def raw(**sizes: object) -> Preprocessing:
    """Without normalisation, so that outputs can be compared with pixels."""
    return Preprocessing.create(**sizes, mean=(0, 0, 0), std=(1, 1, 1))  # type: ignore[arg-type]


class TestForward:
    def test_normalisation(self) -> None:
        pixels = RNG.integers(0, 256, (6, 8, 3), dtype=np.uint8)
        output = Preprocessing()(pixels)
        assert output.shape == (3, 6, 8)
        assert output.dtype == torch.float32
        expected = (pixels / 255 - IMAGENET_MEAN) / IMAGENET_STD
        np.testing.assert_allclose(output.permute(1, 2, 0).numpy(), expected, atol=1e-5)

    def test_channels_stay_last_in_memory(self) -> None:
        region = (3, 5, 30, 47)
        for sizes in (
            {},
            {"resize": 16},
            {"crop": 16},
            {"resize": (20, 30), "crop": (16, 24)},
            {"region": region},
            {"resize": 16, "region": region},
        ):
            output = Preprocessing.create(**sizes)(RNG.integers(0, 256, (32, 48, 3), dtype=np.uint8))
            assert output.permute(1, 2, 0).is_contiguous()

    def test_views_of_other_arrays(self) -> None:
        pixels = RNG.integers(0, 256, (32, 48, 3), dtype=np.uint8)
        preprocessing, before = Preprocessing.create(resize=16), pixels.copy()
        for view in (pixels[::2, ::3], pixels[::-1], pixels[..., ::-1], pixels.transpose(1, 0, 2)):
            assert torch.equal(preprocessing(view), preprocessing(view.copy()))
        np.testing.assert_array_equal(pixels, before)

    @pytest.mark.filterwarnings("error")
    def test_pixels_that_may_not_be_written_to(self) -> None:
        pixels = RNG.integers(0, 256, (32, 48, 3), dtype=np.uint8)
        for values in (pixels, (pixels / 255).astype(np.float32)):
            protected = values.copy()
            protected.flags.writeable = False
            expected = Preprocessing.create(resize=16)(values)
            assert torch.equal(Preprocessing.create(resize=16)(protected), expected)

    def test_eight_bits_and_floats_agree(self) -> None:
        pixels = RNG.integers(0, 256, (37, 53, 3), dtype=np.uint8)
        preprocessing = Preprocessing.create(resize=(20, 30), crop=(16, 24))
        difference = preprocessing(pixels) - preprocessing((pixels / 255).astype(np.float32))
        assert difference.abs().max() < 1e-5

    def test_nothing_to_do_keeps_the_pixels(self) -> None:
        pixels = RNG.random((6, 8, 3), dtype=np.float32)
        np.testing.assert_array_equal(
            raw(resize=(6, 8), crop=(6, 8))(pixels).permute(1, 2, 0).numpy(), pixels
        )

    def test_crop_is_centred(self) -> None:
        pixels = RNG.random((9, 8, 3), dtype=np.float32)
        output = raw(crop=(4, 6))(pixels).permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(output, pixels[2:6, 1:7])

    def test_downscaling_averages(self) -> None:
        # Without antialiasing a fine chequerboard would turn into a plain black or white area.
        board = np.indices((64, 64)).sum(axis=0) % 2
        output = raw(resize=16)(np.repeat(board[..., None], 3, axis=2).astype(np.float32))
        assert (output - 0.5).abs().max() < 0.02

    @pytest.mark.parametrize("size", [(600, 700), (5000, 60), (1, 300_000)])
    @pytest.mark.parametrize("resize", [(256, 256), (700, 20), (20, 900)])
    def test_photographs_are_resized_as_in_one_piece(self, size, resize) -> None:
        """In bands, to the bit what one call of PyTorch's gives."""
        pixels = RNG.integers(0, 256, (*size, 3), dtype=np.uint8)
        whole = torch.from_numpy(pixels).permute(2, 0, 1)[None].float().div(255)
        expected = torch.nn.functional.interpolate(whole, resize, mode="bilinear", antialias=True)[0]
        assert torch.equal(raw(resize=resize)(pixels), expected)

    @pytest.mark.parametrize("sizes", [{}, {"resize": 64}, {"crop": 50}, {"resize": (70, 90), "crop": 64}])
    @pytest.mark.parametrize("region", [(0, 0, 60, 70), (7, 130, 907, 1000), (100, 0, 1000, 999)])
    @pytest.mark.parametrize("dtype", [np.uint8, np.float32])
    def test_a_region_is_what_cutting_it_out_gives(self, sizes, region, dtype) -> None:
        pixels = RNG.integers(0, 256, (1000, 1000, 3), dtype=np.uint8)
        if dtype == np.float32:
            pixels = pixels.astype(np.float32) / 255
        top, left, bottom, right = region
        part = pixels[top:bottom, left:right].copy()
        whole, cut = Preprocessing.create(**sizes, region=region), Preprocessing.create(**sizes)
        assert torch.equal(whole(pixels), cut(part))

        mask = RNG.random((1000, 1000)) > 0.5
        np.testing.assert_array_equal(
            whole.mask_to_input(mask), cut.mask_to_input(mask[top:bottom, left:right])
        )
        anomaly_map = torch.rand(whole.output_size((1000, 1000)))
        assert tuple(anomaly_map.shape) == whole.input_size
        back = whole.to_original(anomaly_map, (1000, 1000))
        assert torch.equal(back[top:bottom, left:right], cut.to_original(anomaly_map, part.shape[:2]))
        back[top:bottom, left:right] = 0
        assert not back.any()

    @pytest.mark.parametrize(
        "sizes", [{}, {"resize": 64}, {"resize": (400, 64)}, {"crop": 100}, {"resize": (70, 90), "crop": 64}]
    )
    @pytest.mark.parametrize("region", [None, (20, 30, 190, 270), ((20, 150), (190, 30), (180, 290))])
    def test_nothing_of_what_is_ignored_is_seen(self, sizes, region) -> None:
        pixels = RNG.integers(0, 256, (200, 300, 3), dtype=np.uint8)
        shapes = [(0, 0, 50, 300), ((100, 100), (180, 90), (150, 200)), (190, 290, 200, 300)]
        preprocessing = Preprocessing.create(**sizes, region=region, ignore=shapes)
        ignored = preprocessing.ignored((200, 300))
        assert ignored is not None
        seen = preprocessing(pixels)
        top, left, bottom, right = preprocessing.scored_box((200, 300))
        unseen = ignored.copy()
        unseen[:top] = unseen[bottom:] = unseen[:, :left] = unseen[:, right:] = True
        if sizes != {"resize": (70, 90), "crop": 64}:  # which looks over its edge, as without shapes
            spoiled = np.where(unseen[..., None], 255 - pixels, pixels)
            assert torch.equal(preprocessing(spoiled), seen)

        # Elsewhere it is what it would be without them, and no more is hidden than must be.
        plain = Preprocessing.create(**sizes, region=region and preprocessing.scored_box((200, 300)))
        if region is None:
            hidden = (seen == 0).all(0)
            assert torch.equal(seen[:, ~hidden], plain(pixels)[:, ~hidden])
            inside = ignored[top:bottom, left:right].mean()
            assert inside <= hidden.float().mean() < 2 * inside

        back = preprocessing.to_original(torch.ones(seen.shape[1:]), (200, 300)).numpy()
        np.testing.assert_array_equal(back == 0, unseen)

    def test_shapes_are_drawn_as_they_are_written(self) -> None:
        shapes = [(1, 2, 3, 5), ((5, 0), (5, 4), (9, 4), (9, 0)), ((0, 8), (4, 8), (4, 8))]
        ignored = Preprocessing.create(ignore=shapes).ignored((11, 10))
        expected = np.zeros((11, 10), dtype=bool)
        expected[1:3, 2:5] = expected[5:10, 0:5] = expected[0:5, 8] = True
        np.testing.assert_array_equal(ignored, expected)
        # Shapes that overlap, and one that the region cuts.
        overlapping = Preprocessing.create(region=(2, 3, 11, 10), ignore=[*shapes, (2, 4, 9, 9)])
        assert overlapping.scored_box((11, 10)) == (2, 3, 11, 10)
        expected[2:9, 4:9] = True
        expected[:2] = expected[:, :3] = False
        np.testing.assert_array_equal(overlapping.ignored((11, 10)), expected)

    def test_a_region_with_corners_looks_at_what_lies_between_them(self) -> None:
        preprocessing = Preprocessing.create(region=[(2, 3), (2, 7), (8, 7), (8, 3)])
        assert preprocessing.scored_box((11, 10)) == (2, 3, 9, 8)
        assert preprocessing.ignored((11, 10)) is None
        triangle = Preprocessing.create(region=[(2, 3), (8, 3), (8, 9)])
        assert triangle.scored_box((11, 10)) == (2, 3, 9, 10)
        assert triangle.input_size == (7, 7)
        ignored = triangle.ignored((11, 10))
        np.testing.assert_array_equal(~ignored[2:9, 3:10], np.tri(7, dtype=bool))
        assert not Preprocessing().ignored((11, 10))

    def test_rectangles_from_rectangles(self) -> None:
        assert Preprocessing.create(resize=(30, 40), crop=(24, 36))(
            np.zeros((50, 20, 3), np.uint8)
        ).shape == (3, 24, 36)

    def test_a_resize_keeps_a_ramp_in_place(self) -> None:
        height, width = 40, 60
        centres = (np.arange(height) + 0.5) / height
        ramp = np.broadcast_to(centres[:, None, None], (height, width, 3)).astype(np.float32)
        output = raw(resize=(100, 70), crop=(60, 70))(ramp)[0, :, 0].numpy()
        expected = (np.arange(100) + 0.5)[20:80] / 100
        np.testing.assert_allclose(output, expected, atol=1e-6)


SIZES = st.tuples(st.integers(1, 40), st.integers(1, 40))


@st.composite
def geometries(draw: st.DrawFn) -> tuple[Preprocessing, tuple[int, int]]:
    original = draw(SIZES)
    region = None
    part = original
    if draw(st.booleans()):
        top, left = (draw(st.integers(0, edge - 1)) for edge in original)
        part = draw(st.tuples(st.integers(1, original[0] - top), st.integers(1, original[1] - left)))
        region = (top, left, top + part[0], left + part[1])
    resize = draw(st.none() | SIZES)
    full = resize or part
    crop = draw(st.none() | st.tuples(st.integers(1, full[0]), st.integers(1, full[1])))
    return raw(resize=resize, crop=crop, region=region), original


def geometry(preprocessing: Preprocessing, original: tuple[int, int]) -> list[tuple[float, float, int]]:
    """Scale, crop offset and output length for rows and columns, told in the plainest words."""
    full = preprocessing.resize or original
    output = preprocessing.crop or full
    return [(full[axis] / original[axis], (full[axis] - output[axis]) // 2, output[axis]) for axis in (0, 1)]


class TestBack:
    def test_identity_to_the_bit(self) -> None:
        anomaly_map = torch.rand(17, 23)
        for preprocessing in (Preprocessing(), Preprocessing.create(resize=(17, 23), crop=(17, 23))):
            assert torch.equal(preprocessing.to_original(anomaly_map, (17, 23)), anomaly_map)
            assert preprocessing.scored_box((17, 23)) == (0, 0, 17, 23)

    @pytest.mark.parametrize("original", [(256, 256), (512, 200), (900, 901), (31, 57)])
    @pytest.mark.parametrize(
        ("resize", "crop"), [(64, None), (64, 56), ((96, 40), (81, 33)), ((33, 70), (32, 69))]
    )
    def test_a_ramp_comes_back_in_place(
        self, original: tuple[int, int], resize: int | tuple[int, int], crop: int | tuple[int, int] | None
    ) -> None:
        preprocessing = Preprocessing.create(resize=resize, crop=crop)
        (scale_y, top, height), (scale_x, left, width) = geometry(preprocessing, original)
        # The ramp 2 y + 3 x + 1 over original coordinates, seen at the centres of the network's pixels.
        y = (torch.arange(height, dtype=torch.float64) + 0.5 + top) / scale_y
        x = (torch.arange(width, dtype=torch.float64) + 0.5 + left) / scale_x
        back = preprocessing.to_original(2 * y[:, None] + 3 * x[None] + 1, original)
        assert back.shape == original

        centres_y = torch.arange(original[0], dtype=torch.float64) + 0.5
        centres_x = torch.arange(original[1], dtype=torch.float64) + 0.5
        ramp = 2 * centres_y[:, None] + 3 * centres_x[None] + 1
        interior = (
            ((centres_y >= y[0]) & (centres_y <= y[-1]))[:, None] & (centres_x >= x[0]) & (centres_x <= x[-1])
        )
        assert interior.any()
        torch.testing.assert_close(back[interior], ramp[interior], rtol=1e-12, atol=1e-9)

    @given(geometries())
    @settings(max_examples=150, deadline=None)
    def test_box_holds_the_centres_inside_the_crop(self, case: tuple[Preprocessing, tuple[int, int]]) -> None:
        preprocessing, original = case
        top, left, bottom, right = preprocessing.scored_box(original)
        region = preprocessing.region or (0, 0, *original)
        part = (region[2] - region[0], region[3] - region[1])
        full, output = preprocessing.resize or part, preprocessing.output_size(original)
        for (first, end), begin, size, whole, length in zip(
            ((top, bottom), (left, right)), region[:2], part, full, output, strict=True
        ):
            start = (whole - length) // 2
            # (i + 0.5) * whole / size lies in [start, start + length), in whole numbers
            inside = [
                i
                for i in range(size)
                if 2 * start * size <= (2 * i + 1) * whole < 2 * (start + length) * size
            ]
            assert list(range(first - begin, end - begin)) == inside

    @given(geometries())
    @settings(max_examples=100, deadline=None)
    def test_constant_inside_and_zero_outside(self, case: tuple[Preprocessing, tuple[int, int]]) -> None:
        preprocessing, original = case
        back = preprocessing.to_original(torch.full(preprocessing.output_size(original), 0.7), original)
        top, left, bottom, right = preprocessing.scored_box(original)
        assert (back[top:bottom, left:right] == 0.7).all()
        back[top:bottom, left:right] = 0
        assert not back.any()

    @given(geometries())
    @settings(max_examples=100, deadline=None)
    def test_agrees_with_interpolate_where_nothing_is_cropped(
        self, case: tuple[Preprocessing, tuple[int, int]]
    ) -> None:
        preprocessing, original = case
        preprocessing = raw(resize=preprocessing.resize)
        anomaly_map = torch.rand(preprocessing.output_size(original), dtype=torch.float64)
        expected = torch.nn.functional.interpolate(
            anomaly_map[None, None], original, mode="bilinear", align_corners=False
        )[0, 0]
        torch.testing.assert_close(preprocessing.to_original(anomaly_map, original), expected)

    def test_maps_and_masks_agree(self) -> None:
        preprocessing = Preprocessing.create(resize=64, crop=48)
        mask = np.zeros((160, 128), dtype=bool)
        mask[60:90, 40:70] = True
        small = preprocessing.mask_to_input(mask)
        assert small.shape == (48, 48)
        back = preprocessing.to_original(torch.from_numpy(small).float(), mask.shape)  # type: ignore[arg-type]
        differ = (back.numpy() > 0.5) != mask
        assert differ.mean() < 0.02

    def test_mask_without_a_resize_is_the_crop(self) -> None:
        mask = RNG.random((9, 8)) > 0.5
        np.testing.assert_array_equal(Preprocessing.create(crop=(4, 6)).mask_to_input(mask), mask[2:6, 1:7])

    @pytest.mark.parametrize(
        "map_", [torch.zeros(5, 5), torch.zeros(1, 4, 4), torch.zeros(4, 4, dtype=torch.int64)]
    )
    def test_wrong_map(self, map_: torch.Tensor) -> None:
        with pytest.raises(InputError, match=r"anomaly_map .* \[4, 4\]"):
            Preprocessing.create(resize=4).to_original(map_, (8, 8))


@pytest.mark.parametrize(
    ("settings_", "message"),
    [
        ({"resize": 0}, r"resize is \(0, 0\)"),
        ({"resize": (10,)}, r"resize is \(10,\)"),
        ({"resize": 2.5}, r"resize is 2\.5"),
        ({"resize": True}, "resize is True"),
        ({"crop": (3, "4")}, "crop is"),
        ({"resize": (10, 20), "crop": (10, 21)}, "crop is 10 x 21, larger than resize, which is 10 x 20"),
        ({"region": (1, 2, 3)}, r"region: \(1, 2, 3\) given; allowed are \(top, left, bottom, right\)"),
        ({"region": (10, 0, 10, 5)}, "top < bottom and left < right"),
        ({"region": (-1, 0, 10, 5)}, "in whole pixels >= 0"),
        ({"region": (0, 0, 10, 5.5)}, "in whole pixels >= 0"),
        ({"region": ((0, 0), (5, 5))}, "three and more corners"),
        ({"region": ((0, 0), (5, 5), (6, 7, 8))}, "three and more corners"),
        ({"region": ((0, 0), (5, 5), 6)}, "three and more corners"),
        ({"region": ()}, r"region: \(\) given"),
        ({"ignore": (0, 0, 5, 5)}, r"ignore: \(0, 0, 5, 5\) given; allowed is a list .* also of one: \["),
        ({"ignore": [(0, 0), (5, 5), (0, 5)]}, r"ignore: \[\(0, 0\), .* given; allowed is a list"),
        ({"region": np.array([0.0, 0, 5, 5])}, r"region: array\(.*\) given"),
        ({"ignore": [(0, 0, 5, 5), (5, 5, 5, 9)]}, r"ignore\[1\]: \(5, 5, 5, 9\) given"),
        ({"ignore": "mask.png"}, "ignore: 'mask.png' given; allowed is a list of boxes and polygons"),
        ({"region": "0123"}, "region: '0123' given"),
        (
            {"region": (0, 0, 50, 60), "crop": 55},
            "crop is 55 x 55, larger than region, which is 50 x 60",
        ),
        ({"mean": (0, 0)}, "mean is"),
        ({"mean": (0, 0, float("nan"))}, "mean is"),
        ({"std": (1, 0, 1)}, "above 0"),
        ({"std": 1}, "std is 1"),
    ],
)
def test_wrong_settings(settings_: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Preprocessing.create(**settings_)  # type: ignore[arg-type]


def test_sizes_of_the_class_itself_are_pairs() -> None:
    with pytest.raises(InputError, match="resize is 256"):
        Preprocessing(resize=256)  # type: ignore[arg-type]


def test_image_smaller_than_the_crop() -> None:
    message = r"the image is 100 x 300 .* smaller than the crop of 224 x 224"
    preprocessing = Preprocessing.create(crop=224)
    for call in (preprocessing.output_size, preprocessing.scored_box):
        with pytest.raises(InputError, match=message):
            call((100, 300))
    with pytest.raises(InputError, match=message):
        preprocessing(np.zeros((100, 300, 3), dtype=np.uint8))
    with pytest.raises(InputError, match=message):
        preprocessing.mask_to_input(np.zeros((100, 300), dtype=bool))


@pytest.mark.parametrize(
    "shapes",
    [
        {"region": (10, 20, 200, 300)},
        {"region": ((10, 20), (199, 20), (10, 299))},
        {"region": (10, 20, 200, 200), "ignore": [(0, 0, 5, 300)]},
    ],
)
def test_image_that_does_not_hold_the_shapes(shapes: dict[str, object]) -> None:
    preprocessing = Preprocessing.create(resize=64, **shapes)  # type: ignore[arg-type]
    message = "the image is 200 x 299 pixels .*; region and ignore reach to 200 x 300"
    for call in (preprocessing.output_size, preprocessing.scored_box):
        with pytest.raises(InputError, match=message):
            call((200, 299))
    with pytest.raises(InputError, match=message):
        preprocessing(np.zeros((200, 299, 3), dtype=np.uint8))
    assert preprocessing.least_size == (200, 300)
    assert preprocessing.scored_box((200, 300))[:3] == (10, 20, 200)


def test_nothing_is_left_to_look_at() -> None:
    preprocessing = Preprocessing.create(resize=16, region=(10, 10, 20, 20), ignore=[(0, 0, 20, 20)])
    with pytest.raises(InputError, match="nothing is left of the image"):
        preprocessing(np.zeros((20, 20, 3), dtype=np.uint8))


@pytest.mark.parametrize(
    "pixels", [np.zeros((4, 4), np.uint8), np.zeros((4, 4, 4), np.uint8), np.zeros((4, 4, 3))]
)
def test_wrong_pixels(pixels: np.ndarray) -> None:
    with pytest.raises(InputError, match="must be uint8 or float32"):
        Preprocessing()(pixels)


def test_thousands_of_corners_are_looked_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    preprocessing = raw(resize=16, region=[(0, 0), (40, 50), (40, 0)], ignore=[[(2, 2), (5, 9), (5, 2)]])

    def there_and_back() -> torch.Tensor:
        pixels = preprocessing(np.ones((60, 60, 3), dtype=np.uint8))
        return preprocessing.to_original(pixels[0], (60, 60))

    first = there_and_back()
    monkeypatch.setattr("pydefect.preprocessing.bounding_box", None)
    assert torch.equal(there_and_back(), first)


def test_shapes_from_numpy() -> None:
    corners = np.array([[1, 2], [30, 40], [30, 2]], dtype=np.int32)
    box = (np.int64(1), 2, np.uint8(3), 4)
    preprocessing = Preprocessing.create(region=corners, ignore=[np.array([0, 0, 5, 5]), box, list(corners)])  # type: ignore[arg-type]
    triangle = ((1, 2), (30, 40), (30, 2))
    assert preprocessing == Preprocessing.create(
        region=triangle, ignore=[(0, 0, 5, 5), (1, 2, 3, 4), triangle]
    )
    json.dumps(preprocessing.to_dict())


@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"resize": 256},
        {"resize": (256, 128), "crop": (224, 96)},
        {"resize": 64, "region": (1, 2, 30, 40)},
        {"region": [(1, 2), (30, 40), (30, 2)], "ignore": [(1, 2, 3, 4), [(5, 6), (7, 8), (9, 10)]]},
    ],
)
def test_json_round_trip(sizes: dict[str, object]) -> None:
    preprocessing = Preprocessing.create(**sizes)  # type: ignore[arg-type]
    assert Preprocessing.from_dict(json.loads(json.dumps(preprocessing.to_dict()))) == preprocessing


def test_dictionary_of_a_version_without_shapes() -> None:
    settings_ = Preprocessing.create(resize=64).to_dict()
    del settings_["region"], settings_["ignore"]
    assert Preprocessing.from_dict(settings_) == Preprocessing.create(resize=64)


def test_dictionary_with_other_keys() -> None:
    with pytest.raises(InputError, match="keys"):
        Preprocessing.from_dict({"resize": 256})


class _Applied(torch.nn.Module):
    def __init__(self, preprocessing: Preprocessing) -> None:
        super().__init__()
        self.preprocessing = preprocessing

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.preprocessing.apply(images)


@pytest.mark.parametrize("size", [(90, 50), (17, 23), (40, 61), (1, 200)])
def test_an_exported_graph_resizes_alike(size: tuple[int, int]) -> None:
    """Exported graphs resize by matrix products, for not every runtime has PyTorch's antialiasing."""
    preprocessing = Preprocessing.create((40, 36), (30, 36))
    images = torch.randint(
        0, 256, (2, *size, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    got = torch.export.export(_Applied(preprocessing), (images,)).module()(images)
    # Weights and sums of a few numbers in 0..1 in float32, divided by 0.22.
    torch.testing.assert_close(got, preprocessing.apply(images), rtol=0, atol=1e-5)


def test_what_is_ignored_is_not_to_be_written_to() -> None:
    ignored = Preprocessing.create(ignore=[(0, 0, 4, 4)]).ignored((8, 8))
    assert ignored is not None
    with pytest.raises(ValueError, match="read-only"):
        ignored[:] = True
