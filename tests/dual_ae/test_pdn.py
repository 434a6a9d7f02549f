"""The patch description network: layers, sizes, receptive field and the place of its cells."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from pydefect.dual_ae.pdn import (
    PDN,
    RECEPTIVE_FIELD,
    STRIDE,
    first_centre,
    output_size,
)

SMALL = {
    "0.weight": (128, 3, 4, 4),
    "3.weight": (256, 128, 4, 4),
    "6.weight": (256, 256, 3, 3),
    "8.weight": (384, 256, 4, 4),
}
MEDIUM = {
    "0.weight": (256, 3, 4, 4),
    "3.weight": (512, 256, 4, 4),
    "6.weight": (512, 512, 1, 1),
    "8.weight": (512, 512, 3, 3),
    "10.weight": (384, 512, 4, 4),
    "12.weight": (384, 384, 1, 1),
}


@pytest.mark.parametrize(("size", "published"), [("small", SMALL), ("medium", MEDIUM)])
def test_names_and_shapes_are_those_of_the_published_files(size, published):
    state = PDN(size).state_dict()
    assert {name: tuple(value.shape) for name, value in state.items() if "weight" in name} == published
    assert set(state) == {*published, *(name.replace("weight", "bias") for name in published)}


@pytest.mark.parametrize(("padding", "cells"), [(False, 56), (True, 64)])
def test_256_pixels_give_the_papers_maps(padding, cells):
    assert output_size((256, 256), padding) == (cells, cells)


@pytest.mark.parametrize("size", ["small", "medium"])
@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("image_size", [(33, 33), (36, 37), (38, 41), (47, 64)])
def test_output_size_is_that_of_the_network(size, padding, image_size):
    with torch.inference_mode():
        described = PDN(size, 8, padding)(torch.zeros(2, 3, *image_size))
    assert described.shape == (2, 8, *output_size(image_size, padding))


def thin(size: str, padding: bool) -> PDN:
    """A network whose every convolution adds what it sees: an output is a positive count of paths."""
    network = PDN(size, 1, padding)
    for module in network:
        if isinstance(module, nn.Conv2d):
            nn.init.constant_(module.weight, 1 / module.weight[0].numel())
            nn.init.zeros_(module.bias)
    # Frozen: gradients in tiles are some roundings beside zero where they should be zero.
    return network.requires_grad_(False)


@pytest.mark.parametrize("size", ["small", "medium"])
@pytest.mark.parametrize("padding", [False, True])
def test_a_cell_sees_33_pixels_round_its_centre(size, padding):
    image = torch.rand(1, 3, 52, 48, requires_grad=True)
    described = thin(size, padding)(image)
    for row, column in ((0, 0), (2, 1), (described.shape[2] - 1, described.shape[3] - 1)):
        (seen,) = torch.autograd.grad(described[0, 0, row, column], image, retain_graph=True)
        seen = seen[0, 0] > 0
        for axis, cell in ((1, row), (0, column)):
            pixels = seen.any(axis).nonzero()[:, 0].tolist()
            centre = first_centre(padding) + STRIDE * cell
            length = image.shape[3 - axis]
            assert pixels[0] == max(0, centre - RECEPTIVE_FIELD / 2)
            assert pixels[-1] + 1 == min(length, centre + RECEPTIVE_FIELD / 2)


def test_channels_last_and_bfloat16_pass_through():
    network = PDN("small", 16).to(memory_format=torch.channels_last)
    image = torch.randn(1, 3, 40, 40).contiguous(memory_format=torch.channels_last)
    exact = network(image)
    assert exact.is_contiguous(memory_format=torch.channels_last)
    with torch.autocast("cpu", torch.bfloat16):
        rounded = network(image)
    assert rounded.dtype == torch.bfloat16
    # Four layers of 8-bit roundings.
    assert (rounded.float() - exact).abs().max() < 0.05 * exact.abs().max()


@pytest.mark.parametrize("size", ["small", "medium"])
@pytest.mark.parametrize("padding", [False, True])
def test_it_is_its_layers_one_after_the_other(size, padding):
    network = PDN(size, 8, padding).to(memory_format=torch.channels_last)
    images = torch.randn(2, 3, 45, 38).contiguous(memory_format=torch.channels_last)
    plainly = images
    for layer in network:
        plainly = nn.AvgPool2d.forward(layer, plainly) if isinstance(layer, nn.AvgPool2d) else layer(plainly)
    assert torch.equal(network(images), plainly)


@pytest.mark.gpu
@pytest.mark.parametrize("padding", [False, True])
def test_a_card_describes_as_the_processor(padding, monkeypatch):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    network = PDN(padding=padding)
    images = torch.randn(2, 3, 70, 81)
    expected = network(images)
    actual = network.cuda()(images.cuda().contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(actual.cpu(), expected, rtol=1e-4, atol=1e-5)
