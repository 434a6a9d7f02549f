"""Small synthetic features for the baselines' formulas."""

from __future__ import annotations

import pytest
import torch

from pydefect.features import FeatureCache


@pytest.fixture(scope="session")
def cache() -> FeatureCache:
    """Seven images on grids of 6x5, 3x3 and 2x2."""
    generator = torch.Generator().manual_seed(0)
    cache = FeatureCache()
    cache.append(
        [
            torch.randn(7, channels, height, width, generator=generator)
            for channels, height, width in ((6, 6, 5), (8, 3, 3), (10, 2, 2))
        ]
    )
    return cache
