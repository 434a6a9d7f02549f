"""Pixel metrics against scikit-learn, and AUPRO against the same steps in NumPy.

Run with ``pytest benchmarks/bench_metrics.py``; ``OMP_NUM_THREADS=1`` in front gives single-thread figures.
Sets of 100 maps, and anomalib's AUPRO, which lives in an environment of its own, are timed by
``end_to_end.py metrics``; ``metrics_memory.py`` tells what 1,000 maps take.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import anomaly_maps
import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import label
from sklearn.metrics import average_precision_score, roc_auc_score

from pydefect.metrics import PixelScores, aupro, detection_metrics

IMAGES, SIDE = 4, 1024
GROUP = f"{IMAGES}x{SIDE}x{SIDE}"

drawn = cache(anomaly_maps.draw)


def numpy_aupro(maps: NDArray[np.float32], masks: NDArray[np.bool_], limit: float = 0.3) -> float:
    """The steps of MVTec AD's evaluation: all pixels sorted, sums of what each adds to FPR and overlap."""
    overlaps, regions = np.zeros(maps.shape), 0
    for index, mask in enumerate(masks):
        labelled, number = label(mask, np.ones((3, 3)))
        areas = np.bincount(labelled.ravel())
        areas[0] = 1
        overlaps[index] = (labelled > 0) / areas[labelled]
        regions += number
    order = np.argsort(maps.ravel())[::-1]
    scores = maps.ravel()[order]
    last_of_ties = np.append(np.diff(scores) != 0, True)
    rates = np.cumsum(~masks.ravel()[order])[last_of_ties] / np.count_nonzero(~masks)
    heights = np.cumsum(overlaps.ravel()[order])[last_of_ties] / regions
    rates, heights = np.insert(rates, 0, 0), np.insert(heights, 0, 0)
    inside = rates <= limit
    at_limit = np.interp(limit, rates, heights)
    return float(np.trapezoid(np.append(heights[inside], at_limit), np.append(rates[inside], limit)) / limit)


@pytest.fixture
def device() -> str:
    """Metrics run on the CPU alone."""
    return "cpu"


def bytes_of(maps: NDArray[np.float32]) -> int:
    """Scores and one byte of mask are read, keys are written and read."""
    return maps.size * (4 + 1 + 4 + 4)


@pytest.mark.parametrize("contender", ["pydefect", "scikit-learn"])
def bench_auroc(contender: str, measure: Callable[..., None]) -> None:
    maps, masks = drawn(IMAGES, SIDE)
    scores, labels = maps.ravel(), masks.ravel()
    calls = {
        "pydefect": lambda: detection_metrics(labels, scores).auroc,
        "scikit-learn": lambda: roc_auc_score(labels, scores),
    }
    assert calls[contender]() == pytest.approx(calls["pydefect"](), abs=1e-9)
    measure(f"auroc {GROUP}", calls[contender], traffic=bytes_of(maps), contender=contender)


@pytest.mark.parametrize("contender", ["pydefect", "scikit-learn"])
def bench_average_precision(contender: str, measure: Callable[..., None]) -> None:
    maps, masks = drawn(IMAGES, SIDE)
    scores, labels = maps.ravel(), masks.ravel()
    calls = {
        "pydefect": lambda: detection_metrics(labels, scores).average_precision,
        "scikit-learn": lambda: average_precision_score(labels, scores),
    }
    assert calls[contender]() == pytest.approx(calls["pydefect"](), abs=1e-9)
    measure(f"average_precision {GROUP}", calls[contender], traffic=bytes_of(maps), contender=contender)


@pytest.mark.parametrize("contender", ["pydefect", "reference"])
def bench_aupro(contender: str, measure: Callable[..., None]) -> None:
    maps, masks = drawn(IMAGES, SIDE)
    calls = {"pydefect": lambda: aupro(maps, masks), "reference": lambda: numpy_aupro(maps, masks)}
    assert calls[contender]() == pytest.approx(calls["pydefect"](), abs=1e-9)
    measure(f"aupro {GROUP}", calls[contender], traffic=bytes_of(maps), contender=contender)


def bench_pro_curve(measure: Callable[..., None]) -> None:
    """A curve for a plot, of scores that are there."""
    maps, masks = drawn(IMAGES, SIDE)
    scores = PixelScores()
    scores.extend(maps, masks)
    # A new step each time: curves are kept.
    steps = iter(1e-3 * (1 + np.arange(100) * 1e-9))
    measure(f"pro_curve {GROUP}", lambda: scores.pro_curve(step=float(next(steps))), contender="pydefect")
