"""Steps at a share of the first rate, which a graph can hold, are steps at the rate."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from pydefect.dual_ae.optimisers import Optimisers


@pytest.fixture
def network():
    torch.manual_seed(0)
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 3), nn.Flatten(), nn.Linear(16, 2))
    return layers.to(memory_format=torch.channels_last)


def train(network, optimisers, rates):
    """Gradients in the same memory in every step, as a graph's are."""
    device = next(network.parameters()).device
    held = [torch.empty_like(parameter) for parameter in network.parameters()]
    images = torch.rand(len(rates), 5, 3, 6, 6, generator=torch.Generator().manual_seed(1)).to(device)
    for rate, batch in zip(rates, images, strict=True):
        gradients = torch.autograd.grad(network(batch).square().sum(), list(network.parameters()))
        for parameter, own, gradient in zip(network.parameters(), held, gradients, strict=True):
            parameter.grad = own.copy_(gradient)
        optimisers.step(rate)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize("optimiser", ["adam", "muon"])
def test_steps_by_a_share_are_steps_at_the_rate(network, optimiser, device):
    rates = [1e-3, 5e-4, 2e-3, 0.0, 1e-3, 1e-5, 7e-4]
    found = []
    before = torch.cat([parameter.detach().flatten() for parameter in network.parameters()])
    for captured in (False, True):
        own = copy.deepcopy(network).to(device)
        train(own, Optimisers(own, optimiser, 1e-3, 1e-2, muon_decay=0.5, captured=captured), rates)
        found.append(torch.cat([parameter.detach().flatten().cpu() for parameter in own.parameters()]))
    # Numbers of up to one, moved by a thousandth seven times: a rounding of the moved number and one of the
    # move itself in each. Muon's products are bfloat16, but of gradients that differ by no more than that.
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=2e-6 if optimiser == "adam" else 2e-5)
    assert not torch.equal(found[0], before)


def test_muon_s_decay_holds_the_matrices_and_nothing_else(network):
    """By the rate times the decay in every step, beside the step itself."""
    own, other = copy.deepcopy(network), copy.deepcopy(network)
    train(own, Optimisers(own, "muon", 1e-3, 0.0, muon_decay=0.0), [1e-3])
    train(other, Optimisers(other, "muon", 1e-3, 0.0, muon_decay=0.5), [1e-3])
    for start, free, held in zip(*(one.parameters() for one in (network, own, other)), strict=True):
        expected = free - 5e-4 * start if start.dim() == 4 else free
        # Two roundings of numbers of up to one.
        torch.testing.assert_close(held, expected, rtol=0, atol=2e-7)


@pytest.mark.parametrize("captured", [False, True])
@pytest.mark.parametrize("optimiser", ["adam", "muon"])
def test_gentle_layers_have_a_rate_of_their_own(network, optimiser, captured):
    """Adam's first step is as long as the rate, and a layer at a hundredth moves a hundredth of that."""
    before = copy.deepcopy(network)
    gentle = [network[0], network[4]]
    optimisers = Optimisers(
        network, optimiser, 1e-3, 0.0, muon_decay=0.0, gentle=gentle, gentle_rate=1e-5, captured=captured
    )
    train(network, optimisers, [5e-4])
    for layer, old in zip(network, before, strict=True):
        for parameter, start in zip(layer.parameters(), old.parameters(), strict=True):
            moved = (parameter - start).abs().max()
            expected = 5e-6 if layer in gentle else 5e-4
            if layer in gentle or parameter.dim() != 4 or optimiser == "adam":
                # Rounding of numbers of up to one, moved by 5e-6.
                assert abs(moved - expected) < 1e-7 + 1e-3 * expected
            else:
                assert moved > 1e-4


def test_a_state_with_gentle_layers_is_taken_up_again(network):
    def optimisers(own):
        return Optimisers(own, "muon", 1e-3, 1e-2, muon_decay=0.5, gentle=[own[0], own[4]], gentle_rate=1e-4)

    rates = [1e-3, 5e-4, 7e-4]
    whole, resumed = copy.deepcopy(network), copy.deepcopy(network)
    train(whole, optimisers(whole), rates)
    images = torch.rand(3, 5, 3, 6, 6, generator=torch.Generator().manual_seed(1))
    own = optimisers(resumed)
    for rate, batch in zip(rates, images, strict=True):
        state = {name: value.clone() for name, value in own.state().items()}
        own = optimisers(resumed)
        own.restore(state)
        resumed.zero_grad()
        resumed(batch).square().sum().backward()
        own.step(rate)
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("optimiser", ["adam", "muon"])
def test_what_has_faded_is_put_to_zero(network, optimiser):
    """A processor takes a hundred times as long for denormal numbers, which nothing else would end."""
    smallest = torch.finfo(torch.float32).tiny
    optimisers = Optimisers(network, optimiser, 1e-3, 0.0, muon_decay=0.0)
    train(network, optimisers, [1e-3])
    # The channels of the first layer are dead but one, as behind a ReLU that no image excites.
    for parameter in network.parameters():
        parameter.grad = torch.zeros_like(parameter)
    number_of_denormals = []
    for step in range(2000):
        network[0].weight.grad[0].fill_(1.0 + step % 2)
        if step == 1500:
            network[0].weight.data[1:].fill_(1e-33)
        optimisers.step(1e-3)
        values = [*optimisers.state().values(), *network.parameters()]
        number_of_denormals.append(
            sum(int(((one.abs() > 0) & (one.abs() < smallest)).sum()) for one in values)
        )
    assert max(number_of_denormals) == 0
    assert (network[0].weight[1:] == 0).all()
    assert (network[0].weight[0].abs() > 0.1).all()
    assert torch.isfinite(torch.cat([one.detach().flatten() for one in network.parameters()])).all()


@pytest.mark.gpu
def test_the_processor_goes_on_from_a_card_s_state(network):
    """On a card the matrices are shared out among several optimisers, and nobody can tell from the state."""
    states, arguments = [], ("muon", 1e-3, 1e-2)
    for device in ("cpu", "cuda"):
        own = copy.deepcopy(network).to(device)
        optimisers = Optimisers(own, *arguments, muon_decay=0.5, captured=device == "cuda")
        train(own, optimisers, [1e-3])
        states.append({name: value.cpu() for name, value in optimisers.state().items()})
    # The card multiplies numbers of 11 bits where it convolves (TF32), and squares what it gets.
    torch.testing.assert_close(states[1], states[0], rtol=2e-2, atol=1e-4)
    again = Optimisers(network, *arguments, muon_decay=0.5)
    again.restore(states[1])
    torch.testing.assert_close(again.state(), states[1], rtol=0, atol=0)


def test_a_first_rate_of_zero_moves_nothing(network):
    before = copy.deepcopy(network)
    train(network, Optimisers(network, "adam", 0.0, 0.0, muon_decay=0.0, captured=True), [0.0, 0.0])
    for one, other in zip(network.parameters(), before.parameters(), strict=True):
        assert torch.equal(one, other)
