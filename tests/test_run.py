"""Run folders: nothing is lost between an evaluation and its reader but the last digits of the maps."""

from __future__ import annotations

import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import pydefect
from pydefect.data.layouts import Sample, read_dataset, read_mask
from pydefect.data.procedural import write_dataset
from pydefect.detector import Detector
from pydefect.errors import InputError
from pydefect.run import _write_map, is_run, read_run
from pydefect.scoring import ScoredImage

SIZE = 64
CROP = (36, 40)


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "flange", 2, 3, 1, SIZE, seed=1)


def streamed(detector: Detector, product: Path) -> list[tuple[Sample, ScoredImage]]:
    """What the detector says, without a run between."""
    samples = read_dataset(product).test
    return list(zip(samples, detector.stream([sample.image for sample in samples]), strict=True))


@pytest.mark.parametrize("crop", [None, CROP])
@pytest.mark.parametrize("scale", [1.0, 1e9, 1e-20])
def test_a_run_gives_back_what_the_detector_said(colours, product, tmp_path, crop, scale):
    detector = colours(crop, scale)
    # So that the local and the global map each pass over their thresholds in some images.
    middle = {"local": (0.8 * scale,) * 9, "global": (0.8 * scale,) * 9}
    detector.calibration = replace(detector.calibration, image_scores=(0.5 * scale,) * 9, part_maxima=middle)
    evaluation = pydefect.evaluate(
        detector, product, out=tmp_path / "runs" / "flange", batch_size=3, progress=False
    )
    run = read_run(tmp_path / "runs" / "flange")
    expected = streamed(detector, product)
    result = detector.score([sample.image for sample, _ in expected])
    assert [image.kind for image in run.images] == result.kind
    assert [image.p_value for image in run.images] == result.p_values.tolist()
    assert run.evaluation == json.loads(json.dumps(evaluation.to_dict()))
    assert len(run.images) == len(expected) == evaluation.images
    assert run.map_names == ("anomaly", "local", "global")
    for index, (sample, scored) in enumerate(expected):
        image = run.images[index]
        assert product / image.name == sample.image
        assert (image.defect, image.label) == (sample.defect, sample.label)
        assert image.image_score == scored.image_score
        assert image.is_defective == (scored.image_score > 0.75 * scale)
        assert image.scored_box == scored.scored_box
        assert image.seconds > 0
        assert run.sample(index) == sample
        assert read_mask(run.sample(index), image.size).any() == bool(sample.label)
        for name in run.map_names:
            # The bound that the module promises; these maps hold nothing below 2**-28 of their maximum but 0.
            np.testing.assert_allclose(
                run.network_map(index, name), scored.network_maps[name], rtol=2**-11, atol=0
            )
        # On top of it the rounding of one interpolation in float32.
        np.testing.assert_allclose(run.map(index), scored.anomaly_map, rtol=2**-11 + 1e-6, atol=0)


def test_the_facts_say_what_was_measured_with_what(colours, product, tmp_path):
    evaluation = pydefect.evaluate(colours(), product, out=tmp_path / "run", progress=False)
    run = read_run(tmp_path / "run")
    assert run.calibration == colours().calibration
    assert run.preprocessing == colours().preprocessing
    assert run.root == product
    facts = run.facts
    assert facts["method"] == "colours"
    assert facts["training"] == {"images": 2, "skipped": []}
    assert facts["versions"]["pydefect"] == pydefect.__version__
    assert facts["machine"]["device"] == "cpu"
    assert facts["times"]["evaluation_seconds"] > 0
    assert facts["dataset"]["train"] == ["train/good/000.png", "train/good/001.png"]
    # The mean of the rows is the figure of the evaluation.
    seconds = np.mean([image.seconds for image in run.images])
    assert seconds == pytest.approx(evaluation.seconds_per_image, rel=1e-9)


def test_a_detector_without_thresholds_decides_nothing(colours, product, tmp_path):
    detector = colours()
    detector.calibration = None
    pydefect.evaluate(detector, product, out=tmp_path / "run", progress=False)
    run = read_run(tmp_path / "run")
    assert run.calibration is None
    assert {image.is_defective for image in run.images} == {None}


def test_data_that_moved_is_found_where_the_reader_says(colours, product, tmp_path):
    pydefect.evaluate(colours(), product, out=tmp_path / "run", progress=False)
    run = read_run(tmp_path / "run", data=tmp_path / "elsewhere")
    assert run.sample(0).image == tmp_path / "elsewhere" / run.images[0].name


def test_skipped_images_are_listed(colours, product, tmp_path):
    copy = write_dataset(tmp_path / "flange", 2, 3, 1, SIZE, seed=1)
    broken = copy / "test/good/001.png"
    broken.write_bytes(broken.read_bytes()[:60])
    pydefect.evaluate(colours(), copy, out=tmp_path / "run", on_error="skip", progress=False)
    run = read_run(tmp_path / "run")
    assert [Path(skipped["name"]) for skipped in run.evaluation["skipped"]] == [broken]
    assert "test/good/001.png" not in [image.name for image in run.images]
    assert "test/good/001.png" in run.facts["dataset"]["test"]


def test_a_failure_leaves_the_earlier_run_and_nothing_else(colours, product, tmp_path):
    class Failing(colours):
        def predict_maps(self, images):
            if self.scale > 1:
                raise RuntimeError("out of luck")
            self.scale += 1
            return super().predict_maps(images)

    with pytest.raises(RuntimeError, match="out of luck"):
        pydefect.evaluate(Failing(), product, out=tmp_path / "run", batch_size=2, progress=False)
    assert list(tmp_path.iterdir()) == []
    pydefect.evaluate(colours(), product, out=tmp_path / "run", progress=False)
    before = {path: path.read_bytes() for path in (tmp_path / "run").iterdir()}
    with pytest.raises(RuntimeError, match="out of luck"):
        pydefect.evaluate(Failing(), product, out=tmp_path / "run", batch_size=2, progress=False)
    assert list(tmp_path.iterdir()) == [tmp_path / "run"]
    assert {path: path.read_bytes() for path in (tmp_path / "run").iterdir()} == before
    pydefect.evaluate(colours(scale=2.0), product, out=tmp_path / "run", progress=False)
    assert read_run(tmp_path / "run").evaluation["configuration"]["scale"] == 2.0
    assert list(tmp_path.iterdir()) == [tmp_path / "run"]


def test_nothing_else_is_replaced(colours, product, tmp_path):
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "mine.txt").write_text("precious")
    run = tmp_path / "run"
    pydefect.evaluate(colours(), product, out=run, progress=False)
    # What a killed `pydefect report` left is no one's work.
    (run / ".report.html.k1l2ed_0").write_text("<!DOCTYPE")
    pydefect.evaluate(colours(), product, out=run, progress=False)
    (run / "notes.txt").write_text("precious")
    (tmp_path / "link").symlink_to(tmp_path / "letters")
    # A user's own file of that name, and what `pydefect evaluate --json` writes, make no run.
    (tmp_path / "photographs").mkdir()
    (tmp_path / "photographs" / "evaluation.json").write_text('{"mine": 1}')
    for out, message in (
        (tmp_path / "letters", r"holds something else than a run \(mine.txt\)"),
        (tmp_path / "letters" / "mine.txt", "is a file"),
        (run, r"holds something else than a run \(notes.txt\)"),
        (tmp_path / "link", "is a link"),
        (tmp_path / "photographs", "holds something else than a run;"),
    ):
        with pytest.raises(InputError, match=message):
            pydefect.evaluate(colours(), product, out=out, progress=False)
    assert (tmp_path / "letters" / "mine.txt").read_text() == "precious"
    assert (run / "notes.txt").read_text() == "precious"


def test_a_folder_that_cannot_be_replaced_is_said_before_any_image_is_scored(
    colours, product, tmp_path, monkeypatch
):
    class Unused(colours):
        def predict_maps(self, images):
            raise AssertionError("an image was scored")

    (tmp_path / "drive").mkdir()
    with monkeypatch.context() as patch:
        patch.setattr("os.path.ismount", lambda path: Path(path).name == "drive")
        with pytest.raises(InputError, match=r"out: '.*drive' is where a file system is mounted"):
            pydefect.evaluate(Unused(), product, out=tmp_path / "drive", progress=False)
    monkeypatch.setattr("os.access", lambda path, mode: Path(path) != tmp_path)
    with pytest.raises(InputError, match="out: no permission to write to"):
        pydefect.evaluate(Unused(), product, out=tmp_path / "run", progress=False)


def test_the_current_folder_is_refused_before_any_image_is_scored(colours, product, tmp_path, monkeypatch):
    class Unused(colours):
        def predict_maps(self, images):
            raise AssertionError("an image was scored")

    (tmp_path / "empty").mkdir()
    pydefect.evaluate(colours(), product, out=tmp_path / "run", progress=False)
    for folder, out in (("empty", "."), ("empty", "../empty"), ("run", "."), ("run", "../run")):
        monkeypatch.chdir(tmp_path / folder)
        with pytest.raises(
            InputError, match=rf"out: '{out}' is the current folder, which cannot be replaced"
        ):
            pydefect.evaluate(Unused(), product, out=out, progress=False)
    assert read_run(tmp_path / "run").images
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "run"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("evaluation.json", b"{", "is damaged"),
        ("evaluation.json", b'{"format": 99}', "format 99; this version of pydefect reads 1"),
        ("images.jsonl", b'{"name": "a.png"}\n', "is damaged: ValueError: images.jsonl has the keys"),
    ],
)
def test_damaged_runs_are_refused(colours, product, tmp_path, name, content, message):
    pydefect.evaluate(colours(), product, out=tmp_path / "run", progress=False)
    (tmp_path / "run" / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_run(tmp_path / "run")


def test_what_is_no_run_or_no_map_is_said(colours, product, tmp_path):
    assert not is_run(tmp_path)
    with pytest.raises(InputError, match=r"holds no evaluation\.json"):
        read_run(tmp_path)
    with pytest.raises(InputError, match="is missing"):
        read_run(tmp_path / "nowhere")
    pydefect.evaluate(colours(), product, out=tmp_path / "run", progress=False)
    run = read_run(tmp_path / "run")
    with pytest.raises(InputError, match="'depth' is no map of this run; it has anomaly, local, global"):
        run.map(0, "depth")
    maps = tmp_path / "run" / "maps.npz"
    maps.write_bytes(maps.read_bytes()[:-40])
    with pytest.raises(InputError, match=r"maps\.npz' is damaged"):
        run.map(0)


@given(
    values=arrays(
        np.float32,
        (3, 4),
        elements=st.floats(0, 2.0**127, width=32, allow_subnormal=False),
    )
)
def test_every_map_keeps_the_promised_bound(values, tmp_path_factory):
    path = tmp_path_factory.mktemp("maps") / "maps.npz"
    with zipfile.ZipFile(path, "w") as file:
        exponent = _write_map(file, "anomaly/00000", values)
    with np.load(path, allow_pickle=False) as maps:
        stored = maps["anomaly/00000"]
    assert stored.dtype == np.float16
    back = np.ldexp(stored.astype(np.float64), exponent)
    error = np.abs(back - values.astype(np.float64))
    # Float32's own smallest numbers end above 2**-39 of a map whose maximum is itself near them.
    largest = float(values.max())
    assert (error <= np.maximum(2.0**-11 * values.astype(np.float64), 2.0**-39 * largest + 2.0**-149)).all()


def test_curves_are_kept_and_end_where_they_are_said_to(colours, tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "flange", 2, 3, 1, 64, seed=1)
    entry = {"defect_name": "a", "pixel_value": 255, "saturation_threshold": 1, "relative_saturation": False}
    (root / "defects_config.json").write_text(json.dumps([entry]))
    evaluation = pydefect.evaluate(colours(), root, out=tmp_path / "run", progress=False)
    curves = read_run(tmp_path / "run").curves
    assert curves.keys() == evaluation.curves.keys()
    assert curves["pixel_pro"].x[-1] == 0.3
    for kind, areas in evaluation.pixel_spro_by_defect.items():
        assert curves[f"pixel_spro_{kind}"].x[-1] == 0.05
        assert curves[f"pixel_spro_{kind}"].area == areas[0.05]
    for name, curve in evaluation.curves.items():
        for part in ("x", "y", "thresholds"):
            np.testing.assert_array_equal(getattr(curves[name], part), getattr(curve, part))
