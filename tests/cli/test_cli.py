"""The command line: exit codes, messages, and the way from images to figures."""

from __future__ import annotations

import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import pydefect
from pydefect.calibration import held_out_calibration
from pydefect.cli import app
from pydefect.cli._console import parse_settings
from pydefect.cli.calibrate import print_calibration
from pydefect.data.procedural import DEFECTS, write_dataset
from pydefect.persistence import load_tensors
from pydefect.preprocessing import Preprocessing
from pydefect.run import read_run

FAST = [
    *("--weights", "random", "--epochs", "0", "--quiet"),
    *("--set", "resize=64", "--set", "crop=null", "--set", "calibration_folds=2"),
    *("--set", "levels=[1,2]", "--set", "representation_dim=64"),
]


@pytest.fixture(scope="module")
def product(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "flange", 6, 3, 1, 64, seed=3)


@pytest.fixture(scope="module")
def model(product: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("model") / "flange.safetensors"
    result = CliRunner().invoke(app, ["fit", str(product), "--out", str(path), *FAST])
    assert result.exit_code == 0, result.output
    assert "learned from 6 images" in result.stdout
    highest = pydefect.load(path).training["held_out_scores"][:3]
    shown = ", ".join(f"{name} ({score:.4g})" for name, score in highest)
    assert f"\nhighest scores of held-out images, to look at: {shown}\n" in result.stdout
    assert str(path) in result.stdout
    return path


def call(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout, result.stderr


@pytest.mark.parametrize(
    "arguments",
    [[], ["fit"], ["score"], ["evaluate"], ["evaluate-maps"], ["calibrate"], ["info"], ["demo"]],
)
def test_every_command_explains_itself(arguments: list[str]) -> None:
    code, output, _ = call(*arguments, "--help")
    assert code == 0
    assert output.startswith("Usage: pydefect")
    assert "--debug" in output or not arguments


def test_version() -> None:
    assert call("--version") == (0, f"pydefect {pydefect.__version__}\n", "")


def wrong_calls() -> list[tuple[str, list[str], str]]:
    return [
        ("no command", [], "Missing command"),
        ("unknown command", ["fti"], "fti"),
        ("unknown option", ["info", "--colour"], "--colour"),
        ("no model to write", ["fit", "{data}"], "--out"),
        ("missing data", ["fit", "{tmp}/nowhere", "--out", "{tmp}/m"], "nowhere"),
        ("folder without images", ["fit", "{tmp}", "--out", "{tmp}/m"], "image"),
        ("model is a folder", ["fit", "{data}", "--out", "{tmp}"], "is a folder"),
        ("model below a file", ["fit", "{data}", "--out", "{model}/m"], "is a file"),
        ("model exists", ["fit", "{data}", "--out", "{model}"], "--force"),
        ("unknown method", ["fit", "{data}", "--out", "{tmp}/m", "--method", "magic"], "magic"),
        ("unknown preset", ["fit", "{data}", "--out", "{tmp}/m", "--preset", "best"], "best"),
        ("unknown backbone", ["fit", "{data}", "--out", "{tmp}/m", "--backbone", "vgg"], "vgg"),
        ("unknown weights", ["fit", "{data}", "--out", "{tmp}/m", "--weights", "{tmp}/w.npz"], "w.npz"),
        ("unknown device", ["fit", "{data}", "--out", "{tmp}/m", "--device", "tpu"], "tpu"),
        ("negative epochs", ["fit", "{data}", "--out", "{tmp}/m", "--epochs", "-1"], "--epochs"),
        (
            "impossible rate",
            ["fit", "{data}", "--out", "{tmp}/m", "--false-alarm-rate", "2"],
            "--false-alarm-rate",
        ),
        ("unknown setting", ["fit", "{data}", "--out", "{tmp}/m", "--set", "gama=2"], "gama"),
        ("wrong value", ["fit", "{data}", "--out", "{tmp}/m", "--set", "bank=huge"], "huge"),
        (
            "no JSON",
            ["fit", "{data}", "--out", "{tmp}/m", "--set", "region=(0,0,9,9)"],
            "is no list as JSON writes it",
        ),
        ("no key=value", ["fit", "{data}", "--out", "{tmp}/m", "--set", "gamma"], "key=value"),
        ("set twice", ["fit", "{data}", "--out", "{tmp}/m", "--set", "gamma=2", "--set", "gamma=3"], "twice"),
        ("set an option", ["fit", "{data}", "--out", "{tmp}/m", "--set", "seed=2"], "--seed"),
        ("set no setting", ["fit", "{data}", "--out", "{tmp}/m", "--set", "progress=1"], "no setting"),
        ("no such model", ["score", "{tmp}/m", "{data}/test", "--out", "{tmp}/r"], "m"),
        ("not a model", ["score", "{picture}", "{data}/test", "--out", "{tmp}/r"], "000.png"),
        ("no such images", ["score", "{model}", "{tmp}/nowhere", "--out", "{tmp}/r"], "nowhere"),
        ("damaged image", ["score", "{model}", "{damaged}", "--out", "{tmp}/r", "--quiet"], "damaged.png"),
        ("report among the images", ["score", "{model}", "{data}", "--out", "{data}/report"], "inside"),
        ("report is a file", ["score", "{model}", "{data}/test", "--out", "{model}"], "is a file"),
        (
            "no batch",
            ["score", "{model}", "{data}/test", "--out", "{tmp}/r", "--batch-size", "0"],
            "--batch-size",
        ),
        ("nothing to measure", ["evaluate", "{model}", "{data}/train"], "label"),
        ("json is a folder", ["evaluate", "{model}", "{data}", "--json", "{tmp}"], "--json"),
        ("run is a file", ["evaluate", "{model}", "{data}", "--out", "{model}"], "is a file"),
        ("run replaces images", ["evaluate", "{model}", "{data}", "--out", "{data}"], "something else"),
        ("maps are a file", ["evaluate-maps", "{model}", "{data}"], "is a file, no folder"),
        ("no maps", ["evaluate-maps", "{tmp}", "{data}"], "images have no map in"),
        ("maps of nothing", ["evaluate-maps", "{tmp}", "{tmp}/nowhere"], "nowhere"),
        (
            "no scores",
            ["evaluate-maps", "{tmp}", "{data}", "--image-scores", "{tmp}/s.csv"],
            "s.csv cannot be read",
        ),
        ("calibrate by a data set", ["calibrate", "{model}", "--normal", "{data}"], "without a validation"),
        ("calibrate by nothing", ["calibrate", "{model}", "--normal", "{tmp}"], "image"),
        (
            "defective alone",
            ["calibrate", "{model}", "--defective", "{data}/test"],
            "thresholds need normal images",
        ),
        (
            "two ways to calibrate",
            ["calibrate", "{model}", "--labelled", "{data}", "--normal", "{tmp}"],
            "together with --normal",
        ),
        (
            "a rate of labelled images",
            ["calibrate", "{model}", "--labelled", "{data}", "--false-alarm-rate", "0.01"],
            "together with --false-alarm-rate",
        ),
        ("calibrated model exists", ["calibrate", "{model}", "--out", "{model}"], "--force"),
        ("no confidence", ["calibrate", "{model}", "--confidence", "1"], "confidence"),
        ("histogram of another kind", ["calibrate", "{model}", "--histogram", "{tmp}/h.svg"], ".png"),
        ("demo into a file", ["demo", "--out", "{model}"], "is a file"),
    ]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [pytest.param(arguments, message, id=name) for name, arguments, message in wrong_calls()],
)
def test_a_wrong_call_says_what_is_wrong_in_one_line(
    arguments: list[str], message: str, tmp_path: Path, product: Path, model: Path
) -> None:
    damaged = tmp_path / "input" / "damaged.png"
    damaged.parent.mkdir()
    damaged.write_bytes(b"\x89PNG, or is it?")
    picture = product / "train/good/000.png"
    before = model.read_bytes()
    (tmp_path / "empty").mkdir()
    places = {
        "tmp": tmp_path / "empty",
        "data": product,
        "model": model,
        "picture": picture,
        "damaged": damaged,
    }
    code, output, errors = call(*(argument.format(**places) for argument in arguments))
    lines = errors.splitlines()
    assert code == 2, errors
    assert output == ""
    assert len(lines) == 1
    assert lines[0].startswith("pydefect: error: ")
    assert message in lines[0]
    assert "Traceback" not in errors
    assert model.read_bytes() == before
    assert not (tmp_path / "empty/m").exists()
    assert not (tmp_path / "empty/r/scores.csv").exists()


def test_other_failures_have_code_1_and_a_traceback_only_on_demand(
    model: Path, product: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_arguments: object, **_settings: object) -> None:
        raise RuntimeError("out of\n  luck")

    monkeypatch.setattr("pydefect.api.load", fail)
    arguments = ("score", model, product / "test", "--out", tmp_path)
    assert call(*arguments) == (
        1,
        "",
        "pydefect: error: RuntimeError: out of luck (--debug shows where)\n",
    )
    code, _, errors = call(*arguments, "--debug")
    assert code == 1
    assert "Traceback" in errors
    assert errors.endswith("pydefect: error: RuntimeError: out of luck\n")


def test_an_interruption_says_how_to_go_on(
    product: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*_arguments: object, **_settings: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("pydefect.api.fit", interrupt)
    code, _, errors = call("fit", product, "--out", tmp_path / "m", "--checkpoint", tmp_path / "state")
    assert code == 130
    assert errors == f"pydefect: interrupted; the same command resumes from what {tmp_path / 'state'} holds\n"
    code, _, errors = call("fit", product, "--out", tmp_path / "m")
    assert (code, errors) == (130, "pydefect: interrupted\n")


def test_score_writes_what_the_library_says(product: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "report"
    code, output, errors = call(
        "score", model, product / "test", "--out", out, "--maps", "--quiet", "--batch-size", 2
    )
    assert code == 0, errors
    assert errors == ""
    count = 3 + len(DEFECTS)
    assert f"{count} images" in output
    expected = pydefect.score(model, product / "test", progress=False)
    with (out / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == expected.names
    assert [float(row["score"]) for row in rows] == pytest.approx(expected.image_scores.tolist(), rel=1e-5)
    for row in rows:
        for folder in ("overlays", "contours", "masks"):
            assert (out / folder / row["picture"]).is_file()
    assert len(list((out / "maps").rglob("*.tiff"))) == count
    content = json.loads((out / "scores.json").read_text())
    assert content["configuration"]["levels"] == [1, 2]


def test_score_takes_files_and_skips_damaged_ones_on_demand(
    product: Path, model: Path, tmp_path: Path
) -> None:
    damaged = tmp_path / "damaged.png"
    damaged.write_bytes(b"no image")
    good = product / "test/good/000.png"
    code, output, errors = call(
        *("score", model, good, damaged, "--out", tmp_path / "r"),
        "--on-error",
        "skip",
        "--quiet",
        "--pictures",
        "none",
    )
    assert code == 0
    assert errors.startswith(f"skipped: {damaged}: ")
    assert "1 skipped" in output
    content = json.loads((tmp_path / "r/scores.json").read_text())
    assert [row["name"] for row in content["images"]] == [str(good)]
    assert [row["name"] for row in content["skipped"]] == [str(damaged)]


def test_settings_in_python_s_spelling_and_in_json_s() -> None:
    given = ["a=None", "b=True", "c=false", "d=null", "e=[1,2]", "f=0.5", "g=imagenet"]
    expected = {"a": None, "b": True, "c": False, "d": None, "e": [1, 2], "f": 0.5, "g": "imagenet"}
    assert parse_settings(given, ()) == expected


def loads(monkeypatch: pytest.MonkeyPatch, detector: pydefect.Detector, digest: str = "1f" * 32) -> None:
    """Let every model file hold this detector."""
    monkeypatch.setattr("pydefect.api.load", lambda *_arguments, **_settings: detector)
    monkeypatch.setattr("pydefect.persistence.content_digest", lambda _path, version: digest)
    monkeypatch.setattr("pydefect.persistence.file_version", lambda _path: 0)


def test_score_leaves_out_what_is_smaller_than_the_crop(
    product: Path, colours, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    detector = colours()
    detector.preprocessing = Preprocessing.create(None, 40, (0, 0, 0), (1, 1, 1))
    loads(monkeypatch, detector)
    images = tmp_path / "images"
    images.mkdir()
    for name, size in (("1.png", 64), ("2.png", 32), ("4.png", 64)):
        cv2.imwrite(str(images / name), np.full((size, size, 3), 70, np.uint8))
    (images / "3.png").write_bytes(b"no image")
    arguments = ("score", "m", images, "--out", tmp_path / "r", "--quiet", "--batch-size", 1)
    code, _, errors = call(*arguments)
    assert code == 2
    assert "2.png: the image is 32 x 32 pixels" in errors
    code, output, errors = call(*arguments, "--on-error", "skip")
    assert code == 0, errors
    assert "2 images" in output
    assert "2 skipped" in output
    assert "skipped: 2.png: the image is 32 x 32 pixels" in errors
    assert "skipped: 3.png: " in errors
    content = json.loads((tmp_path / "r/scores.json").read_text())
    assert [row["name"] for row in content["images"]] == ["1.png", "4.png"]
    assert sorted(row["name"] for row in content["skipped"]) == ["2.png", "3.png"]
    assert sorted(path.name for path in (tmp_path / "r/overlays").iterdir()) == ["1.png", "4.png"]


def test_score_adds_to_the_scores_of_a_growing_folder(
    product: Path, colours, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads(monkeypatch, colours())
    out = tmp_path / "shift"

    def photograph(name: str, red: int) -> None:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        cv2.imwrite(str(tmp_path / name), np.full((48, 48, 3), red, np.uint8))

    def score(day: str) -> tuple[str, str]:
        monkeypatch.chdir(tmp_path)
        options = ("--append", "--quiet", "--on-error", "skip", "--pictures", "defective")
        code, output, errors = call("score", "m", day, "--out", out, *options)
        assert code == 0, errors
        return output.splitlines()[-2], output.splitlines()[-1]

    photograph("day-1/1.png", 250)
    (tmp_path / "day-1/2.png").write_bytes(b"")  # its camera is still at it
    counted, lists = score("day-1")
    assert counted == "1 images, 1 defective (score above 0.7500), 1 skipped"
    assert lists == f"scores: {out / 'scores.csv'} (1 images), {out / 'sheet.png'}"
    photograph("day-1/2.png", 70)
    photograph("day-1/3.png", 251)
    counted, lists = score("day-1")
    assert counted == "2 images, 1 defective (score above 0.7500), 1 listed already"
    assert lists == f"scores: {out / 'scores.csv'} (3 images), {out / 'sheet.png'} (the new ones)"
    before = {path: path.read_bytes() for path in out.rglob("*.*")}
    assert score("day-1/") == ("0 images, 3 listed already", f"scores: {out / 'scores.csv'} (3 images)")
    assert before == {path: path.read_bytes() for path in out.rglob("*.*")}
    # The next day's camera counts from 1 again.
    photograph("day-2/1.png", 252)
    assert score(str(tmp_path / "day-2"))[0] == "1 images, 1 defective (score above 0.7500)"
    with (out / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["name"] for row in rows] == ["1.png", "2.png", "3.png", "1.png"]
    assert [row["picture"] for row in rows] == ["1.png", "", "3.png", "1-2.png"]
    assert json.loads((out / "scores.json").read_text())["skipped"] == []

    other = colours(scale=2)
    monkeypatch.setattr(other, "predict_maps", None)
    loads(monkeypatch, other)
    before = {path: path.read_bytes() for path in out.rglob("*.*")}
    code, _, errors = call("score", "m", product / "test", "--out", out, "--append")
    assert code == 2
    assert "another detector (it differs in image_threshold, pixel_threshold, scale)" in errors
    assert before == {path: path.read_bytes() for path in out.rglob("*.*")}
    # One with the same settings and thresholds: fitted on other images, or updated since.
    loads(monkeypatch, colours(), "2f" * 32)
    code, _, errors = call("score", "m", product / "test", "--out", out, "--append")
    assert code == 2
    assert "another detector (it differs in model_sha256)" in errors


def test_score_draws_defective_images_only(product: Path, colours, tmp_path: Path, monkeypatch) -> None:
    detector = colours()
    loads(monkeypatch, detector)
    images = tmp_path / "images"
    images.mkdir()
    for name, red in (("1.png", 70), ("2.png", 250), ("3.png", 90)):
        cv2.imwrite(str(images / name), np.full((48, 48, 3), red, np.uint8))
    arguments = ("score", "m", images, "--out", tmp_path / "r", "--quiet", "--pictures", "defective")
    code, output, errors = call(*arguments)
    assert code == 0, errors
    assert output.endswith(f"scores: {tmp_path / 'r/scores.csv'}, {tmp_path / 'r/sheet.png'}\n")
    with (tmp_path / "r/scores.csv").open(newline="") as file:
        assert [row["picture"] for row in csv.DictReader(file)] == ["", "2.png", ""]
    assert [path.name for path in (tmp_path / "r/overlays").iterdir()] == ["2.png"]

    detector.calibration = None
    monkeypatch.setattr(detector, "predict_maps", None)
    code, _, errors = call(*arguments, "--out", tmp_path / "other")
    assert code == 2
    assert 'pictures: "defective" given, but without thresholds no image is called defective' in errors
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (["{data}/test", "{tmp}/typo.png"], "there is no file or folder {tmp}/typo.png"),
        (["{tmp}/empty", "{data}/test"], "no image in the folder {tmp}/empty"),
    ],
)
def test_images_that_are_not_there_are_said_before_any_is_scored(
    product: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, images: list[str], message: str
) -> None:
    def fail(*_arguments: object, **_settings: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("pydefect.api.load", fail)
    (tmp_path / "empty").mkdir()
    places = {"data": product, "tmp": tmp_path}
    code, _, errors = call("score", "m", *(one.format(**places) for one in images), "--out", tmp_path / "r")
    assert code == 2
    assert message.format(**places) in errors


@pytest.mark.parametrize("encoding", ["latin-1", "utf-8"])
def test_names_that_the_terminal_cannot_show_are_no_failure(
    product: Path, model: Path, tmp_path: Path, encoding: str
) -> None:
    images = tmp_path / "images"
    images.mkdir()
    picture = (product / "test/good/000.png").read_bytes()
    for name in (b"\xd0\xb6.png", b"\xff.png"):
        (images / os.fsdecode(name)).write_bytes(picture)
    (images / os.fsdecode(b"\xfe.png")).write_bytes(b"no image")
    options = ("--pictures", "none", "--on-error", "skip")
    done = subprocess.run(
        [sys.executable, "-m", "pydefect", "score", model, images, "--out", tmp_path / "out", *options],
        cwd=tmp_path,
        env={**os.environ, "PYTHONIOENCODING": encoding},
        capture_output=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert b"\\udcff.png" in done.stdout
    assert "ж.png".encode(encoding, "backslashreplace") in done.stdout
    assert b"skipped: \\udcfe.png" in done.stderr
    # A log is no place for bars.
    assert len(done.stderr.splitlines()) == 1


def test_evaluate_prints_a_table_and_writes_json(product: Path, model: Path, tmp_path: Path) -> None:
    file = tmp_path / "new" / "figures.json"
    code, output, errors = call("evaluate", model, product, "--json", file, "--quiet")
    assert code == 0, errors
    figures = json.loads(file.read_text())
    for name in ("image_auroc", "pixel_auroc", "image_ap", "pixel_ap", "image_f1_max", "pixel_f1_max"):
        assert 0 <= figures[name] <= 1
    assert figures["seconds_per_image"] > 0
    assert figures["peak_rss_mb"] > 10
    assert figures["configuration"]["representation_dim"] == 64
    assert f"{100 * figures['image_auroc']:8.2f}" in output
    assert all(defect in output for defect in DEFECTS)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["fit", "DATA", "--out", "m", "--seed", "-1"], "'--seed': .*-1"),
        (
            ["fit", "DATA", "--out", "m", "--device", "tpu"],
            "--device: 'tpu' given; allowed are 'auto', 'cpu'",
        ),
        (["fit", "DATA", "--out", "m", "--set", "gamma=abc"], "--set gamma: 'abc' given; allowed are 1 and"),
        (["fit", "DATA", "--out", "m", "--set", "gama=2"], "--set gama: .*; did you mean 'gamma'"),
        (["fit", "DATA", "--out", "m", "--method", "Conpach"], "--method: .*; did you mean 'conpatch'"),
        (["fit", "DATA", "--out", "m", "--weights", "none.pth"], "--weights: no file 'none.pth'; give a"),
        (["calibrate", "MODEL", "--confidence", "2"], "--confidence: 2.0 given; allowed are numbers over 0"),
        (["score", "m", "DATA/test", "--out", "scores"], "MODEL: no file 'm'"),
        (["score", "MODEL", "DATA/test", "--out", "s", "--batch-size", "0"], "'--batch-size': .*0"),
        (["benchmark", "--data", "DATA", "--out", "b", "--methods", "padimm"], "--methods: .* mean 'padim'"),
    ],
)
def test_an_error_names_the_option_as_it_was_typed(
    arguments: list[str],
    said: str,
    product: Path,
    model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    arguments = [text.replace("DATA", str(product)).replace("MODEL", str(model)) for text in arguments]
    code, output, errors = call(*arguments)
    assert (code, output) == (2, "")
    assert re.match(f"pydefect: error: (Invalid value for )?{said}", errors), errors


def test_a_dash_is_standard_output(
    product: Path, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    code, output, errors = call("evaluate", model, product, "--json", "-", "--out", "run", "--quiet")
    assert code == 0, errors
    figures = json.loads(output)
    assert f"{100 * figures['image_auroc']:8.2f}" in errors
    # Not of the runner's streams: the page is written into what /dev/stdout leads to.
    done = subprocess.run(
        [sys.executable, "-m", "pydefect", "report", "run", "--out", "-"], capture_output=True, check=True
    )
    assert done.stdout.startswith(b"<!DOCTYPE html>")
    assert done.stdout.endswith(b"</html>")
    assert os.listdir() == ["run"]


def test_readers_that_have_gone_take_no_results_with_them(product: Path, model: Path, tmp_path: Path) -> None:
    """As ``| head`` does. A fit's warning ended it before its model was saved."""
    read, write = os.pipe()
    os.close(read)
    program = [sys.executable, "-m", "pydefect"]
    fit = [*program, "fit", product, "--out", tmp_path / "m", *FAST]
    evaluate = [*program, "evaluate", model, product, "--json", tmp_path / "figures.json"]
    for arguments, closed, other in ((fit, "stderr", "stdout"), (evaluate, "stdout", "stderr")):
        pipes = {closed: write, other: subprocess.PIPE}
        done = subprocess.run(arguments, text=True, check=False, cwd=tmp_path, **pipes)
        assert "Traceback" not in getattr(done, other)
    os.close(write)
    assert pydefect.load(tmp_path / "m").training["images"] == 6
    assert json.loads((tmp_path / "figures.json").read_text())["images"] == 9


def test_long_names_of_defects_stand_apart_from_their_figures(
    product: Path, model: Path, tmp_path: Path
) -> None:
    for kind in ("scratch", "dent"):
        name = f"{kind} of the inner ring, left side" if kind == "scratch" else kind
        shutil.copytree(product / "test" / kind, tmp_path / "product/test" / name)
    for part in ("train", "test/good"):
        shutil.copytree(product / part, tmp_path / "product" / part)
    code, output, errors = call("evaluate", model, tmp_path / "product")
    assert code == 0, errors
    rows = [line for line in output.splitlines() if "image AUROC" in line]
    assert len({row.index("  image AUROC") for row in rows}) == 1
    assert len(rows) == 2


def test_nothing_else_is_put_into_a_run(product: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "flange"
    code, _, errors = call(
        "evaluate", model, product, "--out", out, "--json", out / "figures.json", "--quiet"
    )
    assert code == 2
    assert "which is replaced as a whole" in errors
    assert not out.exists()


def test_evaluate_maps_gives_the_figures_of_evaluate(product: Path, model: Path, tmp_path: Path) -> None:
    scores = tmp_path / "scores"
    assert call("score", model, product / "test", "--out", scores, "--maps", "--quiet")[0] == 0
    files = [tmp_path / "expected.json", tmp_path / "figures.json"]
    assert call("evaluate", model, product, "--json", files[0], "--quiet")[0] == 0
    arguments = ["evaluate-maps", scores / "maps", product, "--image-scores", scores / "scores.csv"]
    code, output, errors = call(*arguments, "--json", files[1], "--quiet")
    assert (code, errors) == (0, "")
    expected, figures = (json.loads(file.read_text()) for file in files)
    unknown = {"false_alarms": None, "misses": None, "seconds_per_image": None, "peak_rss_mb": None}
    assert figures == {**expected, **unknown, "configuration": {}}
    assert "test images, 3 good and" in output
    assert "model's threshold" not in output
    assert "ms an image" not in output
    # Without scores the maximum of each map.
    code, output, errors = call("evaluate-maps", scores / "maps", product, "--json", "-", "--quiet")
    assert code == 0
    assert json.loads(output)["pixel_auroc"] == expected["pixel_auroc"]
    assert "pixels" in errors


def test_evaluate_keeps_a_run(product: Path, model: Path, tmp_path: Path) -> None:
    out = tmp_path / "runs" / "flange"
    code, _, errors = call("evaluate", model, product, "--out", out, "--quiet")
    assert code == 0, errors
    code, _, errors = call("report", out, "--out", out / "page.html", "--quiet")
    assert code == 2
    assert "lies in the run, where the page is called report.html" in errors
    run = read_run(out)
    assert run.facts["method"] == "conpatch"
    assert run.map_names == ("anomaly",)
    result = pydefect.score(model, run.sample(0).image, progress=False)
    assert run.images[0].image_score == pytest.approx(result.image_scores[0])
    # The bound that pydefect.run promises.
    assert run.map(0) == pytest.approx(result.anomaly_maps[0], rel=2**-10)


def test_force_replaces_a_model(product: Path, model: Path, tmp_path: Path) -> None:
    path = tmp_path / "m"
    path.write_text("something else")
    code, _, errors = call("fit", product / "train/good", "--out", path, "--force", *FAST)
    assert code == 0, errors
    assert path.stat().st_size > 1000


def test_info_is_readable_and_json() -> None:
    code, output, _ = call("info")
    assert code == 0
    assert "instruction sets" in output
    code, output, _ = call("info", "--json")
    facts = json.loads(output)
    assert facts["versions"]["pydefect"] == pydefect.__version__
    assert set(facts) == {"versions", "methods", "backbones", "native code", "cuda", "imagenet weights"}


def test_the_demo_ignores_no_weights(tmp_path: Path) -> None:
    code, _, errors = call("demo", "--out", tmp_path / "demo", "--scene", "logical", "--weights", "random")
    assert code == 2
    assert "weights are for --scene structural" in errors
    assert not (tmp_path / "demo").exists()


@pytest.mark.slow
def test_demo_finds_defects_in_two_minutes(tmp_path: Path) -> None:
    out = tmp_path / "demo"
    start = time.perf_counter()
    code, _, errors = call("demo", "--out", out, "--weights", "random", "--quiet")
    assert code == 0, errors
    assert time.perf_counter() - start < 240  # twice what is promised: other work may share the machine
    for name in ("sheet.png", "report.html", "model.safetensors", "scores/scores.csv", "scores/sheet.png"):
        assert (out / name).is_file()
    result = pydefect.evaluate(out / "model.safetensors", out / "flange-0", progress=False)
    assert result.image.auroc > 0.75
    assert result.pixel is not None
    assert result.pixel.auroc > 0.85


def test_help_does_not_wait_for_torch() -> None:
    code = "import sys; from pydefect.cli import app; app(['--help'], standalone_mode=False); "
    code += "print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "False"


def test_the_module_runs_as_a_program(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pydefect", "fit", str(tmp_path / "nowhere"), "--out", str(tmp_path / "m")],
        # Not in the source folder, which Python would put in front of the installed package.
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert "nowhere" in done.stderr


@pytest.mark.parametrize("library", ["typer", "torch"])
def test_an_interruption_while_a_library_loads_is_answered_in_one_line(library: str, tmp_path: Path) -> None:
    # What PyTorch makes of it is chance: another error, or the end of the process.
    (tmp_path / f"{library}.py").write_text(
        "import signal\n"
        "try:\n    signal.raise_signal(signal.SIGINT)\n"
        "except KeyboardInterrupt:\n    raise RecursionError from None\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "pydefect", "info"],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "pydefect: interrupted\n")


@pytest.mark.filterwarnings("ignore:.*held-out images support:UserWarning")
def test_calibrate_writes_the_model_that_a_link_leads_to(model: Path, tmp_path: Path) -> None:
    copy, link = tmp_path / "flange-3.safetensors", tmp_path / "current.safetensors"
    copy.write_bytes(model.read_bytes())
    link.symlink_to(copy.name)
    code, _, errors = call("calibrate", link, "--false-alarm-rate", "0.5")
    assert code == 0, errors
    assert link.is_symlink()
    assert (
        pydefect.load(copy).calibration.false_alarm_rate == pydefect.load(link).calibration.false_alarm_rate
    )
    assert pydefect.load(copy).calibration != pydefect.load(model).calibration


@pytest.mark.filterwarnings("ignore:.*held-out images support:UserWarning")
def test_calibrate_rewrites_the_thresholds_and_nothing_else(
    model: Path, product: Path, tmp_path: Path
) -> None:
    copy, other = tmp_path / "model.safetensors", tmp_path / "other.safetensors"
    copy.write_bytes(model.read_bytes())
    good = product / "test" / "good"
    defective = product / "test" / DEFECTS[0]
    code, output, _ = call(
        *("calibrate", copy, "--normal", good, "--defective", defective, "--false-alarm-rate", "0.5"),
        *("--histogram", tmp_path / "histogram.png", "--quiet"),
    )
    assert code == 0
    assert "1 of 3 held-out good images; 50.00% expected, 0.84% to 90.57% with 95% confidence" in output
    assert "defects found: " in output
    assert "with 95% by 5 good images (--guaranteed), on average by 1" in output
    assert (tmp_path / "histogram.png").read_bytes().startswith(b"\x89PNG")
    before, after = load_tensors(model), load_tensors(copy)
    assert all(torch.equal(before[0][name], after[0][name]) for name in (before[0] | after[0]))
    assert {key for key in before[1] if before[1][key] != after[1][key]} == {"calibration"}

    result = pydefect.score(copy, good, progress=False)
    assert result.image_threshold == pytest.approx(float(np.median(result.image_scores)))
    # 1 + the number of at least as high ones of three, over four.
    assert sorted(result.p_values.tolist()) == [0.5, 0.75, 1.0]

    # Another rate from the scores just kept, into another file.
    assert call("calibrate", copy, "--false-alarm-rate", "0.25", "--out", other)[0] == 0
    assert pydefect.load(other).calibration.image_threshold == pytest.approx(result.image_scores.max())
    assert pydefect.load(copy).calibration.image_threshold == result.image_threshold

    assert call("score", copy, good, "--out", tmp_path / "report", "--pictures", "none", "--quiet")[0] == 0
    with (tmp_path / "report" / "scores.csv").open(newline="") as file:
        assert [float(row["p_value"]) for row in csv.DictReader(file)] == result.p_values.tolist()


def test_calibrate_by_labelled_images(model: Path, product: Path, tmp_path: Path) -> None:
    out = tmp_path / "labelled.safetensors"
    code, output, _ = call("calibrate", model, "--labelled", product, "--out", out, "--quiet")
    assert code == 0
    calibration = pydefect.load(out).calibration
    assert calibration == pydefect.calibrate(pydefect.load(model), product, progress=False)
    assert calibration.source == "labelled"
    assert f"F1 is largest there over {calibration.images} labelled images, of whose good ones" in output
    assert "promised" not in output


@pytest.mark.slow
def test_ctrl_c_ends_a_fit_in_one_line(product: Path, tmp_path: Path) -> None:
    arguments = [sys.executable, "-m", "pydefect", "fit", str(product), "--out", str(tmp_path / "m"), *FAST]
    arguments += [
        "--epochs",
        "100000",
        "--checkpoint",
        str(tmp_path / "state"),
        "--set",
        "early_stopping=false",
    ]
    process = subprocess.Popen(
        arguments,
        cwd=tmp_path,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        # A shell that runs the tests in the background lets them ignore Ctrl-C, and children inherit that.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    try:
        while not list(tmp_path.glob("state/*")):
            assert process.poll() is None
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        output, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert output == ""
    assert errors == f"pydefect: interrupted; the same command resumes from what {tmp_path / 'state'} holds\n"
    assert not (tmp_path / "m").exists()


def test_what_is_promised_is_that_of_the_rank(capsys) -> None:
    scores = list(map(float, range(1, 300)))
    print_calibration(held_out_calibration(scores, scores, 0.01, guaranteed=True), 0.01)
    # 1 - 0.99^299
    assert "promised with 95.0% confidence by these thresholds" in capsys.readouterr().out
