"""The relaxed contrastive loss against the paper's formulas, written out as loops over i and j in float64.

Tolerances. The implementation takes |x - y|^2 as |x|^2 + |y|^2 - 2xy. Where two points coincide (i = j
always does) this leaves a few ulps of |x|^2 instead of 0: a distance of up to sqrt(8 * 2**-53) |x|, 3e-8
|x| in float64, where the loops have 0. It enters the loss through the row means and the weights, at first
order, so values in float64 agree to about 1e-8 relatively; 1e-7 is asked. In float32 the same reasoning
gives 7e-4 |x| for the diagonal, a share of 1/N of each row mean: 1e-3 / N, and 2e-4 is asked for the N of
these tests.
"""

from __future__ import annotations

import importlib
import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pydefect import ops
from pydefect.buildinfo import build_info
from pydefect.ops import reference

# The package's function hides the module of the same name.
MODULE = importlib.import_module("pydefect.ops.reference.relaxed_contrastive")

IMPLEMENTATIONS = [
    pytest.param(ops.relaxed_contrastive, id="ops"),
    pytest.param(reference.relaxed_contrastive, id="reference"),
]


def points(n: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(n, d, generator=generator, dtype=torch.float64)
    z_target = z + 0.5 * torch.randn(n, d, generator=generator, dtype=torch.float64)
    return z.to(dtype), z_target.to(dtype)


def distance(x: list[float], y: list[float]) -> float:
    return math.sqrt(sum((a - b) ** 2 for a, b in zip(x, y, strict=True)))


def neighbour_sets(target: list[list[float]], k: int) -> list[set[int]]:
    """N_k(i): point i itself, then the others by distance and index."""
    sets = []
    for i, x in enumerate(target):
        others = sorted((distance(x, y), j) for j, y in enumerate(target) if j != i)
        sets.append({i} | {j for _, j in others[: k - 1]})
    return sets


def loops(
    z: Tensor,
    z_target: Tensor,
    *,
    alpha: float = 0.8,
    sigma: float = 4.0,
    margin: float = 0.2,
    neighbors: int = 5,
    similarity_power: int = 1,
    pair_source: str = "target",
    reduction: str = "mean",
) -> float:
    """Equations (1) to (5), one pair at a time."""
    online, target = z.double().tolist(), z_target.double().tolist()
    n = len(online)
    sets = neighbour_sets(target, neighbors)
    total = 0.0
    for i in range(n):
        row_mean = sum(distance(online[i], online[m]) for m in range(n)) / n
        for j in range(n):
            source = target if pair_source == "target" else online
            w_pair = math.exp(-(distance(source[i], target[j]) ** similarity_power) / sigma)  # (1)
            w_glob = len(sets[i] & sets[j]) / len(sets[i]) if j in sets[i] else 0.0  # (2)
            w = alpha * w_pair + (1 - alpha) * w_glob  # (3)
            delta = distance(online[i], online[j]) / row_mean  # (4)
            total += w * delta**2 + (1 - w) * max(margin - delta, 0.0) ** 2  # (5)
    return total / (n if reduction == "paper" else n**2)


@pytest.mark.parametrize("loss", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("alpha", "similarity_power", "pair_source", "reduction"),
    list(itertools.product([0.0, 0.3, 1.0], [1, 2], ["target", "cross"], ["paper", "mean"])),
)
def test_equations_1_to_5(loss, alpha, similarity_power, pair_source, reduction):
    z, z_target = points(17, 5)
    options = {
        "alpha": alpha,
        "similarity_power": similarity_power,
        "pair_source": pair_source,
        "reduction": reduction,
        # Delta averages 1, so the margin cuts through the cloud: both branches of (5) are taken.
        "margin": 0.7,
    }
    torch.testing.assert_close(
        float(loss(z, z_target, **options)), loops(z, z_target, **options), rtol=1e-7, atol=0
    )


@pytest.mark.parametrize("loss", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("n", "d", "neighbors", "margin", "sigma"),
    [
        (12, 1, 1, 0.2, 4.0),
        (13, 3, 2, 0.0, 0.5),
        (24, 2, 12, 1.3, 1.0),
        (40, 8, 40, 0.9, 10.0),
        (5, 4, 5, 0.2, 4.0),
    ],
)
def test_sizes_neighbours_margins(loss, n, d, neighbors, margin, sigma):
    z, z_target = points(n, d, seed=n)
    options = {"alpha": 0.4, "neighbors": neighbors, "margin": margin, "sigma": sigma}
    torch.testing.assert_close(
        float(loss(z, z_target, **options)), loops(z, z_target, **options), rtol=1e-7, atol=0
    )


@pytest.mark.parametrize("loss", IMPLEMENTATIONS)
def test_float32(loss):
    z, z_target = points(40, 8, dtype=torch.float32)
    torch.testing.assert_close(
        float(loss(z, z_target, margin=0.9)), loops(z, z_target, margin=0.9), rtol=2e-4, atol=0
    )


@pytest.mark.parametrize("loss", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_rounded_once(loss, dtype):
    """Its sums are float32's: in float16 those of N^2 pairs end at 65,504, and the distance of a point to
    itself has a gradient of 0 / 0."""
    z, z_target = points(600, 4, dtype=dtype)
    value, gradient = loss_and_gradient(loss, z, z_target)
    expected = loss_and_gradient(loss, z.float(), z_target.float())
    assert torch.isfinite(gradient).all()
    assert torch.equal(value, expected[0].to(dtype))
    assert torch.equal(gradient, expected[1].to(dtype))


@pytest.mark.parametrize("loss", IMPLEMENTATIONS)
def test_a_common_offset_changes_nothing(loss):
    """Patch features are far from the origin; differences must not drown in their squares."""
    z, z_target = points(30, 6, dtype=torch.float32)
    # 64 keeps z's bits down to 2**-18, the offset's own rounding: 4e-6 of distances around 3, each squared.
    torch.testing.assert_close(loss(z + 64, z_target + 64), loss(z, z_target), rtol=2e-4, atol=0)


@pytest.mark.parametrize("loss", IMPLEMENTATIONS)
@pytest.mark.parametrize("reduction", ["paper", "mean"])
def test_coinciding_points(loss, reduction):
    """Flat regions give equal patches. Every point twice, k even: no set's boundary cuts through a pair of
    twins."""
    z, z_target = (part.repeat_interleave(2, 0).requires_grad_() for part in points(12, 4))
    options = {"alpha": 0.5, "neighbors": 4, "margin": 0.8, "reduction": reduction}
    value = loss(z, z_target, **options)
    torch.testing.assert_close(value.item(), loops(z, z_target, **options), rtol=1e-7, atol=0)
    value.backward()
    # Twins see the same world, and the distance to each other has no direction.
    torch.testing.assert_close(z.grad[0::2], z.grad[1::2], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("loss", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_nothing_but_one_point(loss, dtype):
    """A constant image: (4) is 0 / 0, which must not become NaN and end a training."""
    z = torch.full((20, 3), 0.3, dtype=dtype, requires_grad=True)
    value = loss(z, z.detach())
    value.backward()
    assert torch.isfinite(value)
    assert torch.isfinite(z.grad).all()


@pytest.mark.parametrize("loss", IMPLEMENTATIONS)
@pytest.mark.parametrize("pair_source", ["target", "cross"])
@pytest.mark.parametrize(("alpha", "similarity_power"), [(0.0, 1), (0.6, 1), (1.0, 2)])
def test_gradcheck(loss, alpha, similarity_power, pair_source):
    """The squared hinge is smooth, and no two points coincide but i = j.

    Steps of 1e-4: central differences are then wrong by about 1e-8, while the diagonal's rounding (1e-8 in
    the loss, see above) divided by the step stays near 1e-4. With ``cross`` the weights depend on z but
    count as constants, which differences of the loss cannot know, so that case is compared with the formula
    below.
    """
    z, z_target = points(12, 3, seed=3)
    options = {
        "alpha": alpha,
        "similarity_power": similarity_power,
        "pair_source": pair_source,
        "margin": 0.7,
    }
    if pair_source == "target":
        assert torch.autograd.gradcheck(
            lambda online: loss(online, z_target, **options),
            z.requires_grad_(),
            eps=1e-4,
            atol=5e-4,
            rtol=1e-3,
        )
        return
    z.requires_grad_()
    (actual,) = torch.autograd.grad(loss(z, z_target, **options), z)
    (expected,) = torch.autograd.grad(with_constant_weights(z, z_target, alpha, similarity_power, 0.7), z)
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-8)


def with_constant_weights(z: Tensor, z_target: Tensor, alpha: float, power: int, margin: float) -> Tensor:
    """Equation (5) with pairs i != j only (i = j contributes neither value nor gradient at weight 1)."""
    n = len(z)
    sets = neighbour_sets(z_target.tolist(), 5)
    pairs = [(i, j) for i in range(n) for j in range(n)]
    w_glob = torch.tensor([len(sets[i] & sets[j]) / 5 if j in sets[i] else 0.0 for i, j in pairs]).double()
    w_pair = torch.exp(-((z.detach()[:, None] - z_target[None]).norm(dim=2) ** power) / 4.0)
    w = alpha * w_pair + (1 - alpha) * w_glob.reshape(n, n)
    off = ~torch.eye(n, dtype=torch.bool)
    distances = torch.zeros(n, n, dtype=z.dtype)
    distances[off] = (z[:, None] - z[None])[off].norm(dim=1)
    delta = distances / distances.mean(1, keepdim=True)
    terms = w * delta**2 + (1 - w) * (margin - delta).clamp_min(0) ** 2
    return terms.sum() / n**2


@pytest.mark.parametrize("loss", IMPLEMENTATIONS)
@pytest.mark.parametrize("pair_source", ["target", "cross"])
def test_no_gradient_reaches_the_target_branch(loss, pair_source):
    z, z_target = (part.requires_grad_() for part in points(12, 3))
    loss(z, z_target, pair_source=pair_source).backward()
    assert z.grad is not None
    assert z.grad.abs().sum() > 0
    assert z_target.grad is None


@pytest.mark.parametrize("rows", [1, 3, 7, 23])
def test_the_size_of_the_chunks_changes_nothing(rows, monkeypatch):
    n = 23
    z, z_target = points(n, 4)
    z.requires_grad_()
    whole = reference.relaxed_contrastive(z, z_target, margin=0.7)
    (whole_gradient,) = torch.autograd.grad(whole, z)
    monkeypatch.setattr(MODULE, "_CHUNK_ELEMENTS", rows * n)
    chunked = reference.relaxed_contrastive(z, z_target, margin=0.7)
    (chunked_gradient,) = torch.autograd.grad(chunked, z)
    # Only the diagonal's rounding depends on how the products are cut: 1e-8, see the module's head.
    torch.testing.assert_close(chunked, whole, rtol=1e-7, atol=0)
    torch.testing.assert_close(chunked_gradient, whole_gradient, rtol=1e-5, atol=1e-8)


class LargestTensor(TorchDispatchMode):
    """Watches every operator, of the forward and of the backward pass."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor):
                self.elements = max(self.elements, result.numel())
        return results


@pytest.mark.parametrize(("n", "neighbors"), [(400, 5), (800, 5), (400, 60)])
def test_nothing_of_size_n_by_n_exists(n, neighbors, monkeypatch):
    chunk = 1 << 14
    monkeypatch.setattr(MODULE, "_CHUNK_ELEMENTS", chunk)
    z, z_target = points(n, 4, dtype=torch.float32)
    z.requires_grad_()
    with LargestTensor() as watched:
        reference.relaxed_contrastive(z, z_target, neighbors=neighbors).backward()
    # Beside the chunks: the inputs (n * 4) and the neighbours.
    assert watched.elements <= max(chunk, n * neighbors) < n * n


def test_global_similarity_against_sets():
    _, target = points(30, 3, seed=5)
    indices, similarity = MODULE.global_similarity(target, 6)
    sets = neighbour_sets(target.tolist(), 6)
    for i in range(30):
        assert set(indices[i].tolist()) == sets[i]
        assert indices[i, 0] == i
        for column, j in enumerate(indices[i].tolist()):
            assert similarity[i, column] == pytest.approx(len(sets[i] & sets[j]) / 6, abs=1e-15)


OPTIONS = {
    "printed": {},
    "margin through the cloud": {"margin": 0.8},
    "paper's reduction, squared": {"margin": 0.8, "reduction": "paper", "similarity_power": 2},
    "cross": {"margin": 0.8, "pair_source": "cross"},
    "cross, squared": {"margin": 0.8, "pair_source": "cross", "similarity_power": 2},
    "pairwise alone": {"margin": 0.8, "alpha": 1.0},
    "global alone": {"margin": 0.8, "alpha": 0.0},
}
# One less than, exactly, and one more than every level's panel (12, 24, 48 rows) and block (six panels);
# widths around the vectors' lengths.
SHAPES = [
    *itertools.product((1, 2, 11, 12, 13, 47, 48, 49), (1, 5, 16)),
    *[(23, 3), (25, 4), (71, 17), (73, 33), (145, 15), (287, 8), (289, 31), (600, 448)],
]


def loss_and_gradient(loss, z: Tensor, z_target: Tensor, **options) -> tuple[Tensor, Tensor]:
    z = z.detach().requires_grad_()
    value = loss(z, z_target, **options)
    return value.detach(), torch.autograd.grad(value, z)[0]


def assert_as_exact_as_the_reference(
    value: Tensor, gradient: Tensor, z: Tensor, z_target: Tensor, **options
) -> None:
    """Compare with the reference in float64: at most twice the error that the reference makes in float32.

    Where that happens to be tiny: 2e-5 of the loss, which adds N^2 terms without cancellation, what 1e-6 of
    each delta does to terms (m - delta)^2 near their zero, and the rounding of the diagonal's m^2 - m^2; and
    5e-5 of the largest gradient, which cancels in part. A pair's squared distance is known to about
    2^-22 (|x|^2 + |y|^2); its force is off by that share, which counts where two points nearly coincide.
    """
    margin = options.get("margin", 0.2)
    expected = loss_and_gradient(reference.relaxed_contrastive, z.double(), z_target.double(), **options)
    plain = loss_and_gradient(reference.relaxed_contrastive, z, z_target, **options)
    centred = (z - z.mean(0)).double()
    norms = centred.square().sum(1)
    shares = 2.0**-22 * (norms[:, None] + norms) / torch.cdist(centred, centred).square().fill_diagonal_(1)
    scale = expected[1].abs().max()
    allowed = (
        2e-5 * expected[0]
        + 2e-6 * (len(z) * expected[0]).sqrt()
        + 2e-7 * margin**2
        + 2 * (plain[0] - expected[0]).abs(),
        (5e-5 + shares.max()) * scale + 2 * (plain[1] - expected[1]).abs().max() + 1e-12,
    )
    assert (value - expected[0]).abs() <= allowed[0]
    assert (gradient - expected[1]).abs().max() <= allowed[1]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize(("n", "d"), SHAPES)
def test_native_against_the_reference(n, d, options):
    z, z_target = points(n, d, seed=n + d, dtype=torch.float32)
    options = {**options, "neighbors": min(5, n)}
    found = loss_and_gradient(ops.relaxed_contrastive, z, z_target, **options)
    if n == 2:  # delta is 2 whatever the distance: there is no force but rounding's
        assert found[0].item() == pytest.approx(loops(z, z_target, **options), rel=2e-5)
        return
    assert_as_exact_as_the_reference(*found, z, z_target, **options)


@pytest.mark.cpu
@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.8])
@pytest.mark.parametrize("apart", [1e-3, 1e-4])
def test_near_duplicates_are_as_exact_as_in_float32_pytorch(alpha, apart):
    """Flat regions give nearly equal patches, which repel each other with a force that the global similarity
    takes back: both have to find the same distance between them, whatever its rounding."""
    z, _ = points(400, 32, dtype=torch.float32)
    z = z.repeat_interleave(4, 0)[: len(z)]
    generator = torch.Generator().manual_seed(1)
    z = z + apart * torch.randn(z.shape, generator=generator)
    target = z + apart * torch.randn(z.shape, generator=generator)
    options = {"alpha": alpha, "neighbors": 4}
    expected, plain, found = (
        loss_and_gradient(loss, z.to(dtype), target.to(dtype), **options)[1].double()
        for loss, dtype in (
            (reference.relaxed_contrastive, torch.float64),
            (reference.relaxed_contrastive, torch.float32),
            (ops.relaxed_contrastive, torch.float32),
        )
    )
    # A force of 2 m / (mean * apart) is added to one side and taken from the other, in float32.
    rounding = 2.0**-22 * 0.4 / (torch.cdist(z, z).mean().item() * apart) * z.norm(dim=1).max() / len(z) ** 2
    assert (found - expected).abs().max() <= 2 * (plain - expected).abs().max() + rounding * 4


def test_pairs_past_the_last_patch_count_for_nothing():
    """Collapsed projections have a mean distance of next to nothing, by which distances from the padding of
    a tile, far away, are divided."""
    z, z_target = torch.full((1, 3), 1e5), torch.full((1, 3), -1e5)
    value, gradient = loss_and_gradient(
        ops.relaxed_contrastive, z, z_target, neighbors=1, pair_source="cross"
    )
    expected = loss_and_gradient(reference.relaxed_contrastive, z, z_target, neighbors=1, pair_source="cross")
    assert value.item() == pytest.approx(expected[0].item())
    assert torch.equal(gradient, expected[1])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_number_of_threads_gives_the_same(options):
    z, z_target = points(1200, 20, dtype=torch.float32)
    results = []
    for threads in (1, 2, 3, 8):
        torch.set_num_threads(threads)
        results.append(loss_and_gradient(ops.relaxed_contrastive, z, z_target, **options))
    torch.set_num_threads(1)
    for value, gradient in results[1:]:
        assert torch.equal(value, results[0][0])
        assert torch.equal(gradient, results[0][1])


@pytest.mark.parametrize("level", build_info().cpu_levels_usable)
def test_every_level(level, tmp_path, at_level):
    """Levels round differently (FMA, widths of sums): each agrees with the reference, not with the others."""
    file = tmp_path / "results.pt"
    shapes = [(13, 5), (49, 17), (300, 33)]
    code = f"""
import torch
from pydefect.ops import relaxed_contrastive
results = []
for n, d in {shapes}:
    generator = torch.Generator().manual_seed(n)
    z = torch.randn(n, d, generator=generator, requires_grad=True)
    target = torch.randn(n, d, generator=generator)
    for options in {list(OPTIONS.values())}:
        loss = relaxed_contrastive(z, target, **options)
        results.append((loss.detach(), torch.autograd.grad(loss, z)[0]))
torch.save(results, {str(file)!r})
"""
    at_level(level, code)
    results = iter(torch.load(file))
    for n, d in shapes:
        generator = torch.Generator().manual_seed(n)
        z, target = torch.randn(n, d, generator=generator), torch.randn(n, d, generator=generator)
        for options in OPTIONS.values():
            value, gradient = next(results)
            assert_as_exact_as_the_reference(value, gradient, z, target, **options)


def test_equal_points_in_float32():
    """Products and norms round alike, so that coinciding points are at distance 0 and not at rounding's."""
    z, z_target = (part.repeat_interleave(2, 0) for part in points(40, 33, dtype=torch.float32))
    value, gradient = loss_and_gradient(ops.relaxed_contrastive, z, z_target, neighbors=4, margin=0.8)
    expected, _ = loss_and_gradient(
        reference.relaxed_contrastive, z.double(), z_target.double(), neighbors=4, margin=0.8
    )
    # The reference in float64 takes coinciding points to be 1e-8 |x| apart: see the module's head.
    torch.testing.assert_close(value.double(), expected, rtol=2e-5, atol=0)
    torch.testing.assert_close(gradient[0::2], gradient[1::2], rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_what_is_not_finite_shows(options, bad):
    """The trainer stops where a loss is not finite: it must not be swallowed."""
    z, z_target = points(60, 7, dtype=torch.float32)
    z[17, 3] = bad
    value = ops.relaxed_contrastive(z, z_target, **options)
    assert not torch.isfinite(value)


def test_inputs_may_lie_anyhow_and_stay_as_they_are():
    z, z_target = points(70, 9, dtype=torch.float32)
    expected, expected_gradient = loss_and_gradient(ops.relaxed_contrastive, z, z_target)
    strided, flipped = z.T.contiguous().T, z_target.repeat_interleave(2, 0)[::2]
    before = strided.clone(), flipped.clone()
    value, gradient = loss_and_gradient(ops.relaxed_contrastive, strided, flipped)
    assert torch.equal(value, expected)
    assert torch.equal(gradient, expected_gradient)
    assert torch.equal(strided, before[0])
    assert torch.equal(flipped, before[1])


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_any_small_problem(data):
    n = data.draw(st.integers(3, 120), label="n")
    d = data.draw(st.integers(1, 40), label="d")
    options = {
        "alpha": data.draw(st.floats(0, 1), label="alpha"),
        "sigma": data.draw(st.floats(0.5, 20), label="sigma"),
        "margin": data.draw(st.floats(0, 2), label="margin"),
        "neighbors": data.draw(st.integers(1, n), label="neighbors"),
        "similarity_power": data.draw(st.sampled_from([1, 2]), label="power"),
        "pair_source": data.draw(st.sampled_from(["target", "cross"]), label="source"),
    }
    z, z_target = points(n, d, seed=data.draw(st.integers(0, 1000)), dtype=torch.float32)
    found = loss_and_gradient(ops.relaxed_contrastive, z, z_target, **options)
    assert_as_exact_as_the_reference(*found, z, z_target, **options)


FLOATS = torch.zeros(6, 3)
ERRORS = {
    "z 1-D": ((torch.zeros(3), torch.zeros(3)), {}, RuntimeError, "z and z_target have shapes"),
    "empty": ((torch.zeros(0, 3), torch.zeros(0, 3)), {}, RuntimeError, "z and z_target have shapes"),
    "shapes": ((FLOATS, torch.zeros(6, 4)), {}, RuntimeError, "z and z_target have shapes"),
    "dtypes": ((FLOATS, FLOATS.double()), {}, RuntimeError, "z is torch.float32, z_target torch.float64"),
    "integers": ((FLOATS.long(), FLOATS.long()), {}, RuntimeError, "z is torch.int64, z_target torch.int64"),
    "alpha": ((FLOATS, FLOATS), {"alpha": 1.5}, ValueError, r"alpha: 1.5 given; allowed: 0..1"),
    "alpha NaN": ((FLOATS, FLOATS), {"alpha": math.nan}, ValueError, "alpha: nan given"),
    "sigma": ((FLOATS, FLOATS), {"sigma": 0.0}, ValueError, "sigma: 0.0 given; allowed: > 0"),
    "margin": ((FLOATS, FLOATS), {"margin": -1.0}, ValueError, "margin: -1.0 given; allowed: >= 0"),
    "no neighbour": ((FLOATS, FLOATS), {"neighbors": 0}, ValueError, "neighbors: 0 given; allowed: 1..6"),
    "neighbours": ((FLOATS, FLOATS), {"neighbors": 7}, ValueError, "neighbors: 7 given; allowed: 1..6"),
    "power": ((FLOATS, FLOATS), {"similarity_power": 3}, ValueError, "similarity_power: 3 given"),
    "source": ((FLOATS, FLOATS), {"pair_source": "both"}, ValueError, "pair_source: 'both' given"),
    "reduction": ((FLOATS, FLOATS), {"reduction": "sum"}, ValueError, "reduction: 'sum' given"),
}


@pytest.mark.parametrize("loss", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", ERRORS)
def test_wrong_arguments(case, loss):
    tensors, options, error, message = ERRORS[case]
    with pytest.raises(error, match=f"relaxed_contrastive: {message}"):
        loss(*tensors, **{"neighbors": 1, **options} if len(tensors[0]) < 5 else options)


@pytest.mark.cpu
def test_the_operator_guards_its_neighbours():
    z = torch.zeros(4, 2)
    with pytest.raises(RuntimeError, match="neighbors must be between 0 and 3, got 4"):
        torch.ops.pydefect.relaxed_contrastive(z, z, torch.full((4, 1), 4), 0.5, 4.0, 0.2, 1, False, True)
    with pytest.raises(RuntimeError, match="neighbors must be int64"):
        torch.ops.pydefect.relaxed_contrastive(z, z, z.int(), 0.5, 4.0, 0.2, 1, False, True)


def test_opcheck():
    z, z_target = points(15, 4, dtype=torch.float32)
    neighbors = torch.arange(15).unsqueeze(1).repeat(1, 3)
    settings = (0.8, 4.0, 0.2, 1, False, True)
    torch.library.opcheck(
        torch.ops.pydefect.relaxed_contrastive.default, (z.requires_grad_(), z_target, neighbors, *settings)
    )
    _, inverse_means, slopes = torch.ops.pydefect.relaxed_contrastive(
        z.detach(), z_target, neighbors, *settings
    )
    torch.library.opcheck(
        torch.ops.pydefect.relaxed_contrastive_backward.default,
        (torch.ones(()), z.detach(), z_target, neighbors, inverse_means, slopes, *settings),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_point_is_its_own_neighbour_among_many_duplicates(dtype):
    """More coinciding points than places: the point itself may not be crowded out."""
    target = torch.cat(
        [torch.full((15, 4), 0.1), torch.randn(5, 4, generator=torch.Generator().manual_seed(0))]
    )
    indices, similarity = MODULE.global_similarity(target.to(dtype), 4)
    assert indices[:, 0].tolist() == list(range(20))
    assert (similarity[:, 0] == 1).all()
    assert all(len(set(row)) == 4 for row in indices.tolist())
