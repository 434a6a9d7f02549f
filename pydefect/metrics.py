"""AUROC, average precision and F1-max, for images and pixels (scikit-learn)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike
from sklearn.metrics import average_precision_score, precision_recall_curve, roc_auc_score

from pydefect.errors import InputError

__all__ = ["DetectionMetrics", "detection_metrics", "f1_max"]


@dataclass(frozen=True)
class DetectionMetrics:
    """How well scores tell defective from normal.

    Attributes
    ----------
    auroc
        Area under the receiver operating characteristic, 0..1.
    average_precision
        Area under the precision-recall curve (step-wise sum), 0..1.
    f1_max
        Largest F1 over all thresholds, equation (10), 0..1.
    f1_threshold
        The threshold that gives it, equation (11): a score greater than it counts as defective.
    """

    auroc: float
    average_precision: float
    f1_max: float
    f1_threshold: float


def _checked(labels: ArrayLike, scores: ArrayLike) -> tuple[np.ndarray, np.ndarray]:
    label_array, score_array = (
        np.asarray(labels).ravel().astype(bool),
        np.asarray(scores, dtype=np.float32).ravel(),
    )
    if len(label_array) != len(score_array):
        raise InputError(f"scores: {len(score_array)} given for {len(label_array)} labels")
    if not np.isfinite(score_array).all():
        raise InputError("scores: some are not finite")
    if label_array.all() or not label_array.any():
        kind = "defective" if len(label_array) and label_array.all() else "normal"
        raise InputError(f"labels: all {len(label_array)} are {kind}; metrics need normal and defective ones")
    return label_array, score_array


def f1_max(labels: ArrayLike, scores: ArrayLike) -> tuple[float, float]:
    """Find the threshold that maximises F1, equations (10) and (11).

    Parameters
    ----------
    labels
        [n] bool or 0/1; 1 is defective.
    scores
        [n] float.

    Returns
    -------
    f1, threshold
        ``score > threshold`` counts as defective. The threshold lies just under the lowest score that is
        still called defective.

    Raises
    ------
    InputError
        Lengths differ, only one class, or a score that is not finite.
    """
    label_array, score_array = _checked(labels, scores)
    precision, recall, thresholds = precision_recall_curve(label_array, score_array)
    f1 = 2 * precision * recall / np.maximum(precision + recall, np.finfo(np.float64).tiny)
    best = int(np.argmax(f1[:-1]))
    return float(f1[best]), float(np.nextafter(np.float32(thresholds[best]), np.float32(-np.inf)))


def detection_metrics(labels: ArrayLike, scores: ArrayLike) -> DetectionMetrics:
    """Compute all metrics of labelled scores.

    Parameters
    ----------
    labels, scores
        See :func:`f1_max`; any shape, flattened.

    Returns
    -------
    DetectionMetrics
        Of images or of pixels, as the input is.

    Raises
    ------
    InputError
        See :func:`f1_max`.
    """
    label_array, score_array = _checked(labels, scores)
    f1, threshold = f1_max(label_array, score_array)
    return DetectionMetrics(
        auroc=float(roc_auc_score(label_array, score_array)),
        average_precision=float(average_precision_score(label_array, score_array)),
        f1_max=f1,
        f1_threshold=threshold,
    )
