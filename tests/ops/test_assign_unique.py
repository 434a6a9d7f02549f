"""Algorithm 1's choice of patches, against one written out and against the operator's own promises.

The kernel promises the answer of measuring every pair in float32, in the order of summation that `measure`
spells out: nothing is left to a tolerance. The twin measures in float64, which changes the answer only where
two patches' distances from a centre agree to (D + 4) * 2**-24 of themselves, the rounding of a float32 sum of
D squares; random vectors do not.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pydefect import ops
from pydefect.buildinfo import build_info
from pydefect.ops import reference

IMPLEMENTATIONS = [
    pytest.param(ops.assign_unique, id="ops"),
    pytest.param(reference.assign_unique, id="reference"),
]


def one_by_one(bank: Tensor, patches: Tensor) -> list[int]:
    taken: list[int] = []
    for centre in bank.tolist():
        free = [index for index in range(len(patches)) if index not in taken]
        taken.append(min(free, key=lambda index: (math.dist(centre, patches[index].tolist()), index)))
    return taken


def measure(bank: Tensor, patches: Tensor) -> Tensor:
    """Every squared distance in float32: sixteen partial sums, then halves added to halves."""
    pad = (0, -bank.shape[1] % 16)
    x = torch.nn.functional.pad(bank, pad)[:, None]
    y = torch.nn.functional.pad(patches, pad)[None]
    sums = torch.zeros(len(bank), len(patches), 16)
    for start in range(0, x.shape[2], 16):
        difference = x[..., start : start + 16] - y[..., start : start + 16]
        sums = sums + difference * difference
    for half in (8, 4, 2, 1):
        sums = sums[..., :half] + sums[..., half : 2 * half]
    return sums[..., 0]


def by_measuring(bank: Tensor, patches: Tensor) -> list[int]:
    # NaN sorts behind infinity.
    order = measure(bank, patches).sort(dim=1, stable=True).indices.tolist()
    taken: dict[int, None] = {}
    for row in order:
        taken[next(patch for patch in row if patch not in taken)] = None
    return list(taken)


def random_pair(m: int, n: int, d: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(m, d, generator=generator), torch.randn(n, d, generator=generator)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("assign", IMPLEMENTATIONS)
@pytest.mark.parametrize(("m", "n", "d"), [(1, 1, 1), (3, 12, 2), (12, 12, 4), (5, 40, 1), (16, 64, 8)])
def test_one_centre_at_a_time(assign, m, n, d, dtype):
    bank, patches = (part.to(dtype) for part in random_pair(m, n, d, m * n))
    taken = assign(bank, patches)
    assert taken.dtype == torch.int64
    assert taken.tolist() == one_by_one(bank, patches)


@pytest.mark.parametrize(
    ("m", "n", "d"),
    # One less and one more than the tiles (4 x 4, 1 x 8), than the candidates (8) and than a block (64).
    [
        *[(0, 1, 3), (3, 3, 15), (4, 5, 16), (5, 5, 17), (7, 9, 1), (9, 9, 448), (63, 65, 33)],
        *[(65, 65, 31), (200, 200, 7), (300, 301, 48), (100, 400, 112), (150, 1000, 5)],
    ],
)
def test_is_direct_measurement(m, n, d):
    bank, patches = random_pair(m, n, d)
    expected = by_measuring(bank, patches)
    assert ops.assign_unique(bank, patches).tolist() == expected
    assert reference.assign_unique(bank, patches).tolist() == expected


@pytest.mark.parametrize("assign", IMPLEMENTATIONS)
def test_ties_go_to_the_lower_index_and_no_patch_is_taken_twice(assign):
    # Integers: distances are exact, all centres are one point, and patches come in pairs.
    bank = torch.zeros(4, 2)
    patches = torch.tensor([[3.0, 4.0], [1.0, 0.0], [0.0, 1.0], [3.0, 4.0], [0.0, 0.0]])
    assert assign(bank, patches).tolist() == [4, 1, 2, 0]


@pytest.mark.parametrize("assign", IMPLEMENTATIONS)
def test_earlier_centres_choose_first(assign):
    patches = torch.tensor([[0.0], [10.0]])
    assert assign(torch.tensor([[1.0], [0.0]]), patches).tolist() == [0, 1]


@pytest.mark.parametrize("assign", IMPLEMENTATIONS)
def test_as_many_centres_as_patches_gives_a_permutation(assign):
    points = torch.randn(20, 3, generator=torch.Generator().manual_seed(0))
    assert sorted(assign(points.flip(0), points).tolist()) == list(range(20))
    assert assign(points, points).tolist() == list(range(20))


@pytest.mark.parametrize("assign", IMPLEMENTATIONS)
def test_a_constant_image_is_taken_in_order(assign):
    """Every centre wants every patch equally: the candidates run out at once."""
    assert assign(torch.zeros(300, 5), torch.full((320, 5), 0.7)).tolist() == list(range(300))


@pytest.mark.parametrize("assign", IMPLEMENTATIONS)
def test_all_centres_want_the_same_patches(assign):
    bank = torch.zeros(60, 1)
    patches = torch.arange(100.0).flip(0)[:, None]
    assert assign(bank, patches).tolist() == list(range(99, 39, -1))


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_not_finite_values_come_last(value):
    bank, patches = random_pair(40, 40, 6)
    patches[3, 2] = value
    bank[7, 5] = value
    expected = by_measuring(bank, patches)
    assert ops.assign_unique(bank, patches).tolist() == expected
    assert reference.assign_unique(bank, patches).tolist() == expected
    assert sorted(expected) == list(range(40))


def test_inputs_that_are_not_contiguous_come_out_unchanged():
    bank, patches = random_pair(60, 160, 32)
    expected = ops.assign_unique(bank[::2, 1::2].contiguous(), patches[::3, 1::2].contiguous())
    before = bank.clone(), patches.clone()
    assert torch.equal(ops.assign_unique(bank[::2, 1::2], patches[::3, 1::2]), expected)
    assert torch.equal(bank, before[0])
    assert torch.equal(patches, before[1])


def test_same_for_every_thread_count():
    bank, patches = random_pair(400, 410, 65)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(ops.assign_unique(bank, patches).tolist())
    finally:
        torch.set_num_threads(before)
    assert results == results[:1] * 4


@pytest.mark.parametrize("scale", [1.0, 1e-20, 1e18])
def test_falling_variances(scale):
    """As those of principal components: distances are bounded before they are measured."""
    bank, patches = random_pair(400, 420, 260)
    falling = scale * torch.arange(1, 261).pow(-0.8)
    bank, patches = bank * falling, patches * falling
    bank[1::9] = bank[0]
    patches[2::11] = patches[0]
    assert ops.assign_unique(bank, patches).tolist() == by_measuring(bank, patches)


@pytest.mark.parametrize("level", build_info().cpu_levels_usable)
def test_same_on_every_instruction_set(level, tmp_path, at_level):
    shapes = [(m, n, d) for m, n in ((5, 9), (37, 38), (97, 97)) for d in (1, 7, 16, 17, 33, 112)]
    file = tmp_path / "results.pt"
    code = f"""
import torch
from pydefect.ops import assign_unique
results = []
for m, n, d in {shapes}:
    generator = torch.Generator().manual_seed(0)
    pair = torch.randn(m, d, generator=generator), torch.randn(n, d, generator=generator)
    results.append(assign_unique(*pair))
torch.save(results, {str(file)!r})
"""
    at_level(level, code)
    for shape, result in zip(shapes, torch.load(file), strict=True):
        assert result.tolist() == by_measuring(*random_pair(*shape))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_small_problem(data):
    n = data.draw(st.integers(1, 60), label="n")
    m = data.draw(st.integers(0, n), label="m")
    d = data.draw(st.integers(1, 40), label="d")
    levels = data.draw(st.sampled_from([1, 2, 5, 1000]), label="levels")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), label="seed"))
    bank = torch.randint(levels, (m, d), generator=generator) / 7
    patches = torch.randint(levels, (n, d), generator=generator) / 7
    assert ops.assign_unique(bank, patches).tolist() == by_measuring(bank, patches)


ERRORS = {
    "bank 1-D": (torch.zeros(3), torch.zeros(2, 3), "bank must have 2 dimensions, got 1"),
    "patches 3-D": (torch.zeros(1, 3), torch.zeros(1, 2, 3), "patches must have 2 dimensions, got 3"),
    "bank half": (torch.zeros(1, 3).half(), torch.zeros(2, 3), "bank must be float32 or float64, got"),
    "dtypes": (torch.zeros(1, 3), torch.zeros(2, 3).double(), "patches must have the dtype of bank"),
    "widths": (torch.zeros(1, 3), torch.zeros(2, 4), "bank must have the width of patches, 4, got 3"),
    "no width": (torch.zeros(1, 0), torch.zeros(2, 0), "patches must have a width of at least 1, got 0"),
    "no patches": (torch.zeros(0, 3), torch.zeros(0, 3), "patches must have at least 1 row, got 0"),
    "few patches": (torch.zeros(3, 3), torch.zeros(2, 3), "at most one row for each of the 2 patches, got 3"),
}


@pytest.mark.parametrize("assign", IMPLEMENTATIONS)
@pytest.mark.parametrize("case", ERRORS)
def test_wrong_arguments(assign, case):
    bank, patches, message = ERRORS[case]
    with pytest.raises(RuntimeError, match=f"assign_unique: .*{message}"):
        assign(bank, patches)


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("candidates", "message"),
    [
        (torch.tensor([[0], [3]]), "rows of the 3 patches, got 3"),
        (torch.tensor([[-1], [0]]), "rows of the 3 patches, got -1"),
        (torch.zeros(3, 1, dtype=torch.int64), "one row for each row of bank"),
        (torch.zeros(2, 1), "must be int64"),
    ],
)
def test_wrong_candidates_are_refused(candidates, message):
    with pytest.raises(RuntimeError, match=message):
        torch.ops.pydefect.assign_unique(torch.zeros(2, 4), torch.zeros(3, 4), candidates)


def test_without_candidates_everything_is_measured():
    bank, patches = random_pair(30, 40, 9)
    none = torch.zeros(30, 0, dtype=torch.int64)
    assert torch.ops.pydefect.assign_unique(bank, patches, none).tolist() == by_measuring(bank, patches)


def test_no_gradient():
    bank, patches = random_pair(3, 9, 4)
    assert not ops.assign_unique(bank.requires_grad_(), patches.requires_grad_()).requires_grad


@pytest.mark.parametrize(("m", "n", "d"), [(0, 3, 2), (5, 9, 4), (20, 20, 17)])
def test_opcheck(m, n, d):
    bank, patches = random_pair(m, n, d)
    candidates = ops.knn(bank, patches, 2)[1]
    torch.library.opcheck(torch.ops.pydefect.assign_unique.default, (bank, patches, candidates))


def test_compiles():
    def take(bank, patches):
        return patches[ops.assign_unique(bank * 2, patches)]

    bank, patches = random_pair(20, 30, 8)
    compiled = torch.compile(take, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(bank, patches), take(bank, patches))
