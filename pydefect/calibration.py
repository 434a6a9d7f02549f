"""Thresholds: from held-out normal images and a false-alarm rate, or from labelled images by F1."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from pydefect.errors import InputError

__all__ = ["Calibration", "conformal_threshold", "held_out_calibration"]


@dataclass(frozen=True)
class Calibration:
    """Where a detector draws the line.

    Attributes
    ----------
    image_threshold
        An image whose score is greater is called defective.
    pixel_threshold
        A pixel whose score is greater belongs to the mask.
    source
        ``"held_out"``: normal images that the scoring detectors had not seen; ``"labelled"``: F1-maximising
        over labelled images, image and pixel level apart (equations 10 and 11).
    images
        How many images the thresholds stand on.
    false_alarm_rate
        Share of normal images to be called defective: expected for ``"held_out"``, counted for
        ``"labelled"``.
    image_scores, map_maxima
        ``"held_out"``: ascending scores of the held-out images and ascending maxima of their maps, so that
        another rate can be chosen later.
    """

    image_threshold: float
    pixel_threshold: float
    source: Literal["held_out", "labelled"]
    images: int
    false_alarm_rate: float
    image_scores: tuple[float, ...] = ()
    map_maxima: tuple[float, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Calibration:
        """Read what :meth:`to_dict` wrote."""
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        return cls(**fields)


def conformal_threshold(scores: Sequence[float], false_alarm_rate: float) -> tuple[float, float]:
    """Choose a threshold that a new normal image passes over with at most a given probability.

    Parameters
    ----------
    scores
        n >= 1 scores of normal images that the detector has not seen.
    false_alarm_rate
        0..1.

    Returns
    -------
    threshold
        The k-th smallest score, k = ceil((n + 1) (1 - rate)), or the largest where there are too few for the
        rate.
    rate
        The rate that it implies, (n + 1 - k) / (n + 1), if new normal images are exchangeable with these.

    Raises
    ------
    InputError
        No scores, or a rate outside 0..1.

    References
    ----------
    Vovk et al., Algorithmic learning in a random world, 2005 (split conformal prediction).
    """
    if not scores:
        raise InputError("scores: none given; a threshold needs at least one held-out normal image")
    if not isinstance(false_alarm_rate, int | float) or not 0 <= false_alarm_rate <= 1:
        raise InputError(f"false_alarm_rate: {false_alarm_rate!r} given; allowed are 0 to 1")
    n = len(scores)
    # Rounding first: (n + 1) * (1 - 0.1) must not become one more through the last bit.
    k = max(1, math.ceil(round((n + 1) * (1 - false_alarm_rate), 9)))
    k = min(k, n)
    return sorted(scores)[k - 1], (n + 1 - k) / (n + 1)


def held_out_calibration(
    image_scores: Sequence[float], map_maxima: Sequence[float], false_alarm_rate: float
) -> Calibration:
    """Calibrate on normal images that the scoring detectors had not seen.

    Parameters
    ----------
    image_scores, map_maxima
        Of the same n >= 1 images: image scores, and maxima of the anomaly maps.
    false_alarm_rate
        Share of normal images that may be called defective, and of those that may get a mask.

    Returns
    -------
    Calibration
        A warning is given where n images cannot support the rate.

    Raises
    ------
    InputError
        See :func:`conformal_threshold`.
    """
    image_threshold, implied = conformal_threshold(image_scores, false_alarm_rate)
    pixel_threshold, _ = conformal_threshold(map_maxima, false_alarm_rate)
    if implied > false_alarm_rate + 1e-9:
        warnings.warn(
            f"{len(image_scores)} held-out images support a false-alarm rate of {implied:.3g} at the lowest, "
            f"not {false_alarm_rate:g}; the threshold is their largest score",
            stacklevel=2,
        )
    return Calibration(
        image_threshold=image_threshold,
        pixel_threshold=pixel_threshold,
        source="held_out",
        images=len(image_scores),
        false_alarm_rate=implied,
        image_scores=tuple(sorted(image_scores)),
        map_maxima=tuple(sorted(map_maxima)),
    )
