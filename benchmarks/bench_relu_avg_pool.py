"""ReLU and average pooling of a patch description network: the operator, and PyTorch's two as its twin.

Run with ``pytest benchmarks/bench_relu_avg_pool.py``; ``OMP_NUM_THREADS=1`` in front gives single-thread
figures. Maps are channels_last, those of the three images that a training step has of one, at 128 pixels.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pydefect.ops import reference, relu_avg_pool

# Behind the first and the second convolution, with padding.
SHAPES = [(3, 128, 131, 131), (3, 256, 69, 69)]


@pytest.mark.parametrize("contender", [relu_avg_pool, reference.relu_avg_pool], ids=["pydefect", "reference"])
@pytest.mark.parametrize("direction", ["forward", "forward+backward"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def bench_relu_avg_pool(
    shape: tuple[int, int, int, int],
    dtype: torch.dtype,
    direction: str,
    contender: Callable[[Tensor, int], Tensor],
    device: str,
    measure: Callable[..., None],
) -> None:
    values = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    maps = values.to(device, dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    expected = reference.relu_avg_pool(maps, 1)
    # A card may add in another order.
    torch.testing.assert_close(contender(maps, 1), expected, rtol=1e-2, atol=1e-2)
    along = torch.ones_like(expected)

    def forward() -> None:
        with torch.no_grad():
            contender(maps, 1)

    def forward_and_backward() -> None:
        torch.autograd.grad(contender(maps, 1), maps, along)

    both = direction == "forward+backward"
    name = "x".join(map(str, shape))
    measure(
        f"relu_avg_pool {name} {str(dtype).removeprefix('torch.')} {direction}",
        forward_and_backward if both else forward,
        # Forward reads a map and writes a quarter; backward reads both and writes a map.
        traffic=maps.element_size() * maps.numel() * (3.5 if both else 1.25),
    )
