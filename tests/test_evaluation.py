"""Evaluation and labelled calibration on a tiny data set, with a detector whose scores are the pixels
themselves."""

from __future__ import annotations

import json
import shutil
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
import torch
from torch import Tensor

import pydefect
import pydefect.score_folder
from pydefect.calibration import Calibration
from pydefect.data.layouts import Dataset, Sample, read_dataset
from pydefect.data.maps import read_image_scores
from pydefect.data.procedural import write_dataset
from pydefect.data.seen import file_print
from pydefect.detector import Detector
from pydefect.errors import InputError
from pydefect.evaluation import evaluate
from pydefect.metrics import aupro, detection_metrics, spro
from pydefect.preprocessing import Preprocessing

SIZE = (24, 32)
BOX = (6, 8, 18, 24)  # what a centre crop of 12x16 leaves


class Brightness(Detector):
    """Calls bright what a person would: the score of a pixel is its red channel, that of an image the
    largest of them."""

    method = "brightness"

    def __init__(self, crop: tuple[int, int] | None = None, **shapes: Any) -> None:
        self.preprocessing = Preprocessing.create(None, crop, (0, 0, 0), (1, 1, 1), **shapes)
        self.calibration = None
        self.device = torch.device("cpu")
        self.training = {}

    @property
    def configuration(self):
        return {"method": self.method}

    @classmethod
    def fit(cls, images, config, **how):
        raise NotImplementedError

    @classmethod
    def from_file(cls, tensors, metadata, **how):
        raise NotImplementedError

    def predict(self, images: Tensor) -> tuple[Tensor, Tensor]:
        return images[:, 0].flatten(1).amax(1), images[:, 0]

    def save(self, path, *, include_backbone=True):
        raise NotImplementedError


def picture(rng: np.random.Generator, spot: int | None) -> tuple[np.ndarray, np.ndarray]:
    """Noise, with a spot of the given brightness at a random place; and the spot's mask."""
    pixels = rng.integers(0, rng.integers(60, 130), (*SIZE, 3), dtype=np.uint8)
    mask = np.zeros(SIZE, np.uint8)
    if spot is not None:
        top, left = rng.integers(4, 16), rng.integers(4, 22)
        mask[top : top + 5, left : left + 6] = 255
        pixels[mask > 0] = np.clip(rng.normal(spot, 30, (30, 1)), 0, 255).astype(np.uint8)
    return pixels, mask


@pytest.fixture
def written(tmp_path: Path) -> Path:
    """MVTec AD's layout: 2 training images, 5 good ones, 4 spots of two kinds."""
    rng = np.random.default_rng(0)
    root = tmp_path / "spots"
    for folder, kinds in (
        ("train/good", [None, None]),
        ("test/good", [None] * 5),
        ("test/bright", [200, 230]),
        ("test/dim", [90, 110]),
    ):
        (root / folder).mkdir(parents=True)
        for index, spot in enumerate(kinds):
            pixels, mask = picture(rng, spot)
            cv2.imwrite(str(root / folder / f"{index:03}.png"), pixels[:, :, ::-1])
            if spot is not None:
                masks = root / "ground_truth" / Path(folder).name
                masks.mkdir(parents=True, exist_ok=True)
                cv2.imwrite(str(masks / f"{index:03}_mask.png"), mask)
    return root


def truth(root: Path, box: tuple[int, int, int, int] = (0, 0, *SIZE)):
    """Labels, image scores, pixel labels and pixel scores, read without pydefect."""
    top, left, bottom, right = box
    labels, scores, pixel_labels, pixel_scores, kinds = [], [], [], [], []
    for path in sorted((root / "test").rglob("*.png")):
        kind = path.parent.name
        red = (cv2.imread(str(path))[:, :, 2].astype(np.float32) / 255)[top:bottom, left:right]
        mask = np.zeros(SIZE, bool)
        if kind != "good":
            mask = cv2.imread(str(root / "ground_truth" / kind / f"{path.stem}_mask.png"), 0) > 0
        labels.append(kind != "good")
        kinds.append(kind)
        scores.append(red.max())
        pixel_labels.append(mask[top:bottom, left:right].ravel())
        pixel_scores.append(red.ravel())
    return (
        np.array(labels),
        np.array(scores),
        np.concatenate(pixel_labels),
        np.concatenate(pixel_scores),
        np.array(kinds),
    )


def maps_and_masks(root: Path):
    """Of every test image, and its kind; read without pydefect."""
    _, _, pixel_labels, pixel_scores, kinds = truth(root)
    return pixel_scores.reshape(-1, *SIZE), pixel_labels.reshape(-1, *SIZE), kinds


def test_a_data_set_of_ones_own_may_name_its_files_as_text(written):
    read = read_dataset(written)
    test = tuple(Sample(str(one.image), one.defect, [str(mask) for mask in one.masks]) for one in read.test)
    own = Dataset("spots", "folder", str(written), (), (), test)
    expected = evaluate(Brightness(), read)
    assert evaluate(Brightness(), own).pixel == expected.pixel


@pytest.mark.parametrize(("crop", "box"), [(None, (0, 0, *SIZE)), ((12, 16), BOX)])
@pytest.mark.parametrize("batch_size", [1, 4])
def test_metrics_are_those_of_the_images_and_pixels_on_disk(written, crop, box, batch_size):
    evaluation = pydefect.evaluate(Brightness(crop), written, batch_size=batch_size, progress=False)
    labels, scores, pixel_labels, pixel_scores, kinds = truth(written, box)
    assert evaluation.image == detection_metrics(labels, scores)
    assert evaluation.pixel == detection_metrics(pixel_labels, pixel_scores)
    assert evaluation.image_auroc_by_defect.keys() == {"bright", "dim"}
    for kind, auroc in evaluation.image_auroc_by_defect.items():
        chosen = (kinds == kind) | ~labels
        assert auroc == detection_metrics(labels[chosen], scores[chosen]).auroc
    assert (evaluation.images, evaluation.defective, evaluation.without_mask) == (9, 4, 0)
    assert evaluation.dataset == "spots"
    assert evaluation.configuration == {"method": "brightness"}
    assert evaluation.seconds_per_image > 0
    assert evaluation.peak_rss_mb > 10
    assert evaluation.false_alarms is None
    assert evaluation.misses is None


@pytest.mark.parametrize("with_kinds", [False, True])
def test_what_is_ignored_counts_as_good_and_never_called_defective(written, with_kinds):
    if with_kinds:
        kinds_of_defects = {
            "defect_name": "spot",
            "pixel_value": 255,
            "saturation_threshold": 0.2,
            "relative_saturation": True,
        }
        (written / "defects_config.json").write_text(json.dumps([kinds_of_defects]))
    detector = Brightness(ignore=[(0, 0, 9, 32), (0, 20, 24, 26)])
    evaluation = pydefect.evaluate(detector, written, progress=False)
    maps, masks, kinds = maps_and_masks(written)
    cut = sum(bool(mask[:9].any()) for mask in masks)
    assert cut, "no spot is cut, nothing is tested"
    for anomaly_map, mask in zip(maps, masks, strict=True):
        for part in (anomaly_map, mask):
            part[:9] = part[:, 20:26] = 0
    pixel_scores, pixel_labels = (np.concatenate([one.ravel() for one in part]) for part in (maps, masks))
    assert evaluation.pixel == detection_metrics(pixel_labels > 0, pixel_scores)
    assert evaluation.pixel_aupro == aupro(maps, masks)
    scores = [anomaly_map.max() for anomaly_map in maps]
    assert evaluation.image == detection_metrics([kind != "good" for kind in kinds], scores)
    if with_kinds:
        chosen = [index for index, kind in enumerate(kinds) if kind in ("bright", "good")]
        regions = [
            [(masks[index], max(int(0.2 * np.count_nonzero(masks[index])), 1))] if masks[index].any() else []
            for index in chosen
        ]
        expected = spro([maps[index] for index in chosen], regions, limit=0.3)
        assert evaluation.pixel_spro_by_defect["bright"][0.3] == expected


def test_aupro_over_all_and_of_every_kind(written):
    evaluation = pydefect.evaluate(Brightness(), written, progress=False)
    maps, masks, kinds = maps_and_masks(written)
    assert evaluation.pixel_aupro == aupro(maps, masks)
    assert evaluation.pixel_aupro_by_defect.keys() == {"bright", "dim"}
    for kind, area in evaluation.pixel_aupro_by_defect.items():
        chosen = [index for index, other in enumerate(kinds) if other in (kind, "good")]
        assert area == aupro([maps[index] for index in chosen], [masks[index] for index in chosen])
    assert evaluation.to_dict()["pixel_aupro"] == evaluation.pixel_aupro
    assert evaluation.pixel_spro is None
    assert not any("spro" in name for name in evaluation.to_dict() if name != "pixel_spro_by_defect")


def test_spro_where_the_set_says_how_regions_saturate(written):
    """Every kind of defect with the good images, and their mean, as MVTec LOCO AD's evaluation has it."""
    # The spots' masks are marked with 255, of 30 pixels.
    entry = {
        "defect_name": "spot",
        "pixel_value": 255,
        "saturation_threshold": 0.2,
        "relative_saturation": True,
    }
    (written / "defects_config.json").write_text(json.dumps([entry]))
    evaluation = pydefect.evaluate(Brightness(), written, progress=False)
    maps, masks, kinds = maps_and_masks(written)
    assert evaluation.pixel_spro is not None
    for limit in (0.01, 0.05, 0.1, 0.3, 1.0):
        areas = {}
        for kind in ("bright", "dim"):
            chosen = [index for index, other in enumerate(kinds) if other in (kind, "good")]
            regions = [[(masks[index], 6)] if masks[index].any() else [] for index in chosen]
            areas[kind] = spro([maps[index] for index in chosen], regions, limit=limit)
            assert evaluation.pixel_spro_by_defect[kind][limit] == areas[kind]
        assert evaluation.pixel_spro[limit] == pytest.approx(sum(areas.values()) / 2, abs=1e-15)
    values = json.loads(json.dumps(evaluation.to_dict(), allow_nan=False))
    assert values["pixel_spro_0.05"] == evaluation.pixel_spro[0.05]
    assert values["pixel_spro_by_defect"]["dim"]["0.05"] == evaluation.pixel_spro_by_defect["dim"][0.05]
    # All else is as without the file.
    (written / "defects_config.json").unlink()
    without = pydefect.evaluate(Brightness(), written, progress=False)
    assert (without.pixel, without.pixel_aupro) == (evaluation.pixel, evaluation.pixel_aupro)


def test_false_alarms_and_misses_are_counted_at_the_threshold(written):
    detector = Brightness()
    labels, scores, *_ = truth(written)
    threshold = float(np.sort(scores[~labels])[2])
    detector.calibration = Calibration(threshold, 0.5, "held_out", 9, 0.1)
    evaluation = pydefect.evaluate(detector, written, progress=False)
    assert evaluation.false_alarms == int((scores[~labels] > threshold).sum()) == 2
    assert evaluation.misses == int((scores[labels] <= threshold).sum())


def test_flat_json(written):
    values = pydefect.evaluate(Brightness(), read_dataset(written), progress=False).to_dict()
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    wanted = {"image_auroc", "pixel_auroc", "image_ap", "pixel_ap", "image_f1_max", "pixel_f1_max"}
    assert wanted | {"seconds_per_image", "peak_rss_mb", "configuration"} <= values.keys()
    labels, scores, *_ = truth(written)
    assert values["image_auroc"] == detection_metrics(labels, scores).auroc


def test_a_defect_without_its_mask_counts_for_the_image_metrics_only(written):
    complete = pydefect.evaluate(Brightness(), written, progress=False)
    (written / "ground_truth" / "dim" / "001_mask.png").unlink()
    evaluation = pydefect.evaluate(Brightness(), written, progress=False)
    assert evaluation.without_mask == 1
    assert evaluation.image == complete.image
    assert evaluation.pixel != complete.pixel


def test_a_damaged_mask_ends_the_evaluation_or_counts_as_unknown(written):
    mask = written / "ground_truth" / "dim" / "001_mask.png"
    whole = mask.read_bytes()
    mask.unlink()
    expected = pydefect.evaluate(Brightness(), written, progress=False)
    mask.write_bytes(whole[:40])
    with pytest.raises(InputError, match=r"001_mask\.png: the file is damaged"):
        pydefect.evaluate(Brightness(), written, progress=False)
    kept = []
    with pytest.warns(UserWarning, match=r"001_mask\.png: .*; its image counts for the image metrics only"):
        evaluation = evaluate(
            Brightness(),
            read_dataset(written),
            on_error="skip",
            on_scored=lambda sample, _: kept.append(sample),
        )
    assert replace(evaluation, seconds_per_image=0, peak_rss_mb=0) == replace(
        expected, seconds_per_image=0, peak_rss_mb=0
    )
    assert len(kept) == evaluation.images
    assert [sample.image for sample in kept if sample.label and not sample.masks] == [
        written / "test" / "dim" / "001.png"
    ]


def test_what_is_left_out_is_said(written):
    dataset = read_dataset(written)
    unknown = Sample(dataset.train[0].image, "unknown")
    with pytest.warns(UserWarning, match="1 test images without a label are left out"):
        pydefect.evaluate(Brightness(), replace(dataset, test=(*dataset.test, unknown)), progress=False)
    next(written.glob("test/good/*.png")).write_bytes(b"nothing")
    with pytest.warns(UserWarning, match=r"good/.*: the file is no image .*; left out of the calibration"):
        pydefect.calibrate(Brightness(), written, on_error="skip", progress=False)


def test_test_images_that_the_fit_has_seen_are_named(written, tmp_path):
    detector = Brightness()
    unseen = pydefect.evaluate(detector, written, progress=False)
    assert unseen.learned == unseen.to_dict()["learned"] == []
    good, *_ = sorted(written.glob("test/good/*.png"))
    dim, *_ = sorted(written.glob("test/dim/*.png"))
    elsewhere = tmp_path / "a copy.png"
    shutil.copy(good, elsewhere)
    detector.training["files"] = [file_print(elsewhere), file_print(dim), "3-0123456789abcdef"]
    names = {f"test/good/{good.name}", f"test/dim/{dim.name}"}
    with pytest.warns(UserWarning, match=rf"fit has seen 2 of the {unseen.images} test images"):
        evaluation = pydefect.evaluate(detector, written, progress=False)
    assert set(evaluation.learned) == set(evaluation.to_dict()["learned"]) == names
    assert evaluation.image == unseen.image


def test_an_image_counts_once(written):
    dataset = read_dataset(written)
    again = replace(dataset, test=(*dataset.test, dataset.test[0]))
    with pytest.raises(
        InputError, match=rf"test images more than once, among them .*{dataset.test[0].image.name}"
    ):
        pydefect.evaluate(Brightness(), again, progress=False)


def test_without_any_mask_there_are_no_pixel_metrics(written):
    for path in (written / "ground_truth").rglob("*.png"):
        path.unlink()
    evaluation = pydefect.evaluate(Brightness(), written, progress=False)
    assert evaluation.pixel is None
    assert evaluation.to_dict()["pixel_auroc"] is None
    with pytest.raises(
        InputError, match="dataset: 'spots' has no masks; the pixel threshold needs at least one"
    ):
        pydefect.calibrate(Brightness(), written, progress=False)


def f1(labels: np.ndarray, scores: np.ndarray, threshold: float) -> float:
    called = scores > threshold
    return 2 * float((called & labels).sum()) / float(called.sum() + labels.sum())


def test_labelled_calibration_maximises_f1_by_brute_force(written):
    """Equations (10) and (11), images and pixels apart: no threshold between or outside the scores does
    better."""
    detector = Brightness()
    calibration = pydefect.calibrate(detector, written, progress=False)
    assert detector.calibration is calibration
    labels, scores, pixel_labels, pixel_scores, _ = truth(written)
    for found, all_labels, all_scores in (
        (calibration.image_threshold, labels, scores),
        (calibration.pixel_threshold, pixel_labels, pixel_scores),
    ):
        best = max(
            f1(all_labels, all_scores, threshold) for threshold in [-1.0, *np.unique(all_scores).tolist()]
        )
        assert f1(all_labels, all_scores, found) == pytest.approx(best, abs=1e-12)
    assert calibration.source == "labelled"
    assert calibration.images == 9
    assert calibration.false_alarm_rate == (scores[~labels] > calibration.image_threshold).mean()
    result = pydefect.score(detector, written / "test", progress=False)
    assert result.image_threshold == calibration.image_threshold
    with pytest.raises(InputError, match="keeps no scores of held-out normal images"):
        detector.set_false_alarm_rate(0.1)


def test_only_good_images_are_no_test(written):
    for kind in ("bright", "dim"):
        for path in (written / "test" / kind).iterdir():
            path.unlink()
        (written / "test" / kind).rmdir()

    class Unused(Brightness):
        def predict(self, images):
            raise AssertionError("an image was scored")

    with pytest.raises(InputError, match=r"labels: all 5 are normal; metrics need normal and defective ones"):
        pydefect.evaluate(Unused(), written, progress=False)
    with pytest.raises(InputError, match=r"labels: all 5 are normal; metrics need normal and defective ones"):
        pydefect.calibrate(Unused(), written, progress=False)


@pytest.mark.parametrize("on_error", ["raise", "skip"])
def test_a_broken_test_image(written, on_error):
    broken = written / "test" / "good" / "002.png"
    broken.write_bytes(broken.read_bytes()[:60])
    if on_error == "raise":
        with pytest.raises(InputError, match=r"002\.png"):
            pydefect.evaluate(Brightness(), written, progress=False)
    else:
        assert pydefect.evaluate(Brightness(), written, on_error="skip", progress=False).images == 8


def written_maps(root: Path, folder: Path, ending: str = ".tiff", below: str = "") -> None:
    """The red channels as another program would write them, read without pydefect."""
    for path in (root / "test").rglob("*.png"):
        values = cv2.imread(str(path))[:, :, 2].astype(np.float32) / 255
        file = (folder / below / path.relative_to(root / "test")).with_suffix(ending)
        file.parent.mkdir(parents=True, exist_ok=True)
        if ending == ".npy":
            np.save(file, values.astype(np.float64))
        else:
            assert cv2.imwrite(str(file), values)


def figures(evaluation: pydefect.Evaluation) -> pydefect.Evaluation:
    """All that is known of maps alone."""
    unknown = dict.fromkeys(("false_alarms", "misses", "seconds_per_image", "peak_rss_mb"))
    return replace(evaluation, **unknown, configuration={})


@pytest.fixture(params=[False, True], ids=["mvtec_ad", "mvtec_loco"])
def spots(written: Path, request: pytest.FixtureRequest) -> Path:
    """`written`, and as MVTec LOCO AD has it: a folder of regions an image, and how they saturate."""
    if request.param:
        for mask in list((written / "ground_truth").rglob("*_mask.png")):
            folder = mask.with_name(mask.stem.removesuffix("_mask"))
            folder.mkdir()
            mask.rename(folder / "000.png")
        entry = {"defect_name": "spot", "pixel_value": 255}
        saturation = {"saturation_threshold": 0.2, "relative_saturation": True}
        (written / "defects_config.json").write_text(json.dumps([entry | saturation]))
    return written


@pytest.mark.parametrize(("ending", "below"), [(".tiff", ""), (".tif", "test"), (".npy", "")])
def test_maps_of_another_program_measure_as_a_detectors_own(spots, tmp_path, ending, below):
    written_maps(spots, tmp_path / "maps", ending, below)
    expected = pydefect.evaluate(Brightness(), spots, progress=False)
    assert (expected.pixel_spro is not None) == (spots / "defects_config.json").exists()
    evaluation = pydefect.evaluate_maps(spots, tmp_path / "maps", progress=False)
    assert evaluation == figures(expected)
    values = evaluation.to_dict()
    assert json.loads(json.dumps(values, allow_nan=False)) == values
    assert values["seconds_per_image"] is None
    if not below:
        # Whatever the data set's folder of good images is called.
        (spots / "test" / "good").rename(spots / "test" / "ok")
        assert pydefect.evaluate_maps(spots, tmp_path / "maps", progress=False).image == expected.image


def test_the_maps_of_a_result_and_of_a_folder_of_scores(spots, tmp_path):
    detector = Brightness()
    expected = figures(pydefect.evaluate(detector, spots, progress=False))
    result = pydefect.score(detector, spots / "test", progress=False)
    maps = dict(zip(result.paths, result.anomaly_maps, strict=True))
    scores = dict(zip(map(str, result.paths), -result.image_scores, strict=True))
    assert pydefect.evaluate_maps(spots, maps, progress=False) == expected
    turned = pydefect.evaluate_maps(spots, maps, image_scores=scores, progress=False)
    assert turned.image.auroc == pytest.approx(1 - expected.image.auroc, abs=1e-12)
    assert turned.pixel == expected.pixel
    of_samples = {sample: maps[sample.image] for sample in read_dataset(spots).test}
    assert pydefect.evaluate_maps(spots, of_samples, progress=False) == expected
    assert pydefect.evaluate_maps(spots, of_samples.__getitem__, progress=False) == expected
    # Likelihoods are below zero, and may be large.
    lower = pydefect.evaluate_maps(spots, lambda sample: 1024 * (of_samples[sample] - 2), progress=False)
    assert (lower.image.auroc, lower.pixel_aupro) == (expected.image.auroc, expected.pixel_aupro)
    assert lower.pixel_spro == expected.pixel_spro
    # Scored as a whole data set and as its test part.
    for which in (spots, spots / "test"):
        with pydefect.score_folder.ScoreFolderWriter(tmp_path / "out", pictures="none", maps=True) as folder:
            folder.add(pydefect.score(detector, which, progress=False))
        assert pydefect.evaluate_maps(spots, tmp_path / "out" / "maps", progress=False) == expected


def test_images_of_one_name_and_two_endings_have_maps_of_their_own(written, tmp_path):
    (written / "test" / "good" / "004.png").rename(written / "test" / "good" / "003.bmp")
    (tmp_path / "maps" / "good").mkdir(parents=True)
    written_maps(written, tmp_path / "maps")
    with pytest.raises(InputError, match=r"003\.tiff is the map of .*003\.\w+ and of .*003\.\w+; give every"):
        pydefect.evaluate_maps(written, tmp_path / "maps", progress=False)
    other = tmp_path / "maps" / "good" / "003.bmp.tiff"
    other.write_bytes((tmp_path / "maps" / "good" / "003.tiff").read_bytes())
    assert pydefect.evaluate_maps(written, tmp_path / "maps", progress=False).images == 9


def test_missing_maps_are_named_before_any_is_read(written, tmp_path):
    written_maps(written, tmp_path / "maps")
    for name in ("bright/000", "dim/000", "good/001", "good/002"):
        (tmp_path / "maps" / f"{name}.tiff").unlink()
    (tmp_path / "maps" / "bright" / "001.tiff").write_bytes(b"broken")
    message = r"maps: 4 of 9 labelled test images have no map in .*: bright/000, dim/000, good/001, \.\.\. \("
    with pytest.raises(InputError, match=message):
        pydefect.evaluate_maps(written, tmp_path / "maps", progress=False)
    with pytest.raises(InputError, match=r"maps: .*nowhere' is missing, no folder"):
        pydefect.evaluate_maps(written, tmp_path / "nowhere", progress=False)
    samples = read_dataset(written).test
    maps = {sample.image: np.zeros((1, 1)) for sample in samples[1:]}
    with pytest.raises(InputError, match=r"maps: 1 of 9 labelled test images are missing: .*000\.png$"):
        pydefect.evaluate_maps(written, maps, progress=False)
    every = {sample.image: np.zeros(SIZE) for sample in samples}
    with pytest.raises(InputError, match=r"image_scores: 1 of 9 labelled"):
        pydefect.evaluate_maps(written, every, image_scores=dict.fromkeys(maps, 0.5), progress=False)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        (np.zeros((12, 16), np.float32), r"000\.png has 12 x 16 pixels, the image 24 x 32; bring it to"),
        (np.zeros((*SIZE, 3), np.float32), r"has the shape \[24, 32, 3\] and the type float32; it must be"),
        (np.zeros(SIZE, bool), "and the type bool; it must be numbers"),
        (np.full(SIZE, np.nan), "has values that are not finite in float32"),
        (np.full(SIZE, 1e60), "has values that are not finite in float32"),
        (None, "it must be numbers"),
    ],
)
def test_a_map_that_cannot_be_measured_is_named(written, value, reason):
    with pytest.raises(InputError, match=rf"^maps: that of .*{reason}"):
        pydefect.evaluate_maps(written, lambda _: value, progress=False)


def test_image_scores_from_a_file(tmp_path):
    file = tmp_path / "scores.csv"
    file.write_text('\ufeffname,score,path\n1,0.5,a.png\n2,-1e3,"b, or c.png"\n', encoding="utf-8")
    assert read_image_scores(file) == {"a.png": 0.5, "b, or c.png": -1000.0}


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "has no column path and none score"),
        (b"path,value\na.png,1\n", "has no column score"),
        (b"path,score\na.png,1\n,2\n", "line 3: there is no path"),
        (b"path,score\na.png,1\na.png,2\n", r"line 3: a\.png is there twice"),
        (b"path,score\na.png,high\n", "line 2: the score is 'high'; a number is needed"),
        (b"path,score\na.png\n", "line 2: the score is None; a number is needed"),
        (b"path,score\n\xff\xfe,1\n", "cannot be read: 'utf-8' codec"),
        (b'path,score\n"a.png,1\n', "cannot be read: unexpected end of data"),
    ],
)
def test_a_file_of_image_scores_that_does_not_serve(tmp_path, content, reason):
    file = tmp_path / "scores.csv"
    file.write_bytes(content)
    with pytest.raises(InputError, match=rf"^image_scores: .*scores\.csv,? {reason}"):
        read_image_scores(file)


def test_what_else_is_wrong_with_maps_is_said(written, tmp_path):
    every = {sample.image: np.zeros(SIZE) for sample in read_dataset(written).test}
    with pytest.raises(InputError, match="maps: an object of type int given; allowed are a folder, a map"):
        pydefect.evaluate_maps(written, 3, progress=False)
    with pytest.raises(InputError, match="maps: the key 3 given; allowed are samples and"):
        pydefect.evaluate_maps(written, {3: np.zeros(SIZE)}, progress=False)
    with pytest.raises(InputError, match="image_scores: an object of type list given; a mapping is needed"):
        pydefect.evaluate_maps(written, every, image_scores=[1.0], progress=False)
    for score in (np.nan, "high", None):
        with pytest.raises(InputError, match=r"image_scores: that of .*000\.png is .*; it must be a finite"):
            pydefect.evaluate_maps(written, every, image_scores=dict.fromkeys(every, score), progress=False)
    written_maps(written, tmp_path / "maps", ".npy")
    (tmp_path / "maps" / "bright" / "000.npy").write_bytes(b"broken")
    with pytest.raises(InputError, match=r"000\.npy: cannot be read as an array: "):
        pydefect.evaluate_maps(written, tmp_path / "maps", progress=False)


def test_a_float16_tiff_says_what_to_write(written, tmp_path):
    written_maps(written, tmp_path / "maps")
    file = tmp_path / "maps" / "bright" / "000.tiff"
    # Width, height, bits, no compression, black is zero, one strip's place, samples, rows and bytes; floats.
    values = np.zeros(SIZE, np.float16).tobytes()
    entries = [(256, 32), (257, 24), (258, 16), (259, 1), (262, 1), (273, 134), (277, 1), (278, 24)]
    entries += [(279, len(values)), (339, 3)]
    directory = b"".join(struct.pack("<HHII", tag, 4 if tag in (273, 279) else 3, 1, n) for tag, n in entries)
    file.write_bytes(b"II*\0" + struct.pack("<IH", 8, len(entries)) + directory + bytes(4) + values)
    with pytest.raises(
        InputError, match=r"000\.tiff: a TIFF of float16 is not read; write float32, or an \.npy"
    ):
        pydefect.evaluate_maps(written, tmp_path / "maps", progress=False)


def test_labelled_thresholds_leave_those_of_the_parts(colours, tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "flange", 2, 3, 1, 64, seed=1)
    detector = colours()
    parts = {"local": (0.2, 0.3), "global": (0.4, 0.5)}
    detector.calibration = replace(detector.calibration, part_maxima=parts)
    assert pydefect.calibrate(detector, root, progress=False).part_maxima == parts
    assert detector.score(np.zeros((1, 64, 64, 3), np.uint8)).kind is not None
