"""A detector, or the anomaly maps of another program, against labelled images."""

from __future__ import annotations

import math
import os
import resource
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pydefect.calibration import Calibration
from pydefect.data.images import SkippedImage, read_image
from pydefect.data.layouts import (
    GOOD,
    Dataset,
    DefectKind,
    Sample,
    read_defects_config,
    read_mask,
    read_regions,
)
from pydefect.data.maps import find_maps, read_map
from pydefect.data.seen import seen_before
from pydefect.detector import Detector, OnError
from pydefect.errors import InputError, as_array
from pydefect.metrics import SPRO_LIMIT, Curve, DetectionMetrics, PixelScores, detection_metrics
from pydefect.progress import ProgressBars
from pydefect.scoring import ScoredImage

__all__ = ["SPRO_LIMITS", "Evaluation", "Maps", "calibrate", "evaluate", "evaluate_maps"]

Maps: TypeAlias = str | os.PathLike[str] | Mapping[Any, ArrayLike] | Callable[[Sample], ArrayLike]
"""Anomaly maps that another program made; see :func:`pydefect.evaluate_maps`."""

SPRO_LIMITS = (0.01, 0.05, 0.1, 0.3, 1.0)
"""False-positive rates up to which MVTec LOCO AD's evaluation integrates sPRO; 0.05 is what papers report."""


@dataclass(frozen=True)
class Evaluation:
    """Metrics of a detector, or of anomaly maps, over a data set's test images.

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
        Reading, scoring and mapping back to the original size; None where another program did that.
    peak_rss_mb
        Largest resident set of this process so far; None likewise.
    configuration
        Of the detector; empty likewise.
    skipped
        Test images that could not be read, with ``on_error="skip"``.
    pixel_aupro
        Area under the per-region overlap curve up to a false-positive rate of 0.3, like `pixel`.
    pixel_aupro_by_defect
        The same of every kind of defect with the good images.
    pixel_spro
        Area under the saturated per-region overlap curve by false-positive rate, for :data:`SPRO_LIMITS`: as
        in MVTec LOCO AD's evaluation the mean over kinds of defects, each with the good images. None where
        the data set has no ``defects_config.json``.
    pixel_spro_by_defect
        The same of every kind of defect.
    curves
        Where asked for: ``pixel_roc``, ``pixel_precision_recall``, ``pixel_pro`` up to 0.3, and
        ``pixel_spro_<kind of defect>`` up to 0.05, as far as the areas are there.
    learned
        Names of test images whose files the detector's fit has read: of these the figures say little. Empty
        for a detector of an earlier version.
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
    seconds_per_image: float | None
    peak_rss_mb: float | None
    configuration: dict[str, Any]
    skipped: list[SkippedImage] = field(default_factory=list)
    pixel_aupro: float | None = None
    pixel_aupro_by_defect: dict[str, float] = field(default_factory=dict)
    pixel_spro: dict[float, float] | None = None
    pixel_spro_by_defect: dict[str, dict[float, float]] = field(default_factory=dict)
    curves: dict[str, Curve] = field(default_factory=dict)
    learned: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values under flat names: image_auroc, pixel_auroc, image_ap, image_f1_max, ...

        sPRO is there where it was measured: pixel_spro_0.01, pixel_spro_0.05, ... Curves are left out.
        """
        values = asdict(replace(self, curves={}))
        del values["curves"]
        values["skipped"] = [{"name": one.name, "reason": one.reason} for one in self.skipped]
        image, pixel = values.pop("image"), values.pop("pixel") or {}
        spro, of_kinds = values.pop("pixel_spro") or {}, values.pop("pixel_spro_by_defect")
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
        flat["pixel_aupro"] = values.pop("pixel_aupro")
        flat |= {f"pixel_spro_{limit:g}": area for limit, area in spro.items()}
        if spro:
            values["pixel_spro_by_defect"] = {
                defect: {f"{limit:g}": area for limit, area in areas.items()}
                for defect, areas in of_kinds.items()
            }
        return flat | values


@dataclass
class _Scored:
    """What scoring the labelled images gave."""

    kinds: dict[int, DefectKind] | None
    labels: list[bool] = field(default_factory=list)
    scores: list[float] = field(default_factory=list)
    defects: list[str] = field(default_factory=list)
    pixels: dict[str, PixelScores] = field(default_factory=dict)
    """By kind of defect, and those of good images."""
    without_mask: int = 0
    seconds: float = 0.0
    skipped: list[SkippedImage] = field(default_factory=list)

    def add(self, sample: Sample, scored: ScoredImage) -> None:
        """Count an image; where its masks cannot be read it is not counted, and InputError raised."""
        if sample.label == 1 and not sample.masks:
            self.without_mask += 1
        else:
            self._add_pixels(sample, scored)
        self.labels.append(sample.label == 1)
        self.scores.append(scored.image_score)
        self.defects.append(sample.defect)
        self.seconds += scored.seconds

    def _add_pixels(self, sample: Sample, scored: ScoredImage) -> None:
        height, width = scored.anomaly_map.shape
        top, left, bottom, right = scored.scored_box
        inside = scored.anomaly_map[top:bottom, left:right]
        if self.kinds is None:
            mask = read_mask(sample, (height, width))
            if scored.ignored is not None:
                mask = mask & ~scored.ignored
            mask = mask[top:bottom, left:right]
            self.pixels.setdefault(sample.defect, PixelScores()).add(inside, mask)
        else:
            regions = read_regions(sample, (height, width), self.kinds, scored.scored_box, scored.ignored)
            self.pixels.setdefault(sample.defect, PixelScores()).add(inside, regions=regions)

    def image_metrics(self) -> DetectionMetrics:
        return detection_metrics(self.labels, self.scores)

    def all_pixels(self) -> PixelScores | None:
        """Of all images with a known mask; None where nothing is marked."""
        pixels = PixelScores().merged(*self.pixels.values())
        return pixels if pixels.defective_pixels else None

    def pixels_by_defect(self) -> dict[str, PixelScores]:
        """Of every kind of defect of which something is marked, together with the good images."""
        good = self.pixels.get(GOOD, PixelScores())
        return {
            defect: good.merged(pixels)
            for defect, pixels in sorted(self.pixels.items())
            if pixels.defective_pixels
        }

    def auroc_by_defect(self) -> dict[str, float]:
        labels, scores, defects = np.array(self.labels), np.array(self.scores), np.array(self.defects)
        return {
            str(defect): detection_metrics(labels[chosen], scores[chosen]).auroc
            for defect in np.unique(defects[labels])
            for chosen in [~labels | (defects == defect)]
        }


def _labelled(dataset: Dataset) -> dict[Path, Sample]:
    """The test images with a label; none, one kind only, or one image twice is refused before hours of
    scoring."""
    samples = {sample.image: sample for sample in dataset.test if sample.label is not None}
    counts = Counter(sample.image for sample in dataset.test)
    if len(counts) < len(dataset.test):
        twice = counts.most_common(1)[0][0]
        raise InputError(f"dataset: {dataset.name!r} has test images more than once, among them {twice}")
    if not samples:
        raise InputError(f"dataset: {dataset.name!r} has no labelled test images")
    detection_metrics([sample.label == 1 for sample in samples.values()], [0.0] * len(samples))
    return samples


def _score(
    detector: Detector,
    dataset: Dataset,
    batch_size: int,
    on_error: OnError,
    progress: bool,
    on_scored: Callable[[Sample, ScoredImage], None] | None = None,
) -> _Scored:
    def stream(samples: list[Sample], skipped: list[SkippedImage]) -> Iterable[ScoredImage]:
        return detector.stream(
            [sample.image for sample in samples],
            batch_size=batch_size,
            on_error=on_error,
            progress=progress,
            skipped=skipped,
        )

    return _gather(dataset, stream, on_error, on_scored)


def _gather(
    dataset: Dataset,
    stream: Callable[[list[Sample], list[SkippedImage]], Iterable[ScoredImage]],
    on_error: OnError = "raise",
    on_scored: Callable[[Sample, ScoredImage], None] | None = None,
) -> _Scored:
    """Count what a stream says about the labelled test images; it lists those that it leaves out."""
    samples = _labelled(dataset)
    if len(samples) < len(dataset.test):
        warnings.warn(
            f"{len(dataset.test) - len(samples)} test images without a label are left out", stacklevel=4
        )
    gathered = _Scored(read_defects_config(dataset.root))
    for scored in stream(list(samples.values()), gathered.skipped):
        assert scored.path is not None
        sample = samples[scored.path]
        try:
            gathered.add(sample, scored)
        except InputError as error:
            if on_error == "raise":
                raise
            warnings.warn(f"{error}; its image counts for the image metrics only", stacklevel=4)
            sample = replace(sample, masks=())
            gathered.add(sample, scored)
        if on_scored is not None:
            on_scored(sample, scored)
    return gathered


def evaluate(
    detector: Detector,
    dataset: Dataset,
    *,
    batch_size: int = 8,
    on_error: OnError = "raise",
    progress: bool = False,
    on_scored: Callable[[Sample, ScoredImage], None] | None = None,
    with_curves: bool = False,
) -> Evaluation:
    """Score a data set's labelled test images; see :func:`pydefect.evaluate`.

    `on_scored` gets every image while its maps are there, without masks where they could not be read;
    `with_curves` fills :attr:`Evaluation.curves`.
    """
    learned = _learned(detector, dataset)
    scored = _score(detector, dataset, batch_size, on_error, progress, on_scored)
    false_alarms, misses = None, None
    if detector.calibration is not None:
        decided = np.array(scored.scores) > detector.calibration.image_threshold
        false_alarms = int((decided & ~np.array(scored.labels)).sum())
        misses = int((~decided & np.array(scored.labels)).sum())
    return replace(
        _measured(dataset, scored, with_curves),
        false_alarms=false_alarms,
        misses=misses,
        seconds_per_image=scored.seconds / len(scored.labels),
        peak_rss_mb=peak_rss_mb(),
        configuration=detector.configuration,
        learned=learned,
    )


def _learned(detector: Detector, dataset: Dataset) -> list[str]:
    """Test images that the fit has seen, with a warning, before hours of scoring."""
    prints = detector.training.get("files", [])
    found = seen_before(prints, list(_labelled(dataset)))
    if not found:
        return []
    inside = [path.relative_to(dataset.root) if path.is_relative_to(dataset.root) else path for path in found]
    names = [path.as_posix() for path in inside]
    warnings.warn(
        f"the detector's fit has seen {len(found)} of the {len(dataset.test)} test images: "
        f"{', '.join(names[:3])}{', ...' if len(names) > 3 else ''}; figures of these say little",
        stacklevel=4,
    )
    return names


def _measured(dataset: Dataset, scored: _Scored, with_curves: bool = False) -> Evaluation:
    """All that does not depend on who scored."""
    image = scored.image_metrics()
    pixels, by_defect = scored.all_pixels(), scored.pixels_by_defect()
    spro_by_defect = (
        {defect: {limit: part.spro(limit) for limit in SPRO_LIMITS} for defect, part in by_defect.items()}
        if scored.kinds is not None
        else {}
    )
    return Evaluation(
        dataset=dataset.name,
        image=image,
        pixel=None if pixels is None else pixels.metrics(),
        image_auroc_by_defect=scored.auroc_by_defect(),
        images=len(scored.labels),
        defective=sum(scored.labels),
        without_mask=scored.without_mask,
        false_alarms=None,
        misses=None,
        seconds_per_image=None,
        peak_rss_mb=None,
        configuration={},
        skipped=scored.skipped,
        pixel_aupro=None if pixels is None else pixels.aupro(),
        pixel_aupro_by_defect={defect: part.aupro() for defect, part in by_defect.items()},
        pixel_spro={
            limit: float(np.mean([areas[limit] for areas in spro_by_defect.values()]))
            for limit in SPRO_LIMITS
        }
        if spro_by_defect
        else None,
        pixel_spro_by_defect=spro_by_defect,
        curves=_curves(pixels, by_defect if scored.kinds else {}) if with_curves and pixels else {},
    )


def _curves(pixels: PixelScores, by_annotated_defect: dict[str, PixelScores]) -> dict[str, Curve]:
    return {
        "pixel_roc": pixels.roc_curve(),
        "pixel_precision_recall": pixels.precision_recall_curve(),
        "pixel_pro": pixels.pro_curve(),
        **{
            f"pixel_spro_{defect}": part.spro_curve(SPRO_LIMIT)
            for defect, part in by_annotated_defect.items()
        },
    }


def evaluate_maps(
    dataset: Dataset,
    maps: Maps,
    *,
    image_scores: Mapping[Any, float] | None = None,
    progress: bool = False,
) -> Evaluation:
    """Measure anomaly maps that another program made; see :func:`pydefect.evaluate_maps`."""
    labelled = list(_labelled(dataset).values())
    map_of = _map_reader(maps, dataset, labelled)
    scores = None if image_scores is None else _by_image("image_scores", image_scores, labelled)
    for image, score in (scores or {}).items():
        if not _is_finite(score):
            raise InputError(f"image_scores: that of {image} is {score!r}; it must be a finite number")

    def stream(samples: list[Sample], _skipped: list[SkippedImage]) -> Iterator[ScoredImage]:
        bars = ProgressBars(progress)
        try:
            for done, sample in enumerate(samples, start=1):
                anomaly_map = _checked_map(map_of(sample), sample)
                height, width = anomaly_map.shape
                yield ScoredImage(
                    name=str(sample.image),
                    path=sample.image,
                    image_score=float(anomaly_map.max() if scores is None else scores[sample.image]),
                    anomaly_map=anomaly_map,
                    scored_box=(0, 0, height, width),
                    network_maps={},
                    seconds=0.0,
                )
                bars("measuring", done, len(samples))
        finally:
            bars.close()

    return _measured(dataset, _gather(dataset, stream))


def _map_reader(maps: Maps, dataset: Dataset, samples: list[Sample]) -> Callable[[Sample], ArrayLike]:
    """Where each sample's map comes from; where one is missing, that is said here."""
    if isinstance(maps, str | os.PathLike):
        files = find_maps(maps, dataset, samples)
        return lambda sample: read_map(files[sample.image])
    if isinstance(maps, Mapping):
        by_image = _by_image("maps", maps, samples)
        return lambda sample: by_image[sample.image]
    if callable(maps):
        return maps
    raise InputError(
        f"maps: an object of type {type(maps).__name__} given; allowed are a folder, a mapping from samples "
        "or their images' paths, and a function of a sample"
    )


def _by_image(name: str, values: Any, samples: list[Sample]) -> dict[Path, Any]:
    """The values of a mapping from samples, or from the paths of their images, however these are written."""
    if not isinstance(values, Mapping):
        raise InputError(f"{name}: an object of type {type(values).__name__} given; a mapping is needed")
    given = {}
    for key, value in values.items():
        if not isinstance(key, Sample | str | os.PathLike):
            raise InputError(f"{name}: the key {key!r} given; allowed are samples and their images' paths")
        given[os.path.abspath(key.image if isinstance(key, Sample) else key)] = value
    missing = [sample.image for sample in samples if os.path.abspath(sample.image) not in given]
    if missing:
        raise InputError(
            f"{name}: {len(missing)} of {len(samples)} labelled test images are missing: "
            f"{', '.join(map(str, missing[:3]))}{', ...' if len(missing) > 3 else ''}"
        )
    return {sample.image: given[os.path.abspath(sample.image)] for sample in samples}


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except TypeError:
        return False


def _checked_map(given: ArrayLike, sample: Sample) -> NDArray[np.float32]:
    values = as_array(f"maps: that of {sample.image}", given)
    if values.ndim != 2 or values.dtype.kind not in "fiu":
        raise InputError(
            f"maps: that of {sample.image} has the shape {list(values.shape)} and the type {values.dtype}; "
            "it must be numbers [H, W]"
        )
    height, width = read_image(sample.image).shape[:2]
    if values.shape != (height, width):
        # Resizing is a choice that moves figures: it is the caller's.
        raise InputError(
            f"maps: that of {sample.image} has {values.shape[0]} x {values.shape[1]} pixels, the image "
            f"{height} x {width}; bring it to the image's size"
        )
    with np.errstate(over="ignore"):
        scores = values.astype(np.float32)
    if not np.isfinite(scores).all():
        raise InputError(f"maps: that of {sample.image} has values that are not finite in float32")
    return scores


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
    without_masks = f"dataset: {dataset.name!r} has no masks; the pixel threshold needs at least one"
    if not any(sample.masks for sample in _labelled(dataset).values()):
        raise InputError(without_masks)
    _learned(detector, dataset)
    scored = _score(detector, dataset, batch_size, on_error, progress)
    for skipped in scored.skipped:
        warnings.warn(f"{skipped.name}: {skipped.reason}; left out of the calibration", stacklevel=2)
    pixels = scored.all_pixels()
    if pixels is None:  # all that were read are empty
        raise InputError(without_masks)
    threshold = scored.image_metrics().f1_threshold
    normal = [score for score, defective in zip(scored.scores, scored.labels, strict=True) if not defective]
    detector.calibration = Calibration(
        image_threshold=threshold,
        pixel_threshold=pixels.metrics().f1_threshold,
        source="labelled",
        images=len(scored.labels),
        false_alarm_rate=sum(score > threshold for score in normal) / len(normal),
        # Which part of the map speaks for a defect stays a question of held-out normal images.
        part_maxima=detector.calibration.part_maxima if detector.calibration else {},
    )
    return detector.calibration
