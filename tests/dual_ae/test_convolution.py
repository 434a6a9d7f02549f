"""Convolutions that are trained: PyTorch's, with gradients of their own."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pydefect.buildinfo import build_info
from pydefect.dual_ae import convolution as module
from pydefect.dual_ae.convolution import SmallConvolution, TrainedConvolution


@pytest.mark.parametrize("capability", ["AVX512", "AVX2"])
@pytest.mark.parametrize("channels_last", [True, False])
@pytest.mark.parametrize(("kernel", "padding"), [(4, 3), (4, 0), (3, 1), (1, 0)])
@pytest.mark.parametrize(("inputs", "outputs"), [(5, 7), (33, 35)], ids=["few", "tiles"])
def test_a_convolutions_gradients_are_pytorchs(
    inputs, outputs, kernel, padding, channels_last, capability, monkeypatch
):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    torch.manual_seed(0)
    layer = TrainedConvolution(inputs, outputs, kernel, padding=padding)
    maps = torch.randn(2, inputs, 12, 9)
    if channels_last:
        layer, maps = layer.to(memory_format=torch.channels_last), maps.to(memory_format=torch.channels_last)
    maps.requires_grad_()
    twin = nn.Conv2d(inputs, outputs, kernel, padding=padding).double()
    twin.load_state_dict(layer.state_dict())
    other = maps.detach().double().requires_grad_()
    found, expected = layer(maps), twin(other)
    # See tests/ops/test_convolution.py for what tiles add to roundings.
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=1e-5)
    along = torch.randn(expected.shape)
    found.backward(along)
    expected.backward(along.double())
    for first, second in zip((maps, *layer.parameters()), (other, *twin.parameters()), strict=True):
        # Sums of up to 560 products of numbers of one: some roundings of their largest partial sum.
        torch.testing.assert_close(first.grad.double(), second.grad, rtol=0, atol=2e-4)


def test_a_convolution_trains_in_autocasts_type():
    torch.manual_seed(0)
    layer = TrainedConvolution(3, 16, 4, padding=3)
    twin = nn.Conv2d(3, 16, 4, padding=3)
    twin.load_state_dict(layer.state_dict())
    maps = torch.randn(1, 3, 20, 20)
    for one in (layer, twin):
        with torch.autocast("cpu", torch.bfloat16):
            out = one(maps)
        assert out.dtype == torch.bfloat16
        out.float().square().sum().backward()
    for first, second in zip(layer.parameters(), twin.parameters(), strict=True):
        assert first.grad.dtype == torch.float32
        # Both are rounded to bfloat16 (8 bits) at the end, and so are the maps before.
        torch.testing.assert_close(
            first.grad, second.grad, rtol=0.02, atol=0.02 * float(second.grad.abs().max())
        )


def test_a_convolution_that_does_not_train_is_pytorchs():
    torch.manual_seed(0)
    layer = TrainedConvolution(3, 4, 4, padding=3).requires_grad_(False)
    twin = nn.Conv2d(3, 4, 4, padding=3)
    twin.load_state_dict(layer.state_dict())
    maps = torch.randn(1, 3, 8, 8, requires_grad=True)
    found = layer(maps)
    assert torch.equal(found, twin(maps))
    # Its maps' gradient is there all the same.
    assert torch.autograd.grad(found.sum(), maps)[0].shape == maps.shape
    with torch.no_grad():
        assert torch.equal(layer.requires_grad_(True)(maps), found)


@pytest.mark.parametrize("layer_type", [TrainedConvolution, SmallConvolution])
def test_where_tiles_are_used(layer_type, monkeypatch):
    if build_info().cpu_level_active == "portable":
        pytest.skip("no tiles on this level")
    made = []

    def seen(weight):
        tiles = convolution_tiles(weight)
        made.append((tuple(weight.shape[:2]), tiles is not None))
        return tiles

    convolution_tiles = module.convolution_tiles
    monkeypatch.setattr(module, "convolution_tiles", seen)
    layer = layer_type(32, 64, 3, padding=1)
    maps = torch.randn(1, 32, 9, 9, requires_grad=True)
    layer(maps).sum().backward()
    # Forward, and for the gradient of the maps.
    assert made == [((64, 32), True), ((32, 64), True)]
    made.clear()
    with torch.no_grad():
        layer(maps)
    assert not made
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(maps)
    out.float().sum().backward()
    assert out.dtype == torch.bfloat16
    assert made == ([] if layer_type is SmallConvolution else [((64, 32), False), ((32, 64), False)])
