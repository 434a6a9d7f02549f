"""Metrics against values worked out by hand, and against their definitions by brute force."""

from __future__ import annotations

import numpy as np
import pytest

from pydefect.errors import InputError
from pydefect.metrics import detection_metrics, f1_max


def pairs_auroc(labels: np.ndarray, scores: np.ndarray) -> float:
    """Share of (defective, normal) pairs in the right order, a tie counting half."""
    defective, normal = scores[labels == 1], scores[labels == 0]
    wins = (defective[:, None] > normal).sum() + 0.5 * (defective[:, None] == normal).sum()
    return float(wins / (len(defective) * len(normal)))


def steps_average_precision(labels: np.ndarray, scores: np.ndarray) -> float:
    """Sum of precision times the gain in recall, one step for every different score."""
    total, recall_before = 0.0, 0.0
    for threshold in sorted(set(scores.tolist()), reverse=True):
        called = scores >= threshold
        recall = labels[called].sum() / labels.sum()
        total += float((recall - recall_before) * labels[called].mean())
        recall_before = float(recall)
    return total


def f1_over(labels: np.ndarray, scores: np.ndarray, threshold: float) -> float:
    called = scores > threshold
    true = int((called & (labels == 1)).sum())
    return 2 * true / (int(called.sum()) + int(labels.sum())) if true else 0.0


def best_f1(labels: np.ndarray, scores: np.ndarray) -> float:
    candidates = [-np.inf, *np.unique(scores).tolist()]
    return max(f1_over(labels, scores, threshold) for threshold in candidates)


@pytest.mark.parametrize(
    ("labels", "scores", "auroc", "precision", "f1"),
    [
        # Everything in its place.
        ([0, 0, 1, 1], [0.1, 0.2, 0.8, 0.9], 1.0, 1.0, 1.0),
        # Upside down: calling all defective is the best there is, 2 * 0.5 / 1.5.
        ([1, 1, 0, 0], [0.1, 0.2, 0.8, 0.9], 0.0, 5 / 12, 2 / 3),
        # 3 of 4 pairs; from above 1, 0, 1, 0: precision 1 and 2/3 at the two gains; F1 2 * (2/3) / (5/3).
        ([0, 1, 0, 1], [0.1, 0.4, 0.5, 0.8], 0.75, 5 / 6, 0.8),
        # One score for all: half of the pairs, precision 1/2, all called.
        ([0, 1, 0, 1], [0.5, 0.5, 0.5, 0.5], 0.5, 0.5, 2 / 3),
        # A tie between a good and a bad one: 3.5 of 4 pairs; 1 at recall 1/2, then 2/3.
        ([0, 0, 1, 1], [0.1, 0.4, 0.4, 0.9], 0.875, 5 / 6, 0.8),
    ],
)
def test_by_hand(labels, scores, auroc, precision, f1):
    metrics = detection_metrics(labels, scores)
    assert metrics.auroc == pytest.approx(auroc, abs=1e-12)
    assert metrics.average_precision == pytest.approx(precision, abs=1e-12)
    assert metrics.f1_max == pytest.approx(f1, abs=1e-12)
    assert f1_over(np.array(labels), np.float32(scores), metrics.f1_threshold) == pytest.approx(f1, abs=1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_by_definition_with_many_ties(seed):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, 2, 40)
    scores = np.float32(rng.integers(0, 9, 40) + 2 * labels) / 7
    metrics = detection_metrics(labels, scores)
    assert metrics.auroc == pytest.approx(pairs_auroc(labels, scores), abs=1e-12)
    assert metrics.average_precision == pytest.approx(steps_average_precision(labels, scores), abs=1e-12)
    assert metrics.f1_max == pytest.approx(best_f1(labels, scores), abs=1e-12)


@pytest.mark.parametrize("seed", range(8))
def test_the_threshold_is_exclusive_and_reaches_the_f1(seed):
    """Results call `score > threshold` defective; the threshold itself is a float32, as the scores are."""
    rng = np.random.default_rng(seed)
    labels = np.r_[0, 1, rng.integers(0, 2, 28)]
    scores = rng.random(30).astype(np.float32)
    f1, threshold = f1_max(labels, scores)
    assert f1_over(labels, scores, threshold) == pytest.approx(f1, abs=1e-12)
    assert threshold == np.float32(threshold)
    lowest_called = scores[scores > threshold].min()
    assert np.nextafter(lowest_called, np.float32(-np.inf)) == np.float32(threshold)


def test_any_shape_counts_flat():
    labels = np.array([[0, 1], [1, 0]], dtype=bool)
    scores = np.array([[0.2, 0.7], [0.6, 0.4]])
    assert detection_metrics(labels, scores) == detection_metrics(labels.ravel(), scores.ravel())


@pytest.mark.parametrize(
    ("labels", "scores", "message"),
    [
        ([0, 1], [0.5], "scores: 1 given for 2 labels"),
        ([0, 1], [0.5, float("nan")], "scores: some are not finite"),
        ([0, 1], [float("inf"), 0.1], "scores: some are not finite"),
        ([0, 0], [0.1, 0.2], "labels: all 2 are normal; metrics need normal and defective ones"),
        ([1, 1, 1], [0.1, 0.2, 0.3], "labels: all 3 are defective"),
        ([], [], "labels: all 0 are normal"),
    ],
)
@pytest.mark.parametrize("function", [detection_metrics, f1_max])
def test_bad_input(function, labels, scores, message):
    with pytest.raises(InputError, match=message):
        function(labels, scores)
