"""The multi-level projection: the operator, its twin (upsample, concatenate, convolve) and the composition of
PyTorch's operators that projects every level on its own grid, per shape in one group.

Run with ``pytest benchmarks/bench_project_levels.py``; ``OMP_NUM_THREADS=1`` in front gives single-thread
figures. Every contender's result is compared with the twin's before anything is timed. Peak memory includes
the result (and the weight's gradient) for every contender.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pydefect.ops import project_levels, reference
from pydefect.ops.project_levels import _compose

Project = Callable[[list[Tensor], Tensor, Tensor], Tensor]

D = 448
# Channels and grids of ResNet-18's and Wide-ResNet-50-2's first three layers at 224 x 224 pixels.
NETWORKS = {
    "resnet18": ((64, 56), (128, 28), (256, 14)),
    "wide_resnet50_2": ((256, 56), (512, 28), (1024, 14)),
}


def composition(levels: list[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    return _compose(levels, weight, bias, pool=False)


def pooling(levels: list[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    return project_levels(levels, weight, bias, pool=True)


def pooling_apart(levels: list[Tensor], weight: Tensor, bias: Tensor) -> Tensor:
    return project_levels([F.avg_pool2d(level, 3, 1, 1) for level in levels], weight, bias)


CONTENDERS = {
    "pydefect": project_levels,
    "pydefect, pooling": pooling,
    "pydefect, pooling apart": pooling_apart,
    "composition": composition,
    "reference": reference.project_levels,
}


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("batch", [1, 4, 8])
@pytest.mark.parametrize("network", NETWORKS)
def bench_project_levels(
    network: str, batch: int, contender: str, direction: str, device: str, measure: Callable[..., None]
) -> None:
    project: Project = CONTENDERS[contender]
    generator = torch.Generator().manual_seed(0)
    levels = [
        torch.randn(batch, channels, side, side, generator=generator)
        .to(device)
        .contiguous(memory_format=torch.channels_last)
        for channels, side in NETWORKS[network]
    ]
    inputs = sum(level.shape[1] for level in levels) + 2
    weight = (torch.randn(D, inputs, generator=generator) / inputs**0.5).to(device).requires_grad_()
    bias = torch.randn(D, generator=generator).to(device).requires_grad_()
    gradient = torch.randn(batch, 56 * 56, D, generator=generator).to(device)

    def forward() -> None:
        with torch.no_grad():
            project(levels, weight, bias)

    def both() -> None:
        weight.grad = bias.grad = None
        project(levels, weight, bias).backward(gradient)

    some = [level[:1] for level in levels]
    pooled = [F.avg_pool2d(level, 3, 1, 1) for level in some] if "pooling" in contender else some
    with torch.no_grad():
        expected = reference.project_levels(pooled, weight, bias)
        torch.testing.assert_close(project(some, weight, bias), expected, rtol=0, atol=1e-4)
    work = sum(2 * level.numel() * D for level in levels)
    read = 4 * (sum(level.numel() for level in levels) + weight.numel())
    passes = 1 if direction == "forward" else 2
    measure(
        f"project_levels {direction} {network} x{batch}",
        forward if passes == 1 else both,
        flops=passes * work,
        traffic=passes * (read + 4 * gradient.numel()),
    )
