"""The modules against the paper's equations, written out."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from pydefect.dual_ae.reunion import ChannelReunion, SelectiveFusion, SpatialReunion

# Sums of some hundred float32 products, added in another order.
CLOSE = {"rtol": 1e-4, "atol": 1e-5}


def maps(*shape: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    found = torch.randn(shape, generator=generator).contiguous(memory_format=torch.channels_last)
    return found.requires_grad_()


def spatial(module: SpatialReunion, features: torch.Tensor) -> torch.Tensor:
    pooled = F.avg_pool2d(features, module.pool, ceil_mode=True)  # (1)
    up = F.interpolate(module.coarse(pooled), features.shape[2:], mode="bilinear")  # (2)
    local = module.local(features)  # (3)
    attention = module.attention(local * torch.sigmoid(up + features))  # (4)
    batch, channels, height, width = features.shape
    weights = attention.reshape(batch, 1, height * width, 1)
    if module.normalisation == "mean":
        weights = weights / (height * width)
    elif module.normalisation == "softmax":
        weights = weights.softmax(2)
    context = features.reshape(batch, channels, 1, height * width) @ weights  # (6)
    return features + context.reshape(batch, channels, 1, 1)  # (7)


def compare(module, native, written, *inputs):
    """Results, gradients of the inputs and of all parameters."""
    found, expected = native(*inputs), written(*inputs)
    found, expected = (one if isinstance(one, tuple) else (one,) for one in (found, expected))
    arguments = [*inputs, *module.parameters()]
    for one, two in zip(found, expected, strict=True):
        torch.testing.assert_close(one, two, **CLOSE)
    gradients = [
        torch.autograd.grad(sum(one.square().sum() for one in some), arguments) for some in (found, expected)
    ]
    # Of the largest: the softmax's bias has none, but for rounding.
    scale = max(float(one.abs().max()) for one in gradients[1])
    for one, two in zip(*gradients, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-3, atol=1e-5 * scale)


@pytest.mark.parametrize("normalisation", ["none", "mean", "softmax"])
@pytest.mark.parametrize("size", [(8, 8), (9, 6), (3, 2)])
def test_spatial_reunion(normalisation, size):
    torch.manual_seed(0)
    module = SpatialReunion(16, 4, normalisation)
    compare(module, module, lambda features: spatial(module, features), maps(2, 16, *size))


@pytest.mark.parametrize("normalisation", ["none", "mean", "softmax"])
def test_channel_reunion(normalisation):
    torch.manual_seed(0)
    module = ChannelReunion(32, 16, normalisation)

    def written(features):
        weights = module.outer(module.inner(features))  # (8)
        pooled = torch.einsum("bnhw,bchw->bc", weights, features)  # (9)
        if normalisation != "none":
            pooled = pooled / (5 * 7)
        gate = torch.sigmoid(module.expand(torch.relu(module.reduce(pooled))))  # (10)
        return features * gate[:, :, None, None]

    assert module.reduce.out_features == 2
    compare(module, module, written, maps(2, 32, 5, 7))


def test_the_printed_sum_shuts_channels_for_good_and_the_mean_does_not():
    """Of (9), over as many positions as the method has."""
    torch.manual_seed(0)
    features = torch.randn(1, 384, 56, 56) + torch.randn(384, 1, 1)
    gates = {}
    for normalisation in ("none", "mean"):
        torch.manual_seed(1)
        module = ChannelReunion(384, 16, normalisation)
        with torch.no_grad():
            # Trained attention is larger than that of a start, of which its sums are a tenth and more.
            module.outer.bias.fill_(1.0)
            gates[normalisation] = (module(features) / features).mean((0, 2, 3))
    shut = {name: float(((gate < 0.01) | (gate > 0.99)).float().mean()) for name, gate in gates.items()}
    assert shut["mean"] == 0
    assert shut["none"] > 0.5


def test_selective_fusion():
    torch.manual_seed(0)
    module = SelectiveFusion(32, 16)

    def written(first, second):
        squeezed = torch.relu(module.reduce((first + second).mean((2, 3))))[:, :, None, None]
        share = torch.stack([module.first(squeezed), module.second(squeezed)]).softmax(0)
        return share[0] * first, share[1] * second

    first, second = (
        maps(2, 32, 5, 7),
        maps(2, 32, 5, 7).detach().flip(1).contiguous(memory_format=torch.channels_last).requires_grad_(),
    )
    compare(module, module, written, first, second)
