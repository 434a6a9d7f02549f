"""Muon in float32 is torch.optim.Muon, whose products are bfloat16, without their rounding."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pydefect.dual_ae import muon
from pydefect.dual_ae.muon import Muon, orthogonalised


def spread(rows, columns, smallest):
    """A matrix whose singular values fall evenly, in logarithms, from 1 to the smallest."""
    generator = torch.Generator().manual_seed(0)
    count = min(rows, columns)
    left, _ = torch.linalg.qr(torch.randn(rows, count, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(columns, count, generator=generator, dtype=torch.float64))
    values = torch.logspace(0, torch.tensor(smallest).log10(), count, dtype=torch.float64)
    return (left * values @ right.T).float()


@pytest.mark.parametrize("shape", [(1, 1), (4, 300), (300, 4), (32, 48), (64, 64), (96, 1024)])
@pytest.mark.parametrize("smallest", [0.5, 1e-3, 1e-7])
def test_it_is_the_iteration(shape, smallest, iterated):
    matrix = spread(*shape, smallest)
    before = matrix.clone()
    found = orthogonalised(matrix)
    # Rounding moves an eigenvalue of the gram matrix by 6e-8 of the largest; one near 0 grows twelvefold in
    # each of four iterations. The largest errors seen were 9e-4 (torch's own, in bfloat16: 0.4).
    assert torch.linalg.matrix_norm(found.double() - iterated(matrix), 2) < 2e-3
    assert torch.equal(matrix, before)


def test_singular_values_come_near_one():
    values = torch.linalg.svdvals(orthogonalised(spread(64, 200, 0.05)))
    assert 0.6 < values.min() <= values.max() < 1.3


def test_zeros_stay_zeros():
    assert torch.equal(orthogonalised(torch.zeros(3, 5)), torch.zeros(3, 5))


def steps(optimiser, matrices, count):
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        for matrix in matrices:
            matrix.grad = torch.randn(matrix.shape, generator=generator)
        optimiser.step()


@pytest.mark.parametrize("smallest", [0.5, 1e-2, 1e-7])
@pytest.mark.parametrize("shape", [(200, 1024), (1024, 200), (256, 256)])
def test_large_matrices_in_bfloat16_are_no_further_off_than_torch_s(shape, smallest, iterated, monkeypatch):
    monkeypatch.setattr(muon, "cpu_has_amx", lambda: True)
    matrix = spread(*shape, smallest)
    expected = iterated(matrix)
    parameter = nn.Parameter(torch.zeros_like(matrix))
    parameter.grad = matrix
    options = {"weight_decay": 0.0, "momentum": 0.0, "nesterov": False, "adjust_lr_fn": "match_rms_adamw"}
    torch.optim.Muon([parameter], lr=1.0, **options).step()
    theirs = -parameter.detach() / (0.2 * max(shape) ** 0.5)

    def error(found):
        return (found.double() - expected).norm() / expected.norm()

    found = orthogonalised(matrix)
    assert found.dtype == torch.float32
    # Theirs were 0.012 to 0.14, the largest ratio 2.5 at 0.03, and the larger the errors the smaller.
    assert 1e-3 < error(found) < 3 * error(theirs)


@pytest.mark.parametrize("amx", [False, True])
def test_what_is_next_to_nothing_makes_no_denormal_numbers(amx, monkeypatch):
    """Of which products would be made, if they were let through."""
    monkeypatch.setattr(muon, "cpu_has_amx", lambda: amx)
    matrix = spread(32, 100, 0.1)
    expected = orthogonalised(matrix)
    found = orthogonalised(torch.cat([matrix, torch.full((3, 100), 1e-25)]))
    assert (found[32:] == 0).all()
    # Products of other sizes may add up in another order; the iteration spreads roundings a thousandfold.
    torch.testing.assert_close(found[:32], expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("amx", [False, True])
def test_steps_are_those_of_torch(amx, monkeypatch):
    monkeypatch.setattr(muon, "cpu_has_amx", lambda: amx)
    start = [torch.randn(8, 40, generator=torch.Generator().manual_seed(2)), torch.ones(24, 6)]
    start.append(torch.randn(250, 200, generator=torch.Generator().manual_seed(3)))
    own, others = ([nn.Parameter(one.clone()) for one in start] for _ in range(2))
    mine = Muon(own, 1e-2, 0.5)
    theirs = torch.optim.Muon(others, lr=1e-2, weight_decay=0.5, adjust_lr_fn="match_rms_adamw")
    steps(mine, own, 3)
    steps(theirs, others, 3)
    for first, second, before in zip(own, others, start, strict=True):
        # Three steps of 1e-2; bfloat16 has two to three digits, and the iteration spreads what it rounds.
        torch.testing.assert_close(first, second, rtol=0, atol=2e-3)
        assert (first - before).abs().mean() > 1e-2


def test_the_state_is_torchs(monkeypatch):
    """A run that began where bfloat16 is fast goes on elsewhere."""
    monkeypatch.setattr(muon, "cpu_has_amx", lambda: False)
    matrix = nn.Parameter(torch.randn(8, 40, generator=torch.Generator().manual_seed(2)))
    theirs = torch.optim.Muon([matrix], lr=1e-2, weight_decay=0.5, adjust_lr_fn="match_rms_adamw")
    steps(theirs, [matrix], 2)
    other = nn.Parameter(matrix.detach().clone())
    mine = Muon([other], 1e-2, 0.5)
    mine.load_state_dict(copy.deepcopy(theirs.state_dict()))
    steps(theirs, [matrix], 1)
    steps(mine, [other], 1)
    torch.testing.assert_close(other, matrix, rtol=0, atol=1e-3)
    for first, second in zip(
        mine.state_dict()["state"].values(), theirs.state_dict()["state"].values(), strict=True
    ):
        assert torch.equal(first["momentum_buffer"], second["momentum_buffer"])


def test_a_closure_is_called_with_gradients(monkeypatch):
    monkeypatch.setattr(muon, "cpu_has_amx", lambda: False)
    matrix = nn.Parameter(torch.ones(2, 3))

    def loss():
        total = matrix.square().sum()
        (matrix.grad,) = torch.autograd.grad(total, matrix)
        return total

    assert Muon([matrix], 1e-2, 0.0).step(loss) == 6
    assert (matrix < 1).all()
