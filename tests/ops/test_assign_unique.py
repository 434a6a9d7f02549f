"""Algorithm 1's choice of patches, against one written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pydefect import ops
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


@pytest.mark.parametrize("assign", IMPLEMENTATIONS)
@pytest.mark.parametrize(("m", "n", "d"), [(1, 1, 1), (3, 12, 2), (12, 12, 4), (5, 40, 1), (16, 64, 8)])
def test_one_centre_at_a_time(assign, m, n, d):
    generator = torch.Generator().manual_seed(m * n)
    bank = torch.randn(m, d, generator=generator, dtype=torch.float64)
    patches = torch.randn(n, d, generator=generator, dtype=torch.float64)
    assert assign(bank, patches).tolist() == one_by_one(bank, patches)


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
