"""Patch features and their cache: same values from memory and from disk, and what float16 costs."""

from __future__ import annotations

import errno
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import pydefect
from pydefect import features
from pydefect.backbones import build_backbone
from pydefect.conpatch import ConPatchConfig
from pydefect.conpatch.bank import MemoryBank, build_bank
from pydefect.conpatch.detector import score_levels
from pydefect.conpatch.network import ConPatchNetwork
from pydefect.conpatch.trainer import build_network, represent
from pydefect.data.images import open_images
from pydefect.errors import InputError, PydefectError
from pydefect.features import (
    FeatureCache,
    PatchFeatureExtractor,
    check_levels,
    resolve_precision,
    whole_patches,
)
from pydefect.preprocessing import Preprocessing


def levels_of(images: int, seed: int = 0) -> list[torch.Tensor]:
    """Levels whose values float16 holds exactly."""
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(images, channels, height, width, generator=generator).half().float()
        for channels, height, width in ((3, 4, 6), (5, 2, 3))
    ]


IMAGE_BYTES = 2 * (3 * 4 * 6 + 5 * 2 * 3)


# -- extraction
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [(1,), (2, 3), (1, 2, 3)])
def test_levels_are_averaged_over_their_neighbourhoods(levels):
    backbone = build_backbone("resnet18", "random")
    images = torch.randn(2, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    extractor = PatchFeatureExtractor(backbone, levels)
    features = extractor(images)
    assert extractor.channels == tuple({1: 64, 2: 128, 3: 256}[level] for level in levels)
    for found, raw in zip(features, backbone(images, levels), strict=True):
        padded = F.pad(raw, (1, 1, 1, 1))  # zeros count, as in CFA's code
        height, width = raw.shape[2:]
        expected = sum(padded[:, :, y : y + height, x : x + width] for y in range(3) for x in range(3)) / 9
        # The mean of nine float32 in another order.
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_batch_gives_what_its_images_give():
    extractor = PatchFeatureExtractor(build_backbone("resnet18", "random"), (1, 2, 3))
    images = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    for index in range(3):
        for one, many in zip(extractor(images[index : index + 1]), extractor(images), strict=True):
            # Convolutions may be blocked otherwise for another batch: sums of up to 2304 terms in another
            # order.
            torch.testing.assert_close(one[0], many[index], rtol=1e-4, atol=1e-5)


def test_bfloat16_features_are_float32_numbers_near_those_of_float32():
    backbone = build_backbone("resnet18", "random")
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    exact = PatchFeatureExtractor(backbone)(images)
    for found, expected in zip(
        PatchFeatureExtractor(backbone, precision="bfloat16")(images), exact, strict=True
    ):
        assert found.dtype == torch.float32
        assert found.is_contiguous(memory_format=torch.channels_last)
        # Ten layers that round to 8 bits.
        assert float((found - expected).norm() / expected.norm()) < 0.01


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_threads_and_the_split_by_them_change_nothing(precision):
    extractor = PatchFeatureExtractor(build_backbone("resnet18", "random"), precision=precision)
    images = torch.randn(5, 3, 32, 48, generator=torch.Generator().manual_seed(0))
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            found.append(extractor(images))
    finally:
        torch.set_num_threads(threads)
    assert all(all(map(torch.equal, other, found[0])) for other in found[1:])


def test_no_image_and_one_image():
    extractor = PatchFeatureExtractor(build_backbone("resnet18", "random"))
    assert [level.shape for level in extractor(torch.zeros(0, 3, 32, 48))] == [
        (0, 64, 8, 12),
        (0, 128, 4, 6),
        (0, 256, 2, 3),
    ]


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("has_bfloat16", [False, True])
def test_auto_is_bfloat16_where_processor_or_card_have_it(monkeypatch, device, has_bfloat16):
    for name in ("cpu", "cuda"):
        monkeypatch.setattr(
            features, f"{name}_has_bfloat16", lambda name=name: has_bfloat16 and name == device
        )
    expected = "bfloat16" if has_bfloat16 and device in ("cpu", "cuda") else "float32"
    assert resolve_precision("auto", torch.device(device)) == expected
    assert resolve_precision("bfloat16", torch.device(device)) == "bfloat16"
    assert resolve_precision("float32", torch.device(device)) == "float32"


@pytest.mark.parametrize("levels", [(), (0, 1), (3, 2), (1, 1), (4,), "1", ("1",), (1.0, 2.0), 2, None])
def test_bad_levels(levels):
    with pytest.raises(InputError, match=r"levels: .* given; allowed are ascending choices out of 1, 2, 3"):
        check_levels(levels)


def test_levels_of_numpy_become_numbers_that_json_knows():
    assert json.dumps(check_levels(tuple(np.array([1, 3])))) == "[1, 3]"


# -- the cache
# -----------------------------------------------------------------------------------------------------


def test_a_full_disk_says_what_was_put_there(tmp_path, monkeypatch):
    cache = FeatureCache(0, tmp_path)
    cache.append(levels_of(1, 0))

    def fail(_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(cache, "_file", SimpleNamespace(seek=fail))
    said = r"No space left on device \(features over cache_memory_mb go there; TMPDIR names .*: "
    with pytest.raises(OSError, match=said + re.escape(repr(str(tmp_path)))):
        cache.append(levels_of(1, 1))


@pytest.mark.parametrize("in_memory", [0, 1, 2, 5, 9])
def test_memory_and_disk_hold_the_same(tmp_path, in_memory):
    cache = FeatureCache(in_memory * IMAGE_BYTES + IMAGE_BYTES // 2, tmp_path)
    batches = [levels_of(2, 0), levels_of(1, 1), levels_of(2, 2)]
    for batch in batches:
        cache.append(batch)
    assert len(cache) == 5
    assert cache.shapes == [(3, 4, 6), (5, 2, 3)]
    assert cache.images_on_disk == max(0, 5 - in_memory)
    assert cache.bytes_in_memory == min(5, in_memory) * IMAGE_BYTES
    # Nothing that a killed process could leave.
    assert not list(tmp_path.iterdir())
    everything = [torch.cat(parts) for parts in zip(*batches, strict=True)]
    for indices in ([0, 1, 2, 3, 4], [4, 0, 4], [3], [2, 1]):
        for found, expected in zip(cache.get(indices), everything, strict=True):
            assert found.dtype == torch.float32
            assert torch.equal(found, expected[indices])
            assert found.stride(1) == 1  # channels last, as the projection reads them


def test_reading_between_writing(tmp_path):
    cache = FeatureCache(0, tmp_path)
    for seed in range(4):
        cache.append(levels_of(1, seed))
        for earlier in range(seed + 1):
            assert torch.equal(cache.get([earlier])[1], levels_of(1, earlier)[1])


def test_the_file_goes_with_the_cache(tmp_path):
    cache = FeatureCache(0, tmp_path)
    cache.append(levels_of(2))
    file = cache._file
    file.flush()
    assert os.fstat(file.fileno()).st_size == 2 * IMAGE_BYTES
    # No name leads to it: with the last handle, at the latest that of a killed process, it is gone.
    assert os.fstat(file.fileno()).st_nlink == 0


def test_values_are_rounded_to_float16():
    generator = torch.Generator().manual_seed(0)
    values = torch.randn(1, 4, 8, 8, generator=generator)
    cache = FeatureCache()
    cache.append([values])
    (found,) = cache.get([0])
    assert torch.equal(found, values.half().float())
    assert ((found - values).abs() <= 2.0**-11 * values.abs() + 2.0**-25).all()


def test_another_size_is_refused_and_says_what_helps():
    cache = FeatureCache()
    cache.append(levels_of(1))
    other = [F.pad(level, (0, 1)) for level in levels_of(1)]
    with pytest.raises(
        InputError, match=r"patch grids of \(4, 7\) and \(4, 6\) in one training set; set resize"
    ):
        cache.append(other)
    assert len(cache) == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 7e4])
def test_what_float16_cannot_hold(value):
    levels = levels_of(1)
    levels[1][0, 2, 1, 1] = value
    with pytest.raises(PydefectError, match="not finite or over 65504"):
        FeatureCache().append(levels)


def test_a_negative_budget():
    with pytest.raises(InputError, match="memory_budget: -1 given; allowed are 0 and more bytes"):
        FeatureCache(-1)


class Float32Cache(FeatureCache):
    """The same features without rounding."""

    def __init__(self) -> None:
        super().__init__()
        self._levels: list[list[torch.Tensor]] = []

    def __len__(self) -> int:
        return len(self._levels)

    def append(self, levels):
        self._shapes = [tuple(level.shape[1:]) for level in levels]
        self._levels += [[level[i : i + 1].clone() for level in levels] for i in range(len(levels[0]))]

    def get(self, indices, device="cpu"):
        return [torch.cat(parts) for parts in zip(*(self._levels[i] for i in indices), strict=True)]


class Float16:
    """What the cache's docstring says of float16, on real images: fitted on good ones, scored on defective
    ones."""

    config = ConPatchConfig(
        resize=128,
        crop=None,
        level_balance="std",
        level_weights=(0.5, 1.0, 1.0),
        coordinate_weight=1.0,
        initialisation="pca",
        representation_dim=448,
        score="certainty",
        smoothing=4.0,
    )

    def __init__(self, dataset: Path, weights: Path) -> None:
        self.extractor = PatchFeatureExtractor(build_backbone("resnet18", str(weights)), self.config.levels)
        self.good = self.features(sorted((dataset / "train" / "good").iterdir())[:8])
        self.test = self.features(
            [
                sorted(folder.iterdir())[0]
                for folder in sorted((dataset / "test").iterdir())
                if folder.is_dir()
            ]
        )

    def features(self, paths: list[Path]) -> list[torch.Tensor]:
        preprocessing = Preprocessing.create(self.config.resize, self.config.crop)
        return self.extractor(torch.stack([preprocessing(image.pixels) for image in open_images(paths)]))

    def fit(self, cache: FeatureCache, bank: str) -> tuple[ConPatchNetwork, MemoryBank]:
        cache.append(self.good)
        network = build_network(cache, range(8), self.config, 0)
        patches = represent(network, cache, range(8), torch.device("cpu"))
        return network, build_bank(patches, bank, gamma=1.0 if bank == "position_mean" else 4.0)

    @torch.inference_mode()
    def score(self, levels: list[torch.Tensor], network: ConPatchNetwork, bank: MemoryBank):
        return score_levels(levels, network, bank, self.config, (128, 128))


@pytest.fixture(scope="module", params=["bottle", "transistor"])
def real(request, resnet18_weights) -> Float16:
    return Float16(request.getfixturevalue(request.param), resnet18_weights)


def assert_within(actual, expected, share: float) -> None:
    for one, other in zip(actual, expected, strict=True):
        assert float((one - other).abs().max()) < share * float(other.max())


def test_float16_moves_the_scores_of_a_detector_by_less_than_a_five_hundredth(real):
    network, centres = real.fit(FeatureCache(), "kcenter")
    cached = FeatureCache()
    cached.append(real.test)
    rounded = cached.get(range(len(cached)))
    assert_within(real.score(rounded, network, centres), real.score(real.test, network, centres), 0.002)


def test_float16_moves_a_bank_of_means_as_little(real):
    caches = (FeatureCache(), Float32Cache())
    scores = [real.score(real.test, *real.fit(cache, "position_mean")) for cache in caches]
    assert_within(scores[0], scores[1], 0.002)


def test_float16_may_let_k_centre_choose_otherwise_but_not_worse(real):
    """Which of two equally far patches becomes a centre is chance, and all later choices hang on it; the
    radius does not."""
    radii = [
        real.fit(cache, "kcenter")[1].squared_radius.sqrt() for cache in (FeatureCache(), Float32Cache())
    ]
    assert float(radii[0] / radii[1]) == pytest.approx(1, abs=0.03)


# -- sizes that are no whole number of patches
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("strides", "size", "whole"),
    [
        ((4,), (8, 9), (8, 12)),
        ((4, 8), (33, 40), (40, 40)),
        ((4, 8, 16), (33, 48), (48, 48)),
        ((16,), (1, 1), (16, 16)),
        ((8, 16), (32, 48), (32, 48)),
        ((14, 14), (28, 29), (28, 42)),
        ((4, 6), (13, 24), (24, 24)),
    ],
)
def test_inputs_are_extended_to_whole_patches(strides, size, whole):
    images = torch.randn(2, 3, *size)
    extended = whole_patches(images, strides)
    assert extended.shape[2:] == whole
    assert torch.equal(extended[:, :, : size[0], : size[1]], images)
    assert int(extended.count_nonzero()) == images.numel()
    assert (extended is images) == (size == whole)


@pytest.mark.parametrize("method", ["conpatch", "patchcore", "padim", "spade", "cfa", "reconpatch"])
def test_maps_of_any_size_lie_where_those_of_whole_patches_do(method):
    """They were squeezed: what the patches say of 48 x 48 pixels was shown on 33 x 40."""
    random = np.random.default_rng(0)
    images = [random.random((33, 40, 3), dtype=np.float32) for _ in range(4)]
    how = {
        "weights": "random",
        "resize": None,
        "levels": (1, 2, 3),
        "calibration_folds": 0,
        "progress": False,
    }
    detector = pydefect.fit(images, method=method, **how)
    given = torch.randn(2, 3, 33, 40)
    scores, maps = detector.predict(given)
    whole_scores, whole_maps = detector.predict(F.pad(given, (0, 8, 0, 15)))
    assert maps.shape == (2, 33, 40)
    assert torch.equal(maps, whole_maps[:, :33, :40])
    assert torch.equal(scores, whole_scores)
