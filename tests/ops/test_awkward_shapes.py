"""Every operator over awkward shapes, layouts and values, from one table.

An entry of `OPERATORS` names an operator's tensors by their dimensions. Four promises are tested: the
operator agrees with its twin; the layout of its inputs changes no bit of its results; NaN and infinity give
results of the right shape (the operators' own tests look into their values); and what is too large for any
memory is an error that says so, not a crash. `.ci/sanitize` runs all this with instrumented code.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from torch import Tensor

from pydefect import ops
from pydefect.ops import reference

# Nothing, one, and one less and one more than vectors, tiles and panels.
ROWS = st.sampled_from([0, 1, 2, 3, 5, 7, 8, 9, 13, 14, 15, 16, 17, 28, 29, 31, 32, 33, 64, 65])
SOME_ROWS = ROWS.filter(bool)
WIDTHS = st.sampled_from([1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 65])
SIDES = st.integers(1, 9)
LAYOUTS = st.sampled_from(["contiguous", "transposed", "strided", "misaligned", "expanded"])

Sizes = dict[str, int]
Arguments = dict[str, Any]


def _close(relative: float, absolute: float) -> Callable[[Arguments, Any, Any], None]:
    def agree(arguments: Arguments, actual: Any, expected: Any) -> None:
        torch.testing.assert_close(actual, expected, rtol=relative, atol=absolute, equal_nan=True)

    return agree


def _same_neighbours(arguments: Arguments, actual: Any, expected: Any) -> None:
    queries, bank = arguments["queries"].double(), arguments["bank"].double()
    # The twin rounds once, from float64; a sum of D squares in float32 rounds at most D + 3 times.
    tolerance = (queries.shape[1] + 4) * 2.0**-24
    torch.testing.assert_close(actual[0], expected[0], rtol=tolerance, atol=0)
    pointed_at = (queries[:, None] - bank[actual[1]]).square().sum(2)
    torch.testing.assert_close(actual[0].double(), pointed_at, rtol=tolerance, atol=0)


def _nearest_left(arguments: Arguments, actual: Any, expected: Any) -> None:
    """Each centre's patch is, but for rounding, the nearest of those that were left to it."""
    bank, patches = arguments["bank"].double(), arguments["patches"].double()
    distances = torch.cdist(bank, patches).square()
    rounding = 1e-5 * (bank.square().sum(1).amax() + patches.square().sum(1).amax()) if len(bank) else 0
    assert len(set(actual.tolist())) == len(bank)
    for centre, patch in enumerate(actual.tolist()):
        assert distances[centre, patch] <= distances[centre].min() + rounding
        distances[:, patch] = torch.inf


def _farthest_left(arguments: Arguments, actual: Any, expected: Any) -> None:
    """Each point is, but for rounding, the farthest from those before it."""
    points = arguments["features"].double()
    distances = torch.cdist(points, points).square()
    rounding = 1e-5 * points.square().sum(1).amax()
    chosen = actual.tolist()
    assert chosen[0] == 0
    assert len(set(chosen)) == len(chosen) == arguments["m"]
    for step in range(1, len(chosen)):
        nearest = distances[chosen[:step]].amin(0)
        assert nearest[chosen[step]] >= nearest.max() - rounding


def _reduced(arguments: Arguments, actual: Any, expected: Any) -> None:
    """The choice is kcenter_greedy's, and its distances are those of the points chosen."""
    points = torch.cat([arguments["centres"], arguments["added"]])
    chosen, squared_radius, distances = actual
    _farthest_left({"features": points, "m": arguments["m"]}, chosen, None)
    rounding = 1e-5 * float(points.square().sum(1).amax())
    between = torch.cdist(points.double(), points[chosen].double()).square()
    torch.testing.assert_close(distances.double(), between[chosen], rtol=1e-5, atol=rounding)
    farthest = between.amin(1).amax()
    torch.testing.assert_close(squared_radius.double(), farthest, rtol=1e-5, atol=rounding)


def _convolution(**arguments: Any) -> Tensor:
    tiles = torch.ops.pydefect.convolution_tiles(arguments["weight"].detach())
    return ops.convolution(**arguments, tiles=tiles)


def _convolutions(sizes: Sizes) -> list[int]:
    """The paddings at which some output lies in the gradient's sides, and what it comes from in the maps'."""
    grown = {padding: 2 * padding - sizes["k"] + 1 for padding in range(sizes["k"])}
    gradient, maps = min(sizes["G"], sizes["L"]), min(sizes["H"], sizes["W"])
    return [padding for padding, by in grown.items() if gradient > by and maps > -by]


def _of_one_convolution(call: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Cuts a gradient and maps of any sides to those of one convolution."""

    def cut(gradient: Tensor, maps: Tensor, *, kernel: int, padding: int) -> Tensor:
        grown = 2 * padding - kernel + 1
        for d in (2, 3):
            length = min(gradient.shape[d], maps.shape[d] + grown)
            gradient, maps = gradient.narrow(d, 0, length), maps.narrow(d, 0, length - grown)
        return call(gradient, maps, kernel=kernel, padding=padding)

    return cut


@_of_one_convolution
def _weight_gradient(gradient: Tensor, maps: Tensor, *, kernel: int, padding: int) -> Tensor:
    """Also of few channels, for which the public function takes PyTorch's way."""
    given = gradient.permute(0, 2, 3, 1), maps.permute(0, 2, 3, 1)
    result: Tensor = torch.ops.pydefect.convolution_weight_gradient(*given, kernel, padding)
    return result.permute(0, 3, 1, 2)


def _weights_met(arguments: Arguments, actual: Any, expected: Any) -> None:
    """As :func:`_convolved`."""
    sizes = _of_one_convolution(reference.convolution_weight_gradient)(
        **arguments | {name: arguments[name].double().abs() for name in ("gradient", "maps")}
    )
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=6e-6 * float(sizes.max()))


def _convolved(arguments: Arguments, actual: Any, expected: Any) -> None:
    """See ``test_convolution.py``: roundings are relative to the sizes of all that is added up."""
    maps, weight = arguments["maps"].double().abs(), arguments["weight"].double().abs()
    sizes = F.conv2d(maps, weight, padding=arguments["padding"])
    most = 6e-6 * float(sizes.max()) if sizes.numel() else 0.0
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=most)


@dataclass(frozen=True)
class Operator:
    """One line of the table."""

    call: Callable[..., Any]
    twin: Callable[..., Any]
    tensors: Mapping[str, str]
    """Argument: its dimensions by name, "N D". ``name.0``, ``name.1``, ... become one list."""
    sizes: Mapping[str, st.SearchStrategy[int]]
    agree: Callable[[Arguments, Any, Any], None]
    settings: Callable[[Sizes], Mapping[str, st.SearchStrategy[Any]]] = lambda sizes: {}
    allowed: Callable[[Sizes], bool] = lambda sizes: True
    scale: Mapping[str, float] = field(default_factory=dict)
    """Of the values, where numbers around 1 would saturate a sigmoid."""
    positive: bool = False
    """Values are distances: none is below zero."""
    channels_last: tuple[str, ...] = ()
    """Maps that have native kernels in this layout only; in others PyTorch's operators round as they like."""
    gradients: tuple[str, ...] = ()
    """Tensors whose gradient must agree with the twin's."""
    expanded: str = ""
    """Points whose squared distances are sums of squares less products, of which nearly equal ones have no
    digit left: nor has that pair's part of the gradient."""
    too_large: tuple[tuple[Sizes, Arguments], ...] = ()
    """Sizes at which only an error is possible, from tensors that themselves take one element of memory.
    Refused by a check, or copied into more than the 2^47 bytes that a process can address: what is only more
    than there is may be handed out, and be missing when it is written."""
    messages: str = "memory|too large|fewer than|overflow"


KNN = Operator(
    ops.knn,
    reference.knn,
    {"queries": "N D", "bank": "M D"},
    {"N": ROWS, "M": SOME_ROWS, "D": WIDTHS},
    _same_neighbours,
    settings=lambda sizes: {
        "k": st.sampled_from(sorted({1, min(3, sizes["M"]), sizes["M"]})),
        "precision": st.sampled_from(["float32", "bf16"]),
    },
    too_large=(
        ({"N": 2**44, "M": 3, "D": 4}, {"k": 1}),
        ({"N": 2**61, "M": 3, "D": 1}, {"k": 1}),
        ({"N": 3, "M": 2**44, "D": 4}, {"k": 1}),
        ({"N": 0, "M": 2**29, "D": 2**29}, {"k": 1}),
        ({"N": 1, "M": 2, "D": 2**44}, {"k": 1}),
    ),
)

OPERATORS: dict[str, Operator] = {
    "knn": KNN,
    "assign_unique": Operator(
        ops.assign_unique,
        reference.assign_unique,
        {"bank": "M D", "patches": "N D"},
        {"M": ROWS, "N": SOME_ROWS, "D": WIDTHS},
        _nearest_left,
        allowed=lambda sizes: sizes["M"] <= sizes["N"],
        too_large=(({"M": 2, "N": 2**44, "D": 4}, {}),),
    ),
    "kcenter_greedy": Operator(
        ops.kcenter_greedy,
        reference.kcenter_greedy,
        {"features": "N D"},
        {"N": SOME_ROWS, "D": WIDTHS},
        _farthest_left,
        settings=lambda sizes: {"m": st.sampled_from(sorted({1, (sizes["N"] + 1) // 2, sizes["N"]}))},
        too_large=(({"N": 2**44, "D": 4}, {"m": 1}), ({"N": 2**29, "D": 2**29}, {"m": 1})),
    ),
    "kcenter_reduce": Operator(
        ops.kcenter_reduce,
        reference.kcenter_reduce,
        {"centres": "M D", "added": "N D"},
        {"M": SOME_ROWS, "N": ROWS, "D": WIDTHS},
        _reduced,
        settings=lambda sizes: {
            "m": st.sampled_from(sorted({1, sizes["M"], sizes["M"] + sizes["N"]})),
        },
        too_large=(
            ({"M": 2**44, "N": 3, "D": 4}, {"m": 1}),
            ({"M": 3, "N": 2**44, "D": 4}, {"m": 1}),
            ({"M": 2**29, "N": 3, "D": 2**29}, {"m": 1}),
            ({"M": 3, "N": 2**29, "D": 2**20}, {"m": 1}),
        ),
    ),
    "hypersphere": Operator(
        ops.hypersphere,
        reference.hypersphere,
        {"features": "N D", "bank": "M D"},
        {"N": SOME_ROWS, "M": SOME_ROWS, "D": WIDTHS},
        # Means of up to N * k positive distances, each a sum of D squares.
        _close(2e-5, 1e-6),
        settings=lambda sizes: {
            "k": st.sampled_from(sorted({1, sizes["M"]})),
            "r": st.sampled_from([0.0, 1e-5, 1.0]),
            "distance_power": st.sampled_from([1, 2]),
        },
        gradients=("features",),
        too_large=(({"N": 2**44, "M": 3, "D": 4}, {"k": 1}), ({"N": 1, "M": 2**44, "D": 4}, {"k": 1})),
    ),
    "relaxed_contrastive": Operator(
        ops.relaxed_contrastive,
        reference.relaxed_contrastive,
        {"z": "N D", "z_target": "N D"},
        {"N": SOME_ROWS, "D": WIDTHS},
        # Distances from the expanded form keep about three digits where points nearly coincide.
        _close(1e-3, 1e-4),
        settings=lambda sizes: {
            "neighbors": st.sampled_from(sorted({1, min(5, sizes["N"]), sizes["N"]})),
            "similarity_power": st.sampled_from([1, 2]),
            "reduction": st.sampled_from(["paper", "mean"]),
        },
        # A single point has no mean distance to be measured by.
        allowed=lambda sizes: sizes["N"] > 1,
        gradients=("z",),
        expanded="z",
        too_large=(({"N": 2**44, "D": 4}, {}), ({"N": 2**29, "D": 2**29}, {"alpha": 1.0})),
    ),
    "project_levels": Operator(
        ops.project_levels,
        reference.project_levels,
        {"levels.0": "B C H W", "levels.1": "B E h w", "weight": "D X", "bias": "D"},
        {"B": st.integers(0, 3), "C": WIDTHS, "E": WIDTHS, "H": SIDES, "W": SIDES, "h": SIDES, "w": SIDES}
        | {"D": WIDTHS},
        # Sums of up to 132 products of numbers around 1.
        _close(1e-4, 1e-4),
        settings=lambda sizes: {"pool": st.booleans()},
        allowed=lambda sizes: sizes["h"] <= sizes["H"] and sizes["w"] <= sizes["W"],
        gradients=("levels.0", "levels.1", "weight", "bias"),
        too_large=(
            ({"B": 2**44, "C": 2, "E": 2, "H": 4, "W": 4, "h": 2, "w": 2, "D": 3}, {}),
            ({"B": 1, "C": 2, "E": 2, "H": 2**29, "W": 2**29, "h": 2, "w": 2, "D": 3}, {}),
        ),
    ),
    "convolution": Operator(
        _convolution,
        reference.convolution,
        {"maps": "B C H W", "weight": "O C k k", "bias": "O"},
        {"B": st.integers(0, 3), "C": WIDTHS, "O": WIDTHS, "H": SIDES, "W": SIDES, "k": st.integers(3, 4)},
        _convolved,
        settings=lambda sizes: {
            "padding": st.integers(max(0, (sizes["k"] - min(sizes["H"], sizes["W"]) + 1) // 2), 2),
            "relu": st.booleans(),
        },
        gradients=("maps", "weight", "bias"),
        too_large=(
            ({"B": 2**44, "C": 3, "O": 2, "H": 4, "W": 4, "k": 3}, {}),
            ({"B": 1, "C": 3, "O": 2, "H": 2**44, "W": 4, "k": 3}, {}),
            ({"B": 1, "C": 2**12, "O": 2, "H": 2**36, "W": 4, "k": 4}, {}),
        ),
    ),
    "convolution_weight_gradient": Operator(
        _weight_gradient,
        _of_one_convolution(reference.convolution_weight_gradient),
        {"gradient": "B O G L", "maps": "B C H W"},
        {"B": st.integers(0, 3), "C": WIDTHS, "O": WIDTHS, "H": SIDES, "W": SIDES}
        | {"G": SIDES, "L": SIDES, "k": st.integers(3, 4)},
        _weights_met,
        settings=lambda sizes: {
            "kernel": st.just(sizes["k"]),
            "padding": st.sampled_from(_convolutions(sizes)),
        },
        allowed=lambda sizes: bool(_convolutions(sizes)),
        too_large=(
            ({"B": 2**44, "C": 3, "O": 2, "H": 4, "W": 4, "G": 2, "L": 2}, {"kernel": 3, "padding": 0}),
            ({"B": 1, "C": 3, "O": 2, "H": 2**31, "W": 4, "G": 2**31, "L": 4}, {"kernel": 3, "padding": 1}),
            ({"B": 1, "C": 2**30, "O": 2**44, "H": 4, "W": 4, "G": 2, "L": 2}, {"kernel": 3, "padding": 0}),
        ),
    ),
    "relu_avg_pool": Operator(
        ops.relu_avg_pool,
        reference.relu_avg_pool,
        {"maps": "B C H W"},
        {"B": st.integers(0, 3), "C": WIDTHS, "H": SIDES, "W": SIDES},
        # Four numbers in one order. A card's average pooling may have another.
        _close(1e-6, 1e-6),
        settings=lambda sizes: {
            "padding": st.just(1) if min(sizes["H"], sizes["W"]) < 2 else st.integers(0, 1)
        },
        channels_last=("maps",),
        gradients=("maps",),
        too_large=(({"B": 2**44, "C": 3, "H": 4, "W": 4}, {}),),
    ),
    "score_maps": Operator(
        ops.score_maps,
        reference.score_maps,
        {"distances": "B H W K"},
        {"B": st.integers(0, 3), "H": SIDES, "W": SIDES, "K": st.integers(1, 9)},
        # Two weighted means of positive values in float32.
        _close(1e-5, 1e-6),
        settings=lambda sizes: {
            "size": st.tuples(st.integers(1, 40), st.integers(1, 40)),
            "sigma": st.sampled_from([0.0, 0.5, 4.0]),
            "certainty": st.booleans(),
        },
        positive=True,
        too_large=(
            ({"B": 2**44, "H": 4, "W": 4, "K": 3}, {"size": (8, 8), "sigma": 1.0}),
            ({"B": 1, "H": 2**29, "W": 2**29, "K": 3}, {"size": (8, 8), "sigma": 1.0}),
        ),
    ),
    "channel_reunion": Operator(
        ops.channel_reunion,
        reference.channel_reunion,
        {"features": "B C H W", "inner_weight": "K C 1 1", "inner_bias": "K"}
        | {"outer_weight": "1 K 1 1", "outer_bias": "1"}
        | {"reduce_weight": "R C", "reduce_bias": "R", "expand_weight": "C R", "expand_bias": "C"},
        {"B": st.integers(0, 3), "C": WIDTHS, "H": SIDES, "W": SIDES}
        | {"K": st.integers(1, 3), "R": st.integers(1, 5)},
        # The gate is a sigmoid of sums of up to 81 * 65 products.
        _close(1e-4, 1e-4),
        scale=dict.fromkeys(["inner_weight", "outer_weight", "reduce_weight", "expand_weight"], 1 / 16),
        channels_last=("features",),
        gradients=("features", "reduce_bias", "expand_weight", "expand_bias"),
    ),
    "selective_fusion": Operator(
        ops.selective_fusion,
        reference.selective_fusion,
        {"first": "B C H W", "second": "B C H W", "reduce_weight": "R C", "reduce_bias": "R"}
        | {"first_weight": "C R 1 1", "first_bias": "C", "second_weight": "C R 1 1", "second_bias": "C"},
        {"B": st.integers(0, 3), "C": WIDTHS, "H": SIDES, "W": SIDES, "R": st.integers(1, 5)},
        # A softmax of sums of up to 65 * 5 products.
        _close(1e-4, 1e-4),
        scale=dict.fromkeys(["reduce_weight", "first_weight", "second_weight"], 1 / 4),
        channels_last=("first", "second"),
        gradients=("first", "second", "reduce_weight", "first_weight", "second_bias"),
    ),
    "spatial_reunion": Operator(
        ops.spatial_reunion,
        reference.spatial_reunion,
        {"features": "B C H W", "local": "B C H W", "coarse": "B C h w"} | {"weight": "1 C 3 3", "bias": "1"},
        {"B": st.integers(0, 3), "C": WIDTHS, "H": SIDES, "W": SIDES, "h": SIDES, "w": SIDES},
        # Sums over up to 81 positions of products with sums of up to 9 * 65 of them.
        _close(1e-4, 1e-3),
        scale={"weight": 1 / 16},
        settings=lambda sizes: {"normalisation": st.sampled_from(["none", "mean", "softmax"])},
        gradients=("features", "local", "coarse", "weight"),
        too_large=(({"B": 2**44, "C": 3, "H": 4, "W": 4, "h": 2, "w": 2}, {}),),
    ),
}


def _shape(dimensions: str, sizes: Sizes) -> list[int]:
    # The weight of project_levels spans both levels and two coordinates.
    return [
        int(name) if name.isdigit() else sizes["C"] + sizes["E"] + 2 if name == "X" else sizes[name]
        for name in dimensions.split()
    ]


def _laid_out(values: Tensor, layout: str) -> Tensor:
    """The same shape, otherwise placed; expanded ones also take other values."""
    if layout == "transposed" and values.dim() > 1:
        return values.transpose(0, -1).contiguous().transpose(0, -1)
    if layout == "strided":
        spread = values.new_full([2 * size for size in values.shape], torch.nan)
        every_second = spread[(slice(1, None, 2),) * values.dim()]
        return every_second.copy_(values)
    if layout == "misaligned":
        flat = values.new_full([values.numel() + 1], torch.nan)
        return flat[1:].view(values.shape).copy_(values)
    if layout == "expanded" and len(values):
        return values[:1].expand_as(values)
    return values


def _arguments(tensors: Mapping[str, Tensor], others: Arguments) -> Arguments:
    arguments: Arguments = dict(others)
    for name, tensor in tensors.items():
        head, _, index = name.partition(".")
        if index:
            arguments.setdefault(head, []).append(tensor)
        else:
            arguments[name] = tensor
    return arguments


def _plain(operator: Operator, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        name: tensor.clone(
            memory_format=torch.channels_last if name in operator.channels_last else torch.contiguous_format
        )
        for name, tensor in tensors.items()
    }


def _takes_kernels(operator: Operator, tensors: Mapping[str, Tensor]) -> bool:
    return all(
        tensors[name].is_contiguous(memory_format=torch.channels_last) for name in operator.channels_last
    )


def _tuple(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)


def _assert_identical(actual: Any, expected: Any) -> None:
    for one, other in zip(_tuple(actual), _tuple(expected), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


@dataclass
class Problem:
    """What hypothesis drew."""

    tensors: dict[str, Tensor]
    others: Arguments = field(default_factory=dict)


def _draw(operator: Operator, data: st.DataObject, values: str, layouts: bool) -> Problem:
    sizes = {name: data.draw(strategy, label=name) for name, strategy in operator.sizes.items()}
    assume(operator.allowed(sizes))
    others = {name: data.draw(one, label=name) for name, one in operator.settings(sizes).items()}
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), label="seed"))
    tensors = {}
    for name, dimensions in operator.tensors.items():
        tensor = torch.randn(_shape(dimensions, sizes), generator=generator)
        if operator.positive:
            tensor = tensor.abs()
        tensor *= operator.scale.get(name, 1.0)
        if values == "not finite" and tensor.numel():
            for position in torch.randint(tensor.numel(), (3,), generator=generator).tolist():
                special = [torch.nan, torch.inf, -torch.inf, 3e38][
                    int(torch.randint(4, (), generator=generator))
                ]
                tensor.view(-1)[position] = special
        layout = data.draw(LAYOUTS, label=f"layout of {name}") if layouts else "contiguous"
        tensor = _laid_out(tensor, layout)
        if name in operator.channels_last and layout == "contiguous":
            tensor = tensor.contiguous(memory_format=torch.channels_last)
        tensors[name] = tensor
    return Problem(tensors, others)


def _settings(examples: int) -> settings:
    return settings(
        max_examples=examples,
        deadline=None,
        suppress_health_check=[HealthCheck.filter_too_much, HealthCheck.too_slow],
    )


ALL = pytest.mark.parametrize("name", OPERATORS)


@ALL
@_settings(40)
@given(data=st.data())
def test_agrees_with_its_twin(name, data):
    operator = OPERATORS[name]
    problem = _draw(operator, data, "normal", layouts=False)
    arguments = _arguments(problem.tensors, problem.others)
    operator.agree(arguments, operator.call(**arguments), operator.twin(**arguments))


@ALL
@_settings(40)
@given(data=st.data())
def test_layout_changes_no_bit(name, data):
    operator = OPERATORS[name]
    problem = _draw(operator, data, "normal", layouts=True)
    plain = _plain(operator, problem.tensors)
    arguments = _arguments(plain, problem.others)
    result = operator.call(**_arguments(problem.tensors, problem.others))
    same = (
        _assert_identical if _takes_kernels(operator, problem.tensors) else partial(operator.agree, arguments)
    )
    same(result, operator.call(**arguments))
    for argument, before in plain.items():
        assert torch.equal(problem.tensors[argument], before), f"{argument} was changed"


@ALL
@_settings(25)
@given(data=st.data())
def test_not_finite_values_have_a_defined_result(name, data):
    operator = OPERATORS[name]
    problem = _draw(operator, data, "not finite", layouts=True)
    result = operator.call(**_arguments(problem.tensors, problem.others))
    arguments = _arguments(_plain(operator, problem.tensors), problem.others)
    if _takes_kernels(operator, problem.tensors):
        _assert_identical(result, operator.call(**arguments))
    expected = operator.twin(**arguments)
    for one, other in zip(_tuple(result), _tuple(expected), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        if not one.dtype.is_floating_point and one.numel():
            rows = sum(tensor.shape[0] for tensor in problem.tensors.values())
            assert 0 <= int(one.min()) <= int(one.max()) < rows


def _digits_lost(points: Tensor) -> float:
    """What roundings of the squares, one a coordinate and some more, are of the smallest squared distance."""
    points = points.double()
    squared = torch.pdist(points).square().min()
    rounding = (points.shape[1] + 4) * 2.0**-23 * points.square().sum(1).max()
    return min(1.0, float(rounding / squared))


@pytest.mark.parametrize("name", [name for name, one in OPERATORS.items() if one.gradients])
@_settings(25)
@given(data=st.data())
def test_gradients_agree_with_the_twins(name, data):
    operator = OPERATORS[name]
    # Not expanded: where points coincide, ties and rounding decide what a gradient is.
    problem = _draw(operator, data, "normal", layouts=False)

    def gradients(implementation: Callable[..., Any], dtype: torch.dtype) -> list[Tensor | None]:
        tensors = {
            argument: tensor.to(dtype, copy=True).requires_grad_(argument in operator.gradients)
            for argument, tensor in problem.tensors.items()
        }
        result = implementation(**_arguments(tensors, problem.others))
        total = sum(part.square().sum() for part in _tuple(result))
        wanted = [tensors[argument] for argument in operator.gradients]
        return list(torch.autograd.grad(total, wanted, allow_unused=True))

    found = zip(
        operator.gradients,
        gradients(operator.call, torch.float32),
        gradients(operator.twin, torch.float32),
        gradients(operator.twin, torch.float64),
        strict=True,
    )
    for argument, actual, rough, exact in found:
        if actual is None or rough is None or exact is None:  # no element of the result depends on it
            continue
        if not exact.numel():
            assert actual.shape == exact.shape
            continue
        # Where points nearly coincide, float32 keeps few digits: the twin in float32 shows how few.
        rounding = float((rough - exact).abs().max())
        most = max(1.0, float(exact.abs().max()))
        lost = _digits_lost(problem.tensors[operator.expanded]) if operator.expanded else 0.0
        torch.testing.assert_close(
            actual.double(),
            exact,
            rtol=2e-3,
            atol=4 * rounding + max(2e-4, lost) * most,
            msg=lambda text, a=argument: f"{a}: {text}",
        )


@pytest.mark.parametrize(
    ("name", "sizes", "others"),
    [(name, *case) for name, operator in OPERATORS.items() for case in operator.too_large],
    ids=lambda value: "-".join(f"{n}{s}" for n, s in value.items()) if isinstance(value, dict) else value,
)
def test_sizes_beyond_any_memory_are_a_clear_error(name, sizes, others):
    operator = OPERATORS[name]
    one = torch.ones(1)
    tensors = {
        argument: one.expand(_shape(dimensions, sizes)) for argument, dimensions in operator.tensors.items()
    }
    with pytest.raises(RuntimeError, match=operator.messages):
        operator.call(**_arguments(tensors, others))


def test_more_pairs_than_32_bits_count():
    generator = torch.Generator().manual_seed(0)
    queries, bank = (torch.randn(rows, 16, generator=generator) for rows in (45_000, 50_000))
    assert len(queries) * len(bank) > 2**31
    distances, indices = ops.knn(queries, bank, 1)
    some = slice(-20, None)
    KNN.agree(
        {"queries": queries[some], "bank": bank},
        (distances[some], indices[some]),
        reference.knn(queries[some], bank, 1),
    )
