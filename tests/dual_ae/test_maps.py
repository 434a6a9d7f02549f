"""Scale and place of the maps."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from pydefect.dual_ae.maps import map_scale, place, placement_matrix
from pydefect.dual_ae.pdn import STRIDE, first_centre, output_size


def test_the_scale_is_that_of_the_papers_quantiles():
    maps = [torch.rand(1, 7, 5, generator=torch.Generator().manual_seed(i)) for i in range(4)]
    low, high = np.quantile(torch.stack(maps).double().numpy(), [0.9, 0.995])
    assert map_scale(maps, 0.9, 0.995) == pytest.approx(0.1 / (high - low))


def test_equal_quantiles_do_not_divide_by_zero():
    assert map_scale([torch.full((1, 4, 4), 2.0)], 0.9, 0.995) == pytest.approx(0.1 / 0.002)
    assert map_scale([torch.zeros(1, 4, 4)], 0.9, 0.995) == 0.1
    single = map_scale([torch.ones(1, 1, 1)], 0.9, 0.9)
    assert np.isfinite(single)


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("size", [(256, 256), (64, 97), (130, 66)])
def test_a_ramp_over_the_image_stays_the_same_ramp(padding, size):
    """Cells that say where their centre lies: every pixel between them must then say its own place."""
    rows, columns = output_size(size, padding)
    y = first_centre(padding) + STRIDE * torch.arange(rows, dtype=torch.float32)
    x = first_centre(padding) + STRIDE * torch.arange(columns, dtype=torch.float32)
    placed = place((100 * y[:, None] + x[None])[None], size, padding)[0]
    own_y = (torch.arange(size[0]) + 0.5).clamp(float(y[0]), float(y[-1]))
    own_x = (torch.arange(size[1]) + 0.5).clamp(float(x[0]), float(x[-1]))
    torch.testing.assert_close(placed, 100 * own_y[:, None] + own_x[None], rtol=1e-5, atol=1e-2)


@pytest.mark.parametrize("padding", [False, True])
def test_no_border_is_dead(padding):
    cells = output_size((96, 96), padding)[0]
    matrix = placement_matrix(96, cells, padding)
    torch.testing.assert_close(matrix.sum(1), torch.ones(96))
    assert (matrix >= 0).all()
    assert (matrix.sum(0) > 0).all()


def test_a_single_cell_covers_the_image():
    assert torch.equal(place(torch.full((2, 1, 1), 3.0), (33, 34), False), torch.full((2, 33, 34), 3.0))
