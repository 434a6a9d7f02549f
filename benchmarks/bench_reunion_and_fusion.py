"""The dual autoencoder's modules: fused, and as PyTorch's operators one after the other.

Run with ``pytest benchmarks/bench_reunion_and_fusion.py``; ``OMP_NUM_THREADS=1`` in front gives single-thread
figures. Maps are stored as the group's name says; channels_last is what the convolutions prefer on the CPU.
Channel reunion and selective fusion are whole modules. Spatial reunion has its two wide convolutions outside,
so it is timed alone and, as spatial_module, with them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pydefect import ops
from pydefect.ops import reference

Operation = Callable[..., Any]

CHANNELS, SIDE, POOLING, REDUCED = 384, 56, 4, 24
BATCHES = [1, 4, 8]
LAYOUTS = {"channels_last": torch.channels_last, "contiguous": torch.contiguous_format}


def parameters_of(*layers: nn.Module) -> list[Tensor]:
    return [parameter.detach() for layer in layers for parameter in (layer.weight, layer.bias)]


def maps(count: int, batch: int, side: int, layout: torch.memory_format, device: str) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    shape = (batch, CHANNELS, side, side)
    return [
        torch.randn(shape, generator=generator).to(device).contiguous(memory_format=layout)
        for _ in range(count)
    ]


def spatial_by_matmul(
    features: Tensor, local: Tensor, coarse: Tensor, weight: Tensor, bias: Tensor
) -> Tensor:
    """Equation (6) as printed: a matrix product of reshaped maps."""
    up = F.interpolate(coarse, size=features.shape[2:], mode="bilinear", align_corners=False)
    attention = F.conv2d(local * torch.sigmoid(up + features), weight, bias, padding=1)
    rows = features.reshape(*features.shape[:2], 1, -1)
    return features + rows @ attention.reshape(len(features), 1, -1, 1)


def spatial_module(reunion: Operation) -> Operation:
    """Equations (1) to (7), the two wide convolutions included."""

    def module(features: Tensor, *parameters: Tensor) -> Tensor:
        coarse_weight, coarse_bias, weight, bias, *rest = parameters
        coarse = F.conv2d(F.avg_pool2d(features, POOLING), coarse_weight, coarse_bias, padding=1)
        local = F.conv2d(features, weight, bias, padding=1)
        return reunion(features, local, coarse, *rest)

    return module


def arguments_of(name: str, batch: int, layout: torch.memory_format, device: str) -> list[Tensor]:
    torch.manual_seed(0)
    one_channel = nn.Conv2d(CHANNELS, 1, 3)
    if name == "spatial_reunion":
        coarse = maps(1, batch, SIDE // POOLING, layout, device)
        given = [*maps(2, batch, SIDE, layout, device), *coarse, *parameters_of(one_channel)]
    elif name == "spatial_module":
        wide = [nn.Conv2d(CHANNELS, CHANNELS, 3).to(memory_format=layout) for _ in range(2)]
        given = [*maps(1, batch, SIDE, layout, device), *parameters_of(*wide, one_channel)]
    elif name == "channel_reunion":
        convolutions = [nn.Conv2d(CHANNELS, REDUCED, 1), nn.Conv2d(REDUCED, 1, 1)]
        dense = [nn.Linear(CHANNELS, REDUCED), nn.Linear(REDUCED, CHANNELS)]
        given = [*maps(1, batch, SIDE, layout, device), *parameters_of(*convolutions, *dense)]
    else:
        heads = [nn.Conv2d(REDUCED, CHANNELS, 1) for _ in range(2)]
        given = maps(2, batch, SIDE, layout, device)
        given += parameters_of(nn.Linear(CHANNELS, REDUCED), *heads)
    return [argument.to(device).requires_grad_() for argument in given]


CONTENDERS: dict[str, dict[str, Operation]] = {
    "spatial_reunion": {
        "pydefect": ops.spatial_reunion,
        "reference": reference.spatial_reunion,
        "matmul": spatial_by_matmul,
    },
    "spatial_module": {
        "pydefect": spatial_module(ops.spatial_reunion),
        "reference": spatial_module(reference.spatial_reunion),
        "matmul": spatial_module(spatial_by_matmul),
    },
    "channel_reunion": {"pydefect": ops.channel_reunion, "reference": reference.channel_reunion},
    "selective_fusion": {"pydefect": ops.selective_fusion, "reference": reference.selective_fusion},
}
# Maps that must be read and written at least: forward, then forward and backward together.
TRAFFIC = {
    "spatial_reunion": (3, 8),
    "spatial_module": (5, 16),
    "channel_reunion": (2, 5),
    "selective_fusion": (4, 10),
}


@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize(
    ("name", "contender"), [(name, contender) for name, found in CONTENDERS.items() for contender in found]
)
def bench_reunion_and_fusion(
    name: str,
    contender: str,
    batch: int,
    layout: str,
    direction: str,
    device: str,
    measure: Callable[..., None],
) -> None:
    arguments = arguments_of(name, batch, LAYOUTS[layout], device)
    operation = CONTENDERS[name][contender]
    with torch.no_grad():
        results = operation(*arguments)
        expected = CONTENDERS[name]["reference"](*arguments)
    results, expected = (r if isinstance(r, tuple) else (r,) for r in (results, expected))
    for result, wanted in zip(results, expected, strict=True):
        # The context is a sum over 3136 positions: float32 keeps five digits of its largest value.
        torch.testing.assert_close(result, wanted, rtol=1e-5, atol=1e-5 * float(wanted.abs().max()))

    def forward() -> None:
        with torch.no_grad():
            operation(*arguments)

    def forward_and_backward() -> None:
        found = operation(*arguments)
        torch.autograd.grad(found, arguments, results)

    both = direction == "forward+backward"
    size = batch * CHANNELS * SIDE * SIDE
    # Multiplications an element, which the backward pass does twice more.
    products = 9 * CHANNELS * (1 + 1 / POOLING**2) if name == "spatial_module" else 0
    measure(
        f"{name} {batch}x{CHANNELS}x{SIDE}x{SIDE} {layout} {direction}",
        forward_and_backward if both else forward,
        flops=2 * size * products * (3 if both else 1),
        traffic=4 * size * TRAFFIC[name][both],
    )
