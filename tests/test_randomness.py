"""What draws from PyTorch's own generator: of a seed alone, and without a trace."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch

import pydefect
from pydefect.data.procedural import render_product
from pydefect.randomness import seeded

FITS = {
    "conpatch": {"weights": "random", "calibration_folds": 0, "epochs": 1, "contrastive_patches": 16},
    "cfa": {"weights": "random", "calibration_folds": 0, "epochs": 1},
    "reconpatch": {"weights": "random", "calibration_folds": 0, "epochs": 1},
    "dual_ae": {"steps": 2, "precision": "float32", "false_alarm_rate": 0.5},
}


@pytest.fixture(scope="module")
def images():
    return [render_product(np.random.default_rng(number), 64)[0] for number in range(4)]


def fit(images, method, seed):
    return pydefect.fit(images, method=method, seed=seed, progress=False, resize=64, **FITS[method])


def test_equal_seeds_draw_equal_numbers_and_the_caller_goes_on_as_before():
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(7)
    following = torch.rand(3)
    torch.manual_seed(7)
    with seeded(5):
        assert torch.equal(torch.rand(3), expected)
        with seeded(5):
            assert torch.equal(torch.rand(3), expected)
    with pytest.raises(ZeroDivisionError), seeded(5):
        torch.rand(3).tolist()[0] / 0
    assert torch.equal(torch.rand(3), following)


@pytest.mark.parametrize("method", list(FITS))
def test_fit_and_load_leave_the_callers_random_numbers_alone(images, method, tmp_path):
    before = torch.get_rng_state()
    fit(images, method, 0).save(tmp_path / "model.safetensors")
    pydefect.load(tmp_path / "model.safetensors")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("method", ["conpatch", "dual_ae"])
def test_fits_in_two_threads_are_what_they_are_one_after_the_other(images, method):
    def scores(seed):
        return fit(images, method, seed).score(images, progress=False).image_scores

    with ThreadPoolExecutor(1) as one, ThreadPoolExecutor(2) as two:
        expected = list(one.map(scores, (0, 1)))
        found = list(two.map(scores, (0, 1)))
    assert not np.array_equal(*expected)
    np.testing.assert_array_equal(found, expected)


@pytest.mark.gpu
def test_dropout_on_a_card_draws_from_the_seed_and_leaves_no_trace():
    ones = torch.ones(4096, device="cuda")
    torch.manual_seed(3)
    expected = torch.nn.functional.dropout(ones)
    following = torch.rand(8, device="cuda")
    torch.manual_seed(3)
    torch.nn.functional.dropout(ones)
    with seeded(3, torch.device("cuda")):
        assert torch.equal(torch.nn.functional.dropout(ones), expected)
    assert torch.equal(torch.rand(8, device="cuda"), following)
