"""Convolutions by Winograd's minimal filtering against PyTorch's in float64."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pydefect import ops
from pydefect.buildinfo import build_info
from pydefect.ops import reference

# B, C, O, kernel, padding, H, W: single pixels, tiles that do not fit, channels around blocks of 16 and
# panels of 32, more tiles than are worked on together.
SHAPES = [
    (0, 16, 32, 3, 1, 8, 8),
    (1, 1, 1, 3, 0, 3, 3),
    (1, 3, 2, 3, 2, 1, 1),
    (2, 16, 32, 3, 1, 8, 12),
    (1, 15, 31, 3, 1, 5, 7),
    (2, 17, 33, 3, 0, 9, 6),
    (1, 33, 70, 3, 1, 33, 29),
    (1, 1, 1, 4, 0, 4, 4),
    (1, 2, 3, 4, 3, 1, 2),
    (2, 16, 32, 4, 1, 7, 10),
    (1, 31, 130, 4, 2, 8, 5),
    (3, 20, 36, 4, 0, 11, 13),
    (1, 16, 40, 4, 1, 40, 37),
]
IMPLEMENTATIONS = [
    pytest.param(ops.convolution, id="ops"),
    pytest.param(reference.convolution, id="reference"),
]
GRADIENTS = [
    pytest.param(ops.convolution_weight_gradient, id="ops"),
    pytest.param(reference.convolution_weight_gradient, id="reference"),
]


def tiles_of(weight):
    """Also of few channels, for which the public function says that they are not worth it."""
    return torch.ops.pydefect.convolution_tiles(weight)


def native_weight_gradient(gradient, maps, *, kernel, padding=0):
    """Also of few channels, for which the public function takes PyTorch's way."""
    given = gradient.permute(0, 2, 3, 1), maps.permute(0, 2, 3, 1)
    return torch.ops.pydefect.convolution_weight_gradient(*given, kernel, padding).permute(0, 3, 1, 2)


def gradient_problem(shape, *, seed=0):
    """The maps of `problem`, and its residual for the gradient of the output."""
    maps, _, _, gradient, padding = problem(shape, seed=seed)
    return gradient, maps, {"kernel": shape[3], "padding": padding}


def problem(shape, *, seed=0):
    batch, inputs, outputs, kernel, padding, height, width = shape
    generator = torch.Generator().manual_seed(seed)
    maps = torch.randn(batch, inputs, height, width, generator=generator)
    maps = maps.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(outputs, inputs, kernel, kernel, generator=generator)
    bias = torch.randn(outputs, generator=generator)
    grown = 2 * padding - kernel + 1
    residual = torch.randn(batch, outputs, height + grown, width + grown, generator=generator)
    return maps, weight, bias, residual.contiguous(memory_format=torch.channels_last), padding


def assert_close(found, maps, weight, bias, padding, relu=False, residual=None):
    """The transforms' matrices have entries up to 8 and rows that add up to 12, so that roundings of the
    numbers between grow by about as much: of 3,000 random problems the worst was off by 1.9e-6 of the largest
    sum of the products' sizes. A wrong entry anywhere moves results by some hundredths of it."""
    expected = reference.convolution(
        maps.double(),
        weight.double(),
        bias.double(),
        padding=padding,
        relu=relu,
        residual=None if residual is None else residual.double(),
    )
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    if found.numel():
        sizes = F.conv2d(maps.double().abs(), weight.double().abs(), padding=padding)
        most = float((found - expected).abs().max())
        # And once more of the sum with bias and residual, which may be larger.
        assert most <= 6e-6 * float(sizes.max()) + 2.0**-24 * float(expected.abs().max()), most


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_by_hand(implementation):
    weight = torch.zeros(1, 1, 3, 3)
    weight[0, 0, 0] = torch.tensor([1.0, 2.0, 3.0])
    maps = torch.arange(9.0).reshape(1, 1, 3, 3)
    bias, residual = torch.tensor([-14.5]), torch.tensor([[[[1.0]]]])
    found = implementation(maps, weight, bias, tiles=tiles_of(weight))
    torch.testing.assert_close(found, torch.tensor([[[[0 + 2 + 6 - 14.5]]]]), rtol=0, atol=1e-5)
    found = implementation(maps, weight, bias, relu=True, residual=residual + 10, tiles=tiles_of(weight))
    torch.testing.assert_close(found, torch.tensor([[[[8 - 14.5 + 11]]]]), rtol=0, atol=1e-5)
    assert implementation(maps, weight, bias, relu=True, tiles=tiles_of(weight)) == 0


@pytest.mark.parametrize("kernel", [3, 4])
def test_every_weight_meets_its_pixel(kernel):
    """One weight and one pixel at a time, whose products are all exact: none is lost or swapped."""
    for row in range(kernel):
        for column in range(kernel):
            weight = torch.zeros(1, 1, kernel, kernel)
            weight[0, 0, row, column] = 2
            maps = torch.zeros(1, 1, 13, 11)
            maps[0, 0, 5, 6] = 3
            found = ops.convolution(maps, weight, torch.zeros(1), padding=1, tiles=tiles_of(weight))
            expected = F.conv2d(maps, weight, padding=1)
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)
            assert float(found.max()) == pytest.approx(6, abs=1e-5)


@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
@pytest.mark.parametrize("relu", [False, True], ids=["linear", "relu"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_a_convolution(shape, relu, with_residual):
    maps, weight, bias, residual, padding = problem(shape)
    more = {"padding": padding, "relu": relu, "residual": residual if with_residual else None}
    before = maps.clone(), residual.clone()
    found = ops.convolution(maps, weight, bias, **more, tiles=tiles_of(weight))
    assert_close(found, maps, weight, bias, **more)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(maps, before[0])
    assert torch.equal(residual, before[1])
    # Without tiles it is PyTorch's.
    plain = ops.convolution(maps, weight, bias, **more)
    assert_close(plain, maps, weight, bias, **more)


@settings(max_examples=80, deadline=None)
@given(data=st.data())
def test_any_small_problem(data):
    kernel = data.draw(st.integers(3, 4))
    padding = data.draw(st.integers(0, kernel - 1))
    side = st.integers(max(1, kernel - 2 * padding), 20)
    channels = st.integers(1, 70)
    shape = (
        data.draw(st.integers(0, 3)),
        data.draw(channels),
        data.draw(channels),
        kernel,
        padding,
        data.draw(side),
        data.draw(side),
    )
    maps, weight, bias, residual, padding = problem(shape, seed=data.draw(st.integers(0, 2**31)))
    more = {"padding": padding, "relu": data.draw(st.booleans()), "residual": residual}
    found = ops.convolution(maps, weight, bias, **more, tiles=tiles_of(weight))
    assert_close(found, maps, weight, bias, **more)


def test_the_layout_of_maps_and_residual_changes_no_bit():
    maps, weight, bias, residual, padding = problem((2, 17, 33, 3, 1, 9, 6))
    tiles = tiles_of(weight)
    expected = ops.convolution(maps, weight, bias, padding=padding, residual=residual, tiles=tiles)
    found = ops.convolution(
        maps.contiguous(), weight, bias, padding=padding, residual=residual.contiguous(), tiles=tiles
    )
    assert torch.equal(found, expected)
    assert found.is_contiguous()


def test_same_for_every_thread_count_and_beside_other_images():
    maps, weight, bias, residual, padding = problem((3, 20, 70, 4, 1, 41, 38))
    tiles = tiles_of(weight)
    before = torch.get_num_threads()

    def run(some):
        return ops.convolution(
            maps[some], weight, bias, padding=padding, residual=residual[some], tiles=tiles
        )

    try:
        torch.set_num_threads(1)
        expected = run(slice(None))
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            assert torch.equal(run(slice(None)), expected)
            assert torch.equal(tiles_of(weight), tiles)
            for image in range(3):
                one = slice(image, image + 1)
                assert torch.equal(run(one), expected[one])
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("level", build_info().cpu_levels_usable)
def test_every_instruction_set(level, tmp_path, at_level):
    cases = [problem(shape) for shape in SHAPES]
    torch.save(cases, tmp_path / "cases.pt")
    code = f"""
import torch
from pydefect import ops
results = []
for maps, weight, bias, residual, padding in torch.load({str(tmp_path / "cases.pt")!r}):
    tiles = torch.ops.pydefect.convolution_tiles(weight)
    more = dict(padding=padding, relu=True, residual=residual, tiles=tiles)
    results.append(ops.convolution(maps, weight, bias, **more))
worth_it = ops.convolution_tiles(torch.zeros(32, 16, 3, 3)) is not None
torch.save((results, worth_it), {str(tmp_path / "results.pt")!r})
"""
    at_level(level, code)
    results, worth_it = torch.load(tmp_path / "results.pt")
    for (maps, weight, bias, residual, padding), found in zip(cases, results, strict=True):
        assert_close(found, maps, weight, bias, padding, relu=True, residual=residual)
    assert worth_it == (level != "portable")


def test_where_tiles_are_worth_it():
    def worth_it(*shape, dtype=torch.float32):
        return ops.convolution_tiles(torch.zeros(shape, dtype=dtype)) is not None

    native = build_info().cpu_level_active != "portable"
    assert worth_it(32, 16, 3, 3) == native
    assert worth_it(384, 256, 4, 4) == native
    assert not worth_it(32, 16, 1, 1)
    assert not worth_it(32, 16, 5, 5)
    assert not worth_it(32, 16, 3, 4)
    assert not worth_it(32, 15, 3, 3)
    assert not worth_it(31, 16, 3, 3)
    assert not worth_it(32, 16, 3, 3, dtype=torch.bfloat16)
    assert not worth_it(32, 16, 3, 3, dtype=torch.float64)


def test_not_finite_values_stay_in_their_tiles():
    maps, weight, bias, _, _ = problem((1, 16, 32, 3, 1, 40, 40))
    tiles = tiles_of(weight)
    expected = ops.convolution(maps, weight, bias, padding=1, tiles=tiles)
    for value in (torch.nan, torch.inf, -torch.inf):
        broken = maps.clone()
        broken[0, 3, 20, 20] = value
        for relu in (False, True):
            found = ops.convolution(broken, weight, bias, padding=1, relu=relu, tiles=tiles)
            if not relu:  # which makes 0 of -inf, as behind a convolution
                assert not bool(found[0, :, 19:22, 19:22].isfinite().any())
            elif math.isnan(value):
                assert bool(found[0, :, 19:22, 19:22].isnan().all())
            far = torch.ones(40, 40, dtype=torch.bool)
            far[20 - 6 : 20 + 7, 20 - 6 : 20 + 7] = False
            wanted = expected.relu() if relu else expected
            assert torch.equal(found[0, :, far], wanted[0, :, far])


@pytest.mark.parametrize("shape", [(1, 1, 3, 3), (33, 17, 3, 3), (3, 16, 4, 4), (64, 40, 4, 4)], ids=str)
def test_tiles_are_the_twins(shape):
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    expected = reference.convolution_tiles(weight)
    # Sums of up to 16 products with entries of at most 16/15, in float32 and in float64.
    torch.testing.assert_close(tiles_of(weight), expected, rtol=1e-6, atol=2e-6)
    assert tiles_of(weight).shape == expected.shape


def test_gradients_are_pytorchs():
    maps, weight, bias, residual, padding = problem((2, 16, 32, 3, 1, 6, 5))
    given = [one.requires_grad_() for one in (maps, weight, bias, residual)]
    found = ops.convolution(
        maps, weight, bias, padding=padding, relu=True, residual=residual, tiles=tiles_of(weight.detach())
    )
    expected = (F.conv2d(maps, weight, bias, padding=padding) + residual).relu()
    assert torch.equal(found, expected)
    for one, other in zip(
        torch.autograd.grad(found.sum(), given), torch.autograd.grad(expected.sum(), given), strict=True
    ):
        assert torch.equal(one, other)
    with torch.no_grad():
        assert not torch.equal(
            ops.convolution(maps, weight, bias, padding=padding, tiles=tiles_of(weight)),
            F.conv2d(maps, weight, bias, padding=padding),
        )


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_other_types_are_pytorchs(dtype):
    maps, weight, bias, residual, padding = problem((2, 16, 32, 3, 1, 6, 5))
    tiles = tiles_of(weight)
    maps, weight, bias, residual = (one.to(dtype) for one in (maps, weight, bias, residual))
    found = ops.convolution(maps, weight, bias, padding=padding, residual=residual, tiles=tiles)
    assert torch.equal(found, F.conv2d(maps, weight, bias, padding=padding) + residual)


GOOD = {"maps": torch.zeros(1, 2, 5, 5), "weight": torch.zeros(3, 2, 3, 3), "bias": torch.zeros(3)}


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"maps": torch.zeros(2, 5, 5)}, r"maps must have 4 dimensions \[B, C, H, W\], got 3"),
        ({"maps": torch.zeros(1, 2, 5, 5, dtype=torch.int64)}, "maps must be floating point, got torch.int"),
        ({"maps": torch.zeros(1, 3, 5, 5)}, r"weight must have the shape \[O, 3, k, k\], got \[3, 2, 3, 3\]"),
        ({"weight": torch.zeros(3, 2, 3, 4)}, r"weight must have the shape \[O, 2, k, k\], got"),
        ({"weight": torch.zeros(3, 2, 3)}, "weight must have 4 dimensions"),
        ({"weight": torch.zeros(3, 2, 3, 3).double()}, "weight must be torch.float32, as maps are, got"),
        ({"bias": torch.zeros(2)}, r"bias must have the shape \[3\], got \[2\]"),
        ({"padding": 3}, "padding must be between 0 and 2, got 3"),
        ({"padding": -1}, "padding must be between 0 and 2, got -1"),
        ({"maps": torch.zeros(1, 2, 5, 2)}, "a height and a width of at least 3, got 5 and 2"),
        ({"residual": torch.zeros(1, 3, 5, 5)}, r"residual must have the shape \[1, 3, 3, 3\], got"),
        ({"residual": torch.zeros(1, 3, 3, 3).half()}, "residual must be torch.float32, as maps are, got"),
        ({"bias": torch.zeros(3, device="meta")}, "bias must be on cpu, as maps are, got meta"),
    ],
)
def test_wrong_arguments(implementation, changed, message):
    with pytest.raises(RuntimeError, match=f"convolution: .*{message}"):
        implementation(**{**GOOD, **changed})


MAPS, TILES, BIAS = torch.zeros(1, 5, 5, 2), torch.zeros(1, 36, 16, 32), torch.zeros(3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(5, 5, 2), TILES, BIAS, None, 3, 0, False), "maps must have 4 dimensions, got 3"),
        ((MAPS.half(), TILES, BIAS, None, 3, 0, False), "maps must be float32, got Half"),
        ((MAPS, TILES, BIAS, None, 5, 0, False), "kernel must be 3 or 4, got 5"),
        ((MAPS, TILES, BIAS, None, 3, 3, False), "padding must be between 0 and 2, got 3"),
        ((MAPS[:, :2], TILES, BIAS, None, 3, 0, False), "of at least 3, got 2 and 5"),
        ((MAPS, TILES, torch.zeros(3, 1), None, 3, 0, False), "bias must have 1 dimension"),
        ((MAPS, TILES, torch.zeros(0), None, 3, 0, False), "bias must have 1 dimension and at least 1"),
        ((MAPS, TILES, BIAS.double(), None, 3, 0, False), "bias must be float32"),
        ((MAPS, TILES, torch.zeros(33), None, 3, 0, False), r"the shape \[2, 36, 16, 32\], which conv"),
        ((MAPS, TILES[:, 1:], BIAS, None, 3, 0, False), r"tiles must be float32 and have the shape \[1, 36"),
        ((MAPS, TILES.double(), BIAS, None, 3, 0, False), "tiles must be float32 and have the shape"),
        ((MAPS, TILES, BIAS, torch.zeros(1, 5, 5, 3), 3, 0, False), r"shape of the output, \[1, 3, 3, 3\]"),
        ((MAPS, TILES, BIAS, torch.zeros(1, 3, 3, 3).half(), 3, 0, False), "residual must be float32"),
    ],
)
def test_the_operator_checks_what_it_is_given(arguments, message):
    with pytest.raises(RuntimeError, match=f"convolution: .*{message}"):
        torch.ops.pydefect.convolution(*arguments)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        (torch.zeros(2, 3, 3), "weight must have 4 dimensions, got 3"),
        (torch.zeros(2, 3, 3, 3).double(), "weight must be float32, got Double"),
        (torch.zeros(2, 3, 3, 4), "weight must have kernels of 3 x 3 or 4 x 4, got 3 x 4"),
        (torch.zeros(2, 3, 5, 5), "weight must have kernels of 3 x 3 or 4 x 4, got 5 x 5"),
        (torch.zeros(0, 3, 3, 3), "weight must have at least 1 channel, got 0 and 3"),
    ],
)
def test_weights_that_have_no_tiles(weight, message):
    with pytest.raises(RuntimeError, match=f"convolution_tiles: {message}"):
        torch.ops.pydefect.convolution_tiles(weight)


@pytest.mark.parametrize("with_residual", [False, True], ids=["plain", "residual"])
def test_registered_as_pytorch_expects(with_residual):
    maps, weight, bias, residual, padding = problem((2, 17, 33, 4, 1, 6, 7))
    torch.library.opcheck(torch.ops.pydefect.convolution_tiles.default, (weight,))
    torch.library.opcheck(
        torch.ops.pydefect.convolution.default,
        (
            maps.permute(0, 2, 3, 1),
            tiles_of(weight),
            bias,
            residual.permute(0, 2, 3, 1) if with_residual else None,
            4,
            padding,
            True,
        ),
    )


def test_compiles():
    maps, weight, bias, residual, padding = problem((2, 17, 33, 4, 1, 6, 7))

    def run(maps, residual):
        return ops.convolution(maps, weight, bias, padding=padding, relu=True, residual=residual, tiles=tiles)

    tiles = tiles_of(weight)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(maps, residual), run(maps, residual))


def assert_gradient_close(found, gradient, maps, kernel, padding):
    """As `assert_close`, with the same matrices transposed: of 3,000 random problems the worst was off by
    2.0e-6 of the largest sum of the products' sizes."""
    more = {"kernel": kernel, "padding": padding}
    expected = reference.convolution_weight_gradient(gradient.double(), maps.double(), **more)
    sizes = reference.convolution_weight_gradient(gradient.double().abs(), maps.double().abs(), **more)
    assert found.shape == expected.shape
    assert found.dtype == torch.float32
    assert float((found - expected).abs().max()) <= 6e-6 * float(sizes.max())


@pytest.mark.parametrize("implementation", [*GRADIENTS, pytest.param(native_weight_gradient, id="operator")])
def test_weight_gradient_by_hand(implementation):
    maps = torch.arange(16.0).reshape(1, 1, 4, 4)
    gradient = torch.tensor([[[[1.0, 0.0], [0.0, 2.0]]]])
    found = implementation(gradient, maps, kernel=3)
    # Twice the window that begins at (1, 1), and once the one at (0, 0).
    expected = 2 * maps[:, :, 1:, 1:] + maps[:, :, :3, :3]
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)
    found = implementation(torch.ones(1, 1, 4, 4), maps, kernel=3, padding=1)
    assert float(found[0, 0, 1, 1]) == pytest.approx(float(maps.sum()), rel=1e-5)
    assert float(found[0, 0, 0, 0]) == pytest.approx(float(maps[0, 0, :3, :3].sum()), rel=1e-5)


@pytest.mark.parametrize("kernel", [3, 4])
def test_every_pixel_meets_every_gradient(kernel):
    """One pixel and one gradient at a time, whose products are all exact: none is lost or swapped."""
    maps, output = torch.zeros(1, 1, 13, 11), torch.zeros(1, 1, 16 - kernel, 14 - kernel)
    maps[0, 0, 5, 6] = 3
    for row in range(3, 9):
        for column in range(3, 9):
            gradient = output.clone()
            gradient[0, 0, row, column] = 2
            found = native_weight_gradient(gradient, maps, kernel=kernel, padding=1)
            expected = torch.zeros(kernel, kernel)
            # Pixel (5, 6) is under weight (y, x) of the output (row, column) = (5, 6) + padding - (y, x).
            if 6 - row in range(kernel) and 7 - column in range(kernel):
                expected[6 - row, 7 - column] = 6
            torch.testing.assert_close(found[0, 0], expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_the_gradient_of_the_weights(shape):
    gradient, maps, more = gradient_problem(shape)
    before = gradient.clone(), maps.clone()
    found = native_weight_gradient(gradient, maps, **more)
    assert_gradient_close(found, gradient, maps, **more)
    assert found.is_contiguous(memory_format=torch.channels_last)
    assert_gradient_close(ops.convolution_weight_gradient(gradient, maps, **more), gradient, maps, **more)
    assert torch.equal(gradient, before[0])
    assert torch.equal(maps, before[1])


def test_weight_gradient_of_more_tiles_than_are_gathered():
    """1,026 tiles of 3 x 3, of three images: in six gatherings, which end within images."""
    gradient, maps, more = gradient_problem((3, 17, 33, 4, 1, 56, 54))
    assert_gradient_close(ops.convolution_weight_gradient(gradient, maps, **more), gradient, maps, **more)


def test_weight_gradient_is_the_same_for_every_thread_count_and_layout():
    gradient, maps, more = gradient_problem((3, 20, 70, 4, 1, 71, 68))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        expected = ops.convolution_weight_gradient(gradient, maps, **more)
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            assert torch.equal(ops.convolution_weight_gradient(gradient, maps, **more), expected)
    finally:
        torch.set_num_threads(before)
    found = ops.convolution_weight_gradient(gradient.contiguous(), maps.contiguous(), **more)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("level", build_info().cpu_levels_usable)
def test_weight_gradient_on_every_instruction_set(level, tmp_path, at_level):
    cases = [gradient_problem(shape) for shape in SHAPES]
    torch.save(cases, tmp_path / "cases.pt")
    code = f"""
import torch
from pydefect import ops
results = []
for gradient, maps, more in torch.load({str(tmp_path / "cases.pt")!r}):
    given = gradient.permute(0, 2, 3, 1), maps.permute(0, 2, 3, 1)
    found = torch.ops.pydefect.convolution_weight_gradient(*given, more["kernel"], more["padding"])
    results.append(found.permute(0, 3, 1, 2))
torch.save(results, {str(tmp_path / "results.pt")!r})
"""
    at_level(level, code)
    for (gradient, maps, more), found in zip(cases, torch.load(tmp_path / "results.pt"), strict=True):
        assert_gradient_close(found, gradient, maps, **more)


@pytest.mark.parametrize("broken", ["gradient", "maps"])
def test_weight_gradient_of_values_that_are_not_finite(broken):
    gradient, maps, more = gradient_problem((2, 16, 32, 3, 1, 12, 12))
    expected = ops.convolution_weight_gradient(gradient, maps, **more)
    given = {"gradient": gradient.clone(), "maps": maps.clone()}
    for value in (torch.nan, torch.inf, -torch.inf):
        given[broken][1, 3, 6, 6] = value
        found = ops.convolution_weight_gradient(**given, **more)
        hit = found[3] if broken == "gradient" else found[:, 3]
        assert not bool(hit.isfinite().any())
        others = [channel for channel in range(len(found) if broken == "gradient" else 16) if channel != 3]
        pick = (others,) if broken == "gradient" else (slice(None), others)
        assert torch.equal(found[pick], expected[pick])


def test_where_the_weight_gradient_has_kernels():
    """Where it has none, and where it is differentiated itself, it is PyTorch's to the bit."""
    gradient, maps, more = gradient_problem((2, 16, 32, 3, 1, 6, 5))

    def pytorchs(gradient, maps):
        shape = (gradient.shape[1], maps.shape[1], 3, 3)
        return torch.nn.grad.conv2d_weight(maps, shape, gradient, padding=1)

    native = build_info().cpu_level_active != "portable"
    found = ops.convolution_weight_gradient(gradient, maps, **more)
    assert torch.equal(found, pytorchs(gradient, maps)) != native
    for dtype in (torch.float64, torch.float16, torch.bfloat16):
        given = gradient.to(dtype), maps.to(dtype)
        assert torch.equal(ops.convolution_weight_gradient(*given, **more), pytorchs(*given))
    for given in ((gradient[:, :31], maps), (gradient, maps[:, :15])):
        assert torch.equal(ops.convolution_weight_gradient(*given, **more), pytorchs(*given))
    wide, maps_of_wide, more_of_wide = torch.ones(1, 32, 2, 2), torch.ones(1, 16, 6, 6), {"kernel": 5}
    found = ops.convolution_weight_gradient(wide, maps_of_wide, **more_of_wide)
    assert torch.equal(found, torch.full((32, 16, 5, 5), 4.0))
    given = gradient.double().requires_grad_(), maps.double().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda gradient, maps: ops.convolution_weight_gradient(gradient, maps, **more)[:2, :2], given
    )
    found = ops.convolution_weight_gradient(gradient.requires_grad_(), maps, **more)
    assert torch.autograd.grad(found.sum(), gradient)[0].shape == gradient.shape


GOOD_GRADIENT = {"gradient": torch.zeros(1, 3, 3, 3), "maps": torch.zeros(1, 2, 5, 5), "kernel": 3}


@pytest.mark.parametrize("implementation", GRADIENTS)
@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"maps": torch.zeros(2, 5, 5)}, r"maps must have 4 dimensions \[B, C, H, W\], got 3"),
        ({"gradient": torch.zeros(3, 3, 3)}, r"gradient must have 4 dimensions \[B, C, H, W\], got 3"),
        ({"kernel": 0}, "kernel must be at least 1, got 0"),
        ({"padding": 3}, "padding must be between 0 and 2, got 3"),
        ({"padding": -1}, "padding must be between 0 and 2, got -1"),
        ({"maps": torch.zeros(1, 2, 5, 2)}, "a height and a width of at least 3, got 5 and 2"),
        ({"padding": 1}, r"gradient must have the shape \[1, O, 5, 5\], got \[1, 3, 3, 3\]"),
        ({"gradient": torch.zeros(2, 3, 3, 3)}, r"gradient must have the shape \[1, O, 3, 3\], got \[2"),
        ({"gradient": torch.zeros(1, 3, 3, 3).double()}, "gradient must be torch.float32, as maps are, got"),
        ({"gradient": torch.zeros(1, 3, 3, 3, device="meta")}, "gradient must be on cpu, as maps are, got"),
    ],
)
def test_wrong_arguments_of_the_weight_gradient(implementation, changed, message):
    with pytest.raises(RuntimeError, match=f"convolution_weight_gradient: .*{message}"):
        implementation(**{**GOOD_GRADIENT, **changed})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.zeros(3, 3, 3), MAPS, 3, 0), "gradient must have 4 dimensions, got 3"),
        ((torch.zeros(1, 3, 3, 4).half(), MAPS, 3, 0), "gradient must be float32, got Half"),
        ((torch.zeros(1, 3, 3, 4), MAPS.double(), 3, 0), "maps must be float32, got Double"),
        ((torch.zeros(1, 3, 3, 4), MAPS, 5, 0), "kernel must be 3 or 4, got 5"),
        ((torch.zeros(1, 3, 3, 4), MAPS, 4, 4), "padding must be between 0 and 3, got 4"),
        ((torch.zeros(1, 1, 1, 4), MAPS[:, :2], 3, 0), "of at least 3, got 2 and 5"),
        ((torch.zeros(1, 3, 4, 4), MAPS, 3, 0), r"the shape of the output, \[1, 3, 3, O\]"),
        ((torch.zeros(2, 3, 3, 4), MAPS, 3, 0), r"the shape of the output, \[1, 3, 3, O\]"),
        ((torch.zeros(1, 3, 3, 0), MAPS, 3, 0), "channels of at least 1, got 3, 3 and 0"),
    ],
)
def test_the_weight_gradient_checks_what_it_is_given(arguments, message):
    with pytest.raises(RuntimeError, match=f"convolution_weight_gradient: .*{message}"):
        torch.ops.pydefect.convolution_weight_gradient(*arguments)


def test_the_weight_gradient_is_registered_as_pytorch_expects():
    gradient, maps, more = gradient_problem((2, 17, 33, 4, 1, 6, 7))
    torch.library.opcheck(
        torch.ops.pydefect.convolution_weight_gradient.default,
        (gradient.permute(0, 2, 3, 1), maps.permute(0, 2, 3, 1), more["kernel"], more["padding"]),
    )

    def run(gradient, maps):
        return ops.convolution_weight_gradient(gradient, maps, **more)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(gradient, maps), run(gradient, maps))
