"""The detector: fit, score, calibrate, save, load, resume."""

from __future__ import annotations

import shutil
import signal
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import pydefect
from pydefect.dual_ae import DualAEConfig, DualAEDetector, EfficientADDetector
from pydefect.dual_ae.detector import _split
from pydefect.dual_ae.pdn import PDN
from pydefect.errors import InputError, ModelFileError
from pydefect.scoring import Result

pytestmark = pytest.mark.filterwarnings("ignore:.*held-out images support")


def fit(images, method="dual_ae", **settings):
    return pydefect.fit(images, method=method, progress=False, **settings)


@pytest.fixture(scope="module")
def fitted(teacher_file, good_images):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return fit(
            good_images,
            teacher=str(teacher_file),
            resize=(64, 72),
            steps=2,
            precision="float32",
            false_alarm_rate=0.5,
            held_out_share=0.5,
        )


def test_the_steps_are_those_of_the_device_where_none_are_asked_for(
    teacher_file, good_images, tmp_path, monkeypatch
):
    assert (DualAEConfig.default_steps("cpu"), DualAEConfig.default_steps("cuda")) == (1_500, 3_000)
    monkeypatch.setattr(DualAEConfig, "default_steps", staticmethod({"cpu": 3}.__getitem__))
    settings = {"teacher": str(teacher_file), "resize": 64, "held_out_share": 0, "penalty": "none"}
    detector = fit(good_images, **settings, additions="none")
    assert (detector.training["steps"], detector.config.steps) == (3, 3)
    detector.save(tmp_path / "model.safetensors")
    assert pydefect.load(tmp_path / "model.safetensors").config.steps == 3


def test_scores_maps_and_kinds(fitted, good_images):
    defective = good_images[0].copy()
    defective[20:40, 20:40] = (255, 0, 255)
    result = pydefect.score(fitted, [good_images[1], defective], batch_size=2, progress=False)
    assert isinstance(fitted, DualAEDetector)
    assert fitted.training["images"] == fitted.training["held_out"] == 3
    assert [one.shape for one in result.anomaly_maps] == [(64, 72)] * 2
    for one, local, whole in zip(result.anomaly_maps, result.local_maps, result.global_maps, strict=True):
        np.testing.assert_allclose(one, (local + whole) / 2, rtol=1e-5)
        assert one.min() >= 0
    assert result.image_scores[1] == pytest.approx(result.anomaly_maps[1].max())
    assert result.image_scores[1] > result.image_scores[0]
    assert set(result.part_thresholds) == {"local", "global"}
    assert result.kind[1] in ("structural", "logical", "both")
    alone = pydefect.score(fitted, [defective], progress=False)
    np.testing.assert_allclose(alone.anomaly_maps[0], result.anomaly_maps[1], rtol=1e-4, atol=1e-5)


def test_a_saved_detector_scores_as_before(fitted, good_images, teacher_file, tmp_path):
    before = pydefect.score(fitted, good_images, progress=False)
    fitted.save(tmp_path / "whole.safetensors")
    fitted.save(tmp_path / "part.safetensors", include_backbone=False)
    whole = pydefect.load(tmp_path / "whole.safetensors")
    part = pydefect.load(tmp_path / "part.safetensors", weights=teacher_file)
    for loaded in (whole, part):
        after = pydefect.score(loaded, good_images, progress=False)
        np.testing.assert_array_equal(after.image_scores, before.image_scores)
        assert after.kind == before.kind
        np.testing.assert_array_equal(after.global_maps[0], before.global_maps[0])
        assert loaded.calibration == fitted.calibration
        assert loaded.scales == fitted.scales
    assert (tmp_path / "part.safetensors").stat().st_size < (tmp_path / "whole.safetensors").stat().st_size
    # No folder of this machine goes into the file.
    assert whole.config.teacher == teacher_file.name
    with pytest.raises(ModelFileError, match="no teacher in it"):
        pydefect.load(tmp_path / "part.safetensors")
    save_file(PDN().state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(ModelFileError, match="not the teacher"):
        pydefect.load(tmp_path / "part.safetensors", weights=tmp_path / "other.safetensors")


def test_weights_that_are_given_win_over_a_file_of_the_teachers_name(
    fitted, teacher_file, tmp_path, monkeypatch
):
    fitted.save(tmp_path / "part.safetensors", include_backbone=False)
    save_file(PDN().state_dict(), tmp_path / teacher_file.name)
    monkeypatch.chdir(tmp_path)
    pydefect.load("part.safetensors", weights=teacher_file)
    with pytest.raises(ModelFileError, match="not the teacher"):
        pydefect.load("part.safetensors", weights=teacher_file.name)


def test_efficientad_is_the_method_without_additions(settings, good_images, tmp_path):
    detector = fit(good_images, method="efficientad", **settings, held_out_share=0.2)
    assert isinstance(detector, EfficientADDetector)
    same = fit(good_images, **settings, additions="none", held_out_share=0.2)
    assert detector.training["history"] == same.training["history"]
    detector.save(tmp_path / "model.safetensors")
    loaded = pydefect.load(tmp_path / "model.safetensors")
    assert isinstance(loaded, EfficientADDetector)
    np.testing.assert_array_equal(
        pydefect.score(loaded, good_images[:1], progress=False).image_scores,
        pydefect.score(same, good_images[:1], progress=False).image_scores,
    )


def test_a_fit_goes_on_where_it_stopped(settings, good_images, tmp_path, monkeypatch):
    from pydefect.dual_ae import trainer as module

    whole = fit(good_images, **settings)
    step = module.Trainer._train_step

    def stop(self, penalty):
        if self.step == 2:
            self._save()
            raise KeyboardInterrupt
        return step(self, penalty)

    monkeypatch.setattr(module.Trainer, "_train_step", stop)
    with pytest.raises(KeyboardInterrupt):
        fit(good_images, **settings, checkpoint=tmp_path)
    monkeypatch.setattr(module.Trainer, "_train_step", step)
    resumed = fit(good_images, **settings, checkpoint=tmp_path)
    assert resumed.calibration == whole.calibration
    assert resumed.training == whole.training
    assert all(one.grad is None for one in resumed.network.parameters())  # gradients end with the training
    with pytest.raises(InputError, match="learning_rate"):
        fit(good_images, **settings, checkpoint=tmp_path, learning_rate=1e-3)


@pytest.mark.usefixtures("interruptible")
def test_ctrl_c_ends_the_step_and_saves_it(settings, good_images, tmp_path, monkeypatch):
    settings = {**settings, "additions": "none"}
    whole = fit(good_images, **settings)
    steps = []

    def report(self, description, done, total):
        if description == "training" and done:
            steps.append(done)
            if len(steps) == 2:
                signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("pydefect.progress.ProgressBars.__call__", report)
    with pytest.raises(KeyboardInterrupt):
        fit(good_images, **settings, checkpoint=tmp_path)
    resumed = fit(good_images, **settings, checkpoint=tmp_path)
    assert steps == list(range(1, settings["steps"] + 1))
    assert resumed.calibration == whole.calibration
    assert resumed.training == whole.training


def test_validation_images_are_calibrated_on(settings, good_images):
    settings = {**settings, "steps": 1, "additions": "none", "penalty": "none"}
    detector = fit(good_images[:4], validation=good_images[4:], **settings)
    assert (detector.training["images"], detector.training["held_out"]) == (4, 2)
    with pytest.raises(InputError, match="validation"):
        pydefect.fit(good_images[:3], validation=good_images[3:], weights="random", progress=False)


def test_a_data_sets_validation_part_is_taken(settings, good_images, tmp_path):
    for part, images in (
        ("train", good_images[:3]),
        ("validation", good_images[3:5]),
        ("test", good_images[5:]),
    ):
        folder = tmp_path / "set" / part / "good"
        folder.mkdir(parents=True)
        for number, image in enumerate(images):
            cv2.imwrite(str(folder / f"{number}.png"), image)
    settings = {**settings, "steps": 1, "additions": "none", "penalty": "none"}
    detector = fit(tmp_path / "set", **settings)
    assert (detector.training["images"], detector.training["held_out"]) == (3, 2)
    # Their names are those of the files that score so.
    kept = dict(detector.training["held_out_scores"])
    assert list(kept.values()) == sorted(detector.calibration.image_scores, reverse=True)
    result = pydefect.score(detector, tmp_path / "set" / "validation", batch_size=1, progress=False)
    expected = {Path(name).name: score for name, score in zip(result.names, result.image_scores, strict=True)}
    assert kept == expected
    shutil.rmtree(tmp_path / "set" / "validation")
    with pytest.raises(InputError, match=r"validation: .* without a validation part"):
        fit(good_images[:3], validation=tmp_path / "set", **settings)


@pytest.mark.parametrize("method", ["dual_ae", "efficientad"])
def test_held_out_images_keep_their_names(settings, good_images, tmp_path, method):
    settings = {**settings, "steps": 1, "penalty": "none", "held_out_share": 0.5}
    detector = fit(good_images, method, **settings)
    kept = detector.training["held_out_scores"]
    assert [score for _, score in kept] == sorted(detector.calibration.image_scores, reverse=True)
    images = [good_images[int(name.removeprefix("image-"))] for name, _ in kept]
    result = pydefect.score(detector, images, batch_size=1, progress=False)
    assert result.image_scores.tolist() == [score for _, score in kept]
    detector.save(tmp_path / "model")
    assert pydefect.load(tmp_path / "model").training == detector.training


@pytest.mark.parametrize(("count", "share"), [(1, 0.1), (3, 0.0)])
def test_without_held_out_images_there_are_no_thresholds(count, share, settings, good_images):
    settings = {**settings, "steps": 1, "additions": "none", "penalty": "none"}
    detector = fit(good_images[:count], **settings, held_out_share=share)
    result = pydefect.score(detector, good_images[:1], progress=False)
    assert detector.calibration is None
    assert detector.training["held_out_scores"] == []
    assert result.kind is None
    assert np.isfinite(result.image_scores).all()
    assert result.image_scores[0] > 0


def test_a_held_out_image_scores_as_it_did_in_the_fit(fitted, good_images):
    """To the bit, although the cache keeps images as float16: a copy must not pass over the threshold."""
    held_out = _split(len(good_images), 0.5, 0)[1]
    result = pydefect.score(fitted, [good_images[index] for index in held_out], progress=False)
    assert sorted(result.image_scores.tolist()) == list(fitted.calibration.image_scores)
    for name, scores in result.part_scores.items():
        assert sorted(scores.tolist()) == list(fitted.calibration.part_maxima[name])


def test_calibrating_anew_moves_the_parts_thresholds_too(fitted, good_images):
    before = fitted.calibration
    try:
        after = pydefect.calibrate(fitted, normal=good_images[:4], false_alarm_rate=0.2, progress=False)
        assert {len(maxima) for maxima in after.part_maxima.values()} == {4}
        again = fitted.set_false_alarm_rate(0.5)
        assert again.part_thresholds["local"] < after.part_thresholds["local"]
        assert pydefect.Calibration.from_dict(after.to_dict()) == after
    finally:
        fitted.calibration = before


def test_the_split_is_seeded_and_keeps_something_to_train_on():
    train, held_out = _split(40, 0.1, 3)
    assert sorted([*train, *held_out]) == list(range(40))
    assert len(held_out) == 4
    assert (train, held_out) == _split(40, 0.1, 3)
    assert held_out != _split(40, 0.1, 4)[1]
    assert _split(1, 0.5, 0) == ([0], [])
    assert len(_split(2, 0.01, 0)[1]) == 1


def test_images_of_another_size_are_refused(teacher_file, good_images, fitted):
    mixed = [good_images[0], np.zeros((80, 90, 3), np.uint8)]
    with pytest.raises(InputError, match="resize"):
        fit(mixed, teacher=str(teacher_file), resize=None)
    with pytest.raises(InputError, match=r"64 x 64 pixels.*64 x 72"):
        fitted.predict(torch.zeros(1, 3, 64, 64))


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (np.zeros((1, 3, 64, 72), np.float32), r"images: ndarray given; a tensor \[B, 3, h, w\] is needed"),
        (torch.zeros(3, 64, 72), r"images: the shape \[3, 64, 72\] given; allowed is \[B, 3, h, w\]"),
        (torch.zeros(1, 1, 64, 72), r"images: the shape \[1, 1, 64, 72\] given"),
        (torch.zeros(0, 3, 64, 72), r"images: the shape \[0, 3, 64, 72\] given; .* with B >= 1"),
        (torch.zeros(1, 3, 64, 72).double(), r"images: torch.float64 given; allowed is torch.float32"),
        (torch.zeros(1, 3, 64, 72, device="meta"), "images: on meta; the detector computes on cpu"),
    ],
    ids=["no tensor", "no batch", "grey", "none", "double", "elsewhere"],
)
def test_network_inputs_are_looked_at(fitted, images, message):
    for predict in (fitted.predict, fitted.predict_maps):
        with pytest.raises(InputError, match=message):
            predict(images)


def test_what_cannot_work_is_said_before_any_work(settings, good_images, tmp_path):
    with pytest.raises(InputError, match="penalty"):
        fit(good_images, **settings, penalty=str(tmp_path / "nothing"))
    with pytest.raises(InputError, match="images"):
        fit([np.zeros((40, 90, 3), np.uint8)], **{**settings, "resize": None})
    with pytest.raises(InputError, match="teacher"):
        fit(good_images, **{**settings, "teacher": str(Path("no") / "such.pth")})


@pytest.mark.parametrize(
    ("score", "local", "whole", "kind"),
    [
        (0.5, 9, 9, None),
        (2, 2, 0.5, "structural"),
        (2, 0.5, 2, "logical"),
        (2, 2, 3, "both"),
        (2, 0.9, 0.8, "structural"),
        (2, 0.7, 0.8, "logical"),
    ],
)
def test_the_kind_of_a_defect_follows_from_the_two_maps(score, local, whole, kind):
    result = Result(
        image_scores=np.array([score], dtype=np.float32),
        anomaly_maps=[],
        paths=[None],
        names=["one"],
        scored_boxes=[(0, 0, 1, 1)],
        image_threshold=1.0,
        part_scores={"local": np.array([local * 3.0]), "global": np.array([whole * 5.0])},
        part_thresholds={"local": 3.0, "global": 5.0},
    )
    assert result.kind == [kind]


@pytest.mark.filterwarnings("ignore:.*held-out images support:UserWarning")
def test_a_checkpoint_of_other_validation_images_is_refused(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (4, 64, 72, 3), dtype=np.uint8)

    def fit(validation):
        how = {"method": "dual_ae", "resize": (64, 72), "steps": 1, "penalty": "none", "precision": "float32"}
        return pydefect.fit(images, validation=validation, checkpoint=tmp_path, progress=False, **how)

    fit(images[:2])
    for other in (images[2:], None):
        with pytest.raises(InputError, match=r"another run \(it differs in images\)"):
            fit(other)
