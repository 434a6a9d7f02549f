"""The benchmark of methods over data sets: what it finds, runs, repeats and prints."""

from __future__ import annotations

import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from pydefect import InputError
from pydefect.benchmark import (
    Variant,
    find_categories,
    read_results,
    render_tables,
    run_benchmark,
    runner,
    write_tables,
)
from pydefect.benchmark.plan import Pair, Weights, without_places
from pydefect.benchmark.results import Results
from pydefect.benchmark.runner import _reason
from pydefect.benchmark.tables import cell
from pydefect.benchmark.worker import Job, run_job
from pydefect.cli import app
from pydefect.data.procedural import write_dataset
from pydefect.persistence import alone_in
from pydefect.run import read_run

FAST: dict[str, Any] = {
    "resize": 64,
    "levels": [1, 2],
    "representation_dim": 16,
    "epochs": 0,
    "calibration_folds": 0,
}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("data")
    write_dataset(root / "first" / "flange", 3, 2, 1, 64, seed=0)
    write_dataset(root / "second" / "disc", 3, 2, 1, 64, seed=1)
    return root


# -- what there is
# --------------------------------------------------------------------------------------------------


def test_categories_are_found_wherever_they_are(data: Path) -> None:
    assert [one.name for one in find_categories([data])] == ["flange", "disc"]
    assert [one.name for one in find_categories([data / "second", data / "first"])] == ["disc", "flange"]
    assert [one.name for one in find_categories([data / "first" / "flange"])] == ["flange"]
    assert [one.name for one in find_categories([data], ["disc", "flange", "disc"])] == ["disc", "flange"]


def test_equal_names_are_told_apart_by_their_folders(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "first" / "flange", tmp_path / "a" / "flange")
    shutil.copytree(data / "first" / "flange", tmp_path / "b" / "flange")
    assert [one.name for one in find_categories([tmp_path])] == ["a/flange", "b/flange"]
    with pytest.raises(InputError, match="two categories have the same name"):
        find_categories([tmp_path / "a", tmp_path / "a"])


def test_links_lead_to_a_category_once(data: Path, tmp_path: Path) -> None:
    shutil.copytree(data / "first" / "flange", tmp_path / "sets" / "flange")
    (tmp_path / "sets" / "other").symlink_to(tmp_path / "sets" / "flange")
    (tmp_path / "sets" / "up").symlink_to(tmp_path)
    assert [one.name for one in find_categories([tmp_path])] == ["flange"]
    # A link so deep that nothing inside is looked for any more must not hide the folder itself.
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "c").symlink_to(tmp_path / "sets")
    assert [one.name for one in find_categories([tmp_path])] == ["flange"]


def test_what_cannot_be_measured_is_no_category(data: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="holds no data set"):
        find_categories([data / "first" / "flange" / "train"])
    with pytest.raises(InputError, match="is no folder"):
        find_categories([tmp_path / "nowhere"])
    with pytest.raises(InputError, match="'cable' is not there; found are flange, disc"):
        find_categories([data], ["cable"])


def test_a_category_that_cannot_be_read_is_named(data: Path, tmp_path: Path) -> None:
    # Its folder test holds good and defective images: read by itself, it would be a data set to learn from.
    whole = shutil.copytree(data / "first" / "flange", tmp_path / "sets" / "flange")
    (whole / "ground_truth").rename(whole / "ground_truth_of_before")
    (whole / "ground_truth" / "dent").mkdir(parents=True)
    shutil.copy(next(whole.rglob("*_mask.png")), whole / "ground_truth" / "dent" / "other.png")
    shutil.copytree(data / "second" / "disc", tmp_path / "sets" / "disc")
    with pytest.raises(InputError, match="fits an image"):
        find_categories([tmp_path])
    assert [one.name for one in find_categories([tmp_path], ["disc"])] == ["disc"]
    shutil.rmtree(whole / "ground_truth")
    shutil.rmtree(whole / "train" / "good")
    with pytest.raises(InputError, match="holds no data set"):
        find_categories([whole])


def test_the_fingerprint_is_that_of_the_content(data: Path, tmp_path: Path) -> None:
    (original,) = find_categories([data / "first"])
    copy = tmp_path / "flange"
    shutil.copytree(data / "first" / "flange", copy)
    assert find_categories([copy])[0].fingerprint == original.fingerprint
    image = next((copy / "train" / "good").iterdir())
    image.write_bytes(image.read_bytes() + b"\0")
    changed = find_categories([copy])[0].fingerprint
    assert changed != original.fingerprint
    next((copy / "ground_truth").rglob("*.png")).write_bytes(b"another mask")
    assert find_categories([copy])[0].fingerprint != changed


def test_a_variant_is_checked_and_named() -> None:
    assert Variant("conpatch").label == "conpatch"
    assert Variant("conpatch", "paper").label == "conpatch (paper)"
    assert Variant("conpatch", label="ours").label == "ours"
    assert Variant("conpatch").with_known({"gamma": 3, "coreset": 1}).settings == {"gamma": 3}
    for arguments, message in (
        (("magic",), "method: 'magic'"),
        (("conpatch", "best"), "preset: 'best'"),
        (("conpatch", "default", {"gama": 1}), "gama"),
    ):
        with pytest.raises(InputError, match=message):
            Variant(*arguments)


def test_a_pair_is_known_by_what_its_figures_follow_from(data: Path, tmp_path: Path) -> None:
    first, second = find_categories([data])
    weights = Weights("random")
    pair = Pair(Variant("conpatch", settings={"gamma": 3}), first, 0, weights, "cpu")
    same = Pair(Variant("conpatch", settings={"gamma": 3}, label="other"), first, 0, weights, "cpu")
    assert same.key == pair.key
    others = [
        replace(pair, seed=1),
        replace(pair, category=second),
        replace(pair, variant=Variant("conpatch")),
        replace(pair, weights=Weights("imagenet")),
        replace(pair, device="cuda"),
    ]
    assert len({pair.key, *(other.key for other in others)}) == 6
    file = tmp_path / "weights.npz"
    file.write_bytes(b"some")
    text = json.dumps(replace(pair, weights=Weights(str(file))).facts)
    assert "weights.npz" in text
    assert str(tmp_path) not in text + json.dumps(without_places({"teacher": str(file), "bank": "kcenter"}))
    with pytest.raises(InputError, match="weights: no file"):
        Weights(str(tmp_path / "nowhere.npz"))


def test_files_and_folders_are_known_by_what_is_in_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    teacher, photographs = Path("teacher.safetensors"), Path("photographs")
    teacher.write_bytes(b"one")
    photographs.mkdir()
    (photographs / "a.png").write_bytes(b"1")
    settings = {"teacher": "teacher.safetensors", "penalty": "photographs", "bank": "teacher.safetensors"}
    before = without_places(settings)
    assert before["bank"] == "teacher.safetensors"  # not a setting that names a file
    assert without_places({**settings, "teacher": str(tmp_path / teacher)}) == before
    teacher.write_bytes(b"two")
    (photographs / "b.png").write_bytes(b"2")
    after = without_places(settings)
    for name in ("teacher", "penalty"):
        assert after[name]["name"] == before[name]["name"]
        assert after[name]["sha256"] != before[name]["sha256"]
    named = {"teacher": "shipped", "penalty": "none"}
    assert without_places(named) == named


# -- running
# --------------------------------------------------------------------------------------------------


def job(data: Path, tmp_path: Path, **changes: Any) -> Job:
    values: dict[str, Any] = {
        "root": str(data / "first" / "flange"),
        "method": "conpatch",
        "preset": "default",
        "settings": FAST,
        "weights": "random",
        "seed": 0,
        "device": "cpu",
        "batch_size": 4,
        "checkpoint": str(tmp_path / "checkpoint"),
        "run": None,
        "best_epoch": False,
        "threads": 1,
    }
    return Job(**{**values, **changes})


def test_one_pair(data: Path, tmp_path: Path) -> None:
    row = run_job(job(data, tmp_path, run=str(tmp_path / "run")))
    evaluation = read_run(tmp_path / "run").evaluation
    assert row["metrics"]["image_auroc"] == evaluation["image_auroc"]
    assert row["metrics"]["pixel_auroc"] == evaluation["pixel_auroc"]
    assert row["training_images"] == 3
    assert row["fit_seconds"] > 0
    assert row["peak_rss_mb"] >= row["fit_peak_rss_mb"] > 10
    assert row["configuration"]["resize"] == [64, 64]
    assert not row["resumed"]
    assert "best_epoch" not in row
    assert str(tmp_path) not in json.dumps(row)
    again = run_job(job(data, tmp_path))
    assert again["resumed"]
    assert again["metrics"] == row["metrics"]


def test_the_best_epoch_is_chosen_among_all_and_says_so(data: Path, tmp_path: Path) -> None:
    settings = {**FAST, "epochs": 2, "early_stopping": False, "learning_rate": 0.05}
    best = run_job(job(data, tmp_path, settings=settings, best_epoch=True))
    by_epochs = [
        run_job(
            job(data, tmp_path, settings={**settings, "epochs": count}, checkpoint=str(tmp_path / f"{count}"))
        )
        for count in range(3)
    ]
    assert best["metrics"] == by_epochs[2]["metrics"]
    for metric in ("image_auroc", "pixel_auroc"):
        figures = [row["metrics"][metric] for row in by_epochs]
        assert best["best_epoch"][metric] == {"epochs": figures.index(max(figures)), "value": max(figures)}
    assert best["best_epoch"]["chosen_on"] == "test"


@pytest.mark.parametrize("method", ["cfa", "reconpatch"])
def test_methods_that_train_have_a_best_epoch(data: Path, tmp_path: Path, method: str) -> None:
    settings = {"resize": 32, "epochs": 1, "calibration_folds": 0}
    found = run_job(job(data, tmp_path, method=method, settings=settings, best_epoch=True))
    assert found["epochs"] == 1
    assert found["best_epoch"]["image_auroc"]["epochs"] in (0, 1)


@pytest.mark.slow
def test_failures_interruptions_and_repetitions(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, out = tmp_path / "data", tmp_path / "out"
    shutil.copytree(data, copy)
    damaged = copy / "second" / "disc" / "train" / "good" / "000.png"
    content = damaged.read_bytes()
    damaged.write_bytes(b"cut off")
    variant = Variant("conpatch", settings=FAST)

    def run(**changes: Any) -> list[dict[str, Any]]:
        arguments = {"weights": "random", "jobs": 2, "threads": 1, **changes}
        return run_benchmark([variant], find_categories([copy]), out, **arguments)

    def interrupt(_seconds: float) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("pydefect.benchmark.runner.time.sleep", interrupt)
        with pytest.raises(KeyboardInterrupt):
            run()
    assert not (out / "results.jsonl").exists()

    seen: list[tuple[str, int, int]] = []
    rows = run(on_row=lambda row, done, total: seen.append((row["category"], done, total)))
    assert sorted(name for name, _, _ in seen) == ["disc", "flange"]
    assert [counts for _, *counts in seen] == [[1, 2], [2, 2]]
    assert [row["status"] for row in rows] == ["finished", "failed"]
    assert "000.png" in rows[1]["error"]
    assert rows == read_results(out / "results.jsonl") or rows[::-1] == read_results(out / "results.jsonl")
    # Of the finished pair nothing is left but its row; of the other the log.
    assert [path.name for path in (out / "work").rglob("log.txt")] == ["log.txt"]

    started: list[Any] = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **how: started.append(args) or popen(*args, **how))
    damaged.write_bytes(content)
    again = run()
    assert len(started) == 1
    assert [row["status"] for row in again] == ["finished", "finished"]
    assert again[0] == rows[0]
    assert run() == again
    assert len(started) == 1
    assert not (out / "runs").exists()


SAVES = """
import signal, sys, time
def save(*_):
    print("saved", flush=True)
    sys.exit(1)
signal.signal(signal.SIGINT, save)
print("ready", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize("saves", [True, False])
def test_fits_are_asked_to_save_and_then_ended(monkeypatch: pytest.MonkeyPatch, saves: bool) -> None:
    monkeypatch.setattr(runner, "_SECONDS_TO_SAVE", 30.0 if saves else 0.2)
    code = SAVES if saves else SAVES.replace("sys.exit(1)", "pass")
    processes = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE) for _ in range(2)]
    assert [process.stdout.readline() for process in processes if process.stdout] == [b"ready\n"] * 2
    runner._end(processes)
    assert [process.communicate()[0] for process in processes] == [b"saved\n"] * 2
    assert {process.returncode for process in processes} == {1 if saves else -signal.SIGTERM}


@pytest.mark.slow
def test_kept_maps_are_runs_that_report_takes_and_cost_no_second_fit(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    categories = find_categories([data / "first"])

    def run(*variants: Variant, keep_maps: bool) -> list[dict[str, Any]]:
        return run_benchmark(variants, categories, out, weights="random", threads=1, keep_maps=keep_maps)

    started: list[Any] = []
    popen = subprocess.Popen
    monkeypatch.setattr(subprocess, "Popen", lambda *args, **how: started.append(args) or popen(*args, **how))
    ours = Variant("conpatch", settings=FAST)
    (row,) = run(ours, keep_maps=True)
    (folder,) = [path.parent for path in (out / "runs").rglob("evaluation.json")]
    kept = read_run(folder).evaluation
    # The figures' own evaluation wrote it: another one would have taken another time.
    assert kept["seconds_per_image"] == row["seconds_per_image"]
    assert {name: kept[name] for name in row["metrics"]} == row["metrics"]

    # Found there, it is not repeated; without maps it is, once they are asked for.
    assert run(ours, keep_maps=True) == [row]
    assert len(started) == 1
    other = Variant("padim", settings={"resize": 64, "levels": [1], "calibration_folds": 0})
    run(ours, other, keep_maps=False)
    assert len(started) == 2
    run(ours, other, keep_maps=True)
    assert len(started) == 3

    done = CliRunner().invoke(app, ["report", str(out / "runs"), "--quiet"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    index = (out / "runs" / "index.html").read_text(encoding="utf-8")
    for method in ("conpatch", "padim"):
        (report,) = (out / "runs" / method / "flange").glob("seed-0-*/report.html")
        assert report.relative_to(out / "runs").as_posix() in index


def test_bad_arguments_are_refused_before_any_work(data: Path, tmp_path: Path) -> None:
    categories, variant, out = find_categories([data]), Variant("conpatch", settings=FAST), tmp_path / "out"
    (tmp_path / "file").write_bytes(b"")
    wrong: list[tuple[Any, Any, Any, dict[str, Any], str]] = [
        ([], categories, out, {}, "variants: none given"),
        ([variant], [], out, {}, "categories: none given"),
        ([variant], categories, out, {"seeds": []}, "seeds: none given"),
        ([variant, variant], categories, out, {}, "labels must differ"),
        ([variant], categories, out, {"jobs": 0}, "jobs: 0 given"),
        ([variant], categories, out, {"threads": 1.5}, r"threads: 1\.5 given"),
        ([variant], categories, out, {"device": "tpu"}, "device: 'tpu'"),
        ([variant], categories, out, {"weights": "nowhere.npz"}, "weights: no file"),
        ([variant], categories, tmp_path / "file", {}, "out: .* is a file"),
    ]
    for variants, of, where, changes, message in wrong:
        with pytest.raises(InputError, match=message):
            run_benchmark(variants, of, where, **{"weights": "random", **changes})
    assert not out.exists()
    out.mkdir()
    with alone_in(out, "out"), pytest.raises(InputError, match="out: another program is at work in"):
        run_benchmark([variant], categories, out, weights="random")
    assert not list(out.iterdir())


def test_why_a_process_ended(tmp_path: Path) -> None:
    log = tmp_path / "log.txt"
    log.write_text("Traceback ...\nRuntimeError: no luck\n\n")
    assert _reason(1, log) == "RuntimeError: no luck"
    assert _reason(-9, log) == "killed by SIGKILL (out of memory?)"
    assert _reason(-15, log) == "killed by SIGTERM"
    log.write_text("")
    assert _reason(3, log) == "exit code 3"


# -- results and tables
# --------------------------------------------------------------------------------------------------


def row(label: str, category: str, seed: int = 0, image: float = 0.9, **more: Any) -> dict[str, Any]:
    return {
        "key": f"{label}/{category}/{seed}",
        "label": label,
        "category": category,
        "seed": seed,
        "status": "finished",
        "metrics": {"image_auroc": image, "pixel_auroc": None},
        "fit_seconds": 12.34,
        "seconds_per_image": 0.0456,
        "peak_rss_mb": 789.6,
        "resumed": False,
        **more,
    }


def failed(label: str, category: str) -> dict[str, Any]:
    return {"error": "no luck", **row(label, category), "status": "failed"}


def test_results_are_kept_one_a_pair(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    results = Results(path)
    results.add(failed("a", "x"))
    assert results.finished("a/x/0", best_epoch=False) is None
    results.add(row("b", "x"))
    results.add(row("a", "x"))
    assert [one["label"] for one in read_results(path)] == ["b", "a"]
    again = Results(path)
    assert again.finished("a/x/0", best_epoch=False) == row("a", "x")
    # Best epochs are asked for later: the pair has to be done again, but once even where there are none.
    assert again.finished("a/x/0", best_epoch=True) is None
    again.add(row("a", "x", best_epoch=None))
    assert again.finished("a/x/0", best_epoch=True) is not None
    assert again.finished("c/x/0", best_epoch=False) is None


def test_any_name_can_be_kept(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    rows = [row("a", name) for name in ("é", "a\u2028b", "a\x85b", "a\rb", os.fsdecode(b"\xff"))]
    results = Results(path)
    for one in rows:
        results.add(one)
    assert read_results(path) == rows
    # Before, letters were written as they are.
    path.write_text("".join(json.dumps(one, ensure_ascii=False) + "\n" for one in rows[:4]), encoding="utf-8")
    assert read_results(path) == rows[:4]
    write_tables(rows, tmp_path)
    for name in ("table.md", "table.csv", "table.tex"):
        assert "\\udcff" in (tmp_path / name).read_text(encoding="utf-8")


@pytest.mark.parametrize("content", ["{", "[1]\n", '{"other": 1}\n'])
def test_damaged_results(tmp_path: Path, content: str) -> None:
    (tmp_path / "results.jsonl").write_text(content)
    with pytest.raises(InputError, match="results"):
        read_results(tmp_path / "results.jsonl")
    with pytest.raises(InputError, match="missing"):
        read_results(tmp_path / "nowhere.jsonl")


def test_mean_and_spread_by_hand() -> None:
    assert cell([]) is None
    one, three = cell([2.0]), cell([1.0, 2.0, 6.0])
    assert one is not None
    assert three is not None
    assert one.text(1) == "2.0"
    # Mean 3, squares 4 + 1 + 9 over two.
    assert three.text(2) == "3.00 ± 2.65"
    assert three.seeds == 3


def test_a_table_by_hand() -> None:
    rows = [
        row("a", "x", 0, 0.8),
        row("a", "x", 1, 0.9),
        row("a", "y", 0, 0.6),
        row("a", "y", 1, 0.9),
        row("b|c", "x", 0, 1.0),
        failed("b|c", "y"),
    ]
    text = render_tables(rows)
    lines = text.splitlines()
    assert lines[:6] == [
        "### Image AUROC, %",
        "",
        "|  | x | y | mean |",
        "| --- | ---: | ---: | ---: |",
        # Seeds 0 and 1 of x 80 and 90, of y 60 and 90: their means 70 and 90.
        "| a | 85.00 ± 7.07 | 75.00 ± 21.21 | 80.00 ± 14.14 |",
        # A mean over the categories that are there would not compare.
        "| b\\|c | 100.00 |  |  |",
    ]
    assert "Pixel AUROC" not in text
    assert "No seed changes" not in text
    assert "- b|c on y, seed 0: no luck" in lines
    assert "Mean ± standard deviation over seeds." in text
    assert "est epoch" not in text


def test_one_category_needs_no_mean_and_best_epochs_are_labelled() -> None:
    best = {"chosen_on": "test", "image_auroc": {"epochs": 3, "value": 0.95}}
    text = render_tables([row("a", "x", best_epoch=best), row("b", "x", best_epoch=None)])
    assert "| a | 90.00 |" in text
    title, table = text.split("### Best epoch's image AUROC, %, chosen on the test set")
    assert "| a | 95.00 |" in table
    assert "| b |" not in table
    assert "chosen on the test images" in table
    assert "chosen" not in title


def test_settings_that_share_a_label_are_told_apart() -> None:
    def of(gamma: float, seed: int, image: float, **more: Any) -> dict[str, Any]:
        configuration = {"method": "conpatch", "seed": seed, "gamma": gamma}
        return row("conpatch", "x", seed, image, configuration={**configuration, **more})

    text = render_tables([of(2, 0, 0.9), of(2.0, 1, 0.8), of(16, 0, 0.7), of(16, 1, 0.7, later=True)])
    assert "| conpatch (gamma=2) | 85.00 ± 7.07 |" in text
    assert "| conpatch (gamma=16) | 70.00 ± 0.00 |" in text
    # A spread of nothing says nothing where nothing is drawn.
    assert "No seed changes a figure of conpatch (gamma=16): what draws no random number" in text
    # A setting that an earlier version did not have tells nothing apart.
    assert "| conpatch | 80.00 ± 14.14 |" in render_tables([of(2, 0, 0.9), of(2, 1, 0.7, later=True)])


def test_the_files(tmp_path: Path) -> None:
    write_tables([row("a_b & c", "x", 0, 0.5), row("a_b & c", "x", 1, 0.75)], tmp_path)
    assert "| a_b & c | 62.50 ± 17.68 |" in (tmp_path / "table.md").read_text()
    with (tmp_path / "table.csv").open(newline="") as file:
        first = next(csv.DictReader(file))
    assert first == {
        "measure": "image_auroc",
        "method": "a_b & c",
        "category": "x",
        "mean": "62.5",
        "spread": "17.6777",
        "seeds": "2",
    }
    latex = (tmp_path / "table.tex").read_text()
    assert r"a\_b \& c & 62.50 $\pm$ 17.68 \\" in latex
    assert r"\caption{Image AUROC, \%}" in latex


# -- the command
# --------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_command(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # A checkout as the current folder: the installed package is meant, not the sources without libraries.
    (tmp_path / "pydefect").mkdir()
    (tmp_path / "pydefect" / "__init__.py").write_text("raise ImportError('sources')")
    monkeypatch.chdir(tmp_path)
    arguments = ["benchmark", "--data", str(data), "--categories", "flange", "--out", str(tmp_path / "out")]
    arguments += ["--methods", "conpatch", "--weights", "random", "--threads", "1"]
    arguments += [f"--set={name}={json.dumps(value)}" for name, value in FAST.items()]
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output
    assert "[1/1] conpatch on flange, seed 0: AUROC of images" in done.stdout
    assert "1 of 1 pairs measured" in done.stdout
    assert {path.name for path in (tmp_path / "out").iterdir()} >= {
        "results.jsonl",
        "table.md",
        "table.csv",
        "table.tex",
    }


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (["--methods", "magic"], "magic"),
        (["--methods", ","], "--methods"),
        (["--categories", "cable"], "cable"),
        (["--seeds", "1,x"], "--seeds"),
        (["--seeds", "-1"], "--seeds"),
        (["--set", "gama=1"], "gama"),
        (["--set", "seed=1"], "--seed"),
        (["--backbone", "vgg"], "vgg"),
        (["--weights", "nowhere.npz"], "nowhere.npz"),
    ],
)
def test_wrong_calls(data: Path, tmp_path: Path, changes: list[str], message: str) -> None:
    arguments = ["benchmark", "--data", str(data), "--out", str(tmp_path / "out"), "--weights", "random"]
    done = CliRunner().invoke(app, [*arguments, *changes])
    assert done.exit_code == 2
    assert message in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="Linux ends processes with their parents")
def test_a_pairs_process_ends_with_the_benchmark_however_that_ends(tmp_path):
    child = (
        "import os, sys, time; from pydefect.benchmark.worker import end_with; "
        "end_with(int(sys.argv[1])); print(os.getpid(), flush=True); time.sleep(600)"
    )
    parent = (
        "import os, subprocess, sys; "
        f"subprocess.run([sys.executable, '-c', {child!r}, str(os.getpid())], start_new_session=True)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", parent], stdout=subprocess.PIPE, text=True, cwd=tmp_path
    ) as process:
        assert process.stdout is not None
        number = int(process.stdout.readline())
        process.kill()
    for _ in range(100):
        # Gone, or dead and not yet collected.
        if not (status := Path(f"/proc/{number}/stat")).exists() or ") Z " in status.read_text():
            return
        time.sleep(0.1)
    os.kill(number, signal.SIGKILL)
    pytest.fail("the pair's process goes on without its parent")
