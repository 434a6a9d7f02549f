"""ReLU and average pooling: on the CPU to the bit PyTorch's two operators, in float32 and in bfloat16."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from pydefect import ops
from pydefect.buildinfo import build_info
from pydefect.ops import reference

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
DTYPES = [torch.float32, torch.bfloat16]
# A cell, lines, odd and even sides, channels around 16 bytes and vectors.
SHAPES = [
    (0, 5, 4, 4),
    (1, 1, 2, 2),
    (2, 3, 2, 9),
    (2, 4, 7, 2),
    (1, 8, 8, 8),
    (2, 15, 9, 11),
    (1, 33, 5, 17),
    (3, 64, 20, 13),
]
IMPLEMENTATIONS = [
    pytest.param(ops.relu_avg_pool, id="ops"),
    pytest.param(reference.relu_avg_pool, id="reference"),
]


def maps_of(shape, dtype=torch.float32, *, seed=0, layout=torch.channels_last):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)
    return values.contiguous(memory_format=layout)


def with_gradient(operation, maps, padding):
    """The result, and the gradient along a fixed random direction."""
    maps = maps.detach().clone().requires_grad_()
    result = operation(maps, padding)
    direction = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(result)
    return result, torch.autograd.grad(result, maps, direction)[0]


def plainly(maps, padding):
    return F.avg_pool2d(F.relu(maps), 2, 2, padding=padding)


def assert_equal(actual, expected):
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_by_hand(implementation):
    maps = torch.tensor([[[[1.0, -5.0, 7.0], [2.0, 5.0, -1.0], [4.0, 0.0, 0.0]]]], requires_grad=True)
    assert torch.equal(implementation(maps), torch.tensor([[[[2.0]]]]))
    padded = implementation(maps, 1)
    assert torch.equal(padded, torch.tensor([[[[0.25, 1.75], [1.5, 1.25]]]]))
    (gradient,) = torch.autograd.grad(padded, maps, torch.tensor([[[[4.0, 8.0], [12.0, 16.0]]]]))
    # Of a zero, and of what is below it, none.
    expected = torch.tensor([[[[1.0, 0.0, 2.0], [3.0, 4.0, 0.0], [3.0, 0.0, 0.0]]]])
    assert torch.equal(gradient, expected)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_it_is_pytorchs_to_the_bit(shape, dtype, padding, layout):
    maps = maps_of(shape, dtype, layout=layout)
    before = maps.clone()
    actual = with_gradient(ops.relu_avg_pool, maps, padding)
    assert_equal(actual, with_gradient(plainly, maps, padding))
    assert_equal(actual, with_gradient(reference.relu_avg_pool, maps, padding))
    assert all(one.dtype == dtype for one in actual)
    assert all(one.is_contiguous(memory_format=layout) for one in actual)
    assert torch.equal(maps, before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16])
def test_other_types_are_the_twins(dtype):
    maps = maps_of((2, 3, 6, 5), dtype)
    assert_equal(with_gradient(ops.relu_avg_pool, maps, 1), with_gradient(plainly, maps, 1))


def test_gradients_in_float64():
    maps = maps_of((2, 3, 5, 4), torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ops.relu_avg_pool(x, 1), maps)


@pytest.mark.parametrize("dtype", DTYPES)
def test_not_finite_values_and_zeros_of_both_signs(dtype):
    special = torch.tensor([torch.nan, -torch.nan, torch.inf, -torch.inf, 0.0, -0.0, 3e38, 1e-40])
    picked = torch.randint(len(special), (2, 24, 9, 8), generator=torch.Generator().manual_seed(0))
    maps = torch.where(picked < 6, special[picked], maps_of(picked.shape)).to(dtype)
    maps = maps.contiguous(memory_format=torch.channels_last)
    for padding in (0, 1):
        actual = with_gradient(ops.relu_avg_pool, maps, padding)
        assert_equal(actual, with_gradient(plainly, maps, padding))


@pytest.mark.parametrize("dtype", DTYPES)
def test_what_is_rounded_goes_to_even(dtype):
    """Means halfway between two bfloat16 numbers, and the largest ones, whose sum is too large."""
    maps = torch.zeros(1, 40, 2, 2)
    maps[0, :, 0, 0] = torch.arange(257, 297) * 4
    maps[0, :, 1, 1] = torch.linspace(0, 3e38, 40)
    maps = maps.to(dtype).contiguous(memory_format=torch.channels_last)
    assert_equal(with_gradient(ops.relu_avg_pool, maps, 0), with_gradient(plainly, maps, 0))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_small_problem(data):
    side = st.integers(2, 14)
    shape = data.draw(st.integers(0, 3)), data.draw(st.integers(1, 40)), data.draw(side), data.draw(side)
    maps = maps_of(shape, data.draw(st.sampled_from(DTYPES)), seed=data.draw(st.integers(0, 2**31)))
    padding = data.draw(st.integers(0, 1))
    assert_equal(
        with_gradient(ops.relu_avg_pool, maps, padding), with_gradient(reference.relu_avg_pool, maps, padding)
    )


def test_a_gradient_that_is_not_in_order():
    maps = maps_of((2, 6, 8, 6)).requires_grad_()
    spread = torch.randn(2, 6, 4, 3, 2)[..., 0]
    results = [
        torch.autograd.grad(operation(maps, 0), maps, spread)[0] for operation in (ops.relu_avg_pool, plainly)
    ]
    assert torch.equal(*results)


def test_same_for_every_thread_count():
    maps = maps_of((3, 17, 23, 18))
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(with_gradient(ops.relu_avg_pool, maps, 1))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert_equal(result, results[0])


@pytest.mark.parametrize("level", build_info().cpu_levels_usable)
def test_every_instruction_set(level, tmp_path, at_level):
    cases = [(maps_of(shape, dtype), padding) for shape in SHAPES for dtype in DTYPES for padding in (0, 1)]
    torch.save(cases, tmp_path / "cases.pt")
    code = f"""
import torch
from pydefect import ops
def run(maps, padding):
    maps = maps.requires_grad_()
    result = ops.relu_avg_pool(maps, padding)
    direction = torch.randn(result.shape, generator=torch.Generator().manual_seed(1)).to(result)
    return result.detach(), torch.autograd.grad(result, maps, direction)[0]
cases = torch.load({str(tmp_path / "cases.pt")!r})
torch.save([run(*case) for case in cases], {str(tmp_path / "results.pt")!r})
"""
    at_level(level, code)
    for (maps, padding), actual in zip(cases, torch.load(tmp_path / "results.pt"), strict=True):
        expected = with_gradient(plainly, maps, padding)
        assert_equal(actual, expected)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("maps", "padding", "message"),
    [
        (torch.zeros(3, 4, 4), 0, r"maps must have 4 dimensions \[B, C, H, W\], got 3"),
        (torch.zeros(1, 0, 4, 4), 0, "maps must have C, H and W of at least 1, got"),
        (torch.zeros(1, 2, 4, 4, dtype=torch.int64), 0, "maps must be floating point, got torch.int64"),
        (torch.zeros(1, 2, 4, 4), 2, "padding must be 0 or 1, got 2"),
        (torch.zeros(1, 2, 4, 4), -1, "padding must be 0 or 1, got -1"),
        (torch.zeros(1, 2, 1, 4), 0, "maps must have a height and a width of at least 2, got 1 and 4"),
    ],
)
def test_wrong_arguments(implementation, maps, padding, message):
    with pytest.raises(RuntimeError, match=f"relu_avg_pool: {message}"):
        implementation(maps, padding)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_one_cell_needs_padding(implementation):
    assert torch.equal(implementation(torch.ones(1, 1, 1, 1), 1), torch.full((1, 1, 1, 1), 0.25))


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("relu_avg_pool", (torch.zeros(4, 4, 2), 0), "maps must have 4 dimensions, got 3"),
        ("relu_avg_pool", (torch.zeros(1, 4, 4, 2).half(), 0), "maps must be float32 or bfloat16, got Half"),
        ("relu_avg_pool", (torch.zeros(1, 4, 4, 2), 3), "padding must be 0 or 1, got 3"),
        ("relu_avg_pool", (torch.zeros(1, 4, 4, 0), 0), "maps must have at least 1 channel, got 0"),
        ("relu_avg_pool", (torch.zeros(1, 4, 1, 2), 0), "of at least 2, got 4 and 1"),
        ("relu_avg_pool", (torch.zeros(1, 0, 4, 2), 1), "of at least 1, got 0 and 4"),
        (
            "relu_avg_pool_backward",
            (torch.zeros(1, 2, 3, 2), torch.zeros(1, 4, 4, 2), 0),
            "d_output must have the shape of the output",
        ),
        (
            "relu_avg_pool_backward",
            (torch.zeros(1, 2, 2, 2).bfloat16(), torch.zeros(1, 4, 4, 2), 0),
            "d_output must have the type and the device of maps",
        ),
    ],
)
def test_the_operators_check_what_they_are_given(name, arguments, message):
    with pytest.raises(RuntimeError, match=f"{name}: .*{message}"):
        getattr(torch.ops.pydefect, name)(*arguments)


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_registered_as_pytorch_expects(device):
    maps = maps_of((2, 5, 6, 7)).permute(0, 2, 3, 1).to(device)
    for dtype in DTYPES:
        given_maps = maps.to(dtype, copy=True).requires_grad_()
        torch.library.opcheck(torch.ops.pydefect.relu_avg_pool.default, (given_maps, 1))
    output = torch.ops.pydefect.relu_avg_pool(maps, 1)
    torch.library.opcheck(torch.ops.pydefect.relu_avg_pool_backward.default, (output, maps, 1))


@pytest.mark.parametrize("device", ["cpu", CUDA])
def test_compiles(device):
    maps = maps_of((2, 5, 6, 7)).to(device)
    compiled = torch.compile(ops.relu_avg_pool, fullgraph=True, backend="aot_eager")
    assert_equal(with_gradient(compiled, maps, 1), with_gradient(ops.relu_avg_pool, maps, 1))
