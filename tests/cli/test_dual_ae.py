"""The dual autoencoder from the command line: fit, score, evaluate, and the demo's logical scene."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from typer.testing import CliRunner

from pydefect.cli import app
from pydefect.data.procedural import write_dataset
from pydefect.dual_ae.pdn import PDN

pytestmark = pytest.mark.filterwarnings("ignore:.*held-out images support")


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "teacher.safetensors"
    save_file(PDN().state_dict(), path)
    return path


def call(*arguments: object) -> str:
    done = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert done.exit_code == 0, done.output
    return done.output


def test_fit_score_and_evaluate(tmp_path: Path, teacher: Path) -> None:
    tray = write_dataset(tmp_path / "tray", 4, 1, 1, 64, scene="tray")
    model, scores = tmp_path / "model.safetensors", tmp_path / "scores"
    settings = [f"teacher={teacher}", "resize=64", "steps=2", "held_out_share=0.5"]
    options = [part for setting in settings for part in ("--set", setting)]
    fitted = call("fit", tray, "--out", model, "--method", "dual_ae", *options, "--quiet")
    assert "learned from 2 images" in fitted
    call("score", model, tray / "test", "--out", scores, "--quiet")
    with (scores / "scores.csv").open() as file:
        kinds = {row["kind"] for row in csv.DictReader(file)}
    assert kinds <= {"", "structural", "logical", "both"}
    assert len(list((scores / "parts").rglob("*.png"))) == 5
    assert "image" in call("evaluate", model, tray, "--quiet")


def test_the_demos_logical_scene(tmp_path: Path, teacher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it writes; that it finds defects takes more steps than a test has time for."""
    # The package's name of the module is the command.
    demo = importlib.import_module("pydefect.cli.demo")
    quick = {"teacher": str(teacher), "resize": 64, "steps": 2, "held_out_share": 0.5}
    monkeypatch.setattr(demo, "_LOGICAL", quick)
    for name, value in {"_TRAIN": 4, "_TEST_GOOD": 1, "_PER_DEFECT": 1, "_SIZE": 64}.items():
        monkeypatch.setattr(demo, name, value)
    call("demo", "--out", tmp_path / "demo", "--scene", "logical", "--quiet")
    for name in ("sheet.png", "model.safetensors", "scores/scores.csv", "tray-0/test/swapped/000.png"):
        assert (tmp_path / "demo" / name).is_file()
