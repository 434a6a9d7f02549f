"""Relaxed contrastive loss, forward and backward: the operator and its pure-PyTorch twin.

N = 1,024: the default's random subset; 6,272: the printed batch of two 56 x 56 maps; 25,088: a batch of
eight, which the twin takes minutes for.
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pydefect.ops import reference, relaxed_contrastive

D = 448
SIZES = [1024, 6272, 25088]
SIZES_FOR_THE_TWIN = SIZES[:2]


def step(loss: Callable[..., Tensor], z: Tensor, z_target: Tensor) -> Tensor:
    return torch.autograd.grad(loss(z, z_target), z)[0]


def compare_with_twin(loss: Callable[..., Tensor], z: Tensor, z_target: Tensor) -> None:
    some = z[:600].detach().requires_grad_()
    expected = step(reference.relaxed_contrastive, some, z_target[:600])
    torch.testing.assert_close(
        step(loss, some, z_target[:600]), expected, rtol=0, atol=1e-3 * expected.abs().max()
    )


@pytest.mark.parametrize(
    "loss", [relaxed_contrastive, reference.relaxed_contrastive], ids=["pydefect", "reference"]
)
@pytest.mark.parametrize("n", SIZES)
def bench_relaxed_contrastive(
    loss: Callable[..., Tensor], n: int, device: str, measure: Callable[..., None]
) -> None:
    if loss is reference.relaxed_contrastive and n not in SIZES_FOR_THE_TWIN:
        pytest.skip("too slow for this size")
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(n, D, generator=generator)
    z_target = (z + 0.3 * torch.randn(n, D, generator=generator)).to(device)
    z = z.to(device).requires_grad_()
    compare_with_twin(loss, z, z_target)
    # All inner products of z three times and of z' twice, each for half of the pairs; the neighbours of z'
    # for all of them; and the gradient's product.
    products = 5 / 2 + 1 + 1
    measure(
        f"relaxed_contrastive {n}x{D}",
        lambda: step(loss, z, z_target),
        flops=2 * n * n * D * products,
        traffic=4 * 3 * n * D,
    )
