"""The hypersphere loss, equation (7), against loops; gradients against differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pydefect import ops
from pydefect.ops import reference


def data(n: int, m: int, d: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, d, generator=generator).to(dtype), torch.randn(m, d, generator=generator).to(dtype)


def loops(features: Tensor, bank: Tensor, k: int, r: float, power: int) -> float:
    """Equation (7), one patch and one centre at a time."""
    total = 0.0
    for patch in features.double().tolist():
        distances = sorted(math.dist(patch, centre) for centre in bank.double().tolist())
        for distance in distances[:k]:
            total += max(0.0, distance**power - r**2)
    return total / (len(features) * k)


IMPLEMENTATIONS = [
    pytest.param(ops.hypersphere, id="ops"),
    pytest.param(reference.hypersphere, id="reference"),
]
CASES = [(1, 1, 1, 1), (7, 5, 3, 3), (20, 9, 4, 1), (33, 40, 17, 40)]


@pytest.mark.parametrize("loss", IMPLEMENTATIONS)
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("r", [1e-5, 1.5])
@pytest.mark.parametrize(("n", "m", "d", "k"), CASES)
def test_equation_7(loss, n, m, d, k, r, power):
    features, bank = data(n, m, d)
    # d squares and additions, one root, n * k additions of positive terms, the difference with r^2: below
    # (d + n + k) ulps.
    torch.testing.assert_close(
        float(loss(features, bank, k, r, distance_power=power)),
        loops(features, bank, k, r, power),
        rtol=(d + n + k) * 2.0**-23,
        atol=2.0**-21,
    )


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("r", [1e-5, 1.2])
def test_gradcheck_of_the_reference(power, r):
    """Points in general position: away from the root's and the hinge's kinks, and no neighbours change
    within a step."""
    features, bank = data(8, 6, 4, torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: reference.hypersphere(x, bank, 3, r, distance_power=power), features.requires_grad_()
    )


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize(("n", "m", "d", "k"), CASES)
def test_gradients_of_both_agree(n, m, d, k, power):
    """Both differentiate the same float32 expression; only the order of at most k additions a patch
    differs."""
    features, bank = data(n, m, d, seed=1)
    gradients = []
    for loss in (ops.hypersphere, reference.hypersphere):
        x = features.clone().requires_grad_()
        loss(x, bank, k, distance_power=power).backward()
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-5, atol=1e-6 / n)


@pytest.mark.parametrize("loss", IMPLEMENTATIONS)
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("r", [0.0, 1e-5])
def test_a_patch_on_its_centre_has_no_gradient(loss, r, power):
    features, bank = data(5, 5, 3)
    features[0] = bank[2]
    features.requires_grad_()
    value = loss(features, bank, 1, r, distance_power=power)
    value.backward()
    assert torch.isfinite(value)
    assert (features.grad[0] == 0).all()
    assert (features.grad[1:].abs().sum(1) > 0).all()


@pytest.mark.parametrize("loss", IMPLEMENTATIONS)
def test_inside_the_sphere_nothing_pulls(loss):
    features, bank = data(6, 4, 3)
    features.requires_grad_()
    value = loss(features, bank, 2, r=100.0)
    value.backward()
    assert value.item() == 0
    assert (features.grad == 0).all()


@pytest.mark.parametrize("loss", IMPLEMENTATIONS)
def test_the_bank_is_a_constant(loss):
    features, bank = (part.requires_grad_() for part in data(6, 4, 3))
    loss(features, bank, 2).backward()
    assert bank.grad is None
