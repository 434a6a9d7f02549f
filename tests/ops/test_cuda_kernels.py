"""The CUDA kernels against the twins: on a card, or emulated on the CPU (.ci/emulate, tests/cuda_emulation).

Sizes lie around the kernels' tiles (128 rows, slices of 32 elements, 32 lanes), widths are multiples of no
vector's length. Where an operation's answer is defined bit for bit, no tolerance is left; elsewhere products
are as exact as float32's (csrc/cuda/split.cuh), so the tolerances are those of the CPU's tests.
"""

from __future__ import annotations

import os

import pytest
import torch
from torch import Tensor

from pydefect import ops
from pydefect.ops import reference

EMULATED = "PYDEFECT_CUDA_EMULATION" in os.environ
DEVICE = "cpu" if EMULATED else "cuda"
pytestmark = [] if EMULATED else [pytest.mark.gpu]
on_a_card = pytest.mark.skipif(EMULATED, reason="needs a card")


def random(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    return torch.randn(*shape, generator=generator).to(DEVICE)


def gradients(call, *inputs: Tensor) -> tuple[Tensor, list[Tensor]]:
    """The result, and the gradients of the sum of its squares."""
    inputs = tuple(tensor.detach().clone().requires_grad_() for tensor in inputs)
    result = call(*inputs)
    parts = result if isinstance(result, tuple) else (result,)
    return result, list(torch.autograd.grad(sum(part.square().sum() for part in parts), inputs))


def assert_identical(actual, expected) -> None:
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one.cpu(), other.cpu(), rtol=0, atol=0, equal_nan=True)


def measured(rows: Tensor, columns: Tensor) -> Tensor:
    """All squared distances in the documented order: sixteen partial sums, then halves added to halves."""
    pad = (0, -rows.shape[1] % 16)
    x, y = torch.nn.functional.pad(rows, pad)[:, None], torch.nn.functional.pad(columns, pad)[None]
    sums = torch.zeros(len(rows), len(columns), 16, device=rows.device)
    for start in range(0, x.shape[-1], 16):
        difference = x[..., start : start + 16] - y[..., start : start + 16]
        sums = sums + difference * difference
    for half in (8, 4, 2, 1):
        sums = sums[..., :half] + sums[..., half : 2 * half]
    return sums[..., 0]


@pytest.mark.parametrize(
    ("n", "m", "d", "k"),
    [
        (1, 1, 1, 1),
        (129, 65, 17, 3),
        (127, 200, 33, 9),
        (40, 130, 20, 25),
        (30, 70, 3, 64),
        (300, 20, 112, 3),
    ],
)
def test_knn(n, m, d, k):
    queries, bank = random(n, d), random(m, d, seed=1)
    distances, indices = measured(queries, bank).sort(dim=1, stable=True)
    assert_identical(ops.knn(queries, bank, k), (distances[:, :k], indices[:, :k]))


@pytest.mark.parametrize(
    ("n", "rows", "copies", "k"),
    [
        (40, 50, 8, 5),
        # More queries than are shared out among blocks.
        (100, 30, 9, 64),
        # So many rows that a block takes several hundred of them.
        (3, 600, 28, 3),
    ],
)
def test_knn_with_ties_and_coinciding_rows(n, rows, copies, k):
    """More equally near rows than there are candidates: every row of the bank is measured."""
    bank = random(rows, 8).repeat(copies, 1)
    queries = bank[:n]
    distances, indices = measured(queries, bank).sort(dim=1, stable=True)
    assert_identical(ops.knn(queries, bank, k), (distances[:, :k], indices[:, :k]))


def test_knn_of_any_magnitude():
    # Rows are scaled one by one before they are split: small ones lose nothing beside large ones.
    def rows(n, seed):
        return random(n, 20, seed=seed) * 10 ** (4 * random(n, 1, seed=seed))

    queries, bank = rows(150, 1), rows(140, 2)
    distances, indices = measured(queries, bank).sort(dim=1, stable=True)
    assert_identical(ops.knn(queries, bank, 3), (distances[:, :3], indices[:, :3]))


OPTIONS = [
    {},
    {"margin": 0.8, "reduction": "paper", "similarity_power": 2},
    {"margin": 0.8, "pair_source": "cross"},
    {"margin": 0.8, "alpha": 1.0},
    {"margin": 0.8, "alpha": 0.0},
]


@pytest.mark.parametrize(
    ("n", "d", "options"),
    [
        *((n, d, options) for n, d in ((7, 5), (128, 3), (129, 33)) for options in OPTIONS),
        # Three tiles a side, which the emulation's race check takes long over.
        *((260, 9, options) for options in OPTIONS if options.get("pair_source") == "cross" or not options),
    ],
    ids=str,
)
def test_relaxed_contrastive(n, d, options):
    z = random(n, d)
    target = z + 0.5 * random(n, d, seed=1)
    results = {}
    for name, loss, dtype in (
        ("actual", ops.relaxed_contrastive, torch.float32),
        ("rough", reference.relaxed_contrastive, torch.float32),
        ("exact", reference.relaxed_contrastive, torch.float64),
    ):
        x = z.to(dtype).requires_grad_()
        value = loss(x, target.to(dtype), **options)
        results[name] = value.detach().double(), torch.autograd.grad(value, x)[0].double()
    # Twice the error of the twin in float32, or where that is tiny by chance what test_relaxed_contrastive.py
    # allows.
    for place, share in ((0, 2e-5), (1, 5e-5)):
        exact = results["exact"][place]
        allowed = 2 * (results["rough"][place] - exact).abs().max() + share * exact.abs().max()
        assert (results["actual"][place] - exact).abs().max() <= allowed


@pytest.mark.parametrize("scale", [2.0**-30, 2.0**40])
def test_relaxed_contrastive_in_any_unit(scale):
    z, target = random(130, 33), random(130, 33, seed=1)

    def loss(unit):
        return lambda x: ops.relaxed_contrastive(x, target * unit, margin=0.8, sigma=4.0 * unit)

    value, (gradient,) = gradients(loss(1.0), z)
    scaled, (scaled_gradient,) = gradients(loss(scale), z * scale)
    # Powers of two change no digit but where the logarithm of the similarity is taken.
    torch.testing.assert_close(scaled, value, rtol=1e-6, atol=0)
    torch.testing.assert_close(scaled_gradient * scale, gradient, rtol=1e-5, atol=1e-10)


def test_relaxed_contrastive_gives_the_same_bits_twice():
    z, target = random(270, 12), random(270, 12, seed=1)
    value, gradient = gradients(lambda x: ops.relaxed_contrastive(x, target, margin=0.9), z)
    again, gradient_again = gradients(lambda x: ops.relaxed_contrastive(x, target, margin=0.9), z)
    assert torch.equal(value, again)
    assert torch.equal(gradient[0], gradient_again[0])


def test_relaxed_contrastive_of_coinciding_points():
    z = random(70, 9).repeat_interleave(2, 0)
    value, (gradient,) = gradients(lambda x: ops.relaxed_contrastive(x, z, neighbors=4, margin=0.8), z)
    assert torch.isfinite(value)
    torch.testing.assert_close(gradient[0::2], gradient[1::2], rtol=1e-4, atol=1e-7)


def test_a_foreign_neighbour_poisons_the_loss_and_is_never_read():
    z = random(20, 4)
    neighbors = torch.full((20, 2), 3, device=DEVICE)
    neighbors[5, 1] = 10**12
    settings = (0.5, 4.0, 0.2, 1, False, True)
    loss, means, slopes = torch.ops.pydefect.relaxed_contrastive(z, z, neighbors, *settings)
    assert torch.isnan(loss)
    one = torch.ones((), device=DEVICE)
    torch.ops.pydefect.relaxed_contrastive_backward(one, z, z, neighbors, means, slopes, *settings)


@pytest.mark.parametrize(
    ("n", "m", "d", "k"), [(0, 5, 3, 2), (1, 1, 1, 1), (70, 33, 17, 3), (300, 40, 40, 5)]
)
@pytest.mark.parametrize(("r", "power"), [(1e-5, 1), (1.5, 2)])
def test_hypersphere(n, m, d, k, r, power):
    features, bank = random(n, d), random(m, d, seed=1)
    results = [
        gradients(lambda x, loss=loss: loss(x, bank, k, r, distance_power=power), features)
        for loss in (ops.hypersphere, reference.hypersphere)
    ]
    torch.testing.assert_close(*(value for value, _ in results), rtol=1e-5, atol=0, equal_nan=True)
    torch.testing.assert_close(*(gradient[0] for _, gradient in results), rtol=1e-4, atol=1e-5)


LEVELS = [
    [(3, 5, 4)],
    [(1, 1, 1)],
    [(20, 12, 11), (33, 6, 5)],
    [(9, 12, 13), (17, 5, 13), (4, 3, 2)],
]


@pytest.mark.parametrize("levels", LEVELS, ids=str)
@pytest.mark.parametrize(("pool", "dimension", "bias"), [(False, 7, True), (True, 130, False)])
def test_project_levels(levels, pool, dimension, bias):
    maps = [random(2, *shape) for shape in levels]
    weight = random(dimension, sum(shape[0] for shape in levels) + 2, seed=2) / 4
    offset = [random(dimension)] if bias else []

    def with_(project):
        def call(weight, *rest):
            return project(rest[: len(maps)], weight, *rest[len(maps) :], pool=pool)

        return call

    results = [
        gradients(with_(one), weight, *maps, *offset)
        for one in (ops.project_levels, reference.project_levels)
    ]
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-4, atol=1e-4)
    for actual, expected in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("last", [False, True])
def test_project_levels_of_half_precision(dtype, last):
    layout = torch.channels_last if last else torch.contiguous_format
    maps = [
        random(2, 10, 6, 7).to(dtype, memory_format=layout),
        random(2, 5, 3, 3).to(dtype, memory_format=layout),
    ]
    weight = random(8, 17)
    torch.testing.assert_close(
        ops.project_levels(maps, weight),
        reference.project_levels([one.float() for one in maps], weight),
        rtol=1e-5,
        atol=1e-5,
    )


def test_project_levels_keeps_what_is_not_finite_in_its_place():
    maps = [random(1, 6, 8, 8), random(1, 3, 4, 4)]
    maps[1][0, 1, 3, 3] = torch.nan
    weight = random(5, 11)
    finite = torch.isfinite(ops.project_levels(maps, weight)).all(2)
    assert torch.equal(finite, torch.isfinite(reference.project_levels(maps, weight)).all(2))


@pytest.mark.parametrize(
    ("grid", "size"), [((1, 1), (1, 1)), ((7, 5), (30, 17)), ((9, 4), (5, 40)), ((6, 6), (6, 6))]
)
# The last sigma's Gaussian has more weights than a block has threads, and takes a second round.
@pytest.mark.parametrize(
    ("sigma", "certainty", "k"), [(0.0, True, 3), (4.0, False, 1), (1.3, True, 9), (20.0, True, 3)]
)
def test_score_maps(grid, size, sigma, certainty, k):
    distances = random(3, *grid, k).abs()
    actual = ops.score_maps(distances, size, sigma, certainty=certainty)
    expected = reference.score_maps(distances, size, sigma, certainty=certainty)
    for one, other in zip(actual, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def greedy(points: Tensor, m: int) -> tuple[Tensor, Tensor]:
    chosen, nearest = [0], torch.full((len(points),), torch.inf, device=points.device)
    while True:
        distances = measured(points, points[chosen[-1:]])[:, 0]
        nearest = torch.where(distances < nearest, distances, nearest)
        nearest[chosen] = -1
        if len(chosen) == m:
            return torch.tensor(chosen), nearest.max().clamp_min(0)
        chosen.append(int(nearest.argmax()))


@pytest.mark.parametrize(("n", "d", "m"), [(1, 1, 1), (15, 3, 15), (97, 17, 9), (130, 33, 20)])
def test_kcenter_greedy(n, d, m):
    points = random(n, d)
    assert_identical([ops.kcenter_greedy(points, m)], [greedy(points, m)[0]])
    copies = points[:1].expand(n, d)
    assert ops.kcenter_greedy(copies, m).tolist() == list(range(m))


@pytest.mark.parametrize(
    ("n", "added", "d", "m"), [(1, 0, 2, 1), (20, 7, 5, 12), (9, 40, 17, 10), (5, 3, 1, 8)]
)
def test_kcenter_reduce(n, added, d, m):
    centres, new = random(n, d), random(added, d, seed=1)
    points = torch.cat([centres, new])
    chosen, radius = greedy(points, m)
    rows = points[chosen.to(DEVICE)]
    assert_identical(ops.kcenter_reduce(centres, new, m), (chosen, radius, measured(rows, rows)))


@pytest.mark.parametrize(("m", "n", "d"), [(0, 3, 2), (1, 1, 1), (20, 20, 5), (30, 100, 17), (12, 300, 33)])
@pytest.mark.parametrize("crowded", [False, True])
def test_assign_unique(m, n, d, crowded):
    bank, patches = random(m, d), random(n, d, seed=1)
    if crowded:  # all candidates are soon taken
        bank = bank[:1].expand(m, d) if m else bank
    distances = measured(bank, patches)
    expected = []
    for centre in range(m):
        distances[:, expected] = torch.inf
        expected.append(int(distances[centre].argmin()))
    assert ops.assign_unique(bank, patches).tolist() == expected


STREAMED = {
    "knn": lambda x: ops.knn(x, x[:50].contiguous(), 3),
    "hypersphere": lambda x: (ops.hypersphere(x, x[:50].contiguous()),),
    "relaxed_contrastive": lambda x: (ops.relaxed_contrastive(x, x),),
    "kcenter_greedy": lambda x: (ops.kcenter_greedy(x, 9),),
    "kcenter_reduce": lambda x: ops.kcenter_reduce(x[:20].contiguous(), x[20:50].contiguous(), 9),
    "assign_unique": lambda x: (ops.assign_unique(x[:9].contiguous(), x),),
    "project_levels": lambda x: (ops.project_levels([x.reshape(1, 16, 20, -1)], x.new_ones(4, 18)),),
    "score_maps": lambda x: ops.score_maps(x.abs().reshape(1, 20, 16, -1), (32, 32), 2.0),
    "channel_reunion": lambda x: (
        ops.channel_reunion(
            x.reshape(1, 64, 20, 16).contiguous(memory_format=torch.channels_last),
            x[:3].reshape(3, 64, 1, 1),
            x.new_zeros(3),
            x[0, :3].reshape(1, 3, 1, 1),
            x.new_zeros(1),
            x[:4],
            x.new_zeros(4),
            x[:4].t().contiguous(),
            x.new_zeros(64),
        ),
    ),
    "selective_fusion": lambda x: ops.selective_fusion(
        *[x.reshape(1, 64, 20, 16).contiguous(memory_format=torch.channels_last)] * 2,
        x[:4],
        x.new_zeros(4),
        x[:4].t().reshape(64, 4, 1, 1),
        x.new_zeros(64),
        x[4:8].t().reshape(64, 4, 1, 1),
        x.new_zeros(64),
    ),
    "relu_avg_pool": lambda x: (
        ops.relu_avg_pool(x.reshape(1, 64, 20, 16).contiguous(memory_format=torch.channels_last), 1),
    ),
    "spatial_reunion": lambda x: (
        ops.spatial_reunion(
            x.reshape(1, 64, 20, 16),
            x.reshape(1, 64, 20, 16),
            x[:1].reshape(1, 64, 1, 1),
            x[:9].reshape(1, 64, 3, 3),
            x.new_zeros(1),
            normalisation="softmax",
        ),
    ),
}


@on_a_card
@pytest.mark.parametrize("name", STREAMED)
def test_honours_the_current_stream(name):
    values = random(320, 64)
    expected = STREAMED[name](values)
    late = torch.zeros_like(values)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        # On the default stream zeros would be read: it would not wait for the sleep.
        torch.cuda._sleep(100_000_000)
        late.copy_(values)
        result = STREAMED[name](late)
    torch.cuda.synchronize()
    assert_identical(result, expected)


@on_a_card
@pytest.mark.parametrize("name", STREAMED)
def test_a_graph_can_capture_it(name):
    values = random(320, 64)
    held = values.clone()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):  # a run before the capture, as PyTorch asks for
        STREAMED[name](held)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = STREAMED[name](held)
    other = random(320, 64, seed=5)
    held.copy_(other)
    graph.replay()
    torch.cuda.synchronize()
    assert_identical(captured, STREAMED[name](other))


@on_a_card
@pytest.mark.parametrize("name", STREAMED)
def test_never_waits_for_the_device(name):
    values = random(320, 64)
    STREAMED[name](values)
    torch.cuda.set_sync_debug_mode("error")
    try:
        STREAMED[name](values)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@on_a_card
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs a second CUDA device")
@pytest.mark.parametrize("name", STREAMED)
def test_on_a_device_that_is_not_the_current_one(name):
    values = random(320, 64)
    assert_identical(STREAMED[name](values.to("cuda:1")), STREAMED[name](values))


@on_a_card
def test_more_than_2_31_elements():
    free = torch.cuda.mem_get_info()[0]
    if free < 24 << 30:
        pytest.skip("needs 24 GB of free memory on the card")
    queries = torch.randn(2**31 // 64 + 1000, 64, device=DEVICE)
    bank = queries[-70:].contiguous()
    distances, indices = ops.knn(queries, bank, 1)
    assert (distances[-70:] == 0).all()
    assert indices[-70:, 0].tolist() == list(range(70))
    some = slice(10**6, 10**6 + 100)
    assert_identical(
        (distances[some], indices[some]),
        [part[:, :1] for part in measured(queries[some], bank).sort(dim=1, stable=True)],
    )


@on_a_card
def test_the_pairwise_loss_of_100352_patches_takes_less_than_2_gb():
    # The batch of 32 images that the paper's own code could not hold in 80 GB.
    z, target = random(100_352, 64), random(100_352, 64, seed=1)
    z.requires_grad_()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    ops.relaxed_contrastive(z, target).backward()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - before < 2e9
    assert torch.isfinite(z.grad).all()


@on_a_card
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_accepted(dtype):
    z, bank = random(200, 24).to(dtype).requires_grad_(), random(40, 24).to(dtype)
    for loss in (ops.hypersphere(z, bank), ops.relaxed_contrastive(z, z.detach())):
        assert loss.dtype == dtype
        (gradient,) = torch.autograd.grad(loss, z)
        assert gradient.dtype == dtype
        assert torch.isfinite(gradient).all()


MAPS = [(0, 5, 2, 2), (1, 1, 1, 1), (2, 40, 9, 8), (3, 130, 7, 10)]


def dense_layers(channels: int) -> list[Tensor]:
    reduced = max(1, channels // 16)
    return [random(reduced, channels) / 8, random(reduced), random(channels, reduced) / 2, random(channels)]


def assert_modules_agree(native, twin, map_count: int, *inputs: Tensor) -> None:
    inputs = tuple(
        tensor.contiguous(memory_format=torch.channels_last) if place < map_count else tensor
        for place, tensor in enumerate(inputs)
    )
    results = [gradients(call, *inputs) for call in (native, twin)]
    parts = [result if isinstance(result, tuple) else (result,) for result, _ in results]
    for actual, expected in zip(*parts, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)
    # Sums over positions and images of products of sums: what cancels is of their largest element's size.
    for actual, expected in zip(results[0][1], results[1][1], strict=True):
        largest = float(expected.abs().max()) if expected.numel() else 0.0
        torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-4 * max(1.0, largest))


@pytest.mark.parametrize("shape", MAPS, ids=str)
def test_channel_reunion(shape):
    channels = shape[1]
    inner = [random(3, channels, 1, 1) / 8, random(3), random(1, 3, 1, 1) / 4, random(1)]
    inputs = [random(*shape), *inner, *dense_layers(channels)]
    assert_modules_agree(ops.channel_reunion, reference.channel_reunion, 1, *inputs)


@pytest.mark.parametrize("shape", MAPS, ids=str)
def test_selective_fusion(shape):
    reduce_weight, reduce_bias, expand_weight, expand_bias = dense_layers(shape[1])
    head = expand_weight[:, :, None, None]
    inputs = [random(*shape), random(*shape, seed=1), reduce_weight, reduce_bias]
    inputs += [head, expand_bias, head.flip(0), expand_bias.flip(0)]
    assert_modules_agree(ops.selective_fusion, reference.selective_fusion, 2, *inputs)


def off_by_one(tensor: Tensor) -> Tensor:
    """The same values one element further in memory, where no access of several elements may begin."""
    moved = tensor.new_empty(tensor.numel() + 1).as_strided(tensor.shape, tensor.stride(), 1)
    return moved.copy_(tensor)


def maps_of(*shape: int, seed: int = 0) -> Tensor:
    return random(*shape, seed=seed).contiguous(memory_format=torch.channels_last)


# Widths that are multiples of the widest access: with them alone the place in memory decides.
UNALIGNED = {
    "knn": (lambda q, b: ops.knn(q, b, 3)[0], [(40, 32), (70, 32)]),
    "kcenter_greedy": (lambda f: ops.kcenter_greedy(f, 9).float(), [(70, 32)]),
    "hypersphere": (lambda f, b: ops.hypersphere(f, b) + 0 * b.sum(), [(40, 32), (70, 32)]),
    "relaxed_contrastive": (lambda z, t: ops.relaxed_contrastive(z, t) + 0 * t.sum(), [(140, 32), (140, 32)]),
    "score_maps": (lambda d: ops.score_maps(d.square(), (40, 44), 2.0)[1], [(2, 8, 8, 4)]),
    "project_levels": (
        lambda a, b, w: ops.project_levels([a, b], w),
        [(2, 16, 8, 8), (2, 32, 4, 4), (24, 50)],
    ),
    "relu_avg_pool": (lambda m: ops.relu_avg_pool(m, 1), [(2, 16, 9, 8)]),
    "relu_avg_pool bfloat16": (
        lambda m: ops.relu_avg_pool(off_by_one(m.bfloat16()), 1).float(),
        [(2, 16, 9, 8)],
    ),
    "channel_reunion": (
        lambda m, *layers: ops.channel_reunion(m, *layers),
        [(2, 64, 9, 8), (3, 64, 1, 1), (3,), (1, 3, 1, 1), (1,), (4, 64), (4,), (64, 4), (64,)],
    ),
    "selective_fusion": (
        lambda a, b, *layers: sum(ops.selective_fusion(a, b, *layers)),
        [(2, 64, 9, 8), (2, 64, 9, 8), (4, 64), (4,), (64, 4, 1, 1), (64,), (64, 4, 1, 1), (64,)],
    ),
    "spatial_reunion": (
        lambda m, *others: ops.spatial_reunion(m, *others, normalisation="mean"),
        [(2, 64, 9, 8), (2, 64, 9, 8), (2, 64, 3, 2), (1, 64, 3, 3), (1,)],
    ),
}


@pytest.mark.parametrize("operation", UNALIGNED)
def test_tensors_that_begin_anywhere_in_memory(operation):
    """Slices do. A card ends the program at an access that is not aligned; so does the emulation."""
    call, shapes = UNALIGNED[operation]
    inputs = [
        maps_of(*shape, seed=place) if len(shape) == 4 else random(*shape, seed=place) / max(shape)
        for place, shape in enumerate(shapes)
    ]
    differentiable = operation not in ("knn", "kcenter_greedy", "score_maps")
    results = []
    for place in (lambda tensor: tensor, off_by_one):
        if differentiable:
            value, slopes = gradients(lambda *all_, place=place: call(*map(place, all_)), *inputs)
            results.append([value, *slopes])
        else:
            results.append([call(*map(place, inputs))])
    for one, other in zip(*results, strict=True):
        # A lane has one channel instead of four, so that sums are of other orders.
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_sizes_that_no_grid_has_are_refused():
    """Tensors of some ten MB already: the second dimension of a grid and a block's shared memory end."""
    z = random(2, 1).expand(2, 65535 * 128 + 1)
    neighbors = torch.zeros(2, 1, dtype=torch.int64, device=DEVICE)
    with pytest.raises(RuntimeError, match="on CUDA z must have at most 8388480 columns where there are"):
        torch.ops.pydefect.relaxed_contrastive(z, z, neighbors, 0.5, 1.0, 0.2, 1, False, True)
    level, weight = random(1, 1, 1, 1), random(1, 3).expand(65535 * 128 + 1, 3)
    with pytest.raises(RuntimeError, match="on CUDA there must be at most 8388480 rows of weight"):
        ops.project_levels([level], weight)
    line, tap, bias = random(1, 1, 25400, 1), random(1, 1, 3, 3), random(1)
    with pytest.raises(RuntimeError, match="at most 25344 rows and columns together, got 25400 and 1"):
        gradients(ops.spatial_reunion, line, line, random(1, 1, 1, 1), tap, bias)
    # What failed leaves nothing behind that the next launch would be blamed for.
    assert_identical(ops.knn(z[:, :3], z[:, :3], 1), reference.knn(z[:, :3].cpu(), z[:, :3].cpu(), 1))


# Channels that make 16 bytes and that do not, more than a block has of a row; the least a map may have.
@pytest.mark.parametrize("padding", [0, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "shape",
    [(0, 5, 2, 2), (1, 1, 2, 2), (2, 40, 9, 8), (3, 130, 7, 10), (1, 7, 5, 90), (2, 64, 6, 71)],
    ids=str,
)
def test_relu_avg_pool(shape, dtype, padding):
    maps = random(*shape).to(dtype).contiguous(memory_format=torch.channels_last)
    maps.permute(0, 2, 3, 1).view(-1)[:3] = 0.0  # a view: through flatten() it would be a copy
    results = [
        gradients(lambda x, pool=pool: pool(x, padding), maps)
        for pool in (ops.relu_avg_pool, reference.relu_avg_pool)
    ]
    (actual, (gradient,)), (expected, (expected_gradient,)) = results
    # Sums of four in one order and in another, and one rounding of 8 or 24 bits.
    bits = 2.0**-23 if dtype == torch.float32 else 2.0**-8
    torch.testing.assert_close(actual, expected, rtol=2 * bits, atol=bits)
    torch.testing.assert_close(gradient, expected_gradient, rtol=2 * bits, atol=bits)


# The coarse grid as a point, a line, as fine as the map, finer.
@pytest.mark.parametrize(
    ("shape", "coarse"),
    [
        ((0, 5, 2, 2), (1, 1)),
        ((1, 1, 1, 1), (1, 1)),
        ((2, 40, 9, 8), (3, 1)),
        ((3, 130, 7, 10), (7, 10)),
        ((1, 33, 5, 17), (2, 20)),
        ((1, 7, 13, 15), (4, 4)),
    ],
    ids=str,
)
@pytest.mark.parametrize("normalisation", ["none", "mean", "softmax"])
def test_spatial_reunion(shape, coarse, normalisation):
    batch, channels = shape[:2]
    inputs = [random(*shape), random(*shape, seed=1), random(batch, channels, *coarse)]
    inputs += [random(1, channels, 3, 3) / channels**0.5 / 3, random(1)]
    if normalisation != "softmax":  # the context is a sum over positions, and the gradient one of its squares
        inputs[3:] = [one / (shape[2] * shape[3]) for one in inputs[3:]]

    def with_(module):
        return lambda *maps: module(*maps, normalisation=normalisation)

    assert_modules_agree(with_(ops.spatial_reunion), with_(reference.spatial_reunion), 3, *inputs)


def test_spatial_reunion_gives_the_same_bits_twice():
    inputs = [random(2, 40, 9, 11), random(2, 40, 9, 11, seed=1), random(2, 40, 3, 2)]
    inputs += [random(1, 40, 3, 3) / 20, random(1)]
    found = [gradients(ops.spatial_reunion, *inputs) for _ in range(2)]
    assert torch.equal(found[0][0], found[1][0])
    assert_identical(found[0][1], found[1][1])


def test_spatial_reunion_does_not_saturate_to_nan():
    # exp overflows in float32 beyond 88; the gate is then 0 or 1.
    maps = [1e4 * random(1, 20, 6, 6), random(1, 20, 6, 6, seed=1), random(1, 20, 2, 2)]
    found = gradients(
        lambda *x: ops.spatial_reunion(*x, normalisation="mean"), *maps, random(1, 20, 3, 3), random(1)
    )
    assert all(torch.isfinite(one).all() for one in (found[0], *found[1]))
