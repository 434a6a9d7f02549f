"""The dual autoencoder's three fused modules against their pure-PyTorch twins and against their own promises.

Float32 results are compared with the twin in float64. The twin in float32 errs too, by sums in another order.
The kernels may err by twice what it does, or by 256 roundings (`2**-24` each) of the largest value, whichever
is more: a sum of up to 400 positions whose terms cancel has the rounding of its terms, not of its result, and
the twin's own error is sometimes zero by chance. Instruction set levels differ in the order of sums over
channels and in fused multiply-adds, so they are held to the same bound. Thread counts leave no tolerance.
"""

import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pydefect.buildinfo import build_info
from pydefect.ops import channel_reunion, reference, selective_fusion, spatial_reunion

CUDA = pytest.param("cuda", marks=pytest.mark.gpu)
OPERATIONS = ["spatial_reunion", "channel_reunion", "selective_fusion"]
NORMALISATIONS = ["none", "mean", "softmax"]
# Batch, channels, height, width, coarse height and width: lanes and groups of positions and their neighbours,
# a single position, lines, the coarse grid as fine as the map or finer, more than one block of positions.
SHAPES = [
    (0, 5, 4, 4, 1, 1),
    (1, 1, 1, 1, 1, 1),
    (2, 3, 1, 9, 1, 2),
    (2, 15, 7, 1, 3, 1),
    (1, 16, 8, 8, 2, 2),
    (2, 17, 9, 11, 9, 11),
    (1, 33, 5, 17, 7, 20),
    (1, 64, 20, 20, 5, 5),
    (3, 70, 13, 10, 4, 3),
]


def arguments_of(name, shape, *, seed=0, dtype=torch.float32, layout=torch.channels_last):
    """Random arguments that keep the sigmoids and ReLUs of the module from saturating."""
    batch, channels, height, width, coarse_height, coarse_width = shape
    generator = torch.Generator().manual_seed(seed)

    def normal(*size, scale=1.0):
        values = scale * torch.randn(size, generator=generator)
        return values.contiguous(memory_format=layout).to(dtype) if len(size) == 4 else values.to(dtype)

    features = normal(batch, channels, height, width)
    inner, reduced = 3, max(2, channels // 16)
    small = 0.5 / channels**0.5
    if name == "spatial_reunion":
        return [
            features,
            normal(batch, channels, height, width),
            normal(batch, channels, coarse_height, coarse_width),
            normal(1, channels, 3, 3, scale=small),
            normal(1),
        ]
    reduce = [normal(reduced, channels, scale=small), normal(reduced) + 0.5]
    if name == "channel_reunion":
        # The sum over positions is as large as their number.
        reduce[0] /= height * width
        return [
            features,
            normal(inner, channels, 1, 1, scale=small),
            normal(inner),
            normal(1, inner, 1, 1),
            normal(1),
            *reduce,
            normal(channels, reduced),
            normal(channels),
        ]
    heads = [normal(channels, reduced, 1, 1), normal(channels), normal(channels, reduced, 1, 1)]
    return [features, normal(batch, channels, height, width), *reduce, *heads, normal(channels)]


def with_gradients(operation, arguments, **options):
    """The results, and the gradients of a fixed random combination of them."""
    arguments = [argument.detach().clone().requires_grad_() for argument in arguments]
    results = operation(*arguments, **options)
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(r.shape, generator=generator).to(r) for r in results]
    return [*results, *torch.autograd.grad(results, arguments, directions)]


def assert_close(actual, exact, rough):
    """As the file's first lines say."""
    for index, found in enumerate(zip(actual, exact, rough, strict=True)):
        a, e, r = (tensor.detach() for tensor in found)
        assert a.shape == e.shape
        assert a.dtype == torch.float32
        if not a.numel():
            continue
        error = (a.double() - e).abs().max()
        # Gradients that are sums of terms which cancel (softmax's bias, say) have the terms' rounding.
        largest = max(float(e.abs().max()), 1.0)
        allowed = max(2 * float((r.double() - e).abs().max()), 256 * 2.0**-24 * largest)
        if e.dim() == 1:
            # A bias follows its weight, whose gradient has the same terms times values of about one: its size
            # is theirs, where they cancel here. They are sums over positions too, of some ten roundings each.
            allowed = max(allowed, 32 * 2.0**-24 * float(exact[index - 1].abs().max()))
        assert error <= allowed, f"result {index}: error {error}, allowed {allowed}"


def options_of(name):
    return [{"normalisation": n} for n in NORMALISATIONS] if name == "spatial_reunion" else [{}]


def native(name):
    return globals()[name]


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", OPERATIONS)
def test_agrees_with_reference(name, shape, layout):
    arguments = arguments_of(name, shape, layout=layout)
    twin = getattr(reference, name)
    for options in options_of(name):
        actual = with_gradients(native(name), arguments, **options)
        exact = with_gradients(twin, [a.double() for a in arguments], **options)
        assert_close(actual, exact, with_gradients(twin, arguments, **options))
        for result in actual[: 2 if name == "selective_fusion" else 1]:
            assert result.is_contiguous(memory_format=layout)


@pytest.mark.parametrize("name", OPERATIONS)
def test_gradients_in_float64(name):
    arguments = arguments_of(name, (2, 4, 3, 5, 2, 2), dtype=torch.float64)
    for options in options_of(name):
        inputs = [argument.requires_grad_() for argument in arguments]
        assert torch.autograd.gradcheck(lambda *a, options=options: native(name)(*a, **options), inputs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", OPERATIONS)
def test_half_precision_is_float32_rounded_once(name, dtype):
    arguments = [a.to(dtype) for a in arguments_of(name, (2, 17, 6, 5, 2, 3))]
    actual = with_gradients(native(name), arguments)
    single = with_gradients(native(name), [a.float() for a in arguments])
    assert all(a.dtype == dtype for a in actual)
    count = 2 if name == "selective_fusion" else 1
    for a, s in zip(actual[:count], single[:count], strict=True):
        torch.testing.assert_close(a, s.to(dtype), rtol=0, atol=0)


def test_float32_parameters_with_bfloat16_maps():
    # What autocast brings: maps come out of convolutions in bfloat16, parameters stay in float32.
    features, *parameters = arguments_of("channel_reunion", (1, 20, 6, 6, 1, 1))
    result = channel_reunion(features.bfloat16(), *parameters)
    expected = channel_reunion(features.bfloat16().float(), *parameters).bfloat16()
    torch.testing.assert_close(result, expected, rtol=0, atol=0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(channel_reunion(features.bfloat16(), *parameters), result, rtol=0, atol=0)


@pytest.mark.parametrize("name", OPERATIONS)
def test_strided_inputs_are_read_right_and_left_alone(name):
    arguments = arguments_of(name, (2, 18, 8, 6, 3, 3))
    expected = native(name)(*arguments)
    spread = []
    for argument in arguments:
        wide = torch.randn(*argument.shape, 2)
        wide[..., 0] = argument
        spread.append(wide[..., 0])
    before = [argument.clone() for argument in spread]
    torch.testing.assert_close(native(name)(*spread), expected, rtol=1e-5, atol=1e-5)
    for argument, copy in zip(spread, before, strict=True):
        assert torch.equal(argument, copy)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("name", OPERATIONS)
def test_not_finite_values_spread_as_in_the_reference(name, value):
    arguments = arguments_of(name, (2, 20, 6, 6, 2, 2))
    arguments[0][1, 3, 2, 4] = value
    for options in options_of(name):
        actual = native(name)(*arguments, **options)
        expected = getattr(reference, name)(*arguments, **options)
        if name != "selective_fusion":
            actual, expected = (actual,), (expected,)
        for a, e in zip(actual, expected, strict=True):
            assert torch.isfinite(a[0]).all()
            # An infinite logit makes PyTorch's softmax NaN; the sigmoid of the difference is 0 or 1.
            a = torch.where(e.isnan() & ~torch.tensor(value).isnan(), e, a)
            torch.testing.assert_close(a, e, rtol=1e-5, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format])
def test_saturated_gates(layout):
    # exp overflows in float32 beyond 88; the gate is then 0 or 1, never NaN.
    arguments = arguments_of("spatial_reunion", (1, 20, 6, 6, 2, 2), layout=layout)
    arguments[0] *= 1e4
    actual = with_gradients(spatial_reunion, arguments, normalisation="mean")
    exact = with_gradients(reference.spatial_reunion, [a.double() for a in arguments], normalisation="mean")
    # Around 1e4 float32 is 1e-3 apart, which is what the sigmoid of a value near 0 then errs by, relatively.
    for a, e in zip(actual, exact, strict=True):
        torch.testing.assert_close(a.double(), e, rtol=1e-2, atol=1e-5 * float(e.detach().abs().max()))


@pytest.mark.parametrize("name", OPERATIONS)
def test_same_for_every_thread_count(name):
    arguments = arguments_of(name, (2, 70, 37, 23, 9, 6))
    before = torch.get_num_threads()
    try:
        for options in options_of(name):
            results = []
            for threads in (1, 2, 3, 8):
                torch.set_num_threads(threads)
                results.append(with_gradients(native(name), arguments, **options))
            for result in results[1:]:
                for actual, expected in zip(result, results[0], strict=True):
                    assert torch.equal(actual, expected)
    finally:
        torch.set_num_threads(before)


LEVEL_SHAPES = [(1, c, 9, 11, 3, 4) for c in (1, 4, 7, 8, 9, 15, 16, 17, 33)] + [(2, 70, 20, 13, 5, 4)]
# More than 16 MiB of results, which selective fusion writes past the caches, rows being whole vectors or not.
STREAMED_SHAPES = [(1, 48, 211, 210, 1, 1), (2, 47, 150, 151, 1, 1)]


@pytest.mark.parametrize("level", build_info().cpu_levels_usable)
def test_every_instruction_set(level, tmp_path, at_level):
    inputs, outputs = tmp_path / "inputs.pt", tmp_path / "outputs.pt"
    cases = [(name, arguments_of(name, shape)) for name in OPERATIONS for shape in LEVEL_SHAPES]
    cases += [("selective_fusion", arguments_of("selective_fusion", shape)) for shape in STREAMED_SHAPES]
    torch.save(cases, inputs)
    code = f"""
import torch
import pydefect.ops
def run(operation, arguments):
    arguments = [argument.requires_grad_() for argument in arguments]
    results = operation(*arguments)
    results = results if isinstance(results, tuple) else (results,)
    generator = torch.Generator().manual_seed(1)
    directions = [torch.randn(r.shape, generator=generator).to(r) for r in results]
    return [r.detach() for r in (*results, *torch.autograd.grad(results, arguments, directions))]
results = [run(getattr(pydefect.ops, name), arguments) for name, arguments in torch.load({str(inputs)!r})]
torch.save(results, {str(outputs)!r})
"""
    at_level(level, code)
    for (name, arguments), actual in zip(cases, torch.load(outputs), strict=True):
        twin = getattr(reference, name)
        exact = with_gradients(twin, [a.double() for a in arguments])
        assert_close(actual, exact, with_gradients(twin, arguments))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_small_problem(data):
    name = data.draw(st.sampled_from(OPERATIONS), label="operation")
    shape = (
        data.draw(st.integers(0, 3), label="batch"),
        data.draw(st.integers(1, 40), label="channels"),
        *(data.draw(st.integers(1, 12), label=side) for side in ("height", "width", "h", "w")),
    )
    arguments = arguments_of(name, shape, seed=data.draw(st.integers(0, 2**31), label="seed"))
    options = data.draw(st.sampled_from(options_of(name)), label="options")
    twin = getattr(reference, name)
    actual = with_gradients(native(name), arguments, **options)
    exact = with_gradients(twin, [a.double() for a in arguments], **options)
    assert_close(actual, exact, with_gradients(twin, arguments, **options))


def test_huge_maps_are_written_whole():
    # Beyond 32 MiB, where huge pages are asked for.
    arguments = arguments_of("selective_fusion", (1, 132, 256, 256, 1, 1))
    torch.testing.assert_close(selective_fusion(*arguments), reference.selective_fusion(*arguments))


def test_coarse_grid_of_one_value_is_a_constant():
    features, local, coarse, weight, bias = arguments_of("spatial_reunion", (2, 6, 5, 7, 1, 1))
    spread = coarse.expand(features.shape).contiguous(memory_format=torch.channels_last)
    expected = spatial_reunion(features, local, spread, weight, bias)
    torch.testing.assert_close(spatial_reunion(features, local, coarse, weight, bias), expected)


def test_shares_sum_to_one():
    first, _, *parameters = arguments_of("selective_fusion", (2, 20, 6, 6, 1, 1))
    a, b = selective_fusion(first, first, *parameters)
    torch.testing.assert_close(a + b, first)


ERRORS = {
    ("spatial_reunion", "features", (20, 6, 6)): r"features must have 4 dimensions \[B, C, H, W\], got 3",
    ("spatial_reunion", "features", (1, 0, 6, 6)): "features must have C, H and W of at least 1, got",
    (
        "spatial_reunion",
        "local",
        (1, 4, 6, 5),
    ): r"local must have the shape \[1, 4, 6, 6\], got",
    ("spatial_reunion", "coarse", (1, 3, 2, 2)): r"coarse must have the shape \[1, 4, 2, 2\], got",
    ("spatial_reunion", "coarse", (1, 4, 0, 2)): "coarse must have C, H and W of at least 1, got",
    ("spatial_reunion", "weight", (4, 1, 3, 3)): r"weight must have the shape \[1, 4, 3, 3\], got",
    ("spatial_reunion", "bias", ()): r"bias must have the shape \[1\], got \[\]",
    ("channel_reunion", "features", (4,)): "features must have 4 dimensions",
    ("channel_reunion", "inner_weight", (3, 5, 1, 1)): r"inner_weight must have the shape \[3, 4, 1, 1\]",
    ("channel_reunion", "outer_weight", (1, 2, 1, 1)): r"outer_weight must have the shape \[1, 3, 1, 1\]",
    ("channel_reunion", "outer_bias", (2,)): r"outer_bias must have the shape \[1\]",
    ("channel_reunion", "reduce_weight", (2, 3)): r"reduce_weight must have the shape \[2, 4\]",
    ("channel_reunion", "expand_weight", (2, 4)): r"expand_weight must have the shape \[4, 2\]",
    ("channel_reunion", "expand_bias", (2,)): r"expand_bias must have the shape \[4\]",
    ("selective_fusion", "second", (2, 4, 6, 6)): r"second must have the shape \[1, 4, 6, 6\]",
    ("selective_fusion", "reduce_weight", (4, 2)): r"reduce_weight must have the shape \[2, 4\]",
    ("selective_fusion", "first_weight", (4, 2)): r"first_weight must have the shape \[4, 2, 1, 1\]",
    ("selective_fusion", "second_bias", (2,)): r"second_bias must have the shape \[4\]",
}
CHANNEL_PARAMETERS = ["inner_weight", "inner_bias", "outer_weight", "outer_bias"]
CHANNEL_PARAMETERS += ["reduce_weight", "reduce_bias", "expand_weight", "expand_bias"]
FUSION_PARAMETERS = ["reduce_weight", "reduce_bias", "first_weight", "first_bias"]
FUSION_PARAMETERS += ["second_weight", "second_bias"]
NAMES = {
    "spatial_reunion": ["features", "local", "coarse", "weight", "bias"],
    "channel_reunion": ["features", *CHANNEL_PARAMETERS],
    "selective_fusion": ["first", "second", *FUSION_PARAMETERS],
}


@pytest.mark.parametrize("room", [sys.modules[__name__], reference], ids=["native", "reference"])
@pytest.mark.parametrize("case", ERRORS, ids=str)
def test_wrong_shapes(case, room):
    name, argument, shape = case
    arguments = dict(zip(NAMES[name], arguments_of(name, (1, 4, 6, 6, 2, 2)), strict=True))
    arguments[argument] = torch.zeros(shape)
    with pytest.raises(RuntimeError, match=f"{name}: {ERRORS[case]}"):
        getattr(room, name)(**arguments)


@pytest.mark.parametrize("room", [sys.modules[__name__], reference], ids=["native", "reference"])
def test_wrong_values(room):
    arguments = arguments_of("spatial_reunion", (1, 4, 6, 6, 2, 2))
    with pytest.raises(RuntimeError, match="normalisation must be one of none, mean, softmax, got 'sum'"):
        room.spatial_reunion(*arguments, "sum")
    with pytest.raises(RuntimeError, match=r"local must be floating point, got torch\.int64"):
        room.spatial_reunion(arguments[0], arguments[1].long(), *arguments[2:])
    first, second, *parameters = arguments_of("selective_fusion", (1, 4, 6, 6, 2, 2))
    with pytest.raises(RuntimeError, match="second must have the dtype of first"):
        room.selective_fusion(first, second.bfloat16(), *parameters)
    with pytest.raises(RuntimeError, match="second must be on cpu, got meta"):
        room.selective_fusion(first, second.to("meta"), *parameters)


@pytest.mark.gpu
@pytest.mark.parametrize("name", OPERATIONS)
def test_cuda_takes_the_composition(name):
    arguments = arguments_of(name, (2, 20, 8, 8, 2, 2), dtype=torch.float64)
    actual = with_gradients(native(name), [a.cuda() for a in arguments])
    for a, e in zip(actual, with_gradients(native(name), arguments), strict=True):
        torch.testing.assert_close(a.cpu(), e)


def operator_arguments(name):
    """What the public function hands to the operator."""
    arguments = [argument.requires_grad_() for argument in arguments_of(name, (2, 18, 6, 5, 2, 3))]
    maps = {"spatial_reunion": 3, "channel_reunion": 1, "selective_fusion": 2}[name]
    positions = [a.detach().permute(0, 2, 3, 1).contiguous().requires_grad_() for a in arguments[:maps]]
    rest = [a.detach() for a in arguments[maps:]]
    if name == "spatial_reunion":
        rest = [rest[0].flatten(2)[0].T.contiguous(), rest[1]]
    elif name == "channel_reunion":
        rest = [torch.randn(18), torch.randn(1), *rest[4:]]
    else:
        rest = [r.flatten(1) if r.dim() == 4 else r for r in rest]
    return [*positions, *(r.requires_grad_() for r in rest), *([2] if name == "spatial_reunion" else [])]


@pytest.mark.parametrize("name", OPERATIONS)
def test_opcheck(name):
    torch.library.opcheck(getattr(torch.ops.pydefect, name).default, operator_arguments(name))


@pytest.mark.parametrize("name", OPERATIONS)
def test_opcheck_backward(name):
    arguments = [a.detach() if torch.is_tensor(a) else a for a in operator_arguments(name)]
    results = getattr(torch.ops.pydefect, name)(*arguments)
    if name == "spatial_reunion":
        given = [results[0], *arguments[:4], results[1], arguments[5]]
    elif name == "channel_reunion":
        given = [results[0], *(arguments[i] for i in (0, 1, 3, 5)), *results[1:]]
    else:
        given = [*results[:2], *(arguments[i] for i in (0, 1, 2, 4, 6)), *results[2:]]
    torch.library.opcheck(getattr(torch.ops.pydefect, f"{name}_backward").default, given)


@pytest.mark.parametrize("name", OPERATIONS)
def test_compiles(name):
    arguments = arguments_of(name, (2, 18, 6, 5, 2, 3))
    compiled = torch.compile(native(name), backend="aot_eager", fullgraph=True)
    expected = with_gradients(native(name), arguments)
    for actual, result in zip(with_gradients(compiled, arguments), expected, strict=True):
        torch.testing.assert_close(actual, result, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({3: torch.zeros(9, 17)}, r"weight must have the shape \[9, 18\]"),
        (
            {1: torch.zeros(2, 6, 4, 18)},
            "local must have the shape of features, size 5 in dimension 2",
        ),
        ({2: torch.zeros(2, 2, 3, 17)}, "coarse must have the images and channels of features, 2 and 18"),
        ({0: torch.zeros(2, 6, 5, 18).double()}, "features must be float32, got Double"),
        ({5: 3}, r"normalisation must be 0 \(none\), 1 \(mean\) or 2 \(softmax\), got 3"),
    ],
)
def test_the_operator_checks_too(change, message):
    arguments = operator_arguments("spatial_reunion")
    for place, value in change.items():
        arguments[place] = value
    with pytest.raises(RuntimeError, match=f"spatial_reunion: {message}"):
        torch.ops.pydefect.spatial_reunion(*arguments)
