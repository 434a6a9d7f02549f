"""Score maps: the operator, its twin (separate steps: F.interpolate, scipy's gaussian_filter) and two matrix
products in PyTorch, per shape in one group.

Run with ``pytest benchmarks/bench_score_maps.py``; ``OMP_NUM_THREADS=1`` in front gives single-thread
figures. Every contender's result is compared with the twin's before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pydefect.ops import reference, score_maps
from pydefect.ops.reference.score_maps import patch_scores
from pydefect.ops.score_maps import _upsample_and_smooth

K = 3
SHAPES = [((56, 56), (224, 224), 4.0), ((64, 64), (256, 256), 6.0), ((40, 72), (160, 288), 4.0)]


def matrix_products(distances: Tensor, size: tuple[int, int], sigma: float) -> tuple[Tensor, Tensor]:
    scores = patch_scores(distances)
    rows = _upsample_and_smooth(scores.shape[1], size[0], sigma).to(scores)
    columns = _upsample_and_smooth(scores.shape[2], size[1], sigma).to(scores)
    return scores, rows @ scores @ columns.T


@pytest.mark.parametrize(
    "contender",
    [score_maps, matrix_products, reference.score_maps],
    ids=["pydefect", "matrix products", "reference"],
)
@pytest.mark.parametrize("batch", [1, 8, 32])
@pytest.mark.parametrize(("grid", "size", "sigma"), SHAPES)
def bench_score_maps(
    grid: tuple[int, int],
    size: tuple[int, int],
    sigma: float,
    batch: int,
    contender: Callable[..., tuple[Tensor, Tensor]],
    device: str,
    measure: Callable[..., None],
) -> None:
    distances = (torch.rand(batch, *grid, K, generator=torch.Generator().manual_seed(0)) * 4).to(device)
    for actual, expected in zip(
        contender(distances[:1], size, sigma), reference.score_maps(distances[:1], size, sigma), strict=True
    ):
        torch.testing.assert_close(actual, expected, rtol=1e-5, atol=0)
    pixels = batch * size[0] * size[1]
    measure(
        f"score_maps {grid[0]}x{grid[1]} to {size[0]}x{size[1]} sigma {sigma:g} x{batch}",
        lambda: contender(distances, size, sigma),
        traffic=4 * (distances.numel() + batch * grid[0] * grid[1] + pixels),
    )
