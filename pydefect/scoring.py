"""What a detector says about images: scores, anomaly maps, decisions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
from numpy.typing import NDArray

from pydefect.calibration import Calibration
from pydefect.data.images import SkippedImage

__all__ = ["Kind", "Region", "Result", "ScoredImage"]

Kind = Literal["structural", "logical", "both"]


def _kind(local: float, whole: float) -> Kind:
    """Decide by the two maps' maxima, each as a multiple of its threshold."""
    if local > 1 and whole > 1:
        return "both"
    return "structural" if local >= whole else "logical"


@dataclass(frozen=True)
class Region:
    """A defective region: pixels over the pixel threshold that touch, by edges or corners.

    All positions are in pixels of the original image, whose pixel i covers [i, i + 1).

    Attributes
    ----------
    box
        (top, left, bottom, right), half open: the smallest that holds the region.
    area
        Number of pixels.
    centroid
        (row, column), the mean of the pixels' centres: of one pixel alone, its index + 0.5.
    peak
        (row, column) of the pixel with the highest score; of equal ones the first, row by row.
    score
        The anomaly map's value there: over the pixel threshold.
    """

    box: tuple[int, int, int, int]
    area: int
    centroid: tuple[float, float]
    peak: tuple[int, int]
    score: float


def _regions(anomaly_map: NDArray[np.float32], mask: NDArray[np.bool_]) -> list[Region]:
    if not mask.any():
        return []  # most images of most lines
    count, labels, boxes, centroids = cv2.connectedComponentsWithStats(mask.view(np.uint8), connectivity=8)
    inside = np.flatnonzero(mask)
    owners, scores = labels.ravel()[inside].astype(np.intp), anomaly_map.ravel()[inside]
    highest = np.full(count, -np.inf, dtype=scores.dtype)
    np.maximum.at(highest, owners, scores)
    at_peak = scores == highest[owners]
    peaks = np.full(count, mask.size)
    np.minimum.at(peaks, owners[at_peak], inside[at_peak])
    # Peaks differ, so that equal scores have an order too. The last is label 0: what is not defective.
    order = np.lexsort((peaks, -highest))[:-1]
    return [
        Region((top, left, top + height, left + width), area, (row + 0.5, column + 0.5), peak, score)
        for (left, top, width, height, area), (column, row), peak, score in zip(
            boxes[order].tolist(),
            centroids[order].tolist(),
            zip(*(index.tolist() for index in np.unravel_index(peaks[order], mask.shape)), strict=True),
            highest[order].tolist(),
            strict=True,
        )
    ]


@dataclass(frozen=True)
class ScoredImage:
    """One image's scores: what a stream of images yields.

    Attributes
    ----------
    name, path
        See :class:`Result`.
    image_score
        >= 0, larger is more anomalous.
    anomaly_map
        [H, W] float32 at the original size, >= 0; 0 outside the scored box.
    scored_box
        (top, left, bottom, right) in original pixels, half open.
    network_maps
        [h, w] float32 each, at the network input's size: ``"anomaly"``, of which `anomaly_map` is made, and
        the parts that the method has (:meth:`pydefect.detector.Detector.predict_maps`).
    seconds
        Reading, scoring and mapping back; of what a batch took together, an equal share.
    part_maps
        The parts of `network_maps`, at the original size as `anomaly_map`; a stream leaves them out.
    ignored
        [H, W] bool: pixels of the scored box that were not looked at; None: none.
    """

    name: str
    path: Path | None
    image_score: float
    anomaly_map: NDArray[np.float32]
    scored_box: tuple[int, int, int, int]
    network_maps: dict[str, NDArray[np.float32]]
    seconds: float
    part_maps: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    ignored: NDArray[np.bool_] | None = None

    @property
    def part_scores(self) -> dict[str, float]:
        """The maximum of each part of the map."""
        return {name: float(values.max()) for name, values in self.network_maps.items() if name != "anomaly"}


@dataclass(frozen=True)
class Result:
    """Scores, maps and decisions for n images, in the order in which they came.

    Attributes
    ----------
    image_scores
        [n] float32, >= 0, larger is more anomalous.
    anomaly_maps
        n arrays [H, W] float32 at each image's original size, >= 0; 0 outside the scored box.
    paths
        The files; None for images that came as arrays.
    names
        The paths relative to the folder that was read, or ``image-00003`` for arrays.
    scored_boxes
        (top, left, bottom, right) in original pixels, half open: what the region and the centre crop left of
        the image. Without them the whole image.
    image_threshold, pixel_threshold
        From the detector's calibration; None without one.
    p_values
        [n] float64: the probability that a normal image scores as high, > 0 and <= 1, from the held-out
        normal images of the detector's calibration and from nothing else; None without them. See
        :meth:`pydefect.Calibration.p_values`.
    skipped
        Files that could not be read, with ``on_error="skip"``; they have no other entry.
    part_maps
        The parts of which a method makes its anomaly maps, by name, each as `anomaly_maps`; the dual
        autoencoder has ``"local"`` and ``"global"`` ones. Empty for other methods.
    part_scores
        [n] float32 a part: the maximum of each map, at the network's own size.
    part_thresholds
        The score over which a part speaks for a defect; empty without a calibration.
    ignored
        Per image [H, W] bool: pixels of the scored box that were not looked at, by the setting `ignore` or a
        region with corners, whose scores are 0; None where there are none.
    """

    image_scores: NDArray[np.float32]
    anomaly_maps: list[NDArray[np.float32]]
    paths: list[Path | None]
    names: list[str]
    scored_boxes: list[tuple[int, int, int, int]]
    image_threshold: float | None = None
    pixel_threshold: float | None = None
    p_values: NDArray[np.float64] | None = None
    skipped: list[SkippedImage] = field(default_factory=list)
    part_maps: dict[str, list[NDArray[np.float32]]] = field(default_factory=dict)
    part_scores: dict[str, NDArray[np.float32]] = field(default_factory=dict)
    part_thresholds: dict[str, float] = field(default_factory=dict)
    ignored: list[NDArray[np.bool_] | None] = field(default_factory=list)

    def __len__(self) -> int:
        """Count the scored images."""
        return len(self.names)

    @property
    def is_defective(self) -> NDArray[np.bool_] | None:
        """[n] bool: image score over the image threshold; None without a threshold."""
        if self.image_threshold is None:
            return None
        # NumPy would round the threshold to the scores' float32, and a score next to it would be decided
        # otherwise than the two numbers say.
        return np.asarray(self.image_scores, dtype=np.float64) > float(self.image_threshold)

    @property
    def local_maps(self) -> list[NDArray[np.float32]] | None:
        """n maps [H, W] of what differs in itself: structural defects; None where the method has none."""
        return self.part_maps.get("local")

    @property
    def global_maps(self) -> list[NDArray[np.float32]] | None:
        """n maps [H, W] of what does not fit the whole: logical defects; None where the method has none."""
        return self.part_maps.get("global")

    @property
    def kind(self) -> list[Kind | None] | None:
        """What each image's defect is; an entry is None where the image is called good.

        A defect is ``"structural"`` where the local map alone passes over its own threshold, ``"logical"``
        where the global map alone does, ``"both"`` where both do. Where neither does but the image score is
        over the image threshold, the map decides that comes nearer to its own, as a share of it.

        None without thresholds, or for a method without local and global maps.
        """
        defective = self.is_defective
        if defective is None or not {"local", "global"} <= self.part_thresholds.keys():
            return None
        if not len(self):
            return []  # without images there are no scores of parts either
        tiny = float(np.finfo(np.float32).tiny)
        local, whole = (
            self.part_scores[part] / max(self.part_thresholds[part], tiny) for part in ("local", "global")
        )
        return [
            _kind(float(a), float(b)) if found else None
            for found, a, b in zip(defective, local, whole, strict=True)
        ]

    # Found at the first use and kept, as `regions`: loops ask for one image's after the other.
    @cached_property
    def masks(self) -> list[NDArray[np.bool_]] | None:
        """Per image [H, W] bool: pixel scores over the pixel threshold; None without a threshold."""
        if self.pixel_threshold is None:
            return None
        return [anomaly_map > self.pixel_threshold for anomaly_map in self.anomaly_maps]

    @cached_property
    def regions(self) -> list[list[Region]] | None:
        """Per image the connected regions of its mask, highest score first; None without a threshold.

        Equal scores are ordered by their peaks, row by row.
        """
        masks = self.masks
        if masks is None:
            return None
        return [_regions(*pair) for pair in zip(self.anomaly_maps, masks, strict=True)]

    def calibrated(self, calibration: Calibration) -> Result:
        """Return the same scores with a calibration's thresholds and probabilities."""
        return replace(
            self,
            image_threshold=calibration.image_threshold,
            pixel_threshold=calibration.pixel_threshold,
            p_values=calibration.p_values(self.image_scores),
            part_thresholds=dict(calibration.part_thresholds),
        )

    @classmethod
    def collect(
        cls,
        images: Iterable[ScoredImage],
        *,
        image_threshold: float | None = None,
        pixel_threshold: float | None = None,
        skipped: Sequence[SkippedImage] = (),
    ) -> Result:
        """Gather a stream; ``skipped`` is read after its end."""
        scored = list(images)
        return cls(
            image_scores=np.array([image.image_score for image in scored], dtype=np.float32),
            anomaly_maps=[image.anomaly_map for image in scored],
            paths=[image.path for image in scored],
            names=[image.name for image in scored],
            scored_boxes=[image.scored_box for image in scored],
            ignored=[image.ignored for image in scored],
            part_maps={
                name: [image.part_maps[name] for image in scored]
                for name in (scored[0].part_maps if scored else {})
            },
            part_scores={
                name: np.array([image.part_scores[name] for image in scored], dtype=np.float32)
                for name in (scored[0].part_scores if scored else {})
            },
            image_threshold=image_threshold,
            pixel_threshold=pixel_threshold,
            skipped=list(skipped),
        )
