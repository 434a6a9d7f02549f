"""Fixtures of all tests: the shared real images and weights, which are no part of the repository."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from pydefect.data.procedural import render_product

_DEFAULT_SHARED = Path(__file__).resolve().parents[1].parent / "shared"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Tensors are small here: several threads only wait for each other, on a busy machine for minutes."""
    torch.set_num_threads(1)


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
