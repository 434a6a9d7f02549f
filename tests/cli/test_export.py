"""``pydefect export``."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

import pydefect
from pydefect.cli import app

onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
pytest.importorskip("onnxscript", reason="onnxscript is not installed")


def test_export(products: list[np.ndarray], tmp_path: Path) -> None:
    model, out = tmp_path / "model.safetensors", tmp_path / "model.onnx"
    settings = {"resize": 32, "backbone_precision": "float32", "calibration_folds": 2}
    with pytest.warns(UserWarning, match="held-out images support"):
        detector = pydefect.fit(products, weights="random", progress=False, **settings)
    detector.save(model)

    def call(*more: str, code: int = 0) -> str:
        done = CliRunner().invoke(app, ["export", str(model), "--out", str(out), *more])
        assert done.exit_code == code, done.output
        return done.output

    said = call("--image-size", "[32,32]", "--batch-size", "2")
    assert f"model: {out}" in said
    assert detector.calibration is not None
    assert f"an image score of {detector.calibration.image_threshold:.4g}" in said
    (images,) = onnxruntime.InferenceSession(out).get_inputs()
    assert images.shape == [2, 32, 32, 3]
    before = out.read_bytes()
    assert "--force" in call(code=2)
    assert "is no size" in call("--force", "--image-size", "32x32", code=2)
    assert "it must be one whole number" in call("--force", "--image-size", '"a"', code=2)
    assert out.read_bytes() == before
