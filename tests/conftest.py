"""Fixtures of all tests: the shared real images and weights, which are no part of the repository."""

from __future__ import annotations

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pydefect.calibration import Calibration
from pydefect.data.procedural import render_product
from pydefect.detector import Detector
from pydefect.preprocessing import Preprocessing

_DEFAULT_SHARED = Path(__file__).resolve().parents[1].parent / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # "2/8": every eighth test from the third one on, for processes that share the tests (benchmarks/gpu.py).
    if share := os.environ.get("PYDEFECT_TEST_SHARE"):
        first, of = map(int, share.split("/"))
        items[:] = items[first::of]
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Tensors are small here: several threads only wait for each other, on a busy machine for minutes."""
    torch.set_num_threads(1)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Python's own handling of Ctrl-C, whatever the tests' runner has made of it, and back."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    signal.signal(signal.SIGINT, before)


def _shared(relative: str) -> Path:
    path = Path(os.environ.get("PYDEFECT_SHARED", _DEFAULT_SHARED)) / relative
    if not path.exists():
        pytest.skip(f"no {relative} in the folder of shared files (set PYDEFECT_SHARED)")
    return path


@pytest.fixture(scope="session")
def bottle() -> Path:
    """MVTec AD bottle at 256x256."""
    return _shared("data/mvtec_ad/bottle")


@pytest.fixture(scope="session")
def transistor() -> Path:
    """MVTec AD transistor at 256x256."""
    return _shared("data/mvtec_ad/transistor")


@pytest.fixture(scope="session")
def magnetic_tile() -> Path:
    """Magnetic tiles in MVTec AD's layout; grey, sizes differ."""
    return _shared("data/mtd/magnetic_tile")


@pytest.fixture(scope="session")
def juice_bottle() -> Path:
    """MVTec LOCO AD juice_bottle at 256 wide x 512 high."""
    return _shared("data/mvtec_loco/juice_bottle")


@pytest.fixture(scope="session")
def resnet18_weights() -> Path:
    """ResNet-18's ImageNet weights up to layer 3, torchvision's names."""
    return _shared("weights/resnet18_layers1-3.npz")


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A function that does what pip does: a module and its metadata, where Python looks."""
    site = tmp_path / "site"
    site.mkdir()
    monkeypatch.syspath_prepend(str(site))
    # For processes of their own.
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(site), *filter(None, sys.path)]))

    def put(
        package: str,
        points: dict[str, str],
        code: str = "",
        version: str = "0.1",
        group: str = "pydefect.methods",
    ) -> None:
        module = package.replace("-", "_")
        (site / f"{module}.py").write_text(code, encoding="utf-8")
        for old in site.glob(f"{module}-*.dist-info"):
            shutil.rmtree(old)
        metadata = site / f"{module}-{version}.dist-info"
        metadata.mkdir()
        (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: {version}\n")
        lines = "".join(f"{name} = {value}\n" for name, value in points.items())
        (metadata / "entry_points.txt").write_text(f"[{group}]\n{lines}")
        monkeypatch.delitem(sys.modules, module, raising=False)

    return put


@pytest.fixture(scope="session")
def products() -> list[np.ndarray]:
    """Six good parts, 64x80."""
    return [render_product(np.random.default_rng(seed), (64, 80))[0] for seed in range(6)]


@pytest.fixture(scope="session")
def defective() -> list[np.ndarray]:
    """Three parts with a checkerboard on them, which any features tell from metal, random ones too."""
    images = [render_product(np.random.default_rng(100 + seed), (64, 80))[0] for seed in range(3)]
    for image in images:
        image[20:44, 30:54] = 255 * (np.indices((24, 24)).sum(0) // 4 % 2)[:, :, None]
    return images


@pytest.fixture(scope="session")
def colours() -> type[Detector]:
    """A detector without a fit whose maps anyone can check by looking, for what works with every method."""
    return Colours


class Colours(Detector):
    """Scores an image by its red channel, and has a local map, red again, and a global one, green."""

    method = "colours"

    def __init__(
        self,
        crop: tuple[int, int] | None = None,
        scale: float = 1.0,
        **shapes: Any,
    ) -> None:
        self.preprocessing = Preprocessing.create(40, crop, (0, 0, 0), (1, 1, 1), **shapes)
        self.calibration = Calibration(0.75 * scale, 0.5 * scale, "held_out", 9, 0.1)
        self.device = torch.device("cpu")
        self.training = {"images": 2, "skipped": []}
        self.scale = scale

    @property
    def configuration(self):
        return {"method": self.method, "scale": self.scale}

    @classmethod
    def fit(cls, images, config, **how):
        raise NotImplementedError

    @classmethod
    def from_file(cls, tensors, metadata, **how):
        raise NotImplementedError

    def predict(self, images: Tensor) -> tuple[Tensor, Tensor]:
        scores, maps = self.predict_maps(images)
        return scores, maps["anomaly"]

    def predict_maps(self, images: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        red, green = self.scale * images[:, 0], self.scale * images[:, 1]
        return red.flatten(1).amax(1), {"anomaly": red, "local": red, "global": green}

    def save(self, path, *, include_backbone=True):
        raise NotImplementedError
