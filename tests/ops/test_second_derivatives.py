"""Native gradients are differentiated once; a second time says so instead of leaving terms out."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from pydefect import ops


def _map(channels: int = 8, size: int = 4) -> Tensor:
    return torch.randn(2, channels, size, size).to(memory_format=torch.channels_last).requires_grad_()


def _parameters(*layers: nn.Module) -> list[Tensor]:
    return [parameter for layer in layers for parameter in (layer.weight, layer.bias)]


def _channel_reunion() -> tuple[Tensor, Tensor]:
    features = _map()
    layers = nn.Conv2d(8, 2, 1), nn.Conv2d(2, 1, 1), nn.Linear(8, 2), nn.Linear(2, 8)
    return features, ops.channel_reunion(features, *_parameters(*layers))


def _selective_fusion() -> tuple[Tensor, Tensor]:
    first = _map()
    layers = nn.Linear(8, 2), nn.Conv2d(2, 8, 1), nn.Conv2d(2, 8, 1)
    return first, ops.selective_fusion(first, _map(), *_parameters(*layers))[0]


def _spatial_reunion() -> tuple[Tensor, Tensor]:
    features = _map()
    layer = nn.Conv2d(8, 1, 3)
    return features, ops.spatial_reunion(features, _map(), _map(size=2), layer.weight, layer.bias)


def _project_levels_of_levels() -> tuple[Tensor, Tensor]:
    level = _map()
    return level, ops.project_levels([level, _map(4, 2)], torch.randn(3, 14))


def _project_levels_of_weight() -> tuple[Tensor, Tensor]:
    weight = torch.randn(3, 14, requires_grad=True)
    return weight, ops.project_levels([_map(), _map(4, 2)], weight)


def _hypersphere() -> tuple[Tensor, Tensor]:
    features = torch.randn(20, 5, requires_grad=True)
    return features, ops.hypersphere(features, torch.randn(6, 5), 2)


def _relaxed_contrastive() -> tuple[Tensor, Tensor]:
    z = torch.randn(20, 5, requires_grad=True)
    return z, ops.relaxed_contrastive(z, torch.randn(20, 5))


def _relu_avg_pool() -> tuple[Tensor, Tensor]:
    maps = _map()
    return maps, ops.relu_avg_pool(maps)


CASES = {
    "channel_reunion": _channel_reunion,
    "selective_fusion": _selective_fusion,
    "spatial_reunion": _spatial_reunion,
    "project_levels": _project_levels_of_levels,
    "project_levels, weight": _project_levels_of_weight,
    "hypersphere": _hypersphere,
    "relaxed_contrastive": _relaxed_contrastive,
    "relu_avg_pool": _relu_avg_pool,
}


@pytest.mark.parametrize("case", CASES)
def test_a_gradient_of_a_gradient_is_refused(case):
    build: Callable[[], tuple[Tensor, Tensor]] = CASES[case]
    gradients = []
    for again in (False, True):
        torch.manual_seed(0)
        x, result = build()
        # A square, so that the gradient depends on the input whatever the operator.
        gradients += torch.autograd.grad(result.square().sum(), x, create_graph=again)
    assert torch.equal(*gradients)
    operator = case.partition(",")[0]
    with pytest.raises(RuntimeError, match=rf"^{operator}: its gradient cannot .* pydefect\.ops\.reference"):
        gradients[1].square().sum().backward()
