"""F, g and their twins: equation (6), starts, balance of levels."""

from __future__ import annotations

import pytest
import torch

from pydefect.conpatch.network import ConPatchNetwork, level_scales, principal_components
from pydefect.conpatch.trainer import build_network
from pydefect.errors import InputError
from pydefect.ops import reference

CHANNELS = (6, 8, 10)
INPUTS = sum(CHANNELS) + 2


def network(dimension: int = 5, projection: int = 7, seed: int = 0) -> ConPatchNetwork:
    torch.manual_seed(seed)
    return ConPatchNetwork(CHANNELS, dimension, projection, torch.linspace(0.5, 2, INPUTS))


def stacked(cache, indices) -> torch.Tensor:
    """[N, inputs] of upsampled, concatenated, unscaled features and coordinates."""
    return reference.project_levels(cache.get(indices), torch.eye(INPUTS)).flatten(0, 1)


@pytest.mark.parametrize("momentum", [0.0, 0.4, 0.99, 1.0])
def test_equation_6(momentum):
    net = network()
    with torch.no_grad():
        for parameter in (*net.representation.parameters(), *net.projection.parameters()):
            parameter.add_(torch.randn_like(parameter))
    online = {name: value.clone() for name, value in net.state_dict().items()}
    net.update_target(momentum)
    after = net.state_dict()
    for name, value in after.items():
        if not name.startswith("target_"):
            assert torch.equal(value, online[name])
            continue
        fast, slow = online[name.removeprefix("target_")], online[name]
        # Both sides round twice or three times in float32.
        torch.testing.assert_close(
            value,
            momentum * slow + (1 - momentum) * fast,
            rtol=4e-7,
            atol=4e-7,
            msg=lambda text, n=name: f"{n}: {text}",
        )
    names = [name for name in after if name.startswith("target_") and "input_scale" not in name]
    assert len(names) == 4
    if momentum in (0.0, 1.0):
        kept = "" if momentum == 0 else "target_"
        assert all(torch.equal(after[name], online[kept + name.removeprefix("target_")]) for name in names)


def test_the_twins_start_as_copies_and_take_no_gradient(cache):
    net = network()
    state = net.state_dict()
    for name, value in state.items():
        assert torch.equal(value, state[name.removeprefix("target_")])
    levels = cache.get([0])
    target = net.target_projection(net.target_representation(levels))
    assert not target.requires_grad
    net.projection(net.representation(levels)).sum().backward()
    graded = {name for name, parameter in net.named_parameters() if parameter.grad is not None}
    assert graded == {"representation.weight", "representation.bias", "projection.weight", "projection.bias"}
    # No memory is shared: training the online branch leaves the twin alone.
    with torch.no_grad():
        net.representation.weight.zero_()
    assert net.target_representation.weight.abs().sum() > 0


def test_the_representation_is_a_scaled_coordconv(cache):
    net = network()
    online = net.representation
    expected = (stacked(cache, [0, 1]) * online.input_scale) @ online.weight.T + online.bias
    torch.testing.assert_close(online(cache.get([0, 1])).flatten(0, 1), expected, rtol=1e-4, atol=1e-4)


def test_start_as():
    net = network(dimension=5, projection=7)
    weight, bias = torch.randn(5, INPUTS), torch.randn(5)
    net.start_as(weight, bias)
    assert torch.equal(net.representation.weight, weight)
    assert torch.equal(net.target_representation.bias, bias)
    features = torch.randn(4, 5)
    for projection in (net.projection, net.target_projection):
        assert torch.equal(projection(features), torch.cat([features, torch.zeros(4, 2)], 1))


def test_level_scales_against_numpy(cache):
    for indices in ([0, 1, 2, 3, 4], [1, 3]):
        for level, scale in enumerate(level_scales(cache, indices)):
            values = cache.get(indices)[level].double().numpy()
            total = values.var(axis=(0, 2, 3)).sum() ** 0.5
            assert scale == pytest.approx(1 / total, rel=1e-9)


def test_balanced_levels_have_one_total_variance(cache, make_config):
    config = make_config(level_balance="std", level_weights=(0.5, 1.0, 2.0), coordinate_weight=0.7)
    scale = build_network(cache, range(5), config, 0).representation.input_scale
    for level, (values, weight) in enumerate(zip(cache.get(range(5)), (0.5, 1.0, 2.0), strict=True)):
        part = scale.split([*CHANNELS, 2])[level]
        assert (part == part[0]).all()
        total = float((values.double() * part[0]).var((0, 2, 3), correction=0).sum())
        assert total == pytest.approx(weight**2, rel=1e-5)
    assert scale[-2:].tolist() == pytest.approx([0.7, 0.7])


def test_without_balance_only_the_weights_count(cache, make_config):
    config = make_config(level_balance="none", level_weights=None, coordinate_weight=1.0)
    assert (build_network(cache, range(5), config, 0).representation.input_scale == 1).all()


def test_all_principal_components_keep_distances(cache, make_config):
    net = build_network(cache, range(5), make_config(representation_dim=INPUTS), 0)
    with torch.no_grad():
        represented = net.representation(cache.get([0, 3])).flatten(0, 1)
    scaled = stacked(cache, [0, 3]) * net.representation.input_scale
    # A rotation in float32: distances keep about six digits of the largest.
    torch.testing.assert_close(
        torch.cdist(represented, represented), torch.cdist(scaled, scaled), rtol=1e-3, atol=2e-3
    )


def test_principal_components_against_numpys_svd(cache):
    scale = torch.linspace(0.5, 2, INPUTS)
    weight, bias = principal_components(cache, range(5), scale, 4)
    torch.testing.assert_close(weight @ weight.T, torch.eye(4), rtol=0, atol=1e-5)
    assert (weight.gather(1, weight.abs().argmax(1, keepdim=True)) > 0).all()
    points = (stacked(cache, range(5)) * scale).double()
    centred = points - points.mean(0)
    values = torch.linalg.svdvals(centred)
    # The bias centres; the components carry the largest variances in order.
    projected = points @ weight.double().T + bias.double()
    torch.testing.assert_close(projected.mean(0), torch.zeros(4).double(), rtol=0, atol=1e-4)
    torch.testing.assert_close(projected.square().sum(0).sqrt(), values[:4], rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("initialisation", "dimension", "message"),
    [
        (
            "identity",
            25,
            "representation_dim: 25 given; initialisation 'identity' needs the number of inputs, 26",
        ),
    ],
)
def test_dimensions_that_do_not_fit(cache, make_config, initialisation, dimension, message):
    config = make_config(initialisation=initialisation, representation_dim=dimension)
    with pytest.raises(InputError, match=message):
        build_network(cache, range(5), config, 0)


def test_pca_keeps_every_component_where_there_are_fewer_than_asked_for(cache, make_config):
    network = build_network(cache, range(5), make_config(initialisation="pca", representation_dim=448), 0)
    assert network.representation.weight.shape == (26, 26)


def test_the_seed_decides_the_default_start_and_the_global_generator_stays(cache, make_config):
    config = make_config(initialisation="default", level_weights=(1.0, 1.0, 1.0))
    before = torch.get_rng_state()
    one, same, other = (build_network(cache, range(5), config, seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.equal(one.representation.weight, same.representation.weight)
    assert not torch.equal(one.representation.weight, other.representation.weight)
    # A fresh 1x1 convolution: uniform within 1 / sqrt(inputs).
    assert float(one.representation.weight.detach().abs().max()) <= INPUTS**-0.5
