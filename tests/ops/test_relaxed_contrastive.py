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
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pydefect import ops
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


@pytest.mark.parametrize("n", [400, 800])
def test_nothing_of_size_n_by_n_exists(n, monkeypatch):
    chunk = 1 << 14
    monkeypatch.setattr(MODULE, "_CHUNK_ELEMENTS", chunk)
    z, z_target = points(n, 4, dtype=torch.float32)
    z.requires_grad_()
    with LargestTensor() as watched:
        reference.relaxed_contrastive(z, z_target).backward()
    # Beside the chunks: the inputs (n * 4) and (2)'s comparison of neighbours with neighbours (n * 5^3).
    assert watched.elements <= max(chunk, n * 5**3) < n * n


def test_global_similarity_against_sets():
    _, target = points(30, 3, seed=5)
    indices, similarity = MODULE.global_similarity(target, 6)
    sets = neighbour_sets(target.tolist(), 6)
    for i in range(30):
        assert set(indices[i].tolist()) == sets[i]
        assert indices[i, 0] == i
        for column, j in enumerate(indices[i].tolist()):
            assert similarity[i, column] == pytest.approx(len(sets[i] & sets[j]) / 6, abs=1e-15)


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
