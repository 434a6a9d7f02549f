"""The fused CoordConv equals upsample, concatenate, convolve: a 1x1 convolution commutes with bilinear
upsampling."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from pydefect import ops
from pydefect.ops import reference

GRIDS = [
    pytest.param([(8, 8), (4, 4), (2, 2)], id="square"),
    pytest.param([(6, 10), (3, 5), (2, 3)], id="rectangle"),
    pytest.param([(7, 5), (4, 3), (2, 2)], id="odd"),
    pytest.param([(5, 9)], id="one-level"),
    pytest.param([(9, 1), (5, 1)], id="one-column"),
    pytest.param([(1, 1)], id="one-patch"),
    pytest.param([(4, 4), (4, 4)], id="equal-grids"),
]


def inputs(
    grids: list[tuple[int, int]], dtype: torch.dtype, d: int = 6
) -> tuple[list[Tensor], Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(grids))
    channels = [3, 5, 4][: len(grids)]
    levels = [
        torch.randn(2, count, height, width, generator=generator, dtype=torch.float64).to(dtype)
        for count, (height, width) in zip(channels, grids, strict=True)
    ]
    weight = torch.randn(d, sum(channels) + 2, generator=generator, dtype=torch.float64).to(dtype)
    bias = torch.randn(d, generator=generator, dtype=torch.float64).to(dtype)
    return levels, weight, bias


def patch_by_patch(levels: list[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    """Interpolation and coordinates written out for every patch, from section 3.3's definition."""
    batch, _, height, width = levels[0].shape
    out = torch.zeros(batch, height * width, len(weight), dtype=weight.dtype)

    def coordinate(index: int, length: int) -> float:
        return -1 + 2 * index / (length - 1) if length > 1 else 0.0

    def taps(index: int, size: int, length: int) -> list[tuple[int, float]]:
        """Half-pixel centres: the source position of a target pixel, clamped at 0, between two source
        pixels."""
        position = max((index + 0.5) * length / size - 0.5, 0.0)
        low = min(int(position), length - 1)
        share = position - low
        return [(low, 1 - share), (min(low + 1, length - 1), share)]

    for row in range(height):
        for column in range(width):
            parts = []
            for level in levels:
                value = torch.zeros(batch, level.shape[1], dtype=weight.dtype)
                for y, share_y in taps(row, height, level.shape[2]):
                    for x, share_x in taps(column, width, level.shape[3]):
                        value += share_y * share_x * level[:, :, y, x]
                parts.append(value)
            place = torch.tensor([coordinate(row, height), coordinate(column, width)], dtype=weight.dtype)
            features = torch.cat([*parts, place.expand(batch, 2)], dim=1)
            out[:, row * width + column] = features @ weight.T + (0 if bias is None else bias)
    return out


@pytest.mark.parametrize("project", [ops.project_levels, reference.project_levels], ids=["ops", "reference"])
@pytest.mark.parametrize("grids", GRIDS)
@pytest.mark.parametrize("with_bias", [True, False])
def test_against_every_patch_by_hand(project, grids, with_bias):
    levels, weight, bias = inputs(grids, torch.float64)
    chosen = bias if with_bias else None
    torch.testing.assert_close(
        project(levels, weight, chosen), patch_by_patch(levels, weight, chosen), rtol=1e-10, atol=1e-10
    )


@pytest.mark.parametrize("grids", GRIDS)
def test_fused_equals_concatenated_in_float64(grids):
    levels, weight, bias = inputs(grids, torch.float64)
    fused = ops.project_levels(levels, weight, bias)
    height, width = grids[0]
    assert fused.shape == (2, height * width, 6)
    assert fused.is_contiguous()
    torch.testing.assert_close(fused, reference.project_levels(levels, weight, bias), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("grids", GRIDS)
def test_fused_equals_concatenated_in_float32(grids):
    """Both sum the same 14 products or fewer, each interpolated from four values, in another order.

    Every partial sum is below S = sum |w| |x|, and each of some 20 roundings of either side is at most
    2**-24 of it.
    """
    levels, weight, bias = inputs(grids, torch.float32)
    ones = reference.project_levels([level.abs() for level in levels], weight.abs(), bias.abs())
    # Coordinates are negative in places: their share of S is at most |w|.
    bound = ones.abs() + 2 * weight.abs()[:, -2:].sum(1)
    difference = (
        ops.project_levels(levels, weight, bias) - reference.project_levels(levels, weight, bias)
    ).abs()
    assert (difference <= 40 * 2.0**-24 * bound).all()


def test_real_widths_in_float32():
    """448 channels as with ResNet-18, to a few ulps of the typical output, whose 450 terms add up like a
    random walk."""
    generator = torch.Generator().manual_seed(0)
    levels = [torch.randn(1, c, s, s, generator=generator) for c, s in ((64, 16), (128, 8), (256, 4))]
    weight = torch.randn(96, 450, generator=generator) / 450**0.5
    fused, slow = ops.project_levels(levels, weight), reference.project_levels(levels, weight)
    assert float((fused - slow).abs().max()) < 30 * 2.0**-24 * float(slow.abs().max())


@pytest.mark.parametrize("grids", GRIDS)
def test_gradcheck(grids):
    """Linear in every argument, so differences are exact up to rounding."""
    levels, weight, bias = inputs(grids, torch.float64, d=2)
    arguments = [part.requires_grad_() for part in (*levels, weight, bias)]
    assert torch.autograd.gradcheck(
        lambda *parts: ops.project_levels(parts[:-2], parts[-2], parts[-1]), arguments
    )


@pytest.mark.parametrize("grids", GRIDS)
def test_gradients_of_both_agree(grids):
    levels, weight, bias = inputs(grids, torch.float64)
    gradients = []
    for project in (ops.project_levels, reference.project_levels):
        arguments = [part.clone().requires_grad_() for part in (*levels, weight, bias)]
        project(arguments[:-2], arguments[-2], arguments[-1]).square().sum().backward()
        gradients.append([argument.grad for argument in arguments])
    for fused, slow in zip(*gradients, strict=True):
        torch.testing.assert_close(fused, slow, rtol=1e-10, atol=1e-9)


def test_channels_last_inputs_give_the_same():
    """The cache hands out channels-last levels."""
    levels, weight, bias = inputs([(6, 4), (3, 2)], torch.float64)
    last = [level.contiguous(memory_format=torch.channels_last) for level in levels]
    torch.testing.assert_close(
        ops.project_levels(last, weight, bias),
        ops.project_levels(levels, weight, bias),
        rtol=1e-12,
        atol=1e-12,
    )


def test_average_pooling_commutes_too():
    """Locally aware features (3x3 averages) may be taken before or after a projection without coordinates
    and bias."""
    levels, weight, _ = inputs([(6, 6)], torch.float64)
    weight[:, -2:] = 0

    def pooled(x: Tensor) -> Tensor:
        return F.avg_pool2d(x, 3, stride=1, padding=1)

    before = ops.project_levels([pooled(levels[0])], weight)
    after = pooled(ops.project_levels(levels, weight).transpose(1, 2).reshape(2, -1, 6, 6))
    torch.testing.assert_close(before, after.flatten(2).transpose(1, 2), rtol=1e-12, atol=1e-12)
