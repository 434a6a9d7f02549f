"""What holds for every baseline: finding defects, thresholds, files, seeds, settings, the command line."""

from __future__ import annotations

import dataclasses
import json
import signal
import typing
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

import pydefect
from pydefect.backbones import build_backbone
from pydefect.baselines.detector import BaselineDetector
from pydefect.cli import app
from pydefect.errors import InputError, ModelFileError
from pydefect.registry import METHODS, detector_type

# Settings that make each fit take a fraction of a second.
SMALL: dict[str, dict[str, Any]] = {
    "patchcore": {"coreset_ratio": 0.2, "projection_dim": 32},
    "padim": {"channels": 20},
    "spade": {"image_neighbors": 3, "image_score": "max_map"},
    "cfa": {"epochs": 1, "batch_size": 2, "width_compression": 4},
    "reconpatch": {"epochs": 1, "batch_size": 2, "representation_dim": 40, "coreset_ratio": 0.2},
}
EVERYWHERE = {
    "resize": None,
    "calibration_folds": 3,
    "false_alarm_rate": 0.2,
    "backbone_precision": "float32",
}
every_baseline = pytest.mark.parametrize("method", SMALL)


def fit(images: Any, method: str, **changes: Any) -> BaselineDetector:
    settings = {"weights": "random", "progress": False, **EVERYWHERE, **SMALL[method], **changes}
    detector = pydefect.fit(images, method=method, **settings)
    assert isinstance(detector, BaselineDetector)
    return detector


def assert_same_scores(one: pydefect.Result, other: pydefect.Result) -> None:
    assert np.array_equal(one.image_scores, other.image_scores)
    assert all(np.array_equal(*maps) for maps in zip(one.anomaly_maps, other.anomaly_maps, strict=True))
    assert (one.image_threshold, one.pixel_threshold) == (other.image_threshold, other.pixel_threshold)


def test_every_baseline_is_tested_here():
    registered = {name for name, entry in METHODS.items() if entry.module.startswith("pydefect.baselines")}
    assert registered == set(SMALL)


@every_baseline
def test_defects_score_higher_than_good_parts(products, defective, method):
    detector = fit(products, method)
    good, bad = detector.score(products), detector.score(defective)
    assert bad.image_scores.min() > good.image_scores.max()
    assert bad.is_defective.all()
    for anomaly_map in bad.anomaly_maps:
        assert anomaly_map.shape == (64, 80)
        assert anomaly_map.dtype == np.float32
        assert anomaly_map.min() >= 0
        # The checkerboard, not just the image, stands out.
        assert anomaly_map[20:44, 30:54].mean() > 1.5 * anomaly_map.mean()


@pytest.mark.filterwarnings("ignore:.*held-out images support")
@every_baseline
def test_thresholds_come_from_images_that_the_fold_has_not_seen(products, method):
    detector = fit(products[:3], method)
    assert detector.calibration.source == "held_out"
    singles = []
    for held_out in range(3):
        others = [image for index, image in enumerate(products[:3]) if index != held_out]
        unseen = fit(others, method, calibration_folds=0)
        assert unseen.calibration is None
        singles.append(float(unseen.score([products[held_out]]).image_scores[0]))
    # To the bit, although the cache keeps training features as float16 and scoring computes them anew.
    assert list(detector.calibration.image_scores) == sorted(singles)
    scores = dict(detector.training["held_out_scores"])
    assert [scores[f"image-{index:05d}"] for index in range(3)] == singles


@every_baseline
def test_a_saved_model_scores_the_same(products, defective, tmp_path, method):
    detector = fit(products, method)
    expected = detector.score(defective)
    detector.save(tmp_path / "model")
    loaded = pydefect.load(tmp_path / "model")
    assert type(loaded) is detector_type(method)
    assert loaded.configuration == detector.configuration
    assert loaded.training == detector.training
    assert_same_scores(loaded.score(defective), expected)
    detector.save(tmp_path / "bare", include_backbone=False)
    with pytest.raises(ModelFileError, match="weights: the model file has no backbone in it"):
        pydefect.load(tmp_path / "bare")
    assert_same_scores(pydefect.load(tmp_path / "bare", weights="random").score(defective), expected)


@every_baseline
def test_the_same_fit_twice_and_on_more_threads(products, defective, method):
    expected = fit(products, method, seed=3).score(defective)
    assert_same_scores(fit(products, method, seed=3).score(defective), expected)
    torch.set_num_threads(3)
    # Convolutions and matrix products of the libraries below may sum in other blocks: some 1e-5 of the
    # features, and of their distances.
    other = fit(products, method, seed=3).score(defective)
    np.testing.assert_allclose(other.image_scores, expected.image_scores, rtol=1e-3)


@every_baseline
def test_one_image_is_enough_to_score(products, defective, method):
    detector = fit(products[:1], method)
    assert detector.calibration is None
    assert np.isfinite(detector.score(defective).image_scores).all()


@every_baseline
def test_an_interrupted_fit_resumes_to_the_same_detector(products, defective, tmp_path, monkeypatch, method):
    expected = fit(products, method)
    calls, stop_at = 0, -1

    def report(self, description, done, total):
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise KeyboardInterrupt

    monkeypatch.setattr("pydefect.progress.ProgressBars.__call__", report)
    fit(products, method)
    for stop_at in range(3, calls, max(1, calls // 5)):
        calls = 0
        with pytest.raises(KeyboardInterrupt):
            fit(products, method, checkpoint=tmp_path / str(stop_at))
        calls = -10_000
        resumed = fit(products, method, checkpoint=tmp_path / str(stop_at))
        assert resumed.training == expected.training
        assert_same_scores(resumed.score(defective), expected.score(defective))
    with pytest.raises(InputError, match="holds another run"):
        fit(products, method, checkpoint=tmp_path / "3", seed=1)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("method", ["cfa", "reconpatch"])
def test_ctrl_c_ends_the_step_of_those_that_train(products, tmp_path, monkeypatch, method):
    settings = {"calibration_folds": 0, "batch_size": 1}
    expected = fit(products, method, **settings)
    seen = []

    def report(self, description, done, total):
        seen.append((description, done))
        if description == "epoch 1" and done == 4:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("pydefect.progress.ProgressBars.__call__", report)
    with pytest.raises(KeyboardInterrupt):
        fit(products, method, checkpoint=tmp_path, **settings)
    assert seen[-1] == ("epoch 1", 4)
    seen.clear()
    assert fit(products, method, checkpoint=tmp_path, **settings).training == expected.training
    assert next(one for one in seen if one[0].startswith("epoch")) == ("epoch 1", 5)


@every_baseline
def test_settings_are_checked_and_survive_json(method):
    config_type = detector_type(method).config_type
    for preset in config_type.PRESETS:
        config = config_type.from_preset(preset)
        assert config_type.from_dict(json.loads(json.dumps(config.to_dict(), allow_nan=False))) == config
    for field in dataclasses.fields(config_type):
        with pytest.raises(InputError, match=f"^{field.name}: "):
            config_type(**{field.name: object()})
    hints = typing.get_type_hints(config_type)
    with pytest.raises(InputError, match=f"gamma_ray: not a setting of {config_type.TITLE}; allowed are "):
        pydefect.fit([], method=method, gamma_ray=3)
    for name, (low, _) in config_type.RANGES.items():
        assert name in hints
        with pytest.raises(InputError, match=f"^{name}: .* given; allowed are"):
            config_type(**{name: low - 1})


def test_the_command_line_lists_and_fits_methods(products, tmp_path):
    run = CliRunner().invoke
    text = run(app, ["fit", "--help"]).output
    assert all(method in text for method in METHODS)
    (tmp_path / "good").mkdir()
    for index, image in enumerate(products):
        cv2.imwrite(str(tmp_path / "good" / f"{index}.png"), image[:, :, ::-1])
    call = ["fit", str(tmp_path / "good"), "--out", str(tmp_path / "model"), "--weights", "random", "--quiet"]
    small = ["--set", "resize=64", "--set", "channels=20", "--false-alarm-rate", "0.2"]
    done = run(app, [*call, "--method", "padim", *small])
    assert done.exit_code == 0, done.output
    assert pydefect.load(tmp_path / "model").configuration["channels"] == 20
    wrong = run(app, [*call, "--force", "--method", "patchcore", *small])
    assert wrong.exit_code == 2
    assert "channels: not a setting of PatchCore" in wrong.output


def test_a_checkpoint_of_other_shapes_or_weights_is_refused(tmp_path: Path) -> None:
    state = build_backbone("resnet18", "random", seed=1).state_dict()
    save_file(state, tmp_path / "one.safetensors")
    save_file({**state, "conv1.weight": state["conv1.weight"] * 1.01}, tmp_path / "two.safetensors")
    images = np.random.default_rng(0).integers(0, 256, (4, 48, 64, 3), dtype=np.uint8)

    def fit(images, weights):
        how = {"method": "patchcore", "resize": 32, "calibration_folds": 2, "progress": False}
        return pydefect.fit(images, weights=tmp_path / weights, checkpoint=tmp_path / "state", **how)

    fit(images, "one.safetensors")
    fit(images, "one.safetensors")
    with pytest.raises(InputError, match=r"another run \(it differs in backbone_weights\)"):
        fit(images, "two.safetensors")
    with pytest.raises(InputError, match=r"another run \(it differs in images\)"):
        fit(images.reshape(4, 64, 48, 3), "one.safetensors")
