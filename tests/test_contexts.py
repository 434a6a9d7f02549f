"""What the caller has switched on in PyTorch changes neither a fit nor a score."""

from __future__ import annotations

import contextlib

import numpy as np
import pytest
import torch

import pydefect
from pydefect.data.procedural import render_product
from pydefect.registry import detector_type

FITS = {
    "conpatch": {"weights": "random", "calibration_folds": 0, "epochs": 1, "contrastive_patches": 16},
    "padim": {"weights": "random", "calibration_folds": 0},
    "reconpatch": {"weights": "random", "calibration_folds": 0, "epochs": 1},
    "dual_ae": {"steps": 4, "precision": "bfloat16", "false_alarm_rate": 0.5},
}
CONTEXTS = {
    "none": contextlib.nullcontext,
    "no gradients": torch.no_grad,
    "inference": torch.inference_mode,
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    # It stands for a card: what is made there by mistake meets nothing that is on the CPU.
    "device": lambda: torch.device("meta"),
}


@pytest.fixture(scope="module")
def images():
    return [render_product(np.random.default_rng(number), 64)[0] for number in range(3)]


def fit(images, method):
    return pydefect.fit(images, method=method, progress=False, resize=64, device="cpu", **FITS[method])


@pytest.fixture(scope="module", params=list(FITS))
def plain(request, images):
    # The class's own fit, which knows of no context.
    method, settings = detector_type(request.param), {**FITS[request.param], "resize": 64}
    weights = settings.pop("weights", "imagenet")
    config = method.config_type.from_preset("default", **settings)
    detector = method.fit(images, config, weights=weights, device=torch.device("cpu"), progress=False)
    return request.param, detector, detector.score(images, progress=False).image_scores


@pytest.mark.parametrize("context", CONTEXTS)
def test_fits_and_scores_are_the_same_in_every_context(images, plain, context, tmp_path):
    method, detector, expected = plain
    with CONTEXTS[context]():
        detector.save(tmp_path / "model.safetensors")
        found = [fit(images, method), detector, pydefect.load(tmp_path / "model.safetensors", device="cpu")]
        for one in found:
            np.testing.assert_array_equal(one.score(images, progress=False).image_scores, expected)


def test_another_default_dtype_scores_alike_and_fits_nothing(images, plain):
    method, detector, expected = plain
    torch.set_default_dtype(torch.float64)
    try:
        np.testing.assert_array_equal(detector.score(images, progress=False).image_scores, expected)
        with pytest.raises(pydefect.InputError, match=r"torch\.float64 is set; allowed is torch\.float32"):
            fit(images, method)
    finally:
        torch.set_default_dtype(torch.float32)
