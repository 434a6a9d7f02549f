"""What a detector says about images: scores, anomaly maps, decisions."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pydefect.calibration import Calibration
from pydefect.data.images import SkippedImage

__all__ = ["Result", "ScoredImage"]


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
    """

    name: str
    path: Path | None
    image_score: float
    anomaly_map: NDArray[np.float32]
    scored_box: tuple[int, int, int, int]
    network_maps: dict[str, NDArray[np.float32]]
    seconds: float


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
        (top, left, bottom, right) in original pixels, half open: what a centre crop left of the image.
        Without a crop the whole image.
    image_threshold, pixel_threshold
        From the detector's calibration; None without one.
    p_values
        [n] float64: the probability that a normal image scores as high, > 0 and <= 1, from the held-out
        normal images of the detector's calibration and from nothing else; None without them. See
        :meth:`pydefect.Calibration.p_values`.
    skipped
        Files that could not be read, with ``on_error="skip"``; they have no other entry.
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

    def __len__(self) -> int:
        """Count the scored images."""
        return len(self.names)

    @property
    def is_defective(self) -> NDArray[np.bool_] | None:
        """[n] bool: image score over the image threshold; None without a threshold."""
        return None if self.image_threshold is None else self.image_scores > self.image_threshold

    @property
    def masks(self) -> list[NDArray[np.bool_]] | None:
        """Per image [H, W] bool: pixel scores over the pixel threshold; None without a threshold."""
        if self.pixel_threshold is None:
            return None
        return [anomaly_map > self.pixel_threshold for anomaly_map in self.anomaly_maps]

    def calibrated(self, calibration: Calibration) -> Result:
        """Return the same scores with a calibration's thresholds and probabilities."""
        return replace(
            self,
            image_threshold=calibration.image_threshold,
            pixel_threshold=calibration.pixel_threshold,
            p_values=calibration.p_values(self.image_scores),
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
            image_threshold=image_threshold,
            pixel_threshold=pixel_threshold,
            skipped=list(skipped),
        )
