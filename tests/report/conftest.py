"""A run of a detector that everyone can follow, on drawn products, with errors of both kinds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import pydefect
from pydefect.calibration import Calibration
from pydefect.data.procedural import write_dataset
from pydefect.run import Run, read_run


@pytest.fixture(scope="session")
def product(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "flange", 6, 6, 2, 96, seed=2)


@pytest.fixture(scope="session")
def run(product: Path, colours, tmp_path_factory: pytest.TempPathFactory) -> Run:
    detector = colours()
    result = detector.score(product / "test")
    # In the middle of scores that mean nothing there are misses and false alarms.
    image_threshold = float(np.median(result.image_scores))
    pixel_threshold = float(np.quantile(result.anomaly_maps[0], 0.97))
    detector.calibration = Calibration(image_threshold, pixel_threshold, "held_out", 9, 0.1)
    out = tmp_path_factory.mktemp("runs") / "flange"
    pydefect.evaluate(detector, product, out=out, progress=False)
    return read_run(out)
