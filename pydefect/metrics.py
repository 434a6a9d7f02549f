"""How well scores tell defective from normal, for images and for pixels: exact, in native code.

No score is binned: ties count as ties, and areas are those of the exact curves. Definitions, sources and
measurements are in ``docs/metrics.md``.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from numbers import Real
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from pydefect import _native
from pydefect.errors import InputError, as_array

__all__ = [
    "Confusion",
    "Curve",
    "DetectionMetrics",
    "PixelScores",
    "aupro",
    "confusion",
    "detection_metrics",
    "f1_max",
    "precision_recall_curve",
    "roc_curve",
    "spro",
]

PRO_LIMIT = 0.3
"""The false-positive rate up to which AUPRO is integrated where nothing else is said."""
SPRO_LIMIT = 0.05
"""The same of sPRO."""

Region = tuple[ArrayLike, int]
"""[H, W] mask of one annotated region, and how many of its pixels must be found: its saturation area."""


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
        The threshold that gives it, equation (11), the lowest one where several do: a score greater than it
        counts as defective.
    """

    auroc: float
    average_precision: float
    f1_max: float
    f1_threshold: float


@dataclass(frozen=True)
class Confusion:
    """What a threshold calls defective, counted.

    Attributes
    ----------
    true_positives, false_positives, false_negatives, true_negatives
        Defective ones called so, normal ones called defective, defective ones missed, normal ones called so.
    """

    true_positives: int
    false_positives: int
    false_negatives: int
    true_negatives: int

    @property
    def precision(self) -> float:
        """Share of defective ones among those called so; NaN where nothing is."""
        return _share(self.true_positives, self.true_positives + self.false_positives)

    @property
    def recall(self) -> float:
        """Share of the defective ones that are called so (true-positive rate); NaN without any."""
        return _share(self.true_positives, self.true_positives + self.false_negatives)

    @property
    def false_positive_rate(self) -> float:
        """Share of the normal ones that are called defective; NaN without any."""
        return _share(self.false_positives, self.false_positives + self.true_negatives)

    @property
    def f1(self) -> float:
        """Harmonic mean of precision and recall; NaN where nothing is defective nor called so."""
        wrong = self.false_positives + self.false_negatives
        return _share(2 * self.true_positives, 2 * self.true_positives + wrong)


@dataclass(frozen=True)
class Curve:
    """Corners of a curve, from the highest threshold to the lowest.

    Attributes
    ----------
    x, y
        [n] float64: false-positive rate and true-positive rate (ROC) or mean overlap (PRO, sPRO), or recall
        and precision.
    thresholds
        [n] float32: ``score > thresholds[i]`` is what gives corner i. (A PRO curve's last corner may be cut
        out of the edge that crosses the limit; its threshold is that of the edge's far end.)
    area
        Of the exact curve, whatever corners are left out: AUROC, average precision, AUPRO or sPRO, the latter
        two up to the curve's last x and divided by it.
    """

    x: NDArray[np.float64]
    y: NDArray[np.float64]
    thresholds: NDArray[np.float32]
    area: float


def f1_max(labels: ArrayLike, scores: ArrayLike) -> tuple[float, float]:
    """Find the threshold that maximises F1, equations (10) and (11).

    Parameters
    ----------
    labels
        [n] bool or 0/1; 1 is defective.
    scores
        [n] float; compared as float32.

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
    metrics = detection_metrics(labels, scores)
    return metrics.f1_max, metrics.f1_threshold


def detection_metrics(labels: ArrayLike, scores: ArrayLike) -> DetectionMetrics:
    """Compute AUROC, average precision and F1-max of labelled scores.

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
    scored = _labelled(labels, scores)
    _require_both(scored, "labels")
    return _metrics_of(scored)


def confusion(labels: ArrayLike, scores: ArrayLike, threshold: float) -> Confusion:
    """Count what a threshold calls defective.

    Parameters
    ----------
    labels, scores
        See :func:`f1_max`; any shape, flattened. One class may be missing.
    threshold
        ``score > threshold`` counts as defective.

    Returns
    -------
    Confusion

    Raises
    ------
    InputError
        Lengths differ, a score that is not finite, or a threshold that is NaN.
    """
    return _confusion_of(_labelled(labels, scores), threshold)


def roc_curve(labels: ArrayLike, scores: ArrayLike, *, step: float = 0.0) -> Curve:
    """Corners of the receiver operating characteristic.

    Parameters
    ----------
    labels, scores
        See :func:`f1_max`; any shape, flattened.
    step
        Corners are left out that lie, in both rates and in precision, less than this from one that is kept;
        0 keeps all. 0.001 is finer than a plot shows.

    Returns
    -------
    Curve
        True-positive rate over false-positive rate, (0, 0) to (1, 1); its area is AUROC.

    Raises
    ------
    InputError
        See :func:`f1_max`, and where `step` is not 0 to 1.
    """
    scored = _labelled(labels, scores)
    _require_both(scored, "labels")
    return _roc(scored, _points_of(scored, step), _metrics_of(scored))


def precision_recall_curve(labels: ArrayLike, scores: ArrayLike, *, step: float = 0.0) -> Curve:
    """Corners of precision over recall.

    Parameters
    ----------
    labels, scores, step
        See :func:`roc_curve`.

    Returns
    -------
    Curve
        Precision over recall, from (0, 1) on; its area is average precision, the step-wise sum.

    Raises
    ------
    InputError
        See :func:`roc_curve`.
    """
    scored = _labelled(labels, scores)
    _require_both(scored, "labels")
    return _precision_recall(scored, _points_of(scored, step), _metrics_of(scored))


class PixelScores:
    """Anomaly maps and masks, fed image by image, and the metrics of all their pixels.

    The scores are kept (4 bytes a pixel, and 2 more a defective one), the maps and masks are not: an image
    can be let go of once it is added. Computing metrics needs no copy.

    Parameters
    ----------
    threads
        None: OMP_NUM_THREADS where it is set, else every core that this process may use. No result depends on
        it.

    Examples
    --------
    >>> import numpy as np
    >>> from pydefect.metrics import PixelScores
    >>> scores = PixelScores()
    >>> mask = np.zeros((4, 4), dtype=np.uint8)
    >>> mask[1:3, 1:3] = 255
    >>> scores.add(np.arange(16, dtype=np.float32).reshape(4, 4) / 16, mask)
    >>> scores.add(np.zeros((4, 4), dtype=np.float32))
    >>> round(scores.metrics().auroc, 3), round(scores.aupro(), 3)
    (0.786, 0.286)
    """

    def __init__(self, *, threads: int | None = None) -> None:
        if threads is not None and (not isinstance(threads, int | np.integer) or threads < 1):
            raise InputError(f"threads: {threads!r} given; it must be a whole number of at least 1")
        self._threads = _default_threads() if threads is None else int(threads)
        self._native = _native.ScoreSet()
        self._images = 0
        self._metrics: DetectionMetrics | None = None
        self._areas: dict[tuple[str, float], float] = {}
        self._points: tuple[float, _native._OperatingPoints] | None = None

    @property
    def images(self) -> int:
        """Number of images added."""
        return self._images

    @property
    def normal_pixels(self) -> int:
        """Number of pixels that no mask marks."""
        return self._native.normal

    @property
    def defective_pixels(self) -> int:
        """Number of pixels that a mask marks."""
        return self._native.defective

    @property
    def components(self) -> int:
        """Number of connected components (8-neighbourhood) of the masks."""
        return self._native.components

    @property
    def regions(self) -> int:
        """Number of annotated regions with a saturation area."""
        return self._native.regions

    def add(
        self,
        anomaly_map: ArrayLike,
        mask: ArrayLike | None = None,
        *,
        regions: Iterable[Region] | None = None,
    ) -> None:
        """Take one image's scores.

        Parameters
        ----------
        anomaly_map
            [H, W] float; scores are compared as float32.
        mask
            [H, W] bool or integers, 8-bit or 16-bit: every value but 0 marks a defective pixel. None, or a
            mask of zeros: a normal image.
        regions
            In place of `mask`, for sPRO: every annotated region's mask, like `mask`, and its saturation area
            in pixels, 1 to the region's own area. Regions may overlap; their union is the mask.

        Raises
        ------
        InputError
            A shape, dtype or saturation area that is not as above, or a score that is not finite. Nothing of
            the image has been added then.
        """
        self._add([_image(anomaly_map, mask, regions)])

    def extend(self, anomaly_maps: Iterable[ArrayLike], masks: Iterable[ArrayLike | None]) -> None:
        """Take several images' scores, as many at once as there are threads.

        Parameters
        ----------
        anomaly_maps, masks
            As for :meth:`add`, one mask an image: lists, generators, or arrays [n, H, W].

        Raises
        ------
        InputError
            See :meth:`add`, and where there are more of one than of the other. Images before the wrong one
            may have been added.
        """
        pairs = _pairs(anomaly_maps, masks, "masks")
        while batch := list(islice(pairs, self._threads)):
            self._add([_image(one, mask, None) for one, mask in batch])

    def merged(self, *others: PixelScores) -> PixelScores:
        """Join several collections into a new one, which shares their memory.

        Parameters
        ----------
        *others
            Images of other kinds, for example; none is changed.

        Returns
        -------
        PixelScores
        """
        result = PixelScores(threads=self._threads)
        for part in others:
            if not isinstance(part, PixelScores):
                raise InputError(f"others: {type(part).__name__} given; allowed are PixelScores")
        for part in (self, *others):
            result._native.merge(part._native)
            result._images += part._images
        return result

    def metrics(self) -> DetectionMetrics:
        """AUROC, average precision and F1-max over all pixels.

        Returns
        -------
        DetectionMetrics

        Raises
        ------
        InputError
            If no pixel is defective, or none is normal.
        """
        _require_both(self._native, "masks", "pixels ")
        if self._metrics is None:
            self._measure([PRO_LIMIT], [SPRO_LIMIT] if self.regions else [])
        assert self._metrics is not None
        return self._metrics

    def aupro(self, limit: float = PRO_LIMIT) -> float:
        """Area under the per-region overlap curve, as MVTec AD's evaluation defines it.

        The mean over all connected components (8-neighbourhood) of the share of their pixels that is found,
        over the false-positive rate among all normal pixels, integrated by trapezoids up to `limit` and
        divided by it [1]_.

        Parameters
        ----------
        limit
            False-positive rate, greater than 0 and at most 1.

        Returns
        -------
        float
            0..1.

        Raises
        ------
        InputError
            If no pixel is defective, or none is normal, or `limit` is none.

        References
        ----------
        .. [1] Bergmann et al., "The MVTec Anomaly Detection Dataset", IJCV 129, 2021, section 4.2.
        """
        return self._area("pro", limit)

    def spro(self, limit: float = SPRO_LIMIT) -> float:
        """Area under the saturated per-region overlap curve, as MVTec LOCO AD's evaluation defines it.

        Like :meth:`aupro`, with min(found pixels / saturation area, 1) of every annotated region [1]_.

        Parameters
        ----------
        limit
            See :meth:`aupro`.

        Returns
        -------
        float
            0..1.

        Raises
        ------
        InputError
            If no image was added with regions, no pixel is normal, or `limit` is none.

        References
        ----------
        .. [1] Bergmann et al., "Beyond Dents and Scratches", IJCV 130, 2022, section 4.
        """
        return self._area("spro", limit)

    def roc_curve(self, *, step: float = 1e-3) -> Curve:
        """Corners of the receiver operating characteristic over pixels.

        Parameters
        ----------
        step
            See :func:`roc_curve`; 0 keeps all, which may be as many as there are defective pixels.

        Returns
        -------
        Curve

        Raises
        ------
        InputError
            See :meth:`metrics`, and where `step` is not 0 to 1.
        """
        return _roc(self._native, self._operating_points(step), self.metrics())

    def precision_recall_curve(self, *, step: float = 1e-3) -> Curve:
        """Corners of precision over recall over pixels.

        Parameters
        ----------
        step
            See :meth:`roc_curve`.

        Returns
        -------
        Curve

        Raises
        ------
        InputError
            See :meth:`roc_curve`.
        """
        return _precision_recall(self._native, self._operating_points(step), self.metrics())

    def pro_curve(self, limit: float = PRO_LIMIT, *, step: float = 1e-3) -> Curve:
        """Corners of the mean overlap of components over the false-positive rate, up to `limit`.

        Parameters
        ----------
        limit
            See :meth:`aupro`; the last corner lies there.
        step
            See :meth:`roc_curve`.

        Returns
        -------
        Curve
            Its area is :meth:`aupro`.

        Raises
        ------
        InputError
            See :meth:`aupro` and :meth:`roc_curve`.
        """
        area = self.aupro(limit)
        points = self._operating_points(step)
        return _up_to(limit, self._native, points, points["pro"], area)

    def spro_curve(self, limit: float = SPRO_LIMIT, *, step: float = 1e-3) -> Curve:
        """Corners of the mean saturated overlap of regions over the false-positive rate, up to `limit`.

        Parameters
        ----------
        limit
            See :meth:`spro`; the last corner lies there.
        step
            See :meth:`roc_curve`.

        Returns
        -------
        Curve
            Its area is :meth:`spro`.

        Raises
        ------
        InputError
            See :meth:`spro` and :meth:`roc_curve`.
        """
        area = self.spro(limit)
        points = self._operating_points(step)
        return _up_to(limit, self._native, points, points["spro"], area)

    def confusion(self, threshold: float) -> Confusion:
        """Count the pixels that a threshold calls defective.

        Parameters
        ----------
        threshold
            ``score > threshold`` counts as defective.

        Returns
        -------
        Confusion

        Raises
        ------
        InputError
            If the threshold is NaN.
        """
        return _confusion_of(self._native, threshold)

    def _add(self, images: list[_Image]) -> None:
        try:
            self._native.add_images(images, self._threads)
        except FloatingPointError as error:
            raise InputError(f"anomaly_map: scores must be finite, and {error}") from None
        self._images += len(images)
        self._metrics, self._areas, self._points = None, {}, None

    def _area(self, kind: str, limit: float) -> float:
        limit = _number(limit, "limit", "it must be greater than 0 and at most 1")
        if not 0 < limit <= 1:
            raise InputError(f"limit: {limit} given; it must be greater than 0 and at most 1")
        if kind == "spro" and not self.regions:
            raise InputError("regions: no image was added with any; sPRO needs at least one")
        _require_both(self._native, "masks", "pixels ")
        if (kind, limit) not in self._areas:
            self._measure([limit] if kind == "pro" else [], [limit] if kind == "spro" else [])
        return self._areas[kind, limit]

    def _measure(self, pro_limits: list[float], spro_limits: list[float]) -> None:
        found = self._native.summary(pro_limits, spro_limits, self._threads)
        self._metrics = _detection(found)
        for kind, limits, areas in (("pro", pro_limits, found["pro"]), ("spro", spro_limits, found["spro"])):
            self._areas |= {(kind, limit): area for limit, area in zip(limits, areas, strict=True)}

    def _operating_points(self, step: float) -> _native._OperatingPoints:
        if self._points is None or self._points[0] != step:
            _require_both(self._native, "masks", "pixels ")
            self._points = step, _points_of(self._native, step, self._threads)
        return self._points[1]


def aupro(
    anomaly_maps: Iterable[ArrayLike], masks: Iterable[ArrayLike | None], *, limit: float = PRO_LIMIT
) -> float:
    """Area under the per-region overlap curve; see :meth:`PixelScores.aupro`.

    Parameters
    ----------
    anomaly_maps, masks
        See :meth:`PixelScores.extend`.
    limit
        False-positive rate, greater than 0 and at most 1.

    Returns
    -------
    float
        0..1.

    Raises
    ------
    InputError
        See :meth:`PixelScores.extend` and :meth:`PixelScores.aupro`.
    """
    scores = PixelScores()
    scores.extend(anomaly_maps, masks)
    return scores.aupro(limit)


def spro(
    anomaly_maps: Iterable[ArrayLike], regions: Iterable[Iterable[Region]], *, limit: float = SPRO_LIMIT
) -> float:
    """Area under the saturated per-region overlap curve; see :meth:`PixelScores.spro`.

    Parameters
    ----------
    anomaly_maps, regions
        See :meth:`PixelScores.add`; a normal image has no regions.
    limit
        False-positive rate, greater than 0 and at most 1.

    Returns
    -------
    float
        0..1.

    Raises
    ------
    InputError
        See :meth:`PixelScores.add` and :meth:`PixelScores.spro`.
    """
    scores = PixelScores()
    for anomaly_map, of_image in _pairs(anomaly_maps, regions, "regions"):
        scores.add(anomaly_map, regions=of_image)
    return scores.spro(limit)


_Image = tuple[NDArray[np.float32], NDArray[Any] | None, Sequence[tuple[NDArray[Any], int]]]


def _default_threads() -> int:
    wanted = os.environ.get("OMP_NUM_THREADS", "")
    return int(wanted) if wanted.isdecimal() and int(wanted) > 0 else len(os.sched_getaffinity(0))


def _pairs(anomaly_maps: Iterable[ArrayLike], others: Iterable[Any], name: str) -> Iterator[tuple[Any, Any]]:
    missing = object()
    each = _each(anomaly_maps, "anomaly_maps", "maps"), _each(others, name, f"{name}, one an image")
    for pair in zip_longest(*each, fillvalue=missing):
        if pair[0] is missing:
            raise InputError(f"{name}: more than anomaly maps; there must be one an image")
        if pair[1] is missing:
            raise InputError(f"{name}: fewer than anomaly maps; there must be one an image")
        yield pair


def _share(part: int, whole: int) -> float:
    return part / whole if whole else float("nan")


def _each(values: Iterable[Any], name: str, what: str) -> Iterator[Any]:
    try:
        return iter(values)
    except TypeError:
        raise InputError(f"{name}: {type(values).__name__} given; it must be an iterable of {what}") from None


def _number(value: Any, name: str, allowed: str) -> Any:
    if isinstance(value, Real):
        return value
    # A tensor or an array of one number serves too.
    array = as_array(name, value)
    if array.ndim or array.dtype.kind not in "iuf":
        raise InputError(f"{name}: {value!r} given; {allowed}")
    return float(array)


def _as_float32(values: ArrayLike, name: str) -> NDArray[np.float32]:
    given = as_array(name, values)
    if given.dtype.kind not in "biufO":
        raise InputError(f"{name}: dtype {given.dtype} given; it must be one of real numbers")
    try:
        with np.errstate(over="ignore"):  # infinity is answered where scores are read
            return given.astype(np.float32, copy=False)
    except (TypeError, ValueError, OverflowError) as error:
        raise InputError(f"{name}: it must be an array of real numbers: {error}") from error


def _labelled(labels: ArrayLike, scores: ArrayLike) -> _native.ScoreSet:
    given = as_array("labels", labels).ravel()
    label_array = np.asarray(given == 1)  # compared, not converted: NumPy 1 converts no words
    odd = given[~label_array & np.asarray(given != 0)][:1].tolist()
    if odd:
        raise InputError(f"labels: {odd[0]!r} is among them; allowed are True and False, or 1 and 0")
    score_array = _as_float32(scores, "scores").ravel()
    if len(label_array) != len(score_array):
        raise InputError(f"scores: {len(score_array)} given for {len(label_array)} labels")
    scored = _native.ScoreSet()
    try:
        scored.add_labelled(score_array, label_array, _default_threads())
    except FloatingPointError as error:
        raise InputError(f"scores: {error}") from None
    return scored


def _require_both(scored: _native.ScoreSet, name: str, what: str = "") -> None:
    if not scored.normal or not scored.defective:
        kind = "defective" if scored.defective else "normal"
        raise InputError(
            f"{name}: all {scored.normal + scored.defective} {what}are {kind}; "
            "metrics need normal and defective ones"
        )


def _image(anomaly_map: ArrayLike, mask: ArrayLike | None, regions: Iterable[Region] | None) -> _Image:
    scores = _as_float32(anomaly_map, "anomaly_map")
    if scores.ndim != 2 or not scores.size:
        raise InputError(
            f"anomaly_map: shape {scores.shape} given; it must be [H, W] with at least one pixel"
        )
    if regions is None:
        return scores, None if mask is None else _mask(mask, "mask", scores.shape), ()
    if mask is not None:
        raise InputError("mask: given together with regions; their union is the mask")
    marked = []
    union = np.zeros(scores.shape, dtype=np.bool_)
    for index, pair in enumerate(_each(regions, "regions", "pairs of a mask and its saturation area")):
        name = f"regions[{index}]"
        try:
            region, saturation = pair
        except (TypeError, ValueError):
            raise InputError(f"{name}: it must be a pair of a mask and its saturation area") from None
        pixels = _mask(region, name, scores.shape)
        area = int(np.count_nonzero(pixels))
        if not area:
            raise InputError(f"{name}: it marks no pixel")
        allowed = f"it must be a whole number of pixels, 1 to the region's own {area}"
        whole = _number(saturation, f"{name}: saturation area", allowed)
        if not float(whole).is_integer() or not 1 <= whole <= area:
            raise InputError(f"{name}: saturation area {saturation} given; {allowed}")
        union |= pixels != 0
        marked.append((pixels, int(whole)))
    return scores, union, marked


def _mask(mask: ArrayLike, name: str, shape: tuple[int, ...]) -> NDArray[Any]:
    values = as_array(name, mask)
    if values.dtype.kind not in "bui":
        raise InputError(f"{name}: dtype {values.dtype} given; it must be bool or an integer one")
    if values.shape != shape:
        raise InputError(f"{name}: shape {values.shape} given for an anomaly map of shape {shape}")
    return values if values.dtype in (np.bool_, np.uint8, np.uint16) else values != 0


def _detection(found: _native._MetricsSummary) -> DetectionMetrics:
    return DetectionMetrics(
        auroc=found["auroc"],
        average_precision=found["average_precision"],
        f1_max=found["f1_max"],
        f1_threshold=found["f1_threshold"],
    )


def _metrics_of(scored: _native.ScoreSet) -> DetectionMetrics:
    return _detection(scored.summary([], [], _default_threads()))


def _points_of(scored: _native.ScoreSet, step: float, threads: int | None = None) -> _native._OperatingPoints:
    step = _number(step, "step", "it must be 0 to 1")
    if not 0 <= step <= 1:
        raise InputError(f"step: {step} given; it must be 0 to 1")
    return scored.operating_points(step, threads or _default_threads())


def _roc(scored: _native.ScoreSet, points: _native._OperatingPoints, metrics: DetectionMetrics) -> Curve:
    return Curve(
        x=points["false_positives"] / scored.normal,
        y=points["true_positives"] / scored.defective,
        thresholds=points["thresholds"],
        area=metrics.auroc,
    )


def _precision_recall(
    scored: _native.ScoreSet, points: _native._OperatingPoints, metrics: DetectionMetrics
) -> Curve:
    called = points["true_positives"] + points["false_positives"]
    return Curve(
        x=points["true_positives"] / scored.defective,
        # Where nothing is called defective, nothing is so wrongly.
        y=np.where(called, points["true_positives"] / np.maximum(called, 1), 1.0),
        thresholds=points["thresholds"],
        area=metrics.average_precision,
    )


def _up_to(
    limit: float,
    scored: _native.ScoreSet,
    points: _native._OperatingPoints,
    overlaps: NDArray[np.float64],
    area: float,
) -> Curve:
    """The corners up to a false-positive rate, the last one cut out of the edge that crosses it."""
    rates = points["false_positives"] / scored.normal
    thresholds = points["thresholds"]
    inside = int(np.searchsorted(rates, limit, side="right"))
    x, y, kept = rates[:inside], overlaps[:inside], thresholds[:inside]
    if x[-1] < limit:
        height = np.interp(limit, rates[inside - 1 : inside + 1], overlaps[inside - 1 : inside + 1])
        x, y, kept = np.append(x, limit), np.append(y, height), np.append(kept, thresholds[inside])
    return Curve(x=x, y=y, thresholds=kept, area=area)


def _confusion_of(scored: _native.ScoreSet, threshold: float) -> Confusion:
    threshold = _number(threshold, "threshold", "it must be a number")
    if np.isnan(threshold):
        raise InputError("threshold: NaN given; it must be a number")
    with np.errstate(over="ignore"):
        nearest = np.float32(threshold)
    # Scores are float32: those above the threshold are those above the next float32 that is not.
    if float(nearest) > threshold:
        nearest = np.nextafter(nearest, np.float32(-np.inf))
    hits, false_alarms = scored.count_above(float(nearest))
    return Confusion(
        true_positives=hits,
        false_positives=false_alarms,
        false_negatives=scored.defective - hits,
        true_negatives=scored.normal - false_alarms,
    )
