"""The hypersphere loss, equation (7), against loops; gradients against differences."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pydefect import ops
from pydefect.buildinfo import build_info
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
@pytest.mark.parametrize("loss", IMPLEMENTATIONS)
def test_gradcheck(loss, power, r):
    """Points in general position: away from the root's and the hinge's kinks, and no neighbours change
    within a step."""
    features, bank = data(8, 6, 4, torch.float64)
    assert torch.autograd.gradcheck(
        lambda x: loss(x, bank, 3, r, distance_power=power), features.requires_grad_()
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
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("power", [1, 2])
def test_half_precision_is_rounded_once(loss, dtype, power):
    """Its sums are float32's: in float16 those of many patches end at 65,504, and a patch on its centre has
    a gradient of 0 / 0."""
    features, bank = data(12544, 40, 64, dtype)
    features[0] = bank[2]
    results = []
    for precision in (dtype, torch.float32):
        x = features.to(precision, copy=True).requires_grad_()
        value = loss(x, bank.to(precision), 1, distance_power=power)
        # Of 1 / N float16 has few digits.
        (1000 * value).backward()
        results.append((value.detach(), x.grad))
    assert torch.equal(results[0][0], results[1][0].to(dtype))
    assert torch.equal(results[0][1], results[1][1].to(dtype))
    assert (results[0][1][0] == 0).all()


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


def value_and_gradient(features: Tensor, bank: Tensor, k: int, power: int) -> tuple[Tensor, Tensor]:
    x = features.clone().requires_grad_()
    value = ops.hypersphere(x, bank, k, distance_power=power)
    (2.5 * value).backward()
    return value.detach(), x.grad


@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("d", [1, 7, 15, 16, 17, 63, 64, 65, 129])
def test_widths_around_the_vectors(d, power):
    features, bank = data(50, 70, d, seed=2)
    value, gradient = value_and_gradient(features, bank, 3, power)
    x = features.clone().requires_grad_()
    expected = reference.hypersphere(x, bank, 3, distance_power=power)
    (2.5 * expected).backward()
    # As in test_equation_7 and test_gradients_of_both_agree.
    torch.testing.assert_close(value, expected.detach(), rtol=(d + 200) * 2.0**-23, atol=0)
    torch.testing.assert_close(gradient, x.grad, rtol=1e-5, atol=1e-6 / 50)


def test_same_for_every_thread_count():
    features, bank = data(3000, 90, 33)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(value_and_gradient(features, bank, 3, 1))
    finally:
        torch.set_num_threads(before)
    for value, gradient in results[1:]:
        assert torch.equal(value, results[0][0])
        assert torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("level", build_info().cpu_levels_usable)
def test_same_on_every_instruction_set(level, tmp_path, at_level):
    # Products and sums are rounded apart, so the levels agree bit for bit.
    file = tmp_path / "result.pt"
    code = f"""
import torch
from pydefect.ops import hypersphere
torch.manual_seed(0)
features, bank = torch.randn(40, 37).requires_grad_(), torch.randn(30, 37)
value = hypersphere(features, bank)
(2.5 * value).backward()
torch.save((value.detach(), features.grad), {str(file)!r})
"""
    at_level(level, code)
    torch.manual_seed(0)
    expected = value_and_gradient(torch.randn(40, 37), torch.randn(30, 37), 3, 1)
    for actual, wanted in zip(torch.load(file), expected, strict=True):
        assert torch.equal(actual, wanted)


@pytest.mark.parametrize("loss", IMPLEMENTATIONS)
def test_no_patches(loss):
    features = torch.zeros(0, 3, requires_grad=True)
    value = loss(features, torch.zeros(4, 3), 2)
    value.backward()
    assert torch.isnan(value)
    assert features.grad.shape == (0, 3)


@pytest.mark.parametrize("loss", IMPLEMENTATIONS)
@pytest.mark.parametrize("power", [1, 2])
def test_nan_stays_in_its_row(loss, power):
    features, bank = data(20, 6, 5)
    features[3, 1] = torch.nan
    features.requires_grad_()
    value = loss(features, bank, 2, distance_power=power)
    value.backward()
    assert torch.isnan(value)
    assert torch.isfinite(features.grad[torch.arange(20) != 3]).all()
    assert torch.isnan(features.grad[3, 1])


def test_not_contiguous_inputs():
    features, bank = data(40, 60, 16)
    value, gradient = value_and_gradient(features[::2, ::2], bank[::3, ::2], 3, 1)
    expected = value_and_gradient(features[::2, ::2].contiguous(), bank[::3, ::2].contiguous(), 3, 1)
    assert torch.equal(value, expected[0])
    assert torch.equal(gradient, expected[1])


ERRORS = {
    "features 1-D": ((torch.zeros(3), torch.zeros(2, 3)), {}, "features must have 2 dimensions, got 1"),
    "bank 3-D": ((torch.zeros(1, 3), torch.zeros(1, 2, 3)), {}, "bank must have 2 dimensions, got 3"),
    "integers": ((torch.zeros(1, 3).long(), torch.zeros(2, 3)), {}, "features must be floating point"),
    "bank double": ((torch.zeros(1, 3), torch.zeros(2, 3).double()), {}, "bank must be"),
    "widths": ((torch.zeros(1, 3), torch.zeros(2, 4)), {}, "bank must have the width of features, 3, got 4"),
    "no width": ((torch.zeros(1, 0), torch.zeros(2, 0)), {}, "features must have a width of at least 1"),
    "empty bank": ((torch.zeros(1, 3), torch.zeros(0, 3)), {}, "bank must have at least 1 row, got 0"),
    "k": ((torch.zeros(1, 3), torch.zeros(2, 3)), {"k": 3}, "k must be between 1 and the 2 rows of bank"),
    "r": ((torch.zeros(1, 3), torch.zeros(3, 3)), {"r": -1.0}, "r must be a finite number of at least 0"),
    "power": (
        (torch.zeros(1, 3), torch.zeros(3, 3)),
        {"distance_power": 3},
        "distance_power must be 1 or 2, got 3",
    ),
}


@pytest.mark.parametrize("loss", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", ERRORS)
def test_wrong_arguments(loss, case):
    arguments, options, message = ERRORS[case]
    with pytest.raises(RuntimeError, match=f"hypersphere: {message}"):
        loss(*arguments, **options)


@pytest.mark.parametrize("n", [1, 5])
def test_opcheck(n):
    # Not without patches: opcheck takes two NaN for different.
    features, bank = data(n, 7, 6)
    operators = torch.ops.pydefect
    torch.library.opcheck(operators.hypersphere.default, (features.requires_grad_(), bank, 3, 1e-5, 1))
    _, distances, indices = operators.hypersphere(features.detach(), bank, 3, 1e-5, 1)
    arguments = (torch.tensor(1.0), features.detach(), bank, distances, indices, 1e-5, 1)
    torch.library.opcheck(operators.hypersphere_backward.default, arguments)


@pytest.mark.cpu
def test_backward_refuses_foreign_indices():
    features, bank = data(5, 7, 6)
    distances, indices = torch.zeros(5, 2), torch.full((5, 2), 7)
    with pytest.raises(RuntimeError, match="indices must be rows of bank, got 7"):
        torch.ops.pydefect.hypersphere_backward(torch.tensor(1.0), features, bank, distances, indices, 0.0, 1)


def test_compiles():
    features, bank = data(20, 30, 8)
    compiled = torch.compile(lambda x: ops.hypersphere(2 * x, bank), backend="aot_eager", fullgraph=True)
    gradients = []
    for loss in (compiled, lambda x: ops.hypersphere(2 * x, bank)):
        x = features.clone().requires_grad_()
        loss(x).backward()
        gradients.append(x.grad)
    assert torch.equal(gradients[0], gradients[1])
