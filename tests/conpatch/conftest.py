"""Small synthetic features and products, so that whole trainings take a fraction of a second."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import pydefect
from pydefect.conpatch import ConPatchConfig, ConPatchDetector
from pydefect.features import FeatureCache

# Every setting that a default could change, so that these tests do not depend on the defaults.
SETTINGS: dict[str, Any] = {
    "resize": None,
    "crop": None,
    "levels": (1, 2, 3),
    "backbone_precision": "float32",
    "level_balance": "std",
    "level_weights": (0.5, 1.0, 1.0),
    "coordinate_weight": 1.0,
    "representation_dim": 12,
    "projection_dim": None,
    "initialisation": "pca",
    "bank": "kcenter",
    "gamma": 4.0,
    "bank_momentum": 0.1,
    "rebuild_bank": "epoch",
    "losses": "both",
    "alpha": 0.8,
    "sigma": 4.0,
    "similarity_power": 1,
    "pair_source": "target",
    "global_neighbors": 5,
    "margin": 0.2,
    "reduction": "mean",
    "contrastive_patches": 50,
    "target_momentum": 0.4,
    "phi": 0.6,
    "neighbors": 3,
    "radius": 1e-5,
    "distance_power": 1,
    "epochs": 2,
    "early_stopping": False,
    "patience": 1,
    "batch_size": 2,
    "learning_rate": 1e-3,
    "weight_decay": 5e-4,
    "score": "certainty",
    "image_score": "max_map",
    "smoothing": 2.0,
    "calibration_folds": 3,
    "false_alarm_rate": 0.2,
    "cache_memory_mb": 64,
}


@pytest.fixture
def make_config() -> Callable[..., ConPatchConfig]:
    return lambda **changes: ConPatchConfig(**{**SETTINGS, **changes})


@pytest.fixture(scope="session")
def cache() -> FeatureCache:
    """Five images on grids of 8x6, 4x3 and 2x2, with levels of very different scale and offset."""
    generator = torch.Generator().manual_seed(0)
    cache = FeatureCache()
    cache.append(
        [
            scale * torch.randn(5, channels, height, width, generator=generator) + scale
            for scale, channels, height, width in ((5.0, 6, 8, 6), (1.0, 8, 4, 3), (0.2, 10, 2, 2))
        ]
    )
    return cache


@pytest.fixture(scope="session")
def fit() -> Callable[..., ConPatchDetector]:
    def fit(images: Any, *, weights: str = "random", seed: int = 0, checkpoint: Any = None, **changes: Any):
        settings = {**SETTINGS, "representation_dim": 40, **changes}
        return pydefect.fit(
            images, weights=weights, seed=seed, checkpoint=checkpoint, progress=False, **settings
        )

    return fit


@pytest.fixture
def detector(fit, products) -> ConPatchDetector:
    return fit(products)
