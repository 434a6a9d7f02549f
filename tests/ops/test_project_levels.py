"""The fused CoordConv equals upsample, concatenate, convolve: a 1x1 convolution commutes with bilinear
upsampling.

Float64 takes the composition of PyTorch's operators, float32 on the CPU the native kernels. The latter are
compared with the twin in float64. Each output is a sum of products w x s of a weight, a feature and
interpolation shares; let S be the sum of the absolute values. Every order of adding n terms in float32 errs
by at most n 2**-24 S, and interpolation adds a few roundings more, one of them magnified: the position
between two pixels, up to 64 here, carries a relative rounding of 3 * 2**-24, so a share is off by up to
200 * 2**-24 where the grids' ratio is no power of two.
"""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pydefect import ops
from pydefect.buildinfo import build_info
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


FORMATS = [torch.float32, torch.bfloat16, torch.float16]
# Around the tiles' edges (14 x 32, 6 x 16, 4 x 8; panels of 32, 16 and 8 channels, blocks of 16), with grids
# that grow, shrink and change by odd ratios.
NATIVE = [
    pytest.param([3, 5, 4], [(8, 8), (4, 4), (2, 2)], 6, id="small"),
    pytest.param([1], [(1, 1)], 1, id="one-of-everything"),
    pytest.param([15, 16, 17], [(13, 14), (7, 7), (3, 4)], 31, id="tile-minus-one"),
    pytest.param([16, 32, 8], [(14, 14), (7, 7), (4, 4)], 32, id="tile"),
    pytest.param([17, 33, 9], [(15, 15), (8, 8), (4, 4)], 33, id="tile-plus-one"),
    pytest.param([31, 4], [(4, 29), (4, 29)], 15, id="equal-grids"),
    pytest.param([2, 3, 2], [(9, 5), (23, 11), (5, 64)], 13, id="finer-grids-later"),
    pytest.param([2, 3], [(1, 17), (1, 5)], 5, id="one-row"),
    pytest.param([2, 3], [(40, 3), (5, 300)], 45, id="wider-than-a-sum"),
    pytest.param([64, 128, 256], [(28, 28), (14, 14), (7, 7)], 112, id="real-widths"),
]


def native_inputs(channels, grids, d, batch=2, element=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    levels = [
        torch.randn(batch, count, *grid, generator=generator)
        .to(element)
        .contiguous(memory_format=torch.channels_last)
        for count, grid in zip(channels, grids, strict=True)
    ]
    weight = torch.randn(d, sum(channels) + 2, generator=generator)
    return levels, weight, torch.randn(d, generator=generator)


def gradients_of(project, levels, weight, bias, gradient, pool):
    arguments = [part.detach().clone().requires_grad_() for part in (*levels, weight, bias)]
    project(arguments[:-2], arguments[-2], arguments[-1], pool=pool).backward(gradient)
    return [argument.grad for argument in arguments]


def in_double(tensors):
    return [tensor.double() for tensor in tensors]


def absolute(tensors):
    return [tensor.double().abs() for tensor in tensors]


def assert_close_in(actual, expected, magnitude, terms):
    """Within (terms + 300) roundings of the sum of absolute values."""
    assert actual.shape == expected.shape
    allowed = (terms + 300) * 2.0**-24 * magnitude + 1e-30
    assert ((actual.double() - expected).abs() <= allowed).all()


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize("element", FORMATS)
@pytest.mark.parametrize(("channels", "grids", "d"), NATIVE)
def test_native_agrees_with_reference(channels, grids, d, element, pool):
    levels, weight, bias = native_inputs(channels, grids, d, element=element)
    actual = ops.project_levels(levels, weight, bias, pool=pool)
    assert actual.dtype == torch.float32
    assert actual.is_contiguous()
    expected = reference.project_levels(in_double(levels), weight.double(), bias.double(), pool=pool)
    # Coordinates are at most 1: with their weights' absolute values added twice, S is not undercounted.
    magnitude = reference.project_levels(
        absolute(levels), weight.double().abs(), bias.double().abs(), pool=pool
    )
    magnitude += 2 * weight.double().abs()[:, -2:].sum(1)
    assert_close_in(actual, expected, magnitude, weight.shape[1])


@pytest.mark.parametrize("pool", [False, True])
@pytest.mark.parametrize(("channels", "grids", "d"), NATIVE)
def test_native_gradients_agree_with_reference(channels, grids, d, pool):
    levels, weight, bias = native_inputs(channels, grids, d, batch=3)
    height, width = grids[0]
    gradient = torch.randn(3, height * width, d, generator=torch.Generator().manual_seed(9))
    actual = gradients_of(ops.project_levels, levels, weight, bias, gradient, pool)
    expected = gradients_of(
        reference.project_levels, in_double(levels), weight.double(), bias.double(), gradient.double(), pool
    )
    magnitude = gradients_of(
        reference.project_levels,
        absolute(levels),
        weight.double().abs(),
        bias.double(),
        gradient.double().abs(),
        pool,
    )
    # The coordinates' columns: what the bias sums, times at most 1.
    magnitude[-2][:, -2:] = magnitude[-1].unsqueeze(1)
    for one, other, bound in zip(actual, expected, magnitude, strict=True):
        assert_close_in(one, other, bound, 3 * height * width + d)


@pytest.mark.parametrize("element", FORMATS[1:])
def test_gradients_of_half_precision_levels(element):
    levels, weight, bias = native_inputs([5, 6], [(6, 7), (3, 4)], 9, element=element)
    gradient = torch.randn(2, 42, 9, generator=torch.Generator().manual_seed(9))
    actual = gradients_of(ops.project_levels, levels, weight, bias, gradient, True)
    wide = [level.float() for level in levels]
    expected = gradients_of(ops.project_levels, wide, weight, bias, gradient, True)
    for one, other in zip(actual, expected, strict=True):
        # Everything is computed in float32; the levels' gradients are rounded at the end.
        torch.testing.assert_close(one, other.to(one.dtype), rtol=0, atol=0)


@pytest.mark.cpu  # tensor cores make infinities NaN
def test_every_half_precision_value_is_read_exactly():
    """Subnormal values, both zeros, infinities and NaN among them, at every place in a vector."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for element in FORMATS[1:]:
        level = bits.view(element).reshape(1, 16, 64, 64).contiguous(memory_format=torch.channels_last)
        for channel in (0, 7, 15):
            # Only products with zero are added, so that a value comes out as it is, or NaN.
            weight = torch.zeros(1, 18)
            weight[0, channel] = 1
            alone = level[:, channel : channel + 1]
            single = ops.project_levels([alone], torch.tensor([[1.0, 0.0, 0.0]])).flatten()
            torch.testing.assert_close(single, alone.float().flatten(), rtol=0, atol=0, equal_nan=True)
            among = ops.project_levels([level], weight).flatten()
            finite = torch.isfinite(level.float()).all(1).flatten()
            torch.testing.assert_close(among[finite], single[finite], rtol=0, atol=0)
            assert not torch.isfinite(among[~finite]).any()


def test_levels_in_any_layout():
    """Contiguous levels, slices of a larger tensor, and what the feature cache hands out for a batch."""
    levels, weight, bias = native_inputs([6, 5], [(9, 7), (4, 4)], 11)
    expected = ops.project_levels(levels, weight, bias)
    padded = [F.pad(level, (1, 2, 3, 1, 2, 2))[:, 2:-2, 3:-1, 1:-2] for level in levels]
    inside_last = [
        F.pad(level, (1, 2, 3, 1)).contiguous(memory_format=torch.channels_last)[:, :, 3:-1, 1:-2]
        for level in levels
    ]
    flat = torch.cat([level.permute(0, 2, 3, 1).flatten(1) for level in levels], dim=1)
    cached = [
        part.reshape(2, *level.shape[2:], level.shape[1]).permute(0, 3, 1, 2)
        for part, level in zip(flat.split([9 * 7 * 6, 4 * 4 * 5], dim=1), levels, strict=True)
    ]
    wide_weight = F.pad(weight, (1, 1))[:, 1:-1]
    gradient = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    by_columns = gradient.transpose(1, 2).contiguous().transpose(1, 2)
    for layout in ([level.contiguous() for level in levels], padded, inside_last, cached):
        assert torch.equal(ops.project_levels(layout, wide_weight, bias), expected)
        sums = torch.ops.pydefect.project_levels_weight_gradient(by_columns, layout, True)
        same = torch.ops.pydefect.project_levels_weight_gradient(gradient, levels, True)
        assert all(torch.equal(one, other) for one, other in zip(sums, same, strict=True))


def test_inputs_are_left_alone():
    levels, weight, bias = native_inputs([6, 5], [(9, 7), (4, 4)], 11)
    before = [part.clone() for part in (*levels, weight, bias)]
    ops.project_levels(levels, weight, bias, pool=True)
    for part, copy in zip((*levels, weight, bias), before, strict=True):
        assert torch.equal(part, copy)


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_not_finite_features_stay_where_they_are(value):
    levels, weight, bias = native_inputs([3, 4], [(8, 8), (4, 4)], 5, batch=1)
    clean = ops.project_levels(levels, weight, bias)
    levels[0][0, 1, 6, 6] = value
    levels[1][0, 2, 0, 0] = value
    out = ops.project_levels(levels, weight, bias).reshape(8, 8, 5)
    # Pixel (0, 0) of the 4 x 4 level reaches the first three rows and columns of the 8 x 8 grid.
    touched = torch.zeros(8, 8, dtype=torch.bool)
    touched[:3, :3] = True
    touched[6, 6] = True
    assert not torch.isfinite(out[touched]).any()
    assert torch.equal(out[~touched], clean.reshape(8, 8, 5)[~touched])


def test_no_image():
    levels, weight, bias = native_inputs([3, 4], [(8, 8), (4, 4)], 5, batch=0)
    assert ops.project_levels(levels, weight, bias).shape == (0, 64, 5)
    gradients = gradients_of(ops.project_levels, levels, weight, bias, torch.zeros(0, 64, 5), True)
    assert [gradient.shape for gradient in gradients] == [part.shape for part in (*levels, weight, bias)]
    assert (gradients[-2] == 0).all()
    assert (gradients[-1] == 0).all()
    assert ops.project_levels([level.double() for level in levels], weight.double()).shape == (0, 64, 5)


def test_same_for_every_thread_count():
    levels, weight, bias = native_inputs([20, 33, 16], [(23, 21), (12, 11), (5, 6)], 75, batch=3)
    gradient = torch.randn(3, 23 * 21, 75, generator=torch.Generator().manual_seed(9))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            for pool in (False, True):
                out = ops.project_levels(levels, weight, bias, pool=pool)
                gradients = gradients_of(ops.project_levels, levels, weight, bias, gradient, pool)
                results.append([out, *gradients])
    finally:
        torch.set_num_threads(before)
    for number, result in enumerate(results[2:]):
        for one, other in zip(result, results[number % 2], strict=True):
            assert torch.equal(one, other)


@pytest.mark.parametrize("level", build_info().cpu_levels_usable)
def test_every_instruction_set(level, tmp_path, at_level):
    """Levels differ by fused multiply-adds and by nothing else, so the bounds are those of the reference."""
    cases = [case.values for case in NATIVE]
    file = tmp_path / "inputs.pt"
    inputs_of = [native_inputs(*case) for case in cases]
    gradients = [torch.randn(2, grids[0][0] * grids[0][1], d) for _, grids, d in cases]
    torch.save((inputs_of, gradients), file)
    code = f"""
import torch
from pydefect.ops import project_levels
inputs_of, gradients = torch.load({str(file)!r})
results = []
for (levels, weight, bias), gradient in zip(inputs_of, gradients):
    arguments = [part.requires_grad_() for part in (*levels, weight, bias)]
    out = project_levels(levels, weight, bias, pool=True)
    out.backward(gradient)
    half = project_levels([part.detach().half() for part in levels], weight, bias).detach()
    results.append([out.detach(), half, *(argument.grad for argument in arguments)])
torch.save(results, {str(tmp_path / "results.pt")!r})
"""
    at_level(level, code)
    results = torch.load(tmp_path / "results.pt")
    for (levels, weight, bias), gradient, result in zip(inputs_of, gradients, results, strict=True):
        wide, w, b = in_double(levels), weight.double(), bias.double()
        size = absolute(levels), weight.double().abs(), bias.double().abs()
        coordinates = 2 * size[1][:, -2:].sum(1)
        out = reference.project_levels(wide, w, b, pool=True)
        assert_close_in(
            result[0], out, reference.project_levels(*size, pool=True) + coordinates, weight.shape[1]
        )
        halves = [part.half() for part in levels]
        half = reference.project_levels(in_double(halves), w, b)
        assert_close_in(
            result[1],
            half,
            reference.project_levels(absolute(halves), *size[1:]) + coordinates,
            weight.shape[1],
        )
        expected = gradients_of(reference.project_levels, wide, w, b, gradient.double(), True)
        magnitude = gradients_of(reference.project_levels, *size, gradient.double().abs(), True)
        magnitude[-2][:, -2:] = magnitude[-1].unsqueeze(1)
        for one, other, bound in zip(result[2:], expected, magnitude, strict=True):
            assert_close_in(one, other, bound, gradient[..., 0].numel() + len(weight))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_small_problem(data):
    count = data.draw(st.integers(1, 4), label="levels")
    side, channel = st.integers(1, 19), st.integers(1, 37)
    channels = [data.draw(channel, label="channels") for _ in range(count)]
    grids = [(data.draw(side, label="height"), data.draw(side, label="width")) for _ in range(count)]
    d = data.draw(st.integers(1, 40), label="d")
    batch = data.draw(st.integers(0, 3), label="batch")
    pool = data.draw(st.booleans(), label="pool")
    levels, weight, bias = native_inputs(channels, grids, d, batch, seed=d)
    actual = ops.project_levels(levels, weight, bias, pool=pool)
    wide = in_double(levels), weight.double(), bias.double()
    size = absolute(levels), weight.double().abs(), bias.double().abs()
    magnitude = reference.project_levels(*size, pool=pool) + 2 * size[1][:, -2:].sum(1)
    assert_close_in(actual, reference.project_levels(*wide, pool=pool), magnitude, weight.shape[1])
    gradient = torch.randn(actual.shape, generator=torch.Generator().manual_seed(batch))
    ours = gradients_of(ops.project_levels, levels, weight, bias, gradient, pool)
    theirs = gradients_of(reference.project_levels, *wide, gradient.double(), pool)
    bounds = gradients_of(reference.project_levels, *size, gradient.double().abs(), pool)
    bounds[-2][:, -2:] = bounds[-1].unsqueeze(1)
    for one, other, bound in zip(ours, theirs, bounds, strict=True):
        assert_close_in(one, other, bound, gradient[..., 0].numel() + d)


def test_only_what_is_asked_for_gets_a_gradient():
    levels, weight, bias = native_inputs([3, 4], [(8, 8), (4, 4)], 5)
    levels[1].requires_grad_()
    ops.project_levels(levels, weight, bias).sum().backward()
    assert levels[1].grad is not None
    assert levels[0].grad is None
    assert weight.grad is None
    weight.requires_grad_()
    levels[1].grad = None
    levels[1].requires_grad_(False)
    ops.project_levels(levels, weight).sum().backward()
    assert weight.grad is not None
    assert levels[1].grad is None
    assert not ops.project_levels(levels, weight.detach()).requires_grad


@pytest.mark.parametrize("pool", [False, True])
def test_gradcheck_with_pooling(pool):
    levels, weight, bias = inputs([(4, 5), (2, 3)], torch.float64, d=2)
    arguments = [part.requires_grad_() for part in (*levels, weight, bias)]
    assert torch.autograd.gradcheck(
        lambda *parts: ops.project_levels(parts[:-2], parts[-2], parts[-1], pool=pool), arguments
    )


A, B = torch.zeros(2, 3, 4, 4), torch.zeros(2, 5, 2, 2)
W = torch.zeros(6, 10)
ERRORS = {
    "no level": ([], W, None, "levels must hold at least 1 tensor, got none"),
    "level 3-D": ([A, B[0]], W, None, r"levels\[1\] must have 4 dimensions, got 3"),
    "level integer": ([A, B.int()], W, None, r"levels\[1\] must be float32, bfloat16 or float16, got"),
    "level double": ([A, B.double()], W, None, r"levels\[1\] must be float32, bfloat16 or float16, got"),
    "batches": ([A, B[:1]], W, None, r"levels\[1\] must have the batch size of levels\[0\], 2, got 1"),
    "no channel": ([A, B[:, :0]], W, None, r"levels\[1\] must have between 1 and .* got 0, 2 and 2"),
    "no row": ([A[:, :, :0], B], W, None, r"levels\[0\] must have between 1 and .* got 3, 0 and 4"),
    "weight 1-D": ([A, B], W[0], None, "weight must have 2 dimensions, got 1"),
    "weight integer": ([A, B], W.int(), None, "weight must be float32, got"),
    "weight empty": ([A, B], W[:0], None, "weight must have at least 1 row, got 0"),
    "weight narrow": ([A, B], W[:, 1:], None, "weight must have a column for each .*, 10, got 9"),
    "bias long": ([A, B], W, torch.zeros(7), r"bias must have the shape \[6\]"),
    "bias 2-D": ([A, B], W, torch.zeros(6, 1), r"bias must have the shape \[6\]"),
    "bias half": ([A, B], W, torch.zeros(6).half(), "bias must be float32, got"),
}


@pytest.mark.parametrize("project", [ops.project_levels, reference.project_levels], ids=["ops", "reference"])
@pytest.mark.parametrize("case", ERRORS)
def test_wrong_arguments(case, project):
    levels, weight, bias, message = ERRORS[case]
    with pytest.raises(RuntimeError, match=f"project_levels: {message}"):
        project(levels, weight, bias)


def test_wrong_arguments_of_the_gradients():
    weight_gradient = torch.ops.pydefect.project_levels_weight_gradient
    level_gradient = torch.ops.pydefect.project_levels_level_gradient
    with pytest.raises(RuntimeError, match="the pixels of levels"):
        weight_gradient(torch.zeros(2, 15, 6), [A, B], False)
    with pytest.raises(RuntimeError, match="gradient must have 3 dimensions, got 2"):
        weight_gradient(torch.zeros(2, 16), [A, B], False)
    with pytest.raises(RuntimeError, match="width of rows, 6"):
        level_gradient(torch.zeros(2, 16, 6), torch.zeros(5, 3), 4, 4, 2, 2)
    with pytest.raises(RuntimeError, match="height \\* width pixels, 20, got 16"):
        level_gradient(torch.zeros(2, 16, 6), torch.zeros(6, 3), 4, 5, 2, 2)
    with pytest.raises(RuntimeError, match="grid sizes must be between 1 and"):
        level_gradient(torch.zeros(2, 16, 6), torch.zeros(6, 3), 4, 4, 0, 2)


@pytest.mark.parametrize("pool", [False, True])
def test_opcheck(pool):
    levels, weight, bias = native_inputs([3, 5], [(5, 6), (3, 3)], 7)
    gradient = torch.randn(2, 30, 7)
    operators = torch.ops.pydefect
    learned = weight.clone().requires_grad_(), bias.clone().requires_grad_()
    moving = [level.clone().requires_grad_() for level in levels]
    torch.library.opcheck(operators.project_levels.default, (levels, weight, None, pool))
    torch.library.opcheck(operators.project_levels.default, (levels, *learned, pool))
    torch.library.opcheck(operators.project_levels.default, (moving, *learned, pool))
    torch.library.opcheck(operators.project_levels_weight_gradient.default, (gradient, levels, pool))
    torch.library.opcheck(
        operators.project_levels_level_gradient.default, (gradient, weight[:, :3], 5, 6, 3, 3)
    )


def test_compiles():
    levels, weight, bias = native_inputs([3, 5], [(5, 6), (3, 3)], 7)
    weight.requires_grad_()

    def loss(levels, weight, bias):
        return ops.project_levels(levels, weight * 2, bias, pool=True).square().sum()

    expected = loss(levels, weight, bias)
    (expected_gradient,) = torch.autograd.grad(expected, weight)
    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True)
    actual = compiled(levels, weight, bias)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    torch.testing.assert_close(torch.autograd.grad(actual, weight)[0], expected_gradient, rtol=0, atol=0)
