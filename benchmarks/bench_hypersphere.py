"""The hypersphere loss, forward and backward: the operator, its pure-PyTorch twin and a plain composition.

Run with ``pytest benchmarks/bench_hypersphere.py``; ``OMP_NUM_THREADS=1`` in front gives single-thread
figures. Losses and gradients are compared on some of the patches before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pydefect.ops import hypersphere, reference

Loss = Callable[[Tensor, Tensor], Tensor]

K = 3
RADIUS = 1e-5
# Patches of two and of eight images (56 x 56 each).
SHAPES = [(6272, 784, 448), (25088, 784, 448)]


def cdist_topk_gather(features: Tensor, bank: Tensor) -> Tensor:
    """What one writes without an operator."""
    with torch.no_grad():
        indices = torch.cdist(features, bank).topk(K, largest=False).indices
    distances = (features[:, None] - bank[indices]).square().sum(2).clamp_min(1e-30).sqrt()
    return torch.relu(distances - RADIUS**2).mean()


def value_and_gradient(loss: Loss, features: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
    x = features.detach().requires_grad_()
    value = loss(x, bank)
    value.backward()
    assert x.grad is not None
    return value.detach(), x.grad


def compare_with_twin(loss: Loss, features: Tensor, bank: Tensor) -> None:
    some = features[:100]
    value, gradient = value_and_gradient(loss, some, bank)
    expected, expected_gradient = value_and_gradient(reference.hypersphere, some, bank)
    torch.testing.assert_close(value, expected, rtol=1e-5, atol=0)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize(
    "loss",
    [hypersphere, cdist_topk_gather, reference.hypersphere],
    ids=["pydefect", "cdist+topk+gather", "reference"],
)
@pytest.mark.parametrize(("n", "m", "d"), SHAPES)
def bench_hypersphere(loss: Loss, n: int, m: int, d: int, device: str, measure: Callable[..., None]) -> None:
    if loss is reference.hypersphere and n > SHAPES[0][0]:
        pytest.skip("the twin measures every pair in float64: minutes")
    generator = torch.Generator().manual_seed(0)
    features = torch.randn(n, d, generator=generator).to(device)
    bank = torch.randn(m, d, generator=generator).to(device)
    compare_with_twin(loss, features, bank)
    measure(
        f"hypersphere {n}x{m}x{d}",
        lambda: value_and_gradient(loss, features, bank),
        flops=2 * n * m * d + 3 * n * K * d,
        # The features twice, the gradient, the bank.
        traffic=4 * (3 * n * d + m * d),
    )
