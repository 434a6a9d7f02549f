"""k-NN against its pure-PyTorch twin and against its own promises.

Two comparisons are made. Distances must agree with the twin, which measures in float64, to
`(D + 4) * 2**-24` relatively: a sum of D squares in float32 rounds each difference, each square and at most D
additions, and all terms are positive, so nothing cancels; the twin adds one rounding to float32. The order
may differ from the twin's only between rows whose distances differ by less than that, so indices are compared
through the distances they stand for. And everything must agree bit for bit with `measure_all`, the direct
float32 measurement in the kernels' documented order of summation: that is the contract, and it leaves no
tolerance.
"""

import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pydefect.buildinfo import build_info
from pydefect.ops import hypersphere, knn, reference

CUDA = pytest.param(
    "cuda",
    marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")],
)
DEVICES = ["cpu", CUDA]
WIDTHS = [1, 3, 7, 8, 9, 15, 16, 17, 31, 33, 64, 112, 448]
# Around the tiles' edges (14 x 32, 6 x 16, 4 x 8 on the CPU, 128 x 64 on CUDA) and far from them.
SIZES = [
    (0, 1),
    (1, 1),
    (3, 7),
    (5, 97),
    (7, 3),
    (13, 31),
    (28, 64),
    (29, 65),
    (97, 65),
    (129, 64),
    (97, 1025),
]


def random_pair(n, m, d, device="cpu", seed=0):
    generator = torch.Generator().manual_seed(seed)
    queries = torch.randn(n, d, generator=generator)
    bank = torch.randn(m, d, generator=generator)
    return queries.to(device), bank.to(device)


def measure_all(queries, bank):
    """Every squared distance in float32: sixteen partial sums, then halves added to halves."""
    n, d = queries.shape
    pad = (0, -d % 16)
    x = torch.nn.functional.pad(queries, pad)[:, None]
    y = torch.nn.functional.pad(bank, pad)[None]
    sums = torch.zeros(n, len(bank), 16, device=queries.device)
    for start in range(0, d, 16):
        difference = x[..., start : start + 16] - y[..., start : start + 16]
        sums = sums + difference * difference
    for half in (8, 4, 2, 1):
        sums = sums[..., :half] + sums[..., half : 2 * half]
    return sums[..., 0]


def expected_by_measuring(queries, bank, k):
    distances, indices = measure_all(queries, bank).sort(dim=1, stable=True)
    return distances[:, :k], indices[:, :k]


def assert_same(actual, expected):
    torch.testing.assert_close(actual[1], expected[1], rtol=0, atol=0)
    torch.testing.assert_close(actual[0], expected[0], rtol=0, atol=0, equal_nan=True)


def allowed_k(m, device):
    on_cuda = device != "cpu" or "PYDEFECT_CUDA_EMULATION" in os.environ
    return sorted({min(k, m, 64 if on_cuda else m) for k in (1, 3, 9, m)})


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("d", WIDTHS)
@pytest.mark.parametrize(("n", "m"), SIZES)
def test_agrees_with_reference(n, m, d, device):
    queries, bank = random_pair(n, m, d, device)
    for k in allowed_k(m, device):
        distances, indices = knn(queries, bank, k)
        assert distances.shape == indices.shape == (n, k)
        assert distances.dtype == torch.float32
        assert indices.dtype == torch.int64
        tolerance = (d + 4) * 2.0**-24
        expected, _ = reference.knn(queries, bank, k)
        torch.testing.assert_close(distances, expected, rtol=tolerance, atol=0)
        pointed_at = (queries.double()[:, None] - bank.double()[indices]).square().sum(-1)
        torch.testing.assert_close(distances.double(), pointed_at, rtol=tolerance, atol=0)
        assert (distances.diff(dim=1) >= 0).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("n", "m", "d"), [(97, 1025, 33), (129, 97, 448), (3, 7, 1), (30, 100, 17)])
def test_is_direct_measurement_bit_for_bit(n, m, d, device):
    queries, bank = random_pair(n, m, d, device)
    for k in allowed_k(m, device):
        assert_same(knn(queries, bank, k), expected_by_measuring(queries, bank, k))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("copies", [2, 3, 40])
def test_ties_go_to_the_lower_index(copies, device):
    # 40 equal rows are more than the search keeps as candidates, so this also takes the exhaustive path.
    queries, rows = random_pair(40, 50, 24, device)
    bank = rows.repeat(copies, 1)
    for k in (1, 5, 60):
        assert_same(knn(queries, bank, k), expected_by_measuring(queries, bank, k))


@pytest.mark.gpu
@pytest.mark.parametrize("k", [65, 300])
def test_more_neighbours_than_the_cuda_kernels_list(k):
    # Small integers: one right answer, which every way of measuring gives.
    queries, bank = (part.cuda() for part in random_pair(20, 300, 5, "cpu"))
    queries, bank = queries.round(), bank.round()
    assert_same(knn(queries, bank, k), reference.knn(queries, bank, k))
    loss, twin = (call(queries, bank, k) for call in (hypersphere, reference.hypersphere))
    torch.testing.assert_close(loss, twin)


@pytest.mark.parametrize("device", DEVICES)
def test_integer_grid_ties(device):
    # Small integers are exact in every form, so ties abound and there is exactly one right answer.
    generator = torch.Generator().manual_seed(1)
    queries = torch.randint(0, 3, (200, 5), generator=generator).float().to(device)
    bank = torch.randint(0, 3, (300, 5), generator=generator).float().to(device)
    for k in (1, 7, 60):
        assert_same(knn(queries, bank, k), reference.knn(queries, bank, k))


@pytest.mark.parametrize("device", DEVICES)
def test_identical_points_are_at_zero(device):
    _, bank = random_pair(1, 100, 448, device)
    distances, indices = knn(bank, bank, 1)
    assert (distances == 0).all()
    assert (indices[:, 0] == torch.arange(100, device=device)).all()


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("offset", [1e2, 1e4, 1e6])
def test_near_duplicates_far_from_the_origin(offset, device):
    # |x|^2 - 2 x.y + |y|^2 keeps no correct digit of these distances; the direct measurement keeps them all.
    queries, bank = random_pair(50, 200, 64, device)
    queries, bank = queries + offset, bank + offset
    assert_same(knn(queries, bank, 9), expected_by_measuring(queries, bank, 9))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("scale", [1e-30, 1e-18, 1e15, 1e18, 1e30])
def test_extreme_scales(scale, device):
    # Squares underflow to zero or overflow to infinity; ties among those go to the lower index as well.
    queries, bank = random_pair(30, 100, 33, device)
    queries, bank = queries * scale, bank * scale
    assert_same(knn(queries, bank, 5), expected_by_measuring(queries, bank, 5))


@pytest.mark.parametrize("device", DEVICES)
def test_not_finite_values_rank_last(device):
    queries, bank = random_pair(20, 60, 9, device)
    bank[3, 4] = torch.nan
    bank[5, 0] = torch.inf
    queries[7, 2] = torch.nan
    queries[8, 1] = -torch.inf
    for k in (3, 60):
        assert_same(knn(queries, bank, k), expected_by_measuring(queries, bank, k))


@pytest.mark.parametrize("device", DEVICES)
def test_not_contiguous_inputs(device):
    queries, bank = random_pair(40, 120, 32, device)
    expected = knn(queries[::2, 1::2].contiguous(), bank[5::3, 1::2].contiguous(), 4)
    assert_same(knn(queries[::2, 1::2], bank[5::3, 1::2], 4), expected)
    assert_same(knn(queries.T.contiguous().T, bank.T.contiguous().T, 4), knn(queries, bank, 4))


@pytest.mark.parametrize("device", DEVICES)
def test_inputs_are_left_alone(device):
    queries, bank = random_pair(40, 120, 32, device)
    before = queries.clone(), bank.clone()
    knn(queries, bank, 3)
    assert torch.equal(queries, before[0])
    assert torch.equal(bank, before[1])


def test_bank_larger_than_one_packed_part():
    # 64 MiB are packed at a time; one of this width holds 8192 rows.
    queries, bank = random_pair(20, 8300, 2048)
    assert_same(knn(queries, bank, 3), expected_by_measuring(queries, bank, 3))


def test_same_for_every_thread_count():
    queries, bank = random_pair(500, 300, 65)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            results.append(knn(queries, bank, 7))
            results.append(knn(queries, bank, 7, precision="bf16"))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert_same(result, results[0])


@pytest.mark.parametrize("level", build_info().cpu_levels_usable)
def test_same_on_every_instruction_set(level, tmp_path, at_level):
    shapes = [
        (n, m, d)
        for n, m in ((5, 9), (37, 65), (84, 96), (97, 130))
        for d in (1, 3, 7, 8, 9, 17, 33, 64, 112)
    ]
    file = tmp_path / "results.pt"
    code = f"""
import torch
from pydefect.ops import knn
results = []
for n, m, d in {shapes}:
    torch.manual_seed(n + m + d)
    queries, bank = torch.randn(n, d), torch.randn(m, d)
    results.append(knn(queries, bank, 5))
    results.append(knn(queries, bank, 5, precision="bf16"))
torch.save(results, {str(file)!r})
"""
    at_level(level, code)
    results = torch.load(file)
    for (n, m, d), *both in zip(shapes, results[::2], results[1::2], strict=True):
        torch.manual_seed(n + m + d)
        expected = expected_by_measuring(torch.randn(n, d), torch.randn(m, d), 5)
        for result in both:
            assert_same(result, expected)


def clusters(n, m, d, spread, seed=0):
    """Features that are not negative, in tight clusters far from the origin, as networks' features are."""
    generator = torch.Generator().manual_seed(seed)
    means = torch.randn(40, d, generator=generator).relu() * 3
    parts = []
    for rows in (n, m):
        which = torch.randint(40, (rows,), generator=generator)
        parts.append((means[which] + spread * torch.randn(rows, d, generator=generator)).relu())
    return parts[0], parts[1]


@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 40])
@pytest.mark.parametrize("d", [1, 2, 15, 31, 32, 33, 65, 112])
def test_bf16_gives_the_same_bits(d, k):
    for n, m in ((16, 65), (57, 1025)):
        queries, bank = random_pair(n, m, d)
        assert_same(knn(queries, bank, k, precision="bf16"), expected_by_measuring(queries, bank, k))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("spread", [1e-3, 0.05, 0.5])
def test_clustered_features(spread, precision):
    # From clusters that bf16 cannot tell apart within (they are searched in float32) to ones that it can.
    queries, bank = clusters(300, 1200, 72, spread)
    assert_same(knn(queries, bank, 3, precision=precision), expected_by_measuring(queries, bank, 3))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_queries_unlike_those_tried(precision):
    # Most queries are easy; those between are each equally far from hundreds of rows, more than a list holds.
    queries, bank = random_pair(400, 900, 48)
    bank[:500] = bank[0] + 1e-6 * bank[:500]
    queries[3::40] = bank[0]
    assert_same(knn(queries, bank, 3, precision=precision), expected_by_measuring(queries, bank, 3))


def falling(n, m, d, seed=0):
    """Variances that fall as those of principal components: vectors that may be scored by their heads."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.arange(1, d + 1).pow(-0.8)
    queries, bank = (torch.randn(rows, d, generator=generator) * scale for rows in (n, m))
    bank[1::9] = bank[0]
    queries[::7] = bank[0]
    # The same heads, and rests that are all that tells them apart.
    queries[1::7, :64] = bank[2, :64]
    return queries, bank


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize(("m", "d"), [(300, 256), (97, 270), (333, 449)])
@pytest.mark.parametrize("k", [1, 2, 3, 4, 5, 20])
def test_falling_variances(k, m, d, precision):
    queries, bank = falling(600, m, d)
    assert_same(knn(queries, bank, k, precision=precision), expected_by_measuring(queries, bank, k))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-18, 1e15, 1e18, 1e30, 3e38])
def test_falling_variances_at_extreme_scales(scale, precision):
    queries, bank = (tensor * scale for tensor in falling(450, 60, 256))
    assert_same(knn(queries, bank, 3, precision=precision), expected_by_measuring(queries, bank, 3))


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_falling_variances_with_what_is_not_finite(precision):
    queries, bank = falling(450, 60, 256)
    queries[3, 2] = queries[9, 200] = torch.nan
    queries[30, 255] = torch.inf
    assert_same(knn(queries, bank, 3, precision=precision), expected_by_measuring(queries, bank, 3))
    bank[5, 1] = bank[7, 201] = torch.nan
    bank[8, 250] = torch.inf
    assert_same(knn(queries, bank, 3, precision=precision), expected_by_measuring(queries, bank, 3))


@pytest.mark.parametrize("scale", [1e-40, 1e-30, 1e-18, 1e15, 1e18, 1e30, 3e38])
def test_bf16_extreme_scales(scale):
    queries, bank = random_pair(30, 100, 33)
    queries, bank = queries * scale, bank * scale
    assert_same(knn(queries, bank, 5, precision="bf16"), expected_by_measuring(queries, bank, 5))


def test_bf16_not_finite_values():
    queries, bank = random_pair(20, 60, 9)
    queries[7, 2] = torch.nan
    assert_same(knn(queries, bank, 3, precision="bf16"), expected_by_measuring(queries, bank, 3))
    bank[5, 0] = torch.inf
    assert_same(knn(queries, bank, 3, precision="bf16"), expected_by_measuring(queries, bank, 3))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_small_problem(data):
    n = data.draw(st.integers(0, 40), label="n")
    m = data.draw(st.integers(1, 80), label="m")
    d = data.draw(st.integers(1, 40), label="d")
    k = data.draw(st.integers(1, m), label="k")
    levels = data.draw(st.sampled_from([2, 5, 1000]), label="levels")
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 2**31), label="seed"))
    queries = torch.randint(levels, (n, d), generator=generator) / 7
    bank = torch.randint(levels, (m, d), generator=generator) / 7
    for precision in ("float32", "bf16"):
        result = knn(queries, bank, k, precision=precision)
        assert_same(result, expected_by_measuring(queries, bank, k))


ERRORS = {
    "queries 1-D": (torch.zeros(3), torch.zeros(2, 3), 1, "queries must have 2 dimensions, got 1"),
    "bank 3-D": (torch.zeros(1, 3), torch.zeros(1, 2, 3), 1, "bank must have 2 dimensions, got 3"),
    "queries half": (torch.zeros(1, 3).half(), torch.zeros(2, 3), 1, "queries must be float32, got"),
    "bank double": (torch.zeros(1, 3), torch.zeros(2, 3).double(), 1, "bank must be float32, got"),
    "widths": (torch.zeros(1, 3), torch.zeros(2, 4), 1, "bank must have the width of queries, 3, got 4"),
    "no width": (torch.zeros(1, 0), torch.zeros(2, 0), 1, "queries must have a width of at least 1, got 0"),
    "empty bank": (torch.zeros(1, 3), torch.zeros(0, 3), 1, "bank must have at least 1 row, got 0"),
    "k zero": (torch.zeros(1, 3), torch.zeros(2, 3), 0, "k must be between 1 and the 2 rows of bank, got 0"),
    "k large": (torch.zeros(1, 3), torch.zeros(2, 3), 3, "k must be between 1 and the 2 rows of bank, got 3"),
}


@pytest.mark.parametrize("find", [knn, reference.knn], ids=["native", "reference"])
@pytest.mark.parametrize("case", ERRORS)
def test_wrong_arguments(case, find):
    queries, bank, k, message = ERRORS[case]
    with pytest.raises(RuntimeError, match=f"knn: {message}"):
        find(queries, bank, k)


@pytest.mark.parametrize("find", [knn, reference.knn], ids=["native", "reference"])
def test_wrong_precision(find):
    with pytest.raises(RuntimeError, match="knn: precision must be 'float32' or 'bf16', got 'half'"):
        find(torch.zeros(1, 3), torch.zeros(2, 3), 1, precision="half")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_wrong_arguments_on_cuda():
    with pytest.raises(RuntimeError, match="k must be at most 64, got 65"):
        torch.ops.pydefect.knn(torch.zeros(1, 3, device="cuda"), torch.zeros(100, 3, device="cuda"), 65)
    with pytest.raises(RuntimeError, match="one device"):
        knn(torch.zeros(1, 3, device="cuda"), torch.zeros(100, 3), 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_honours_the_current_stream():
    queries, bank = random_pair(300, 400, 64, "cuda")
    expected = knn(queries, bank, 3)
    late = torch.zeros_like(queries)
    torch.cuda.synchronize()
    with torch.cuda.stream(torch.cuda.Stream()):
        # On the default stream the search would read zeros: it would not wait for the sleep.
        torch.cuda._sleep(100_000_000)
        late.copy_(queries)
        result = knn(late, bank, 3)
    torch.cuda.synchronize()
    assert_same(result, expected)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("k", [1, 3, 5, 13, 29, 64])
def test_cuda_equals_cpu(k):
    queries, bank = random_pair(1000, 3000, 112)
    on_cuda = knn(queries.cuda(), bank.cuda(), k)
    assert_same((on_cuda[0].cpu(), on_cuda[1].cpu()), knn(queries, bank, k))


def test_results_carry_no_gradient():
    queries, bank = random_pair(5, 9, 4)
    distances, indices = knn(queries.requires_grad_(), bank.requires_grad_(), 2)
    assert not distances.requires_grad
    assert not indices.requires_grad


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(("n", "m", "d", "k"), [(5, 9, 4, 2), (0, 3, 1, 3), (97, 65, 33, 9)])
def test_opcheck(n, m, d, k, device):
    for options in ({}, {"precision": "bf16"}):
        torch.library.opcheck(torch.ops.pydefect.knn.default, (*random_pair(n, m, d, device), k), options)


@pytest.mark.parametrize("device", DEVICES)
def test_compiles(device):
    def nearest(queries, bank):
        distances, indices = knn(queries * 2, bank, 3)
        return distances.sqrt(), bank[indices]

    queries, bank = random_pair(20, 30, 8, device)
    compiled = torch.compile(nearest, backend="aot_eager", fullgraph=True)
    for actual, expected in zip(compiled(queries, bank), nearest(queries, bank), strict=True):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_fake_tensors():
    with torch._subclasses.FakeTensorMode():
        distances, indices = knn(torch.empty(4, 6), torch.empty(9, 6), 2)
        assert distances.shape == indices.shape == (4, 2)
        assert (distances.dtype, indices.dtype) == (torch.float32, torch.int64)
        with pytest.raises(RuntimeError, match="width"):
            knn(torch.empty(4, 6), torch.empty(9, 5), 2)
