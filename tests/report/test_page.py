"""What the HTML report says, read from the file; tests/report/test_browser.py looks at it in a browser."""

from __future__ import annotations

import json
import os
import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from typer.testing import CliRunner

import pydefect
from pydefect.cli import app
from pydefect.data.procedural import write_dataset
from pydefect.data.seen import file_print
from pydefect.errors import InputError
from pydefect.report import gallery, write_index, write_report
from pydefect.report.gallery import OUTCOMES, ColourScale, Thresholds, cards, outcome
from pydefect.run import Run, read_run
from pydefect.visualization import shared_scale


class Page(HTMLParser):
    """The tags of a page with their attributes, and its words without scripts and styles."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self._inside: list[str] = []
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in ("script", "style"):
            self._inside.append(tag)

    def handle_endtag(self, tag):
        if tag in ("script", "style"):
            self._inside.pop()

    def handle_data(self, data):
        if not self._inside:
            self.words += data

    def all(self, tag: str, **wanted: str) -> list[dict[str, str | None]]:
        found = [attributes for name, attributes in self.tags if name == tag]
        return [one for one in found if all(one.get(key) == value for key, value in wanted.items())]


@pytest.fixture(scope="module")
def page(run: Run, tmp_path_factory: pytest.TempPathFactory) -> Page:
    return Page(write_report(run, tmp_path_factory.mktemp("page") / "report.html", progress=False))


def test_every_image_has_its_card_errors_first(run, page):
    shown = page.all("li")
    shown = [card for card in shown if "data-name" in card]
    assert {card["data-name"] for card in shown} == {image.name for image in run.images}
    wrong = [card["data-outcome"] in ("miss", "false_alarm") for card in shown]
    assert wrong == sorted(wrong, reverse=True)
    assert 0 < sum(wrong) < len(wrong)
    for errors in (True, False):
        scores = [float(card["data-score"]) for card, its in zip(shown, wrong, strict=True) if its == errors]
        assert scores == sorted(scores, reverse=True)


def test_the_outcomes_are_those_of_the_evaluation(run, page):
    outcomes = [card["data-outcome"] for card in page.all("li") if "data-name" in card]
    assert outcomes.count("miss") == run.evaluation["misses"]
    assert outcomes.count("false_alarm") == run.evaluation["false_alarms"]
    assert set(outcomes) <= set(OUTCOMES)
    assert f"{run.evaluation['misses']} of {run.evaluation['defective']}" in page.words


def test_the_figures_are_those_of_the_evaluation(run, page):
    for key in ("image_auroc", "pixel_auroc", "image_ap", "pixel_ap", "pixel_aupro", "pixel_f1_max"):
        assert f"{100 * run.evaluation[key]:.2f} %" in page.words
    for defect, auroc in run.evaluation["image_auroc_by_defect"].items():
        assert defect.replace("_", " ") in page.words
        assert f"{100 * auroc:.2f} %" in page.words


def test_what_it_was_measured_with_is_there(run, page):
    for text in ("colours", pydefect.__version__, "local map", "Configuration", "Times", "Versions"):
        assert text.lower() in page.words.lower()
    assert run.facts["versions"]["torch"] in page.words


def test_every_picture_says_what_it_shows(run, page):
    pictures = page.all("img") + page.all("svg", role="img")
    # A photograph, the heat map, the local and the global map; and once their colours.
    assert len(pictures) == 4 * len(run.images) + 1
    for picture in pictures:
        assert (picture.get("alt") or picture.get("aria-label") or "").strip()
    assert all(svg.get("aria-hidden") == "true" or svg.get("role") == "img" for svg in page.all("svg"))
    assert len(page.all("path", **{"class": "truth"})) >= run.evaluation["defective"]


def test_nothing_is_loaded_from_anywhere(page):
    policy = page.all("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"]
    assert policy.startswith("default-src 'none'")
    for tag, attributes in page.tags:
        assert tag not in ("link", "iframe", "object", "base")
        for name in ("src", "href", "xlink:href", "srcset", "data", "action"):
            value = attributes.get(name)
            assert value is None or value.startswith(("data:image/jpeg;base64,", "#")), (tag, name)


def test_the_drawn_outlines_hold_the_mask(run):
    """Filling the path of the ground truth gives the mask back, up to what smoothing leaves out."""
    import cv2

    from pydefect.data.layouts import read_mask

    index = next(index for index, image in enumerate(run.images) if image.label)
    card = next(
        card
        for card in cards(run, Thresholds.of(run), ColourScale(0.0, 1.0), 400, lambda done, total: None)
        if card.image is run.images[index]
    )
    curves = [
        np.array([point.split() for point in part.split("L")], dtype=np.int32)
        for part in re.findall(r"M([^Z]*)Z", card.truth)
    ]
    filled = np.zeros(card.image.size, dtype=np.uint8)
    cv2.fillPoly(filled, curves, 1)
    mask = read_mask(run.sample(index), card.image.size)
    assert np.logical_xor(filled, mask).sum() <= 0.1 * mask.sum() + 8


def test_the_colours_of_the_heat_maps_are_explained(run, page):
    low, high = shared_scale([], pixel_threshold=run.calibration.pixel_threshold)
    assert f"heat map from {low:#.4g}" in page.words
    assert f"to {high:#.4g}" in page.words


def test_fewer_pictures_leave_out_the_unremarkable_ones(run, tmp_path):
    page = Page(write_report(run, tmp_path / "report.html", images=3, progress=False))
    shown = [card for card in page.all("li") if "data-name" in card]
    assert len(shown) == 3
    assert {card["data-outcome"] for card in shown} <= {"miss", "false_alarm"}
    assert f"{len(run.images) - 3} images" in page.words


@pytest.mark.parametrize("count", [1, 36, 400, 970, 5000])
def test_the_pictures_of_a_page_share_its_pixels(run, monkeypatch, count):
    """Of so many cards as they would be drawn: a photograph, the heat map, the local and the global map."""
    asked = []
    monkeypatch.setattr(gallery, "_card", lambda run, index, thresholds, scale, pixels: asked.append(pixels))
    large = SimpleNamespace(images=run.images[:1] * count, map_names=run.map_names)
    cards(large, Thresholds.of(run), ColourScale(0.0, 1.0), count, lambda done, total: None)
    assert len(asked) == count
    assert min(asked) >= 96**2
    # Where even the smallest are too many, they are the smallest.
    assert round(4 * sum(asked)) <= max(36_000_000, 4 * count * 96**2)


def test_warnings_about_data_and_model_are_shown(colours, tmp_path):
    root = write_dataset(tmp_path / "flange", 4, 3, 1, 64, seed=3)
    shutil.copy(root / "train/good/000.png", root / "test/good/100.png")
    (root / "test/good/001.png").write_bytes(b"no image")
    detector = colours()
    detector.calibration = None
    pydefect.evaluate(detector, root, out=tmp_path / "run", on_error="skip", progress=False)
    words = Page(write_report(read_run(tmp_path / "run"), progress=False)).words
    assert "1 test image can be found among the training images." in words
    assert "test/good/100.png — train/good/000.png" in words
    assert "The model has no thresholds" in words
    assert "1 of the test images could not be read; no figure counts it." in words


def test_test_images_that_the_fit_has_seen_are_named(colours, product, tmp_path):
    detector = colours()
    seen = product / "test" / "good" / "001.png"
    detector.training["files"] = [file_print(seen)]
    with pytest.warns(UserWarning, match=r"has seen 1 of the .* test images: test/good/001\.png; figures"):
        pydefect.evaluate(detector, product, out=tmp_path / "run", progress=False)
    run = read_run(tmp_path / "run")
    assert run.evaluation["learned"] == ["test/good/001.png"]
    assert run.facts["training"] == {"images": 2, "skipped": []}  # without the prints of all files
    page = write_report(run, tmp_path / "page.html", progress=False).read_text(encoding="utf-8")
    assert "Test images that the fit has seen" in page
    assert "has read 1 of the test images" in page


def test_a_photograph_that_is_gone_leaves_its_heat_map(run, product, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(product, moved)
    (moved / run.images[0].name).unlink()
    page = Page(write_report(read_run(run.folder, data=moved), tmp_path / "r.html", progress=False))
    assert len(page.all("image")) == len(run.images) - 1
    assert "The photograph cannot be shown" in page.words


def test_names_are_text_and_nothing_else(colours, tmp_path):
    root = write_dataset(tmp_path / "flange", 4, 3, 1, 64, seed=3)
    hostile = "a\"><img src=x onerror=\"document.title='broken'\"> 'b' {{ 7 * 7 }}.png"
    (root / "test/good/000.png").rename(root / "test/good" / hostile)
    pydefect.evaluate(colours(), root, out=tmp_path / "run", progress=False)
    page = Page(write_report(read_run(tmp_path / "run"), progress=False))
    assert f"test/good/{hostile}" in page.words
    assert page.all("img", src="x") == []
    assert {card["data-name"] for card in page.all("li") if "data-name" in card} >= {f"test/good/{hostile}"}


def test_wrong_calls(run, product, tmp_path):
    with pytest.raises(InputError, match=r"none of the run's images is in .*elsewhere.* \(--data DIR\)"):
        write_report(read_run(run.folder, data=tmp_path / "elsewhere"), tmp_path / "r.html")
    with pytest.raises(InputError, match="is a folder"):
        write_report(run, tmp_path)
    with pytest.raises(InputError, match="images: -1 given"):
        write_report(run, tmp_path / "r.html", images=-1)
    with pytest.raises(InputError, match="is no run, and there is none below it"):
        write_index(tmp_path)
    with pytest.raises(InputError, match=r"^images: -1 given"):
        write_index(run.folder.parent, images=-1)
    with pytest.raises(InputError, match=r"run: .*nowhere' is missing, no folder"):
        write_index(tmp_path / "nowhere")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_runs_gets_a_report_each_and_an_index(run, tmp_path):
    for name in ("a b/flange", "c"):
        shutil.copytree(run.folder, tmp_path / name)
    result = CliRunner().invoke(app, ["report", str(tmp_path), "--quiet"])
    assert result.exit_code == 0, result.output
    page = Page(tmp_path / "index.html")
    assert [link["href"] for link in page.all("a")] == ["a%20b/flange/report.html", "c/report.html"]
    assert (tmp_path / "a b/flange/report.html").stat().st_size > 10_000
    assert f"{100 * run.evaluation['image_auroc']:.2f}" in page.words


def test_links_lead_to_a_run_once(run, tmp_path):
    shutil.copytree(run.folder, tmp_path / "runs" / "a")
    (tmp_path / "runs" / "b").symlink_to(tmp_path / "runs" / "a")
    (tmp_path / "runs" / "up").symlink_to(tmp_path)
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    write_index(tmp_path, images=1, progress=False)
    assert [link["href"] for link in Page(tmp_path / "index.html").all("a")] == ["runs/a/report.html"]


def test_a_run_without_its_images_is_named_and_the_others_are_shown(run, tmp_path):
    for name in ("a", "b"):
        shutil.copytree(run.folder, tmp_path / name)
    facts = json.loads((tmp_path / "a" / "evaluation.json").read_text())
    facts["dataset"]["root"] = str(tmp_path / "moved")
    (tmp_path / "a" / "evaluation.json").write_text(json.dumps(facts))
    with pytest.warns(UserWarning, match=r"^a: data: none of the run's images .*; left out of the page$"):
        write_index(tmp_path, progress=False)
    assert [link["href"] for link in Page(tmp_path / "index.html").all("a")] == ["b/report.html"]
    shutil.rmtree(tmp_path / "b")
    with pytest.raises(InputError, match="run: no report could be made; the first: a: data: none"):
        write_index(tmp_path, progress=False)


def test_a_run_with_maps_that_are_gone_is_named_and_the_others_are_shown(run, tmp_path):
    """Names of folders may be no text."""
    other = os.fsdecode(b"\xffb")
    for name in ("a", other):
        shutil.copytree(run.folder, tmp_path / name)
    (tmp_path / "a" / "maps.npz").write_bytes(b"")
    with pytest.warns(UserWarning, match=r"^a: run: .*maps\.npz' is damaged: .*; left out of the page$"):
        write_index(tmp_path, progress=False)
    assert [link["href"] for link in Page(tmp_path / "index.html").all("a")] == ["%FFb/report.html"]


def test_the_command_line(run, product, tmp_path):
    moved = tmp_path / "moved"
    shutil.copytree(product, moved)
    shutil.copytree(run.folder, tmp_path / "run")
    result = CliRunner().invoke(app, ["report", str(tmp_path / "run"), "--quiet", "--data", str(moved)])
    assert result.exit_code == 0, result.output
    assert result.stdout == f"report: {tmp_path / 'run' / 'report.html'}\n"
    for arguments, message in (
        ([str(tmp_path / "nowhere")], "is missing"),
        ([str(tmp_path), "--out", str(tmp_path / "r.html")], "is no run folder"),
        ([str(tmp_path / "run"), "--out", str(tmp_path)], "is a folder"),
    ):
        result = CliRunner().invoke(app, ["report", *arguments])
        assert result.exit_code == 2
        assert message in result.stderr


def test_a_score_at_the_threshold_is_not_over_it() -> None:
    for label, below, over in ((0, "passed", "false_alarm"), (1, "miss", "found")):
        image = SimpleNamespace(image_score=1.5, label=label)
        assert outcome(image, 1.5) == below
        assert outcome(image, float(np.nextafter(1.5, 0))) == over


def test_rates_are_shares_of_their_own_images(colours, tmp_path: Path) -> None:
    root = write_dataset(tmp_path / "flange", 2, 7, 1, 64, seed=1)
    detector = colours()
    scores = detector.score(root / "test").image_scores
    threshold = float(np.median(scores))
    detector.calibration = replace(detector.calibration, image_threshold=threshold)
    evaluation = pydefect.evaluate(detector, root, out=tmp_path / "run", progress=False)
    good = evaluation.images - evaluation.defective
    assert 0 < evaluation.false_alarms < good != evaluation.defective
    page = write_report(read_run(tmp_path / "run"), progress=False).read_text()
    false_positives = evaluation.false_alarms / good
    true_positives = 1 - evaluation.misses / evaluation.defective
    assert (
        f"false-positive rate {100 * false_positives:.2f} %, true-positive rate {100 * true_positives:.2f} %"
        in page
    )
