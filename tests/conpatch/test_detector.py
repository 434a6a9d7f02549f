"""The fitted detector: scores, thresholds, going on with new images, model files."""

from __future__ import annotations

import json
import os
import threading
import time
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import pydefect
from pydefect import InputError, ModelFileError, features, persistence
from pydefect.backbones import build_backbone
from pydefect.calibration import conformal_threshold
from pydefect.conpatch import ConPatchConfig, ConPatchDetector, crossfit
from pydefect.conpatch import detector as detector_module
from pydefect.conpatch.crossfit import blend_distance
from pydefect.conpatch.trainer import Trainer
from pydefect.data.layouts import training_images
from pydefect.data.procedural import write_dataset
from pydefect.data.seen import file_print
from pydefect.errors import PydefectError
from pydefect.features import FeatureCache, resolve_precision
from pydefect.ops import reference
from pydefect.persistence import load_tensors, save_tensors
from pydefect.progress import ProgressBars


def assert_same_scores(one: pydefect.Result, other: pydefect.Result) -> None:
    assert np.array_equal(one.image_scores, other.image_scores)
    assert all(np.array_equal(*maps) for maps in zip(one.anomaly_maps, other.anomaly_maps, strict=True))
    assert one.image_threshold == other.image_threshold
    assert one.pixel_threshold == other.pixel_threshold
    assert one.scored_boxes == other.scored_boxes


# -- scoring
# -------------------------------------------------------------------------------------------------------


def test_defects_score_higher_than_good_parts(detector, products, defective):
    good, bad = detector.score(products), detector.score(defective)
    assert bad.image_scores.min() > good.image_scores.max()


def test_a_score_that_is_none_is_an_error(fit, products):
    detector = fit(products, epochs=0, calibration_folds=0)
    detector.bank.centres.fill_(torch.nan)
    with pytest.raises(PydefectError, match=r"image-00000: the score is nan; the model, or the image"):
        detector.score(products)


def test_a_map_that_is_not_finite_is_an_error(fit, products, monkeypatch):
    detector = fit(products, epochs=0, calibration_folds=0)
    predict = detector.predict

    def broken(images):
        scores, maps = predict(images)
        maps = maps.clone()
        maps[1, 3, 5] = torch.inf
        return scores.clone(), maps

    monkeypatch.setattr(detector, "predict", broken)
    with pytest.raises(PydefectError, match=r"image-00001: the anomaly map holds numbers that are not fin"):
        detector.score(products[:2])


@pytest.mark.gpu
@pytest.mark.parametrize("batch", [1, 3])
def test_a_graph_can_capture_scoring(products, defective, batch):
    detector = pydefect.fit(
        products, weights="random", epochs=0, calibration_folds=0, resize=64, device="cuda", progress=False
    )
    held = torch.stack([detector.preprocessing(image) for image in products[:batch]]).cuda()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # runs before the capture, as PyTorch asks for
        for _ in range(3):
            detector.predict(held)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        scores, maps = detector.predict(held)
    held.copy_(torch.stack([detector.preprocessing(image) for image in defective[:batch]]))
    graph.replay()
    expected_scores, expected_maps = detector.predict(held)
    # cuDNN may choose another convolution for the capture.
    torch.testing.assert_close(scores, expected_scores, rtol=1e-2, atol=1e-3)
    torch.testing.assert_close(maps, expected_maps, rtol=1e-2, atol=1e-3)


@pytest.mark.gpu
@pytest.mark.parametrize("bank", ["ema", "kmeans", "kcenter"])
def test_equal_seeds_give_equal_banks_on_a_card(products, bank):
    settings = {"weights": "random", "epochs": 0, "calibration_folds": 0, "resize": 64, "bank": bank}
    one, other = (pydefect.fit(products, device="cuda", progress=False, **settings) for _ in range(2))
    for name, tensor in one.bank.state().items():
        assert torch.equal(tensor, other.bank.state()[name]), name


@pytest.mark.parametrize("image_score", ["max_patch", "max_map"])
@pytest.mark.parametrize("score", ["certainty", "nearest"])
def test_scores_follow_section_3_5(fit, products, defective, score, image_score):
    detector = fit(products, epochs=0, calibration_folds=0, score=score, image_score=image_score)
    images = torch.stack([detector.preprocessing(image) for image in defective])
    scores, maps = detector.predict(images)
    with torch.inference_mode():
        patches = detector.network.representation(detector.features(images)).flatten(0, 1)
        # In float64 from here on; the float32 steps of the detector differ by a few ulps of their inputs.
        distances = torch.cdist(patches.double(), detector.bank.centres.double()).sort(1).values[:, :3]
        patch_scores, expected = reference.score_maps(
            distances.reshape(3, 16, 20, 3), (64, 80), 2.0, certainty=score == "certainty"
        )
    torch.testing.assert_close(maps.double(), expected, rtol=1e-4, atol=1e-5)
    highest = (patch_scores if image_score == "max_patch" else expected).flatten(1).amax(1)
    torch.testing.assert_close(scores.double(), highest, rtol=1e-4, atol=1e-5)


def test_maps_come_back_at_the_size_of_each_image(fit, products):
    detector = fit(products, resize=(64, 80))
    rng = np.random.default_rng(0)
    sizes = [(64, 80), (90, 50), (33, 121), (64, 80)]
    images = [rng.integers(0, 255, (*size, 3), dtype=np.uint8) for size in sizes]
    result = detector.score(images, batch_size=2)
    assert [anomaly_map.shape for anomaly_map in result.anomaly_maps] == sizes
    assert result.scored_boxes == [(0, 0, *size) for size in sizes]
    assert all(
        anomaly_map.dtype == np.float32 and (anomaly_map >= 0).all() for anomaly_map in result.anomaly_maps
    )
    # One at a time or in batches: convolutions may sum in another order.
    singly = [detector.score([image]).image_scores[0] for image in images]
    np.testing.assert_allclose(result.image_scores, singly, rtol=1e-4)


def test_a_crop_scores_its_box_and_nothing_else(fit, products):
    detector = fit(products, resize=(64, 80), crop=(32, 48))
    (box,) = {*detector.score(products).scored_boxes}
    assert box == (16, 16, 48, 64)
    for anomaly_map in detector.score(products).anomaly_maps:
        assert (anomaly_map[16:48, 16:64] > 0).all()
        outside = anomaly_map.copy()
        outside[16:48, 16:64] = 0
        assert (outside == 0).all()


def test_images_of_other_sizes_need_no_resize_to_be_scored(detector):
    """Fully convolutional: a larger photograph of the same scale works."""
    image = np.random.default_rng(0).integers(0, 255, (96, 64, 3), dtype=np.uint8)
    assert detector.score([image]).anomaly_maps[0].shape == (96, 64)


def test_scores_do_not_depend_on_the_number_of_threads(detector, products, defective):
    """The nearest-neighbour search is the same bit for bit (tests/ops/test_knn.py). Convolutions and matrix
    products of the libraries below may sum their at most 2304 terms in other blocks, which moves features
    by about sqrt(2304) * 2**-24 = 3e-6 of their scale; through some 15 layers and the difference to a
    centre 1e-4 is asked.
    """
    results = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        results.append(detector.score([*products, *defective]))
    for other in results[1:]:
        np.testing.assert_allclose(other.image_scores, results[0].image_scores, rtol=1e-4)
        for one, another in zip(results[0].anomaly_maps, other.anomaly_maps, strict=True):
            np.testing.assert_allclose(another, one, rtol=0, atol=1e-4 * float(one.max()))


def test_the_same_fit_twice(fit, products, defective):
    assert_same_scores(fit(products, seed=3).score(defective), fit(products, seed=3).score(defective))


@pytest.mark.parametrize(
    "changes",
    [
        {"preset": "paper", "epochs": 1, "resize": 32, "crop": None},
        {"preset": "default", "epochs": 1, "resize": 32, "crop": None},
        {"losses": "none"},
        {"losses": "contrastive"},
        {"losses": "hypersphere"},
        {"levels": (2, 3), "level_weights": (1.0, 1.0), "representation_dim": 96},
        {"levels": (1,), "level_weights": None, "representation_dim": 16},
        {"representation_dim": 224},
        {"representation_dim": 896, "initialisation": "default"},
        {"representation_dim": 450, "initialisation": "identity"},
        {"gamma": 2.0},
        {"gamma": 8.0, "bank": "kmeans"},
        {"bank": "ema", "rebuild_bank": "end"},
        {"bank": "position_mean", "gamma": 1.0},
        {"early_stopping": True, "epochs": 3},
        {"backbone": "wide_resnet50_2", "epochs": 0, "calibration_folds": 0},
        {"smoothing": 0.0, "calibration_folds": 2},
    ],
    ids=lambda changes: " ".join(f"{name}={value}" for name, value in changes.items()),
)
@pytest.mark.filterwarnings("ignore:.*held-out images support")
def test_every_setting_of_the_paper_fits_saves_and_scores(fit, products, tmp_path, changes):
    if "preset" in changes:
        detector = pydefect.fit(products, weights="random", progress=False, **changes)
    else:
        detector = fit(products, **{"resize": 32, "epochs": 1, **changes})
    result = detector.score(products[:2])
    assert np.isfinite(result.image_scores).all()
    assert detector.configuration["method"] == "conpatch"
    json.dumps(detector.configuration, allow_nan=False)
    detector.save(tmp_path / "model")
    assert_same_scores(pydefect.load(tmp_path / "model").score(products[:2]), result)


# -- thresholds
# ----------------------------------------------------------------------------------------------------


class Spy:
    """Records which images every training saw, and which of the others it scored."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.seen: dict[str, set[int]] = {}
        self.scored: dict[str, set[int]] = {}
        seen, scored, original = self.seen, self.scored, crossfit.CrossFit._finish_epoch

        class Recorded(Trainer):
            def __post_init__(self) -> None:
                seen[self.stage] = set(self.indices)
                super().__post_init__()

        def finish_epoch(self, trainer, fold, epoch, held_out):
            scored.setdefault(trainer.stage, set()).update(held_out)
            original(self, trainer, fold, epoch, held_out)

        monkeypatch.setattr(detector_module, "Trainer", Recorded)
        monkeypatch.setattr(crossfit, "Trainer", Recorded)
        monkeypatch.setattr(crossfit.CrossFit, "_finish_epoch", finish_epoch)


@pytest.mark.parametrize(("folds", "trained"), [(2, 2), (3, 3), (5, 5), (50, 6)])
def test_no_image_calibrates_a_detector_that_has_seen_it(fit, products, monkeypatch, folds, trained):
    spy = Spy(monkeypatch)
    detector = fit(products, calibration_folds=folds, epochs=1)
    assert set(spy.scored) == {f"fold-{fold}" for fold in range(trained)}
    for stage, held_out in spy.scored.items():
        assert held_out.isdisjoint(spy.seen[stage])
        assert held_out | spy.seen[stage] == set(range(6))
    # Every image calibrates once, and the detector itself is made of all.
    assert sorted(index for held_out in spy.scored.values() for index in held_out) == list(range(6))
    assert spy.seen["final"] == set(range(6))
    assert detector.calibration.images == 6


@pytest.mark.filterwarnings("ignore:.*held-out images support")
def test_held_out_images_score_as_unseen_ones(fit, products):
    """With a centre for every patch a detector gives 0 to what it has seen, so a 0 would be a leak."""
    detector = fit(products[:3], bank="kcenter", gamma=1.0, losses="none", smoothing=0.0, calibration_folds=3)
    assert min(detector.calibration.image_scores) > 0
    # Three folds of one image: the same as fitting on the other two and scoring it.
    singles = []
    for held_out in range(3):
        others = [image for index, image in enumerate(products[:3]) if index != held_out]
        unseen = fit(others, bank="kcenter", gamma=1.0, losses="none", smoothing=0.0, calibration_folds=0)
        singles.append(float(unseen.score([products[held_out]]).image_scores[0]))
    # To the bit, although the cache keeps training features as float16 and scoring computes them anew.
    assert list(detector.calibration.image_scores) == sorted(singles)
    scores = dict(detector.training["held_out_scores"])
    assert [scores[f"image-{index:05d}"] for index in range(3)] == singles


def test_the_threshold_is_the_conformal_quantile_of_the_held_out_scores(detector):
    calibration = detector.calibration
    assert len(calibration.image_scores) == len(calibration.map_maxima) == 6
    # k = ceil(7 * 0.8) = 6: the largest of six.
    assert calibration.image_threshold == max(calibration.image_scores)
    assert calibration.pixel_threshold == max(calibration.map_maxima)
    assert calibration.false_alarm_rate == pytest.approx(1 / 7)
    assert calibration.source == "held_out"


def test_decisions_and_masks_follow_the_thresholds(detector, products, defective):
    result = detector.score([*products, *defective])
    assert np.array_equal(result.is_defective, result.image_scores > detector.calibration.image_threshold)
    for mask, anomaly_map in zip(result.masks, result.anomaly_maps, strict=True):
        assert np.array_equal(mask, anomaly_map > detector.calibration.pixel_threshold)
    assert result.is_defective[-3:].all()


def test_another_false_alarm_rate(detector):
    scores, maxima = detector.calibration.image_scores, detector.calibration.map_maxima
    calibration = detector.set_false_alarm_rate(0.5)
    # k = ceil(7 * 0.5) = 4.
    assert calibration is detector.calibration
    assert calibration.image_threshold == scores[3]
    assert calibration.pixel_threshold == maxima[3]
    assert (calibration.image_scores, calibration.map_maxima) == (scores, maxima)
    assert calibration.image_threshold == conformal_threshold(scores, 0.5)[0]
    with pytest.raises(InputError, match=r"false_alarm_rate: 1.5 given; allowed are 0 to 1"):
        detector.set_false_alarm_rate(1.5)
    assert detector.calibration is calibration


def test_too_few_images_for_the_rate_give_a_warning(fit, products):
    with pytest.warns(
        UserWarning, match=r"6 held-out images support a false-alarm rate of 0\.143 at the lowest"
    ):
        fit(products, false_alarm_rate=0.01)


def test_without_folds_there_is_no_threshold(fit, products):
    detector = fit(products, calibration_folds=0)
    assert detector.calibration is None
    assert detector.training["held_out_scores"] == []
    result = detector.score(products)
    assert result.is_defective is None
    assert result.masks is None
    with pytest.raises(InputError, match="keeps no scores of held-out normal images"):
        detector.set_false_alarm_rate(0.1)


def test_one_image_is_enough_to_score(fit, products, defective):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        detector = fit(products[:1])
    assert detector.calibration is None
    assert detector.training["images"] == 1
    assert np.isfinite(detector.score(defective).image_scores).all()


@pytest.mark.parametrize("patience", [1, 2])
def test_early_stopping_takes_the_epoch_of_the_largest_separation(fit, products, patience):
    detector = fit(products, epochs=4, early_stopping=True, patience=patience, learning_rate=3e-3)
    separations = detector.training["separation"]
    best = int(np.argmax(separations))
    assert detector.training["epochs"] == best
    assert [record["epoch"] for record in detector.training["history"]] == list(range(best + 1))
    # It went on until so many epochs without a larger one, or to the end.
    assert len(separations) == min(5, best + patience + 1)


@pytest.mark.filterwarnings("ignore:.*held-out images support")
def test_identical_images(fit, products):
    """Nothing varies, so with a centre for every patch unseen images score 0: no noise to divide by."""
    detector = fit([products[0]] * 4, bank="position_mean", gamma=1.0, epochs=1, early_stopping=True)
    assert np.isfinite(detector.training["separation"]).all()
    result = detector.score(products)
    assert np.isfinite(result.image_scores).all()
    # The one that it was fitted on is no defect.
    assert not result.is_defective[0]
    assert result.p_values[0] == 1


def test_without_early_stopping_all_epochs_are_trained(fit, products):
    assert fit(products, epochs=2, early_stopping=False).training["epochs"] == 2


# -- interruptions
# -------------------------------------------------------------------------------------------------


def test_an_interrupted_fit_resumes_to_the_same_detector(fit, products, defective, tmp_path, monkeypatch):
    settings = {"epochs": 1, "calibration_folds": 2, "early_stopping": True}
    expected = fit(products[:4], **settings)
    calls, stop_at = 0, -1

    def report(self, description, done, total):
        nonlocal calls
        calls += 1
        if calls == stop_at:
            raise KeyboardInterrupt

    monkeypatch.setattr(ProgressBars, "__call__", report)
    fit(products[:4], **settings)
    for stop_at in range(2, calls, 3):
        calls = 0
        with pytest.raises(KeyboardInterrupt):
            fit(products[:4], checkpoint=tmp_path / str(stop_at), **settings)
        calls = -10_000
        resumed = fit(products[:4], checkpoint=tmp_path / str(stop_at), **settings)
        assert resumed.training == expected.training
        assert resumed.calibration == expected.calibration
        assert_same_scores(resumed.score(defective), expected.score(defective))


@pytest.mark.filterwarnings("ignore:.*held-out images support")
def test_a_checkpoint_of_other_images_or_settings_is_refused(fit, products, tmp_path):
    fit(products[:3], epochs=0, checkpoint=tmp_path)
    with pytest.raises(InputError, match=r"holds another run \(it differs in images\)"):
        fit(products[1:4], epochs=0, checkpoint=tmp_path)
    with pytest.raises(InputError, match=r"holds another run \(it differs in phi, sigma\)"):
        fit(products[:3], epochs=0, sigma=2.0, phi=0.5, checkpoint=tmp_path)
    # Random weights come from the seed.
    with pytest.raises(InputError, match=r"\(it differs in backbone_weights, seed\)"):
        fit(products[:3], epochs=0, seed=1, checkpoint=tmp_path)


# -- going on with new images
# --------------------------------------------------------------------------------------


@pytest.mark.parametrize("bank", ["ema", "kcenter", "kmeans"])
def test_update_continues_the_bank(fit, products, bank):
    """As if the stream had gone on: the new images' representations, in order, into the same builder."""
    detector = fit(products[:4], bank=bank, epochs=0)
    with torch.inference_mode():
        images = torch.stack([detector.preprocessing(image) for image in products[4:]])
        patches = detector.network.representation(detector.features(images))
    expected = type(detector.bank).from_state(detector.bank.state(), momentum=0.1)
    for image in patches:
        expected.update(image)
    before = detector.bank.centres
    calibration = detector.calibration
    assert detector.update(products[4:]) == []
    assert torch.equal(detector.bank.centres, expected.centres)
    assert detector.bank.centres.shape == before.shape
    assert not torch.equal(detector.bank.centres, before)
    assert detector.training["images"] == 6
    assert detector.calibration is calibration


def test_updates_at_the_same_time_come_one_after_the_other(fit, products):
    """The later one went on from the bank before both, and the other's images were lost."""
    detector = fit(products[:4], epochs=0, bank="kmeans", calibration_folds=0)
    start = detector.bank
    inside = threading.Event()

    def slow():
        yield products[4]
        inside.set()
        time.sleep(0.2)  # in which the other one would begin, and end
        yield products[5]

    first = threading.Thread(target=detector.update, args=(slow(),))
    first.start()
    inside.wait()
    detector.update(products[:2])
    first.join()
    expected = type(start).from_state(start.state(), momentum=0.1)
    with torch.inference_mode():
        for image in (*products[4:6], *products[:2]):
            inputs = detector.preprocessing(image)[None]
            expected.update(detector.network.representation(detector.features(inputs))[0])
    assert torch.equal(detector.bank.centres, expected.centres)
    assert detector.training["images"] == 8


def test_an_update_lets_new_normal_images_score_lower(fit, products, defective):
    detector = fit(products[:4], epochs=0, bank="kcenter", gamma=1.0, calibration_folds=0)
    before = detector.score(defective).image_scores
    detector.update(defective)
    assert (detector.score(defective).image_scores < 0.7 * before).all()


def test_a_limit_of_the_bank_holds_in_fits_updates_and_files(fit, products, tmp_path):
    detector = fit(products[:4], bank="kcenter", gamma=1.0, max_bank_size=5, epochs=0)
    assert len(detector.bank.centres) == 5
    detector.update(products[4:])
    detector.save(tmp_path / "model")
    loaded = pydefect.load(tmp_path / "model")
    assert len(loaded.bank.centres) == 5
    assert loaded.configuration["max_bank_size"] == 5


def test_one_update_of_two_images_equals_two_updates(fit, products):
    one, two = (fit(products[:4], bank="ema", epochs=0) for _ in range(2))
    one.update(products[4:])
    for image in products[4:]:
        two.update([image])
    # One batch or two: convolutions may sum in another order.
    torch.testing.assert_close(one.bank.centres, two.bank.centres, rtol=1e-4, atol=1e-4)


def test_an_update_from_the_root_of_a_data_set_takes_its_training_images_only(fit, products, tmp_path):
    write_dataset(tmp_path / "flange", n_train=3, n_test_good=1, n_per_defect=1, size=(64, 64), seed=0)
    detector = fit(products, calibration_folds=0)
    before = detector.training["images"]
    assert detector.training["files"] == []  # they came as arrays
    detector.update(tmp_path / "flange")
    assert detector.training["images"] == before + 3
    assert detector.training["files"] == [file_print(path) for path in training_images(tmp_path / "flange")]


@pytest.mark.parametrize("bank", ["ema", "kcenter", "kmeans"])
def test_an_update_that_fails_leaves_the_bank_as_it_was(fit, products, tmp_path, bank):
    detector = fit(products[:4], bank=bank, epochs=0)
    before = {name: value.clone() for name, value in detector.bank.state().items()}
    (tmp_path / "broken.png").write_bytes(b"no image")
    with pytest.raises(InputError, match=r"broken\.png"):
        detector.update([products[4], products[5], tmp_path / "broken.png"])
    assert all(torch.equal(detector.bank.state()[name], value) for name, value in before.items())
    assert detector.training["images"] == 4
    skipped = detector.update([products[4], tmp_path / "broken.png"], on_error="skip")
    assert [os.path.basename(file.name) for file in skipped] == ["broken.png"]
    assert detector.training["images"] == 5


def test_an_image_too_small_for_the_bank(fit, products):
    detector = fit(products[:4], bank="ema", gamma=2.0, epochs=0)
    before = detector.bank.centres.clone()
    small = np.zeros((32, 32, 3), np.uint8)
    with pytest.raises(InputError, match=r"^image-00001: 64 patches; bank='ema' needs one"):
        detector.update([products[4], small])
    assert torch.equal(detector.bank.centres, before)
    (skipped,) = detector.update([small, products[4]], on_error="skip")
    assert skipped.name == "image-00000"
    assert skipped.reason == "64 patches; bank='ema' needs one for each of 160 centres"
    assert detector.training["images"] == 5


# -- model files
# ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bank", ["kcenter", "ema"])
def test_save_and_load_keep_everything(fit, products, defective, tmp_path, bank):
    detector = fit(products, bank=bank)
    detector.save(tmp_path / "model.safetensors")
    loaded = pydefect.load(tmp_path / "model.safetensors")
    assert isinstance(loaded, ConPatchDetector)
    assert loaded.config == detector.config
    assert loaded.calibration == detector.calibration
    assert loaded.training == detector.training
    assert loaded.configuration == detector.configuration
    assert_same_scores(loaded.score(defective), detector.score(defective))
    # Also as a path, and also after going on.
    assert_same_scores(
        pydefect.score(tmp_path / "model.safetensors", defective, progress=False), detector.score(defective)
    )
    detector.update(defective[:1])
    loaded.update(defective[:1])
    assert_same_scores(loaded.score(products), detector.score(products))


@pytest.mark.parametrize("chosen", ["auto", "float32", "bfloat16"])
def test_a_detector_keeps_the_precision_of_its_fit(fit, products, defective, tmp_path, monkeypatch, chosen):
    """Features of another precision are other features, also on a machine where "auto" means another one."""
    detector = fit(products, backbone_precision=chosen)
    precision = resolve_precision(chosen, torch.device("cpu"))
    assert detector.configuration["backbone_precision"] == precision
    detector.save(tmp_path / "model")
    monkeypatch.setattr(features, "cpu_has_bfloat16", lambda: precision != "bfloat16")
    loaded = pydefect.load(tmp_path / "model")
    assert loaded.extractor.precision == precision
    assert_same_scores(loaded.score(defective), detector.score(defective))


def test_a_model_from_before_there_was_a_choice_is_float32(fit, products, tmp_path):
    detector = fit(products, backbone_precision="float32")
    detector.save(tmp_path / "model")
    tensors, metadata = load_tensors(tmp_path / "model")
    del metadata["config"]["backbone_precision"]
    save_tensors(tmp_path / "older", tensors, metadata)
    assert pydefect.load(tmp_path / "older").extractor.precision == "float32"


def test_a_loaded_detector_saves_the_same_file(detector, tmp_path):
    detector.save(tmp_path / "one")
    pydefect.load(tmp_path / "one").save(tmp_path / "two")
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_a_calibration_set_later_is_saved(detector, products, tmp_path):
    detector.set_false_alarm_rate(0.5)
    detector.save(tmp_path / "model")
    assert pydefect.load(tmp_path / "model").calibration == detector.calibration


def test_without_the_backbone(fit, products, defective, tmp_path):
    state = build_backbone("resnet18", "random", seed=11).state_dict()
    save_file(state, tmp_path / "weights.safetensors")
    save_file({**state, "conv1.weight": state["conv1.weight"] * 1.001}, tmp_path / "other.safetensors")
    detector = fit(products, weights=str(tmp_path / "weights.safetensors"))
    detector.save(tmp_path / "whole")
    detector.save(tmp_path / "model", include_backbone=False)
    assert os.path.getsize(tmp_path / "model") < 0.2 * os.path.getsize(tmp_path / "whole")
    with pytest.raises(
        ModelFileError, match="weights: the model file has no backbone in it; give the weights of resnet18"
    ):
        pydefect.load(tmp_path / "model")
    with pytest.raises(
        ModelFileError, match=r"other\.safetensors' are not the weights that the model was fitted with"
    ):
        pydefect.load(tmp_path / "model", weights=tmp_path / "other.safetensors")
    loaded = pydefect.load(tmp_path / "model", weights=tmp_path / "weights.safetensors")
    assert_same_scores(loaded.score(defective), detector.score(defective))


def test_a_failure_while_saving_leaves_the_old_model(detector, defective, tmp_path, monkeypatch):
    path = tmp_path / "model"
    detector.save(path)
    old = path.read_bytes()
    detector.update(defective)

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(persistence.os, "fsync", fail)
    with pytest.raises(OSError, match="disk full"):
        detector.save(path)
    assert path.read_bytes() == old
    assert os.listdir(tmp_path) == ["model"]


def rewrite(path, change) -> None:
    """Apply a change to a model file's tensors and metadata."""
    with safe_open(path, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in [*file.keys()]}
        metadata = json.loads(file.metadata()["pydefect"])
    change(tensors, metadata)
    save_file(tensors, path, metadata={"pydefect": json.dumps(metadata)})


@pytest.mark.parametrize(
    "change",
    [
        pytest.param(lambda tensors, metadata: metadata.update(format=2), id="newer format"),
        pytest.param(lambda tensors, metadata: metadata.pop("format"), id="no format"),
        pytest.param(lambda tensors, metadata: metadata.update(method="otherpatch"), id="unknown method"),
        pytest.param(
            lambda tensors, metadata: metadata["config"].update(newer_setting=1), id="unknown setting"
        ),
        pytest.param(lambda tensors, metadata: metadata.pop("config"), id="no configuration"),
        pytest.param(
            lambda tensors, metadata: metadata["calibration"].update(new=1), id="unknown calibration"
        ),
        pytest.param(lambda tensors, metadata: tensors.pop("bank.centres"), id="no bank"),
        pytest.param(lambda tensors, metadata: tensors.pop("network.projection.weight"), id="no projection"),
        pytest.param(
            lambda tensors, metadata: tensors.update({"network.representation.bias": torch.zeros(3)}),
            id="misshapen",
        ),
        pytest.param(lambda tensors, metadata: metadata["config"].update(levels=[1, 2]), id="fewer levels"),
        pytest.param(lambda tensors, metadata: metadata["config"].update(bank="newer"), id="unknown choice"),
        pytest.param(lambda tensors, metadata: metadata["config"].update(resize=0), id="no size"),
        pytest.param(lambda tensors, metadata: tensors.pop("backbone.conv1.weight"), id="no convolution"),
        pytest.param(
            lambda tensors, metadata: tensors.update({"network.projection.weight": torch.zeros(())}),
            id="no matrix",
        ),
        pytest.param(
            lambda tensors, metadata: tensors.update({"network.representation.weight": torch.zeros(3)}),
            id="a vector",
        ),
        pytest.param(
            lambda tensors, metadata: metadata["calibration"].update(part_maxima=None), id="no maxima"
        ),
        pytest.param(lambda tensors, metadata: metadata.update(method=["conpatch"]), id="methods"),
    ],
)
def test_newer_and_inconsistent_files(detector, tmp_path, change):
    detector.save(tmp_path / "model")
    rewrite(tmp_path / "model", change)
    with pytest.raises(ModelFileError, match=r"model: '.*model'|F has"):
        pydefect.load(tmp_path / "model")


def test_what_is_wrong_with_given_weights_is_said_of_them(detector, tmp_path):
    detector.save(tmp_path / "model", include_backbone=False)
    save_file({"conv1.weight": torch.zeros(3)}, tmp_path / "weights.safetensors")
    with pytest.raises(InputError, match=r"weights.*not a resnet18") as caught:
        pydefect.load(tmp_path / "model", weights=tmp_path / "weights.safetensors")
    assert not isinstance(caught.value, ModelFileError)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x00" * 100])
def test_damaged_files(tmp_path, content):
    (tmp_path / "model").write_bytes(content)
    with pytest.raises(ModelFileError, match="is damaged or no safetensors file"):
        pydefect.load(tmp_path / "model")


@pytest.mark.filterwarnings("ignore:.*held-out images support")
def test_files_of_others(fit, products, tmp_path):
    save_file({"weight": torch.zeros(3)}, tmp_path / "foreign.safetensors")
    with pytest.raises(ModelFileError, match="was not written by pydefect"):
        pydefect.load(tmp_path / "foreign.safetensors")
    fit(products[:2], epochs=0, checkpoint=tmp_path / "state")
    with pytest.raises(
        ModelFileError, match=r"has format None and method None; this version of pydefect reads"
    ):
        pydefect.load(tmp_path / "state" / "final.safetensors")


def test_the_file_says_what_it_is(detector, tmp_path):
    detector.save(tmp_path / "model")
    with safe_open(tmp_path / "model", framework="pt") as file:
        metadata = json.loads(file.metadata()["pydefect"])
    assert metadata["format"] == 1
    assert metadata["method"] == "conpatch"
    assert metadata["version"] == pydefect.__version__
    assert ConPatchConfig.from_dict(metadata["config"]) == detector.config
    assert len(metadata["backbone_sha256"]) == 64


def test_patches_of_each_image_are_mixed_with_those_of_the_next() -> None:
    cache = FeatureCache()
    cache.append([torch.tensor([9.0, 0.0, 2.0, 6.0]).reshape(4, 1, 1, 1).expand(4, 1, 2, 2)])
    network = SimpleNamespace(representation=lambda levels: levels[0].permute(0, 2, 3, 1).flatten(1, 2))
    bank = SimpleNamespace(centres=torch.zeros(1, 1))
    # 0 with 6, 2 with 0, 6 with 2.
    found = blend_distance(network, bank, cache, [1, 2, 3], seed=0, device=torch.device("cpu"))
    assert found == pytest.approx((3 + 1 + 4) / 3)
