"""The autoencoder: EfficientAD's sizes at 256 x 256, and sizes that follow from any other."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pydefect.dual_ae.autoencoder import Autoencoder, decoder_sizes


def test_sizes_at_256_are_the_published_ones():
    assert decoder_sizes((256, 256)) == [(side, side) for side in (3, 8, 15, 32, 63, 127)]


def test_layers_are_the_published_ones():
    network = Autoencoder((256, 256), (56, 56))
    kernels = [
        (layer.in_channels, layer.out_channels, layer.kernel_size[0], layer.stride[0], layer.padding[0])
        for layer in network
        if isinstance(layer, nn.Conv2d)
    ]
    encoder = [(3, 32, 4, 2, 1), (32, 32, 4, 2, 1), (32, 64, 4, 2, 1), (64, 64, 4, 2, 1), (64, 64, 4, 2, 1)]
    decoder = [(64, 64, 4, 1, 2)] * 6
    assert kernels == [*encoder, (64, 64, 8, 1, 0), *decoder, (64, 64, 3, 1, 1), (64, 384, 3, 1, 1)]
    assert [layer.p for layer in network if isinstance(layer, nn.Dropout)] == [0.2] * 6


@pytest.mark.parametrize(
    ("image_size", "map_size"), [((256, 256), (56, 56)), ((64, 96), (8, 16)), ((100, 71), (17, 10))]
)
def test_any_size_has_a_bottleneck_of_64_numbers(image_size, map_size):
    network = Autoencoder(image_size, map_size, 16).eval()
    seen = []
    bottleneck = [layer for layer in network if isinstance(layer, nn.Conv2d)][5]
    bottleneck.register_forward_hook(lambda _m, _i, output: seen.append(output.shape))
    with torch.inference_mode():
        assert network(torch.zeros(2, 3, *image_size)).shape == (2, 16, *map_size)
    assert seen == [(2, 64, 1, 1)]


def test_every_output_depends_on_every_corner_of_the_image():
    network = Autoencoder((64, 96), (8, 16), 4).double().eval()
    image = torch.rand(1, 3, 64, 96, dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(network(image)[0, 0, 7, 15], image)
    for row in (0, 60):
        for column in (0, 92):
            assert gradient[0, :, row : row + 4, column : column + 4].abs().sum() > 0
