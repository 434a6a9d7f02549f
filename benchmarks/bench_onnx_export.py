"""Scoring one image from its pixels: the package, and the ONNX file of the same detector in ONNX Runtime.

Run with ``pytest benchmarks/bench_onnx_export.py``; ``OMP_NUM_THREADS=1`` in front gives single-thread
figures. Images are drawn and weights random: they change neither the operations nor their time. Scores are
compared before anything is timed. "at its size" is the file that was exported for images of this size only.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pydefect
from pydefect.data.procedural import render_product
from pydefect.detector import Detector
from pydefect.onnx_export import PACKAGES

CONTENDERS = ["pydefect", "pydefect bf16", "onnxruntime", "onnxruntime at its size"]


def photograph(seed: int, size: tuple[int, int]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    return render_product(np.random.default_rng(seed), size)[0]


@functools.cache
def fitted(method: str, resize: int, precision: str) -> Detector:
    images = [photograph(seed, (256, 256)) for seed in range(8)]
    settings: dict[str, Any] = {"backbone_precision": precision, "calibration_folds": 0}
    if method == "dual_ae":
        settings = {"precision": precision, "steps": 1, "penalty": "none"}
    return pydefect.fit(images, method=method, weights="random", progress=False, resize=resize, **settings)


def in_the_package(detector: Detector, image: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    scores, _ = detector.predict(detector.preprocessing(image)[None])
    return scores.numpy()


def session(path: Path) -> Callable[[np.ndarray[Any, Any]], np.ndarray[Any, Any]]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    running = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda image: running.run(None, {"images": image[None]})[0]


@pytest.mark.filterwarnings("ignore:.*held-out images support")
@pytest.mark.parametrize("contender", CONTENDERS)
@pytest.mark.parametrize("size", [(256, 256), (1024, 1280)])
@pytest.mark.parametrize(
    ("method", "resize"),
    [("conpatch", 256), ("conpatch", 1024), ("dual_ae", 128)],
    ids=str,
)
def bench_onnx_export(
    method: str,
    resize: int,
    size: tuple[int, int],
    contender: str,
    measure: Callable[..., None],
    tmp_path: Path,
) -> None:
    detector = fitted(method, resize, "bfloat16" if contender.endswith("bf16") else "float32")
    image = photograph(100, size)
    score = functools.partial(in_the_package, detector)
    if contender.startswith("onnxruntime"):
        for package in PACKAGES:
            pytest.importorskip(package, reason=f"{package} is not installed")
        path = tmp_path / "model.onnx"
        pydefect.export_onnx(detector, path, image_size=size if contender.endswith("its size") else None)
        score = session(path)
        np.testing.assert_allclose(score(image), in_the_package(detector, image), rtol=1e-3)
    measure(f"{method} at {resize}, from {size[0]}x{size[1]} pixels", lambda: score(image))


@pytest.fixture
def device() -> str:
    """A file is run where there is no card."""
    return "cpu"
