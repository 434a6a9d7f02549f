"""A teacher without training, and small images."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from pydefect.dual_ae.config import DualAEConfig
from pydefect.dual_ae.pdn import PDN


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_file(PDN().state_dict(), path)
    return path


@pytest.fixture
def settings(teacher_file: Path) -> dict[str, Any]:
    """Settings of a run that takes seconds."""
    return {
        "teacher": str(teacher_file),
        "resize": (64, 72),
        "steps": 3,
        "precision": "float32",
        "false_alarm_rate": 0.5,
    }


@pytest.fixture
def config(settings: dict[str, Any]) -> DualAEConfig:
    return DualAEConfig(**settings)


@pytest.fixture(scope="session")
def good_images() -> list[np.ndarray[Any, Any]]:
    rng = np.random.default_rng(0)
    base = rng.integers(0, 256, (64, 72, 3))
    return [np.clip(base + rng.integers(-9, 10, base.shape), 0, 255).astype(np.uint8) for _ in range(6)]


@pytest.fixture
def iterated() -> Callable[[Tensor], Tensor]:
    """Muon's iteration as it is written down, in float64."""

    def iterate(matrix: Tensor) -> Tensor:
        x = matrix.double()
        x = x / x.norm().clamp_min(1e-7)
        for _ in range(5):
            r = x @ x.T
            x = 3.4445 * x + (-4.7750 * r + 2.0315 * r @ r) @ x
        return x

    return iterate
