"""Thresholds and probabilities from held-out normal images, or thresholds from labelled images."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy.special import betainc, betaincinv

from pydefect.errors import InputError

__all__ = [
    "Calibration",
    "ScoreTail",
    "check_terms",
    "clopper_pearson",
    "conformal_threshold",
    "held_out_calibration",
    "highest_held_out",
    "images_needed",
    "promised_confidence",
]

TAIL_SHARE = 0.1
"""Share of the held-out images, the highest scores, to which the tail is fitted."""
TAIL_IMAGES = 10
"""But at least so many, as far as they are no more than half of all."""
SMALLEST_TAIL = 5
"""With fewer scores over the tail's start nothing is fitted."""

KEPT_BY_NAME = 20
"""So many of the held-out images, the highest scores, are kept by name."""
SUSPECT_RATE = 0.01
"""Share of fits on good images alone that may warn of one, if their log scores are Gumbel distributed.

What it finds on real products, and what it warns of wrongly, is measured in ``docs/calibration.md``."""
SUSPECT_IMAGES = 10
"""With fewer held-out images the quartiles say too little to warn by."""
LEAST_SCATTER = 0.03
"""The least scale of the log scores: a suspect among 60 scores a quarter over the median at least.

Where most maps have their maximum at one spot of the background, as a young autoencoder's, scores agree to a
thousandth, which says nothing of maxima elsewhere."""

_NUMBERS = (int, float, np.integer, np.floating)


@dataclass(frozen=True)
class ScoreTail:
    """A generalised Pareto distribution on the highest scores of normal images.

    Attributes
    ----------
    start
        The tail is what lies over this score.
    share
        Probability that a normal image's score does, 0..1.
    shape, scale
        Of the excesses over ``start``: P(excess > x) = (1 + shape x / scale)^(-1 / shape), for shape 0
        exp(-x / scale). shape >= 0, scale > 0.

    References
    ----------
    Pickands, Statistical inference using extreme order statistics, Annals of Statistics 3, 1975;
    Hosking and Wallis, Parameter and quantile estimation for the generalized Pareto distribution,
    Technometrics 29, 1987 (probability-weighted moments, equation 12).
    """

    start: float
    share: float
    shape: float
    scale: float

    @classmethod
    def fit(cls, scores: Sequence[float]) -> ScoreTail | None:
        """Fit the tail to normal images' scores, or return None where too few of them differ.

        Parameters
        ----------
        scores
            n scores, finite.

        Notes
        -----
        A negative shape, a largest possible score, is taken for 0: a few dozen excesses cannot show that
        no normal image will ever exceed some score, and the exponential tail that comes instead errs
        on the side of larger probabilities.
        """
        ascending = np.sort(np.asarray(scores, dtype=np.float64))
        n = len(ascending)
        wanted = min(max(TAIL_IMAGES, math.ceil(TAIL_SHARE * n)), n // 2)
        if wanted < SMALLEST_TAIL:
            return None
        start = float(ascending[n - wanted - 1])
        excesses = ascending[ascending > start] - start
        count = len(excesses)
        if count < SMALLEST_TAIL:
            return None
        mean = float(excesses.mean())
        # b of Hosking and Wallis, E[x (1 - F(x))], from the order statistics.
        weighted = float((excesses * (count - 1 - np.arange(count))).mean() / (count - 1))
        difference = mean - 2 * weighted
        shape = 2 - mean / difference if difference > 0 else 0.0
        shape = max(shape, 0.0)
        return cls(start, (count + 1) / (n + 1), shape, mean * (1 - shape))

    def survival(self, scores: NDArray[np.float64]) -> NDArray[np.float64]:
        """Probability that a normal image scores higher, of scores over ``start``."""
        excesses = (scores - self.start) / self.scale
        if self.shape < 1e-9:
            return np.asarray(self.share * np.exp(-excesses))
        return np.asarray(self.share * np.exp(-np.log1p(self.shape * excesses) / self.shape))


@dataclass(frozen=True)
class Calibration:
    """Where a detector draws the line, and how often normal images will pass over it.

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
    confidence
        Of the interval, 0..1.
    interval
        ``"held_out"``: (low, high) of the false-alarm rate that these thresholds will have on new normal
        images; see :func:`clopper_pearson`. None for ``"labelled"``, whose threshold was chosen for its
        effect on the very images that would be counted.
    defective_scores
        Ascending scores of defective images, where some were shown; no threshold was chosen by them.
    part_maxima
        Of a method whose anomaly map has parts (:meth:`pydefect.detector.Detector.predict_maps`): ascending
        maxima of each part's maps of the held-out images.
    """

    image_threshold: float
    pixel_threshold: float
    source: Literal["held_out", "labelled"]
    images: int
    false_alarm_rate: float
    # Hundreds of numbers, which would bury the others where a calibration is printed.
    image_scores: tuple[float, ...] = field(default=(), repr=False)
    map_maxima: tuple[float, ...] = field(default=(), repr=False)
    confidence: float = 0.95
    interval: tuple[float, float] | None = None
    defective_scores: tuple[float, ...] = field(default=(), repr=False)
    part_maxima: Mapping[str, tuple[float, ...]] = field(default_factory=dict, repr=False)

    def to_dict(self) -> dict[str, Any]:
        """Return JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Calibration:
        """Read what :meth:`to_dict` wrote.

        Raises
        ------
        InputError
            A value makes no sense: it was changed since, or is of another program.
        """
        fields: dict[str, Any] = {
            name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
        }
        parts = values.get("part_maxima", {})
        fields["part_maxima"] = {name: tuple(maxima) for name, maxima in parts.items()}
        read = cls(**fields)
        read._check()
        return read

    def _check(self) -> None:
        """Raise InputError where a value makes no sense: a NaN among thresholds finds no defect, ever."""
        for name in ("image_threshold", "pixel_threshold"):
            value = getattr(self, name)
            if not _is_number(value) or not math.isfinite(value):
                raise InputError(f"{name}: {value!r} given; allowed are finite numbers")
        if self.source not in ("held_out", "labelled"):
            raise InputError(f"source: {self.source!r} given; allowed are 'held_out' and 'labelled'")
        if not isinstance(self.images, int) or isinstance(self.images, bool) or self.images < 1:
            raise InputError(f"images: {self.images!r} given; allowed are whole numbers from 1 on")
        check_terms(self.false_alarm_rate, self.confidence)
        if self.interval is not None:
            ends = self.interval
            if len(ends) != 2 or not all(map(_is_number, ends)) or not 0 <= ends[0] <= ends[1] <= 1:
                raise InputError(f"interval: {ends!r} given; allowed are 0 <= low <= high <= 1")
        scores = {name: getattr(self, name) for name in ("image_scores", "map_maxima", "defective_scores")}
        for name, values in {**scores, **self.part_maxima}.items():
            finite = all(_is_number(value) and math.isfinite(value) for value in values)
            if not finite or list(values) != sorted(values):
                raise InputError(f"{name}: allowed are finite numbers in ascending order")

    @cached_property
    def part_thresholds(self) -> dict[str, float]:
        """The score over which a part of the map speaks for a defect, for the same false-alarm rate."""
        return {
            name: conformal_threshold(maxima, self.false_alarm_rate)[0]
            for name, maxima in self.part_maxima.items()
        }

    @cached_property
    def tail(self) -> ScoreTail | None:
        """The fitted tail of the held-out scores; None without, or with too few, of them."""
        return ScoreTail.fit(self.image_scores)

    def p_values(self, image_scores: ArrayLike) -> NDArray[np.float64] | None:
        """Probability that a normal image scores as high, for each of some scores.

        Where the held-out images have scores, it is counted: (1 + number of scores at least as high) / (n +
        1), a conformal p-value. Beyond the highest of them it goes on from 1 / (n + 1) as the fitted
        :attr:`tail` falls: an extrapolation, good for an order of magnitude or two. The same score always
        gives the same probability, whatever else is scored.

        Parameters
        ----------
        image_scores
            [m] scores of this detector.

        Returns
        -------
        numpy.ndarray or None
            [m] float64, > 0 and <= 1, falling with the score; None without held-out scores.

        References
        ----------
        Vovk et al., Algorithmic learning in a random world, 2005 (conformal p-values).
        """
        if not self.image_scores:
            return None
        scores = np.asarray(image_scores, dtype=np.float64)
        seen = np.asarray(self.image_scores, dtype=np.float64)
        at_least = len(seen) - np.searchsorted(seen, scores, side="left")
        counted = (1 + at_least) / (len(seen) + 1)
        if self.tail is None:
            return np.asarray(counted)
        beyond = self.tail.survival(np.maximum(scores, seen[-1])) / self.tail.survival(seen[-1:])
        return np.asarray(np.maximum(counted * beyond, np.finfo(np.float64).tiny))


def clopper_pearson(count: int, images: int, confidence: float = 0.95) -> tuple[float, float]:
    """Interval of a rate of which ``count`` cases were seen among ``images``.

    For a threshold that is itself the (count + 1)-th largest of the scores, the upper end is exact as well
    (Wilks' tolerance limit: the rate beyond it is Beta(count + 1, images - count) distributed), and the
    lower end errs to the low side.

    Parameters
    ----------
    count
        0..images.
    images
        >= 1.
    confidence
        The rate lies in the interval with at least this probability, and over or under it with at most
        half of the rest each; over 0, under 1.

    Returns
    -------
    low, high
        0..1.

    Raises
    ------
    InputError
        An argument is out of its range.

    References
    ----------
    Clopper and Pearson, The use of confidence or fiducial limits, Biometrika 26, 1934;
    Wilks, Determination of sample sizes for setting tolerance limits, Annals of Mathematical Statistics 12,
    1941.
    """
    confidence = _check_confidence(confidence)
    if images < 1 or not 0 <= count <= images:
        raise InputError(f"count: {count!r} of {images!r} images given; allowed are 0 to all of 1 or more")
    outside = (1 - confidence) / 2
    low = float(betaincinv(count, images - count + 1, outside)) if count else 0.0
    high = float(betaincinv(count + 1, images - count, 1 - outside)) if count < images else 1.0
    return low, high


def promised_confidence(images: int, over: int, false_alarm_rate: float) -> float:
    """How surely a threshold keeps to a false-alarm rate.

    Parameters
    ----------
    images
        Held-out normal images from which it was chosen.
    over
        How many of them score higher, 0..images - 1.
    false_alarm_rate
        The rate asked for.

    Returns
    -------
    float
        Probability, over the choice of the held-out images, that at most this share of normal images lies
        over the threshold: P(Beta(over + 1, images - over) <= rate).
    """
    return float(betainc(over + 1, images - over, false_alarm_rate))


def images_needed(false_alarm_rate: float, confidence: float | None = 0.95) -> int | None:
    """Count the held-out normal images with which a false-alarm rate can be promised.

    Parameters
    ----------
    false_alarm_rate
        0..1.
    confidence
        With which it is to be kept; None: on average only.

    Returns
    -------
    int or None
        The smallest n for which the largest of n scores is such a threshold: 1 / rate - 1 on average,
        log(1 - confidence) / log(1 - rate) with confidence (Wilks), rounded up. None for a rate of 0, which
        no number of images can promise, or so near to 0 that the number is no finite float.

    Raises
    ------
    InputError
        An argument is out of its range.
    """
    false_alarm_rate = _check_rate(false_alarm_rate)
    if confidence is not None:
        confidence = _check_confidence(confidence)
    if false_alarm_rate == 0:
        return None
    if false_alarm_rate == 1:
        return 1
    if confidence is None:
        needed = 1 / false_alarm_rate - 1
    else:
        needed = math.log1p(-confidence) / math.log1p(-false_alarm_rate)
    if math.isinf(needed):
        return None
    # Rounding first: 1 / 0.01 - 1 must not become 100 through the last bit.
    return max(1, math.ceil(round(needed, 9)))


def conformal_threshold(scores: Sequence[float], false_alarm_rate: float) -> tuple[float, float]:
    """Choose a threshold that a new normal image passes over with at most a given probability.

    Parameters
    ----------
    scores
        n >= 1 scores of normal images that the detector has not seen, finite.
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
        No scores, one that is not finite, or a rate outside 0..1.

    References
    ----------
    Vovk et al., Algorithmic learning in a random world, 2005 (split conformal prediction).
    """
    _check_scores(scores)
    false_alarm_rate = _check_rate(false_alarm_rate)
    n = len(scores)
    k = _rank_on_average(n, false_alarm_rate)
    return sorted(scores)[k - 1], (n + 1 - k) / (n + 1)


def held_out_calibration(
    image_scores: Sequence[float],
    map_maxima: Sequence[float],
    false_alarm_rate: float,
    *,
    confidence: float = 0.95,
    guaranteed: bool = False,
    defective_scores: Sequence[float] = (),
    part_maxima: Mapping[str, Sequence[float]] | None = None,
) -> Calibration:
    """Calibrate on normal images that the scoring detectors had not seen.

    Parameters
    ----------
    image_scores, map_maxima
        Of the same n >= 1 images: image scores, and maxima of the anomaly maps.
    false_alarm_rate
        Share of normal images that may be called defective, and of those that may get a mask.
    confidence
        Of the interval, and of the guarantee.
    guaranteed
        False: the rate is kept on average over all choices of held-out images. True: it is kept with
        ``confidence``, which needs higher thresholds and more images (:func:`images_needed`).
    defective_scores
        Scores of defective images to keep beside; they have no part in the thresholds.
    part_maxima
        Maxima of the parts' maps of the same images, by the parts' names.

    Returns
    -------
    Calibration
        A warning is given where n images cannot support the rate; the thresholds are then the largest
        score and maximum.

    Raises
    ------
    InputError
        See :func:`conformal_threshold`; the confidence is not between 0 and 1; or scores and maxima are not
        of equally many images.
    """
    for values in (image_scores, map_maxima):
        _check_scores(values)
    for name, maxima in {"map_maxima": map_maxima, **(part_maxima or {})}.items():
        if len(maxima) != len(image_scores):
            raise InputError(f"{name}: {len(maxima)} given for {len(image_scores)} image scores")
    false_alarm_rate, confidence = check_terms(false_alarm_rate, confidence)
    # Python's numbers, whatever was given: NumPy's cannot be written into a model file.
    image_scores, map_maxima, defective_scores = (
        sorted(map(float, values)) for values in (image_scores, map_maxima, defective_scores)
    )
    n = len(image_scores)
    k = (
        _rank_guaranteed(n, false_alarm_rate, confidence)
        if guaranteed
        else _rank_on_average(n, false_alarm_rate)
    )
    implied = (n + 1 - k) / (n + 1)
    _warn_of_few(n, false_alarm_rate, confidence if guaranteed else None)
    return Calibration(
        image_threshold=image_scores[k - 1],
        pixel_threshold=map_maxima[k - 1],
        source="held_out",
        images=n,
        false_alarm_rate=implied,
        image_scores=tuple(image_scores),
        map_maxima=tuple(map_maxima),
        confidence=confidence,
        interval=clopper_pearson(n - k, n, confidence),
        defective_scores=tuple(defective_scores),
        part_maxima={name: tuple(sorted(map(float, maxima))) for name, maxima in (part_maxima or {}).items()},
    )


def highest_held_out(names: Sequence[str], image_scores: Sequence[float]) -> list[list[Any]]:
    """Rank held-out images, and warn of those that look as if they were not good.

    Parameters
    ----------
    names, image_scores
        Of the same images, or no scores where none was held out; they are finite and >= 0.

    Returns
    -------
    list
        JSON values for the detector's ``training``: [name, score] of at most ``KEPT_BY_NAME`` images, the
        highest score first.

    Notes
    -----
    The score of an image is the largest of many patches, for which extreme value theory has the Gumbel
    distribution. It is fitted to the logarithms, since scores scatter by factors, and by the quartiles, which
    defective images cannot move far while they are few. A warning names the images whose score the highest
    of n good ones would pass with a probability of ``SUSPECT_RATE`` only: the more images, the higher.
    """
    if not len(image_scores):
        return []
    ranking = sorted(zip(names, image_scores, strict=True), key=lambda pair: pair[1], reverse=True)
    if len(ranking) >= SUSPECT_IMAGES:
        bound = _gumbel_bound(image_scores, SUSPECT_RATE)
        suspects = [name for name, score in ranking if score > bound]
        if suspects:
            shown = ", ".join(suspects[:5]) + (f" and {len(suspects) - 5} more" if suspects[5:] else "")
            warnings.warn(
                f"held-out images that score far above the rest ({len(suspects)} of {len(ranking)}): {shown}"
                "; look at them, and fit again without those that are not good",
                stacklevel=2,
            )
    return [list(pair) for pair in ranking[:KEPT_BY_NAME]]


def _gumbel_bound(scores: Sequence[float], rate: float) -> float:
    """Return the score over which the highest of as many good images lies with this probability."""
    quartiles = np.quantile(scores, (0.25, 0.5, 0.75))
    # Copies of an image that the folds have seen say nothing of others.
    if quartiles[0] <= 0:
        return math.inf
    low, median, high = np.log(quartiles)
    # Quantile p of the distribution is place - scale log(-log p).
    scale = max((high - low) / math.log(math.log(4) / math.log(4 / 3)), LEAST_SCATTER)
    place = median + scale * math.log(math.log(2))
    bound = place - scale * math.log(-math.log1p(-rate) / len(scores))
    return math.exp(min(bound, math.log(np.finfo(np.float64).max)))


def _rank_on_average(n: int, rate: float) -> int:
    # Rounding first: (n + 1) * (1 - 0.1) must not become one more through the last bit.
    k = max(1, math.ceil(round((n + 1) * (1 - rate), 9)))
    return min(k, n)


def _rank_guaranteed(n: int, rate: float, confidence: float) -> int:
    ranks = np.arange(1, n + 1)
    kept = betainc(n - ranks + 1, ranks, rate) >= confidence
    return int(ranks[kept][0]) if kept.any() else n


def _warn_of_few(n: int, rate: float, confidence: float | None) -> None:
    needed = images_needed(rate, confidence)
    if needed is not None and n >= needed:
        return
    surely = "" if confidence is None else f" with {confidence:.0%} confidence"
    lowest = 1 / (n + 1) if confidence is None else 1 - (1 - confidence) ** (1 / n)
    warnings.warn(
        f"{n} held-out images support a false-alarm rate of {lowest:.3g} at the lowest{surely}, not {rate:g} "
        f"({'no number of images does' if needed is None else f'that takes {needed}'}); the threshold is "
        "their largest score",
        stacklevel=3,
    )


def check_terms(false_alarm_rate: Any, confidence: Any) -> tuple[float, float]:
    """Return both; raise InputError unless the rate is in 0..1 and the confidence over 0 and under 1."""
    return _check_rate(false_alarm_rate), _check_confidence(confidence)


def _check_scores(scores: Sequence[float]) -> None:
    if not len(scores):
        raise InputError("scores: none given; a threshold needs at least one held-out normal image")
    if not np.isfinite(np.asarray(scores, dtype=np.float64)).all():
        raise InputError("scores: some are not finite")


def _is_number(value: Any) -> bool:
    return isinstance(value, _NUMBERS) and not isinstance(value, bool)


def _check_rate(rate: Any) -> float:
    if not _is_number(rate) or not 0 <= rate <= 1:
        raise InputError(f"false_alarm_rate: {rate!r} given; allowed are 0 to 1")
    return float(rate)


def _check_confidence(confidence: Any) -> float:
    if not _is_number(confidence) or not 0 < confidence < 1:
        raise InputError(f"confidence: {confidence!r} given; allowed are numbers over 0 and under 1")
    return float(confidence)
