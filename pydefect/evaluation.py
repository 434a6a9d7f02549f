"""A detector against labelled images."""

from __future__ import annotations

import resource
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pydefect.calibration import Calibration
from pydefect.data.images import SkippedImage
from pydefect.data.layouts import Dataset, Sample, read_mask
from pydefect.detector import Detector, OnError
from pydefect.errors import InputError
from pydefect.metrics import DetectionMetrics, detection_metrics
from pydefect.scoring import ScoredImage

__all__ = ["Evaluation", "calibrate", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a detector over a data set's test images.

    Attributes
    ----------
    dataset
        Its name.
    image, pixel
        Over images, and over the scored pixels of all images whose masks are known (None where no defective
        image has one).
    image_auroc_by_defect
        Every kind of defect against the good images.
    images, defective, without_mask
        Number of test images, of the defective ones, and of those without a known mask.
    false_alarms, misses
        Counts at the detector's own image threshold; None without one.
    seconds_per_image
        Reading, scoring and mapping back to the original size.
    peak_rss_mb
        Largest resident set of this process so far.
    configuration
        Of the detector.
    skipped
        Test images that could not be read, with ``on_error="skip"``.
    """

    dataset: str
    image: DetectionMetrics
    pixel: DetectionMetrics | None
    image_auroc_by_defect: dict[str, float]
    images: int
    defective: int
    without_mask: int
    false_alarms: int | None
    misses: int | None
    seconds_per_image: float
    peak_rss_mb: float
    configuration: dict[str, Any]
    skipped: list[SkippedImage] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values under flat names: image_auroc, pixel_auroc, image_ap, image_f1_max, ..."""
        values = asdict(self)
        image, pixel = values.pop("image"), values.pop("pixel") or {}
        flat: dict[str, Any] = {"dataset": values.pop("dataset")}
        short = {
            "auroc": "auroc",
            "average_precision": "ap",
            "f1_max": "f1_max",
            "f1_threshold": "f1_threshold",
        }
        for key, name in short.items():
            flat[f"image_{name}"] = image[key]
            flat[f"pixel_{name}"] = pixel.get(key)
        return flat | values


@dataclass
class _Scored:
    """What scoring the labelled images gave."""

    labels: list[bool] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    defects: list[str] = field(default_factory=list)
    pixel_labels: list[NDArray[np.bool_]] = field(default_factory=list)
    pixel_scores: list[NDArray[np.float32]] = field(default_factory=list)
    without_mask: int = 0
    seconds: float = 0.0
    skipped: list[SkippedImage] = field(default_factory=list)

    def add(self, sample: Sample, scored: ScoredImage) -> None:
        self.labels.append(sample.label == 1)
        self.scores.append(scored.image_score)
        self.defects.append(sample.defect)
        self.seconds += scored.seconds
        if sample.label == 1 and not sample.masks:
            self.without_mask += 1
            return
        height, width = scored.anomaly_map.shape
        top, left, bottom, right = scored.scored_box
        self.pixel_labels.append(read_mask(sample, (height, width))[top:bottom, left:right].ravel())
        self.pixel_scores.append(scored.anomaly_map[top:bottom, left:right].ravel())

    def image_metrics(self) -> DetectionMetrics:
        return detection_metrics(self.labels, self.scores)

    def pixel_metrics(self) -> DetectionMetrics | None:
        if not any(labels.any() for labels in self.pixel_labels):
            return None
        return detection_metrics(np.concatenate(self.pixel_labels), np.concatenate(self.pixel_scores))

    def auroc_by_defect(self) -> dict[str, float]:
        labels, scores, defects = np.array(self.labels), np.array(self.scores), np.array(self.defects)
        return {
            str(defect): detection_metrics(labels[chosen], scores[chosen]).auroc
            for defect in np.unique(defects[labels])
            for chosen in [~labels | (defects == defect)]
        }


def _score(
    detector: Detector,
    dataset: Dataset,
    batch_size: int,
    on_error: OnError,
    progress: bool,
    on_scored: Callable[[Sample, ScoredImage], None] | None = None,
) -> _Scored:
    samples = {sample.image: sample for sample in dataset.test if sample.label is not None}
    if not samples:
        raise InputError(f"dataset: {dataset.name!r} has no labelled test images")
    gathered = _Scored()
    for scored in detector.stream(
        list(samples),
        batch_size=batch_size,
        on_error=on_error,
        progress=progress,
        skipped=gathered.skipped,
    ):
        assert scored.path is not None
        gathered.add(samples[scored.path], scored)
        if on_scored is not None:
            on_scored(samples[scored.path], scored)
    return gathered


def evaluate(
    detector: Detector,
    dataset: Dataset,
    *,
    batch_size: int = 8,
    on_error: OnError = "raise",
    progress: bool = False,
    on_scored: Callable[[Sample, ScoredImage], None] | None = None,
) -> Evaluation:
    """Score a data set's labelled test images; see :func:`pydefect.evaluate`.

    `on_scored` gets every image while its maps are there.
    """
    scored = _score(detector, dataset, batch_size, on_error, progress, on_scored)
    false_alarms, misses = None, None
    if detector.calibration is not None:
        decided = np.array(scored.scores) > detector.calibration.image_threshold
        false_alarms = int((decided & ~np.array(scored.labels)).sum())
        misses = int((~decided & np.array(scored.labels)).sum())
    return Evaluation(
        dataset=dataset.name,
        image=scored.image_metrics(),
        pixel=scored.pixel_metrics(),
        image_auroc_by_defect=scored.auroc_by_defect(),
        images=len(scored.labels),
        defective=sum(scored.labels),
        without_mask=scored.without_mask,
        false_alarms=false_alarms,
        misses=misses,
        seconds_per_image=scored.seconds / len(scored.labels),
        peak_rss_mb=peak_rss_mb(),
        configuration=detector.configuration,
        skipped=scored.skipped,
    )


def peak_rss_mb() -> float:
    """Largest resident set of this process so far, in MB (10**6 bytes)."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 1e6 if sys.platform == "darwin" else peak * 1024 / 1e6


def calibrate(
    detector: Detector,
    dataset: Dataset,
    *,
    batch_size: int = 8,
    on_error: OnError = "raise",
    progress: bool = False,
) -> Calibration:
    """Choose thresholds on labelled images; see :func:`pydefect.calibrate`."""
    scored = _score(detector, dataset, batch_size, on_error, progress)
    pixel = scored.pixel_metrics()
    if pixel is None:
        raise InputError(f"dataset: {dataset.name!r} has no masks; the pixel threshold needs at least one")
    threshold = scored.image_metrics().f1_threshold
    normal = [score for score, defective in zip(scored.scores, scored.labels, strict=True) if not defective]
    detector.calibration = Calibration(
        image_threshold=threshold,
        pixel_threshold=pixel.f1_threshold,
        source="labelled",
        images=len(scored.labels),
        false_alarm_rate=sum(score > threshold for score in normal) / len(normal),
    )
    return detector.calibration
