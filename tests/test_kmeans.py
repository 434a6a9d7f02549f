"""k-means against scikit-learn's from the same beginning, and where there is little to find."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from sklearn.cluster import KMeans
from torch import Tensor

from pydefect.kmeans import assigned_patches, kmeans, nearest_centres
from pydefect.ops import kcenter_greedy


def patches(count: int, dimension: int, seed: int = 0) -> Tensor:
    """Draw features that come in clumps, as those of an image do."""
    generator = torch.Generator().manual_seed(seed)
    clumps = 3 * torch.randn(17, dimension, generator=generator)
    noise = torch.randn(count, dimension, generator=generator)
    return clumps[torch.randint(17, (count,), generator=generator)] + noise


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("count", "dimension", "size"), [(60, 2, 5), (500, 12, 40), (784, 64, 196)])
def test_lloyd_like_scikit_learn(count: int, dimension: int, size: int, seed: int) -> None:
    data = patches(count, dimension, seed)
    start = data[kcenter_greedy(data, size)].numpy()
    # tol=0 ends it where ours ends: when no patch changes its centre, or after as many iterations.
    expected = KMeans(size, init=start, n_init=1, max_iter=20, tol=0, algorithm="lloyd").fit(data.numpy())
    centres, counts = kmeans(data, size)
    # Means of some ten values, added in another order.
    np.testing.assert_allclose(centres.numpy(), expected.cluster_centers_, rtol=1e-4, atol=1e-5)
    assert counts.tolist() == np.bincount(expected.labels_, minlength=size).tolist()


def test_as_good_as_the_best_of_several_random_beginnings() -> None:
    data = patches(784, 64)
    found = float(nearest_centres(data, kmeans(data, 196)[0])[0].sum())
    best = KMeans(196, n_init=4, random_state=0).fit(data.numpy()).inertia_
    # Such features have no clusters of their own at this size: ends of k-means differ by a few percent.
    assert found < 1.05 * best


def test_equal_patches_leave_centres_that_nobody_is_nearest_to() -> None:
    data = torch.ones(12, 3)
    centres, counts = kmeans(data, 4)
    assert torch.equal(centres, torch.ones(4, 3))
    assert counts.tolist() == [12, 1, 1, 1]


def test_a_centre_for_every_patch() -> None:
    data = patches(9, 3)
    centres, counts = kmeans(data, 9)
    assert torch.equal(centres.sort(0).values, data.sort(0).values)
    assert counts.tolist() == [1] * 9


def test_what_every_centre_receives() -> None:
    data = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])
    sums, counts = assigned_patches(data, torch.tensor([2, 0, 2]), 4)
    assert sums.tolist() == [[3, 4], [0, 0], [6, 8], [0, 0]]
    assert counts.tolist() == [1, 0, 2, 0]
