"""The public face: what it takes, what it refuses and with which words, and that its documented examples
run."""

from __future__ import annotations

import copy
import dataclasses
import doctest
import importlib
import os
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

import pydefect
from pydefect import InputError, ModelFileError, WeightsNotFoundError
from pydefect import detector as module
from pydefect.data import open_images, read_dataset
from pydefect.data.procedural import render_product, write_dataset
from pydefect.detector import resolve_device
from pydefect.dual_ae.detector import DualAEDetector
from pydefect.preprocessing import Preprocessing

PACKAGE = Path(pydefect.__file__).parent
SMALL = {
    "weights": "random",
    "resize": 32,
    "crop": None,
    "representation_dim": 24,
    "bank": "kcenter",
    "gamma": 4.0,
    "epochs": 0,
    "calibration_folds": 2,
    "false_alarm_rate": 0.4,
    "progress": False,
}


@pytest.fixture(scope="module")
def good() -> list[np.ndarray]:
    return [render_product(np.random.default_rng(seed), 64)[0] for seed in range(4)]


@pytest.fixture(scope="module")
def detector(good) -> pydefect.Detector:
    return pydefect.fit(good, **SMALL)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data") / "flange"
    write_dataset(root, n_train=4, n_test_good=2, n_per_defect=1, size=64)
    return root


# -- working ways
# --------------------------------------------------------------------------------------------------


def test_from_a_folder_to_decisions_and_metrics(dataset, tmp_path):
    """The README's path: a category's folder gives its training images, and the file scores as the detector
    does."""
    detector = pydefect.fit(dataset, **SMALL)
    assert detector.training["images"] == 4
    detector.save(tmp_path / "flange.safetensors")
    files = sorted((dataset / "test").rglob("*.png"))
    result = pydefect.score(tmp_path / "flange.safetensors", dataset / "test", progress=False)
    assert sorted(result.paths) == files
    assert len(result) == len(files) == len(result.anomaly_maps) == len(result.image_scores)
    assert result.image_scores.dtype == np.float32
    assert np.array_equal(result.is_defective, result.image_scores > result.image_threshold)
    assert [mask.shape for mask in result.masks] == [(64, 64)] * len(files)
    evaluation = pydefect.evaluate(tmp_path / "flange.safetensors", dataset, progress=False)
    assert evaluation.images == len(files)
    by_path = dict(zip(result.paths, result.image_scores.tolist(), strict=True))
    defective = [score for path, score in by_path.items() if path.parent.name != "good"]
    normal = [score for path, score in by_path.items() if path.parent.name == "good"]
    pairs = [(bad > fine) + 0.5 * (bad == fine) for bad in defective for fine in normal]
    assert evaluation.image.auroc == pytest.approx(np.mean(pairs), abs=1e-12)


def test_every_source_gives_the_same_detector(good, tmp_path):
    (tmp_path / "images").mkdir()
    for index, image in enumerate(good):
        cv2.imwrite(str(tmp_path / "images" / f"{index}.png"), image[:, :, ::-1])
    paths = sorted((tmp_path / "images").iterdir())
    sources = [
        tmp_path / "images",
        str(tmp_path / "images"),
        paths,
        [str(path) for path in paths],
        np.stack(good),
        torch.from_numpy(np.stack(good)),
        iter(good),
        (image for image in good),
    ]
    scores = [
        pydefect.score(pydefect.fit(source, **SMALL), good, progress=False).image_scores for source in sources
    ]
    assert all(np.array_equal(one, scores[0]) for one in scores)


def test_numpy_and_path_arguments(good, tmp_path):
    settings = {**SMALL, "epochs": np.int64(1), "gamma": np.float32(4)}
    detector = pydefect.fit(
        good, seed=np.int64(1), checkpoint=tmp_path / "state", device=torch.device("cpu"), **settings
    )
    detector.save(tmp_path / "model")
    assert pydefect.load(tmp_path / "model", device="auto").configuration["seed"] == 1


def test_unreadable_images_can_be_left_out(good, tmp_path, detector):
    for index, image in enumerate(good):
        cv2.imwrite(str(tmp_path / f"{index}.png"), image[:, :, ::-1])
    (tmp_path / "2.png").write_bytes(b"cut off")
    with pytest.raises(InputError, match=r"2\.png"):
        pydefect.fit(tmp_path, **SMALL)
    fitted = pydefect.fit(tmp_path, on_error="skip", **SMALL)
    assert fitted.training["images"] == 3
    assert [os.path.basename(name) for name in fitted.training["skipped"]] == ["2.png"]
    with pytest.raises(InputError, match=r"2\.png"):
        pydefect.score(detector, tmp_path, progress=False)
    result = pydefect.score(detector, tmp_path, on_error="skip", progress=False)
    assert result.names == ["0.png", "1.png", "3.png"]
    assert [skipped.name for skipped in result.skipped] == ["2.png"]


def test_batches_of_large_photographs_are_smaller(good, monkeypatch):
    monkeypatch.setattr(module, "_HELD_BYTES", 2 * good[0].nbytes)
    images, preprocessing = open_images([*good[:3], good[0][:8, :8]]), Preprocessing.create(resize=16)
    groups = [len(group) for group, _ in module.batches(images, preprocessing, 8)]
    assert groups == [2, 2]
    assert [len(group) for group, _ in module.batches(images, preprocessing, 1)] == [1] * 4


@pytest.mark.parametrize("batch_size", [1, 8])
def test_an_image_of_a_size_that_the_method_cannot_score_is_skipped_or_named(good, batch_size):
    """PaDiM has a distribution for every position: only the images that it saw tell how many there are."""
    how = {"weights": "random", "method": "padim", "resize": None, "channels": 8, "calibration_folds": 0}
    detector = pydefect.fit(good[:3], progress=False, **how)
    images = [good[0], good[1][:-16], good[2]]
    result = detector.score(images, batch_size=batch_size, on_error="skip")
    assert result.names == ["image-00000", "image-00002"]
    (skipped,) = result.skipped
    assert skipped.name == "image-00001"
    assert skipped.reason.startswith("a patch grid of ")
    with pytest.raises(InputError, match=r"^image-00001: a patch grid of .*, but PaDiM was fitted on"):
        detector.score(images, batch_size=batch_size)


def test_a_data_set_is_fitted_on_its_training_part(tmp_path):
    root = write_dataset(tmp_path / "flange", n_train=4, n_test_good=2, n_per_defect=1, size=(64, 64), seed=0)
    dataset = read_dataset(root)
    detector = pydefect.fit(dataset, **SMALL)
    same = pydefect.fit([sample.image for sample in dataset.train], **SMALL)
    assert detector.training == same.training
    assert detector.training["images"] == len(detector.training["files"]) == 4
    scores = [one.score(root / "test", progress=False).image_scores for one in (detector, same)]
    assert np.array_equal(*scores)
    with pytest.raises(InputError, match="images: the data set 'flange' has no training images"):
        pydefect.fit(dataclasses.replace(dataset, train=()), **SMALL)


def test_defective_images_in_the_training_folder_are_named(tmp_path):
    rng = np.random.default_rng(0)
    base = render_product(rng, 64)[0].astype(int)
    for number in range(18):
        image = np.clip(base + rng.integers(-9, 10, base.shape), 0, 255).astype(np.uint8)
        if number in (3, 11):
            image[number : number + 24, 20:44] = (255, 0, 255) if number == 3 else (0, 255, 0)
        path = tmp_path / "good" / str(number % 2) / f"{number:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(path), image[:, :, ::-1])
    with pytest.warns(UserWarning, match=r"held-out images .* \(2 of 18\): (03|11)\.png, (03|11)\.png; look"):
        detector = pydefect.fit(tmp_path / "good", **SMALL)
    found = copy.deepcopy(detector.training["held_out_scores"])
    assert {name for name, _ in found[:2]} == {"03.png", "11.png"}
    assert [score for _, score in found] == sorted(detector.calibration.image_scores, reverse=True)
    # What the fit found stays, whatever the thresholds stand on later, and goes into the model file.
    pydefect.calibrate(detector, normal=tmp_path / "good" / "0", false_alarm_rate=0.4, progress=False)
    assert detector.training["held_out_scores"] == found
    detector.save(tmp_path / "model")
    assert pydefect.load(tmp_path / "model").training == detector.training


@pytest.mark.parametrize("batch_size", [1, 3])
def test_an_image_smaller_than_the_crop_is_named_and_can_be_left_out(good, tmp_path, batch_size):
    for index, image in enumerate(good):
        cv2.imwrite(str(tmp_path / f"{index}.png"), image[:20] if index == 2 else image)
    how = {**SMALL, "resize": None, "crop": 32}
    message = r"2\.png: the image is 20 x .*, smaller than the crop of 32 x 32"
    with pytest.raises(InputError, match=message):
        pydefect.fit(tmp_path, **how)
    fitted = pydefect.fit(tmp_path, on_error="skip", **how)
    assert fitted.training["images"] == 3
    assert [os.path.basename(name) for name in fitted.training["skipped"]] == ["2.png"]
    with pytest.raises(InputError, match=message):
        pydefect.score(fitted, tmp_path, batch_size=batch_size, progress=False)
    result = pydefect.score(fitted, tmp_path, batch_size=batch_size, on_error="skip", progress=False)
    assert result.names == ["0.png", "1.png", "3.png"]
    assert [skipped.name for skipped in result.skipped] == ["2.png"]
    assert "smaller than the crop" in result.skipped[0].reason


def test_a_batch_size_may_be_numpys(good, detector):
    expected = pydefect.score(detector, good, batch_size=3, progress=False).image_scores
    scores = pydefect.score(detector, good, batch_size=np.int64(3), progress=False).image_scores
    np.testing.assert_array_equal(scores, expected)
    with pytest.raises(InputError, match="allowed are whole numbers from 1 on"):
        pydefect.score(detector, good, batch_size=np.float32(3), progress=False)


def test_nothing_is_shown_without_progress_and_bars_go_to_standard_error(good, detector, capsys):
    pydefect.score(detector, good, progress=False)
    assert capsys.readouterr() == ("", "")
    pydefect.score(detector, good, progress=True)
    out, err = capsys.readouterr()
    assert out == ""
    assert "scoring" in err


on_three_methods = pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("conpatch", {"weights": "random", "resize": 32, "calibration_folds": 2}),
        ("padim", {"weights": "random", "resize": None, "channels": 4, "calibration_folds": 2}),
        ("dual_ae", {"resize": 64, "steps": 2}),
    ],
)


@pytest.mark.filterwarnings("ignore:.*held-out images support")
@on_three_methods
def test_a_region_is_learned_and_scored_as_if_it_were_the_image(good, tmp_path, method, settings):
    scene = [np.pad(image, ((9, 5), (3, 30), (0, 0)), mode="wrap") for image in good]
    height, width = good[0].shape[:2]
    region = (9, 3, 9 + height, 3 + width)
    how = {"method": method, "progress": False, **settings}
    fitted, expected = pydefect.fit(scene, region=region, **how), pydefect.fit(good, **how)
    fitted.save(tmp_path / "model.safetensors")
    found = pydefect.score(tmp_path / "model.safetensors", scene, progress=False)
    alone = pydefect.score(expected, good, progress=False)
    np.testing.assert_array_equal(found.image_scores, alone.image_scores)
    assert (found.image_threshold, found.pixel_threshold) == (alone.image_threshold, alone.pixel_threshold)
    assert found.scored_boxes == [region] * len(good)
    for whole, part in zip(found.anomaly_maps, alone.anomaly_maps, strict=True):
        np.testing.assert_array_equal(whole, np.pad(part, ((9, 5), (3, 30))))

    with pytest.raises(InputError, match=r"image-00000: .* region and ignore reach to"):
        pydefect.score(fitted, good[0], progress=False)
    result = pydefect.score(fitted, [good[0], scene[0]], on_error="skip", progress=False)
    assert result.names == ["image-00001"]


@pytest.mark.filterwarnings("ignore:.*held-out images support")
@on_three_methods
def test_what_is_ignored_changes_no_score(good, tmp_path, method, settings):
    shapes = {"region": [(0, 0), (0, 60), (63, 63), (63, 0)], "ignore": [(10, 20, 30, 50)]}
    detector = pydefect.fit(good, method=method, progress=False, **shapes, **settings)
    detector.save(tmp_path / "model.safetensors")
    ignored = detector.preprocessing.ignored((64, 64))
    spoiled = [np.where(ignored[..., None], 255 - image, image) for image in good]
    for one in (detector, pydefect.load(tmp_path / "model.safetensors")):
        assert one.preprocessing == detector.preprocessing
        result, other = (pydefect.score(one, images, progress=False) for images in (good, spoiled))
        np.testing.assert_array_equal(result.image_scores, other.image_scores)
        for index, anomaly_map in enumerate(result.anomaly_maps):
            np.testing.assert_array_equal(anomaly_map, other.anomaly_maps[index])
            np.testing.assert_array_equal(result.ignored[index], ignored)
            assert not anomaly_map[ignored].any()
            assert anomaly_map[~ignored].any()
        for maps in result.part_maps.values():
            assert not any(part[ignored].any() for part in maps)


def test_streaming_scores_one_after_the_other(good, detector):
    """A camera has no end, and its next image may be long in coming: nothing waits for that."""

    def camera():
        yield from good[:2]
        raise AssertionError("the result of a full batch waited for the next image")

    for batch_size in (1, 2):
        stream = detector.stream(camera(), batch_size=batch_size)
        expected = detector.score(good[:2], batch_size=batch_size).image_scores
        for score in expected:
            assert next(stream).image_score == float(score)
        stream.close()


def test_a_stream_tells_at_once_what_it_leaves_out(good, detector):
    """A part without a decision, which an endless stream never told of."""
    skipped: list[pydefect.data.SkippedImage] = []
    frames = [good[0], b"no image", good[1], good[2], b"nor this", b"nor this", good[3]]
    stream = detector.stream(frames, batch_size=1, on_error="skip", skipped=skipped)
    assert [(one.name, len(skipped)) for one in stream] == [
        ("image-00000", 0),
        ("image-00002", 1),
        ("image-00003", 1),
        ("image-00006", 3),
    ]
    assert [one.name for one in skipped] == ["image-00001", "image-00004", "image-00005"]


@pytest.mark.parametrize("fault", [OSError("camera timeout"), b"no image"])
def test_what_a_source_gave_before_it_failed_is_scored(good, detector, fault):
    def camera():
        yield from good[:3]
        if isinstance(fault, bytes):
            yield fault
        else:
            raise fault

    scored = []
    with pytest.raises((OSError, InputError), match=r"camera timeout|is no image"):
        scored.extend(detector.stream(camera(), batch_size=8))
    stream = detector.stream(camera(), batch_size=8)
    scored = [next(stream).image_score for _ in range(3)]
    assert scored == detector.score(good[:3]).image_scores.tolist()
    with pytest.raises((OSError, InputError), match=r"camera timeout|is no image"):
        next(stream)


def same(one, other) -> bool:
    """Whether two values of a result are equal in every bit."""
    if isinstance(one, np.ndarray):
        return one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(same(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return len(one) == len(other) and all(map(same, one, other))
    return one == other


@pytest.mark.filterwarnings("ignore:.*held-out images support:UserWarning")
@pytest.mark.parametrize("method", ["conpatch", "dual_ae"])
def test_a_streamed_image_is_decided_as_score_decides_it(method, good, tmp_path, monkeypatch):
    settings = SMALL if method == "conpatch" else {"resize": 64, "steps": 2, "progress": False}
    detector = pydefect.fit(good, method=method, **settings)
    cv2.imwrite(str(tmp_path / "part.png"), 255 - good[0])
    images = [good[1], tmp_path / "part.png"]
    calibration = detector.calibration
    for held_out in (calibration, None):
        detector.calibration = held_out
        expected = [pydefect.score(detector, [image], batch_size=1, progress=False) for image in images]
        streamed = list(detector.stream(images, batch_size=1))
        with monkeypatch.context() as patch:
            patch.setattr(type(detector), "predict_maps", None)  # nothing is scored again
            decided = [detector.decide(scored) for scored in streamed]
        for one, other in zip(decided, expected, strict=True):
            other.names[:] = one.names  # each was the first of its call
            assert vars(one).keys() == vars(other).keys()
            assert all(same(value, vars(other)[name]) for name, value in vars(one).items())
            for name in ("is_defective", "kind", "masks", "regions", "local_maps", "global_maps"):
                assert same(getattr(one, name), getattr(other, name)), name
        assert (decided[0].is_defective is None) == (held_out is None)
        assert (decided[0].local_maps is None) == (method == "conpatch")
    assert decided[1].paths == [tmp_path / "part.png"]
    with pytest.raises(InputError, match="scored: Result given; allowed is one ScoredImage"):
        detector.decide(decided[0])


def test_a_method_that_cannot_go_on_learning_says_so(good):
    settings = {"weights": "random", "resize": 32, "crop": None, "channels": 4, "calibration_folds": 0}
    detector = pydefect.fit(good, method="padim", **settings, progress=False)
    with pytest.raises(InputError, match="update: padim cannot go on learning; fit again"):
        detector.update(good)


# -- refusals
# ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"method": "magic"}, "method: 'magic' is not known; allowed are conpatch"),
        ({"method": None}, "method: None is not known; allowed are conpatch"),
        ({"preset": "fast"}, "preset: 'fast' is not known; allowed are default, paper"),
        ({"preset": ["paper"]}, r"preset: \['paper'\] is not known; allowed are default, paper"),
        ({"backbone": "vgg16"}, "backbone: 'vgg16' is not known; allowed are resnet18, "),
        ({"weights": None}, "weights: None given; a path is needed"),
        (
            {"weights": "nothing.pth"},
            "weights: no file 'nothing.pth'; give a .pth, .safetensors or .npz file",
        ),
        ({"seed": -1}, "seed: -1 given; allowed are whole numbers from 0 to 4294967295"),
        ({"seed": 2**32}, "seed: 4294967296 given; allowed are"),
        ({"seed": 1.0}, "seed: 1.0 given; allowed are"),
        ({"seed": "0"}, "seed: '0' given; allowed are"),
        ({"seed": True}, "seed: True given; allowed are"),
        ({"device": "tpu"}, "device: 'tpu' given; allowed are 'auto', 'cpu', 'cuda', 'cuda:0', ..."),
        ({"device": "cuda:99"}, "device: 'cuda:99' given, but .* CUDA devices are there"),
        ({"device": None}, "device: None given; allowed are"),
        ({"on_error": "ignore"}, "on_error: 'ignore' given; allowed are 'raise', 'skip'"),
        ({"checkpoint": 3}, "checkpoint: 3 given; a path is needed"),
        ({"checkpoint": __file__}, r"checkpoint: '.*test_api\.py' is a file; a folder is needed"),
        ({"epoch": 3}, "epoch: not a setting of ConPatch; allowed are alpha, "),
        ({"epochs": -3}, "epochs: -3 given; allowed are 0 and more"),
        ({"resize": 32, "crop": 64}, "crop is 64 x 64, larger than resize, which is 32 x 32"),
        ({"bank": "position_mean"}, "bank='position_mean' has one centre a patch: allowed are gamma=1"),
    ],
)
def test_fit_refuses(good, arguments, message):
    with pytest.raises(InputError, match=message) as caught:
        pydefect.fit(good[:2], **{**SMALL, **arguments})
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (None, "source is of type NoneType; allowed are a folder, "),
        (42, "source is of type int; allowed are a folder, "),
        ([], "source is an empty list; it must hold at least one image"),
        ([None], "NoneType"),
        (np.zeros((0, 32, 32, 3), np.uint8), "an image has at least one pixel"),
        (np.full((32, 32, 3), np.nan), "NaN or infinite values"),
        ("no such folder", "no such folder"),
    ],
)
def test_images_that_are_none(detector, images, message):
    with pytest.raises(InputError, match=message):
        pydefect.fit(images, **SMALL)
    with pytest.raises(InputError, match=message):
        pydefect.score(detector, images, progress=False)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dataset": "{data}", "normal": "{data}/test/good"}, "dataset: given together with normal"),
        ({"defective": "{data}/test"}, "defective: given without normal"),
        ({"normal": []}, "at least one"),
        ({"normal": "{data}"}, "without a validation part"),
        ({"normal": "{data}/test/good", "false_alarm_rate": 2}, "false_alarm_rate: 2 given"),
        ({"normal": "{data}/test/good", "confidence": 1}, "confidence: 1 given"),
        ({"false_alarm_rate": -1}, "false_alarm_rate: -1 given"),
    ],
)
def test_calibrate_refuses_and_leaves_the_detector_as_it_was(detector, dataset, arguments, message):
    before = detector.calibration
    filled = {
        name: value.format(data=dataset) if isinstance(value, str) else value
        for name, value in arguments.items()
    }
    with pytest.raises(InputError, match=message):
        pydefect.calibrate(detector, progress=False, **filled)
    assert detector.calibration is before


@pytest.mark.filterwarnings("ignore:.*held-out images support:UserWarning")
def test_calibration_by_new_images(good):
    """By hand from the scores: the third of four, ceil(5 * 0.6)."""
    detector = pydefect.fit(good, **SMALL)
    new = [render_product(np.random.default_rng(seed), 64)[0] for seed in range(10, 14)]
    bare = pydefect.score(detector, new, progress=False)
    calibration = pydefect.calibrate(
        detector, normal=iter(new), defective=good, false_alarm_rate=0.4, progress=False
    )
    assert calibration is detector.calibration
    assert calibration.image_scores == tuple(sorted(bare.image_scores.tolist()))
    assert calibration.image_threshold == sorted(bare.image_scores)[2]
    assert calibration.pixel_threshold == sorted(one.max() for one in bare.anomaly_maps)[2]
    assert len(calibration.defective_scores) == len(good)
    again = pydefect.calibrate(detector, false_alarm_rate=0.2)
    assert again.image_threshold == max(bare.image_scores)
    assert again.defective_scores == calibration.defective_scores


def test_a_generator_that_gives_nothing():
    with pytest.raises(InputError, match="images: none could be read; at least one normal image is needed"):
        pydefect.fit(iter(()), **SMALL)


def test_an_empty_folder(tmp_path):
    with pytest.raises(InputError, match="image"):
        pydefect.fit(tmp_path, **SMALL)


def test_differently_sized_images_need_a_size():
    images = [np.zeros((32, 32, 3), np.uint8), np.zeros((64, 32, 3), np.uint8)]
    with pytest.raises(
        InputError, match=r"in one training set; set resize \(or crop\) so that all images have one size"
    ):
        pydefect.fit(images, **{**SMALL, "resize": None})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"batch_size": 0}, "batch_size: 0 given; allowed are whole numbers from 1 on"),
        ({"batch_size": 1.5}, "batch_size: 1.5 given; allowed are whole numbers from 1 on"),
        ({"batch_size": "8"}, "batch_size: '8' given; allowed are whole numbers from 1 on"),
        ({"on_error": "ignore"}, "on_error is 'ignore'; allowed are"),
    ],
)
def test_score_and_evaluate_refuse(detector, good, dataset, arguments, message):
    with pytest.raises(InputError, match=message):
        pydefect.score(detector, good, progress=False, **arguments)
    with pytest.raises(InputError, match=message):
        pydefect.evaluate(detector, dataset, progress=False, **arguments)


def test_what_is_no_detector(good, dataset, tmp_path):
    for wrong in (42, None, good):
        with pytest.raises(
            InputError, match=r"detector: .* given; allowed are a fitted detector or the path"
        ) as caught:
            pydefect.score(wrong, good, progress=False)
        assert len(str(caught.value)) < 120
        with pytest.raises(InputError, match=r"detector: "):
            pydefect.evaluate(wrong, dataset, progress=False)
    with pytest.raises(ModelFileError, match="model: no file"):
        pydefect.score(tmp_path / "nothing", good, progress=False)


def test_what_is_no_dataset(detector, tmp_path):
    with pytest.raises(InputError, match="dataset: 42 given; a path is needed"):
        pydefect.evaluate(detector, 42, progress=False)
    with pytest.raises(InputError, match="nothing is missing"):
        pydefect.evaluate(detector, tmp_path / "nothing", progress=False)
    with pytest.raises(InputError, match=r"there are no images in"):
        pydefect.evaluate(detector, tmp_path, progress=False)


def test_load_refuses(detector, tmp_path):
    detector.save(tmp_path / "model", include_backbone=False)
    with pytest.raises(ModelFileError, match="model: no file"):
        pydefect.load(tmp_path)
    with pytest.raises(InputError, match="path: 42 given; a path is needed"):
        pydefect.load(42)
    with pytest.raises(InputError, match="weights: 42 given; a path is needed"):
        pydefect.load(tmp_path / "model", weights=42)
    with pytest.raises(WeightsNotFoundError, match=r"weights: no file"):
        pydefect.load(tmp_path / "model", weights=tmp_path / "nothing.npz")
    with pytest.raises(InputError, match="device: 'gpu' given; allowed are"):
        pydefect.load(tmp_path / "model", device="gpu")
    assert pydefect.load(tmp_path / "model", weights="random").calibration == detector.calibration


def test_cards_that_are_too_old_for_the_kernels(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert resolve_device("auto") == torch.device("cpu")
    with pytest.raises(InputError, match=r"device: 'cuda' given, a card of compute capability 7\.5"):
        resolve_device("cuda")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert resolve_device("auto") == torch.device("cuda")
    assert resolve_device("cuda:0") == torch.device("cuda", 0)


def test_a_card_without_kernels(monkeypatch, good):
    """A build without nvcc on a machine with a card: the default works, and no fit ends in the middle."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setattr("pydefect.detector.load_cuda_library", lambda: False)
    with pytest.warns(UserWarning, match="device: the CPU works, not the CUDA device: .*nvcc is found"):
        assert resolve_device("auto", kernels=True) == torch.device("cpu")
    with pytest.raises(InputError, match="device: 'cuda' given, but this build of pydefect has no CUDA"):
        resolve_device("cuda", kernels=True)
    # PyTorch's operators serve the autoencoders as well.
    assert resolve_device("auto") == resolve_device("cuda") == torch.device("cuda")
    assert not DualAEDetector.needs_kernels
    with pytest.raises(InputError, match="device: 'cuda' given, but this build"):
        pydefect.fit(good, device="cuda", weights="random", progress=False)
    monkeypatch.setattr("pydefect.detector.load_errors", {"cuda": "the driver is too old"})
    with pytest.raises(InputError, match="device: 'cuda:0' given, but the driver is too old"):
        resolve_device("cuda:0", kernels=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # it was a warning when the library did not load
        assert resolve_device("auto", kernels=True) == torch.device("cpu")


def test_errors_are_what_python_expects():
    """Callers that know nothing of pydefect catch ValueError and FileNotFoundError."""
    assert issubclass(InputError, ValueError)
    assert issubclass(ModelFileError, InputError)
    assert issubclass(WeightsNotFoundError, FileNotFoundError)
    assert issubclass(InputError, pydefect.PydefectError)


# -- documentation
# -------------------------------------------------------------------------------------------------

EXAMPLES = [
    ".".join(["pydefect", *path.relative_to(PACKAGE).with_suffix("").parts]).removesuffix(".__init__")
    for path in sorted(PACKAGE.rglob("*.py"))
    if ">>> " in path.read_text(encoding="utf-8")
]


@pytest.mark.filterwarnings("ignore:.*held-out images support")
@pytest.mark.parametrize("name", EXAMPLES)
def test_the_examples_in_the_docstrings_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    module = importlib.import_module(name)
    # A package may export a function of its submodule's name; the examples are the module's.
    module = module if hasattr(module, "__file__") else importlib.sys.modules[name]
    assert doctest.testmod(module).failed == 0


def test_the_public_functions_document_every_argument():
    from inspect import signature

    for name in ("fit", "score", "evaluate", "calibrate", "load"):
        function = getattr(pydefect, name)
        for parameter in signature(function).parameters:
            assert parameter in function.__doc__, f"{name}: {parameter}"


def test_example_files_are_not_left_behind():
    assert not any(name.endswith((".safetensors", ".npz")) for name in os.listdir(PACKAGE))


def test_an_iterator_that_was_read_before_is_an_error(detector, good):
    images = iter(good)
    assert len(detector.score(images)) == len(good)
    with pytest.raises(InputError, match="images: there are none in it"):
        detector.score(images)


def test_a_calibration_names_what_it_leaves_out(detector, good, tmp_path):
    for number, pixels in enumerate(good):
        cv2.imwrite(str(tmp_path / f"{number}.png"), pixels)
    (tmp_path / "broken.png").write_bytes(b"no image")
    own = copy.copy(detector)
    with pytest.warns(UserWarning, match=r"broken.png: .*; left out of the calibration"):
        calibration = own.calibrate(tmp_path, false_alarm_rate=0.4, on_error="skip")
    assert len(calibration.image_scores) == len(good)
