"""A run as one HTML file."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader, StrictUndefined

from pydefect import charts
from pydefect.data.checks import check_dataset
from pydefect.errors import InputError
from pydefect.metrics import Curve, precision_recall_curve, roc_curve
from pydefect.persistence import write_atomically
from pydefect.places import check_file_writable
from pydefect.progress import ProgressBars
from pydefect.report.gallery import OUTCOMES, Card, ColourScale, Thresholds, cards, outcome
from pydefect.run import Run
from pydefect.version import VERSION

__all__ = ["render", "write_report"]

METRICS = {
    "auroc": "AUROC",
    "ap": "Average precision",
    "f1_max": "F1-max",
    "aupro": "AUPRO",
    "spro_0.05": "sPRO (up to 0.05)",
}
"""Figures by their names in an evaluation, all in 0..1, and as people call them."""

# Longer lists, such as the scores of held-out images, say nothing in a table.
_LONGEST_LIST = 8


@dataclass(frozen=True)
class Figure:
    """A chart, and what it shows in words."""

    title: str
    svg: str
    words: str


@dataclass(frozen=True)
class Notice:
    """Something that a reader should know before reading figures."""

    title: str
    text: str
    images: tuple[tuple[str, ...], ...] = ()


@dataclass(frozen=True)
class Defect:
    """One kind of defect, or the good images."""

    name: str
    images: int
    right: int | None
    median_score: float
    auroc: float | None


def write_report(
    run: Run,
    out: str | os.PathLike[str] | None = None,
    *,
    images: int = 400,
    progress: bool = True,
) -> Path:
    """Write a run as one HTML file that needs nothing else, not even a network.

    Parameters
    ----------
    run
        From :func:`pydefect.run.read_run`; its data set's images are read again.
    out
        The file; None: ``report.html`` in the run's folder. Replaced if it exists.
    images
        Images in the gallery at most. Misses and false alarms come first, so that they are left out last.
    progress
        Show a progress bar on standard error.

    Returns
    -------
    pathlib.Path
        The file.

    Raises
    ------
    InputError
        `images` is negative, `out` is a folder or cannot be written, or the data set's images are no longer
        where they were.

    Examples
    --------
    >>> from pydefect.run import read_run
    >>> write_report(read_run("runs/bottle"))                  # doctest: +SKIP
    PosixPath('runs/bottle/report.html')
    """
    path = run.folder / "report.html" if out is None else Path(out)
    check_images(images)
    if path.is_dir():
        raise InputError(f"out: {str(path)!r} is a folder; name a file in it")
    check_file_writable(path, "out")
    if not any(run.sample(index).image.is_file() for index in range(len(run.images))):
        raise InputError(
            f"data: none of the run's images is in {str(run.root)!r} any more; say where they are "
            "(--data DIR)"
        )
    write_atomically(path, _page(run, images, progress).encode("utf-8", "backslashreplace"))
    return path


def check_images(images: int) -> None:
    """Raise an InputError for a gallery of fewer than 0 images."""
    if images < 0:
        raise InputError(f"images: {images!r} given; allowed are 0 and more")


def render(template: str, **content: Any) -> str:
    """Fill in one of the package's templates; every value is escaped."""
    environment = Environment(
        loader=PackageLoader("pydefect.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = _percent
    environment.filters["score"] = _score
    return environment.get_template(template).render(**content, version=VERSION)


def _page(run: Run, images: int, progress: bool) -> str:
    thresholds = Thresholds.of(run)
    scale = ColourScale.of(run, thresholds)
    bars = ProgressBars(progress)
    try:
        gallery = cards(run, thresholds, scale, images, lambda done, total: bars("gallery", done, total))
    finally:
        bars.close()
    counts = _counts(run, thresholds)
    scores = [image.image_score for image in run.images]
    return render(
        "report.html.j2",
        run=run,
        title=f"{run.facts['method']} on {run.evaluation['dataset']}",
        tiles=_tiles(run, counts, thresholds),
        notices=[*_run_notices(run, thresholds), *_data_notices(run)],
        thresholds=thresholds,
        scale=scale,
        counts=counts,
        metrics=_metric_rows(run.evaluation),
        defects=_defects(run, thresholds),
        figures=_figures(run, thresholds, counts),
        cards=gallery,
        outcomes=OUTCOMES,
        glyphs={"miss": "✕", "false_alarm": "!", "found": "✓", "passed": "✓"},
        left_out=len(run.images) - len(gallery),
        score_range=(min(scores), max(scores)),
        alternative=_alternative,
        tables=_tables(run),
    )


def _counts(run: Run, thresholds: Thresholds) -> dict[str, int] | None:
    """How many images came out how; None without a threshold."""
    if thresholds.image is None:
        return None
    found = [outcome(image, thresholds.image) for image in run.images]
    return {name: found.count(name) for name in OUTCOMES}


def _tiles(run: Run, counts: dict[str, int] | None, thresholds: Thresholds) -> list[tuple[str, str, str]]:
    """The figures that most readers come for: (name, value, remark)."""
    evaluation = run.evaluation
    tiles = [("Image AUROC", _percent(evaluation["image_auroc"]), "")]
    if evaluation["pixel_auroc"] is not None:
        tiles.append(("Pixel AUROC", _percent(evaluation["pixel_auroc"]), ""))
    if evaluation["pixel_aupro"] is not None:
        tiles.append(("AUPRO", _percent(evaluation["pixel_aupro"]), ""))
    if counts is not None:
        defective, good = counts["miss"] + counts["found"], counts["false_alarm"] + counts["passed"]
        which = "best-F1 threshold" if thresholds.chosen_on_test else "the model's threshold"
        tiles.append(("Missed defects", f"{counts['miss']} of {defective}", f"at {which}"))
        tiles.append(("False alarms", f"{counts['false_alarm']} of {good}", f"at {which}"))
    tiles.append(
        ("Time per image", _seconds(evaluation["seconds_per_image"]), run.facts["machine"]["device"])
    )
    return tiles


def _metric_rows(evaluation: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(metric, of images, of pixels), of those that the evaluation has."""
    rows = []
    for key, name in METRICS.items():
        of_images, of_pixels = evaluation.get(f"image_{key}"), evaluation.get(f"pixel_{key}")
        if of_images is not None or of_pixels is not None:
            rows.append((name, _percent(of_images), _percent(of_pixels)))
    of_images, of_pixels = evaluation["image_f1_threshold"], evaluation["pixel_f1_threshold"]
    rows.append(("Threshold of F1-max", _score(of_images), _score(of_pixels)))
    return rows


def _defects(run: Run, thresholds: Thresholds) -> list[Defect]:
    """The good images, then every kind of defect."""
    aurocs = run.evaluation["image_auroc_by_defect"]
    rows = []
    for name in sorted({image.defect for image in run.images}, key=lambda name: (name in aurocs, name)):
        chosen = [image for image in run.images if image.defect == name]
        right = None
        if thresholds.image is not None:
            right = sum(outcome(image, thresholds.image) in ("found", "passed") for image in chosen)
        median = float(np.median([image.image_score for image in chosen]))
        rows.append(Defect(name.replace("_", " "), len(chosen), right, median, aurocs.get(name)))
    return rows


def _figures(run: Run, thresholds: Thresholds, counts: dict[str, int] | None) -> list[Figure]:
    labels = np.array([image.label for image in run.images], dtype=bool)
    scores = np.array([image.image_score for image in run.images], dtype=np.float32)
    good, defective = int((~labels).sum()), int(labels.sum())
    name = "best F1 at" if thresholds.chosen_on_test else "threshold"
    words = (
        f"Good images score {_range(scores[~labels])}, defective ones {_range(scores[labels])} "
        "(median, smallest to largest)."
    )
    false_alarm_rate = precision = recall = None
    if counts is not None:
        words += (
            f" The threshold {thresholds.image:.4g} calls {counts['false_alarm']} of {good} good images "
            f"defective and misses {counts['miss']} of {defective} defective ones."
        )
        false_alarm_rate, recall = counts["false_alarm"] / good, counts["found"] / defective
        called = counts["found"] + counts["false_alarm"]
        precision = counts["found"] / called if called else None
    figures = [
        Figure(
            "Image scores",
            charts.scores_by_label(scores[~labels], scores[labels], thresholds.image, name),
            words,
        )
    ]
    roc = {"images": roc_curve(labels, scores), **_named(run, pixel_roc="pixels")}
    point = None if false_alarm_rate is None or recall is None else (false_alarm_rate, recall)
    figures.append(
        Figure(
            "ROC curve",
            charts.curves(roc, "false-positive rate", "true-positive rate", point=point),
            _areas("Area under the curve", roc)
            + _at_threshold(point, "false-positive rate", "true-positive rate"),
        )
    )
    precision_recall = {
        "images": precision_recall_curve(labels, scores),
        **_named(run, pixel_precision_recall="pixels"),
    }
    point = None if precision is None or recall is None else (recall, precision)
    figures.append(
        Figure(
            "Precision and recall",
            charts.curves(precision_recall, "recall", "precision", point=point),
            _areas("Average precision", precision_recall) + _at_threshold(point, "recall", "precision"),
        )
    )
    spro = {name: name.removeprefix("pixel_spro_").replace("_", " ") for name in run.curves if "spro" in name}
    for title, overlap in (
        ("Per-region overlap", _named(run, pixel_pro="PRO")),
        ("Saturated per-region overlap", _named(run, **spro)),
    ):
        if not overlap:
            continue
        limit = max(float(curve.x[-1]) for curve in overlap.values())
        figures.append(
            Figure(
                title,
                charts.curves(overlap, "false-positive rate of pixels", "mean overlap", limit=limit),
                _areas("Normalised area under the curve", overlap),
            )
        )
    return figures


def _named(run: Run, **names: str) -> dict[str, Curve]:
    """Those of the run's curves that are there, under readable names."""
    return {name: run.curves[key] for key, name in names.items() if key in run.curves}


def _areas(what: str, curves: Mapping[str, Curve]) -> str:
    return f"{what}: " + ", ".join(f"{name} {_percent(curve.area)}" for name, curve in curves.items()) + "."


def _at_threshold(point: tuple[float, float] | None, x_name: str, y_name: str) -> str:
    if point is None:
        return ""
    return f" Images at the threshold: {x_name} {_percent(point[0])}, {y_name} {_percent(point[1])}."


def _run_notices(run: Run, thresholds: Thresholds) -> list[Notice]:
    """What the evaluation itself knows."""
    evaluation, notices = run.evaluation, []
    if thresholds.chosen_on_test:
        notices.append(
            Notice(
                "The model has no thresholds",
                "Decisions and outlines below use those that maximise F1 on these very test images: they "
                "show the best case, not what to expect.",
            )
        )
    elif run.calibration is not None and run.calibration.source == "labelled":
        notices.append(
            Notice(
                "Thresholds from labelled images",
                "The model's thresholds maximise F1 over labelled images. If those were these test images, "
                "decisions show the best case, not what to expect.",
            )
        )
    learned = evaluation.get("learned", [])  # runs of earlier versions lack it
    if learned:
        notices.append(
            Notice(
                "Test images that the fit has seen",
                f"The model's fit has read {len(learned)} of the test images: figures of these say little.",
                (tuple(learned),),
            )
        )
    skipped = evaluation.get("skipped", [])
    if skipped:
        notices.append(
            Notice(
                "Skipped test images",
                f"{len(skipped)} of the test images could not be read; no figure counts "
                f"{'it' if len(skipped) == 1 else 'them'}.",
                tuple((one["name"], one["reason"]) for one in skipped),
            )
        )
    if evaluation["without_mask"]:
        notices.append(
            Notice(
                "Defects without a mask",
                f"{evaluation['without_mask']} of the {evaluation['defective']} defective images have no "
                "mask: no figure over pixels counts them.",
            )
        )
    return notices


def _data_notices(run: Run) -> list[Notice]:
    titles = {
        "unreadable": "Damaged files",
        "leak": "Test images in the training data",
        "near_leak": "Test images like training images",
        "contradiction": "Contradicting labels",
        "repeated": "Repeated images",
        "size": "Differing sizes",
        "mask": "Masks",
    }
    found = check_dataset(run.dataset)
    return [Notice(titles[warning.kind], warning.message, warning.images) for warning in found]


def _alternative(card: Card, what: str) -> str:
    """What a picture of a card shows, in words."""
    image = card.image
    kind = "good" if not image.label else f"defective ({image.defect.replace('_', ' ')})"
    return f"{what} of {image.name}, {kind}, score {image.image_score:#.4g}"


def _tables(run: Run) -> dict[str, list[tuple[str, str]]]:
    """What the figures were measured with."""
    facts = run.facts
    seconds = np.array([image.seconds for image in run.images])
    times = {
        "started": facts["times"]["started"],
        "evaluation": _seconds(facts["times"]["evaluation_seconds"]),
        "an image, mean": _seconds(run.evaluation["seconds_per_image"]),
        "an image, median": _seconds(float(np.median(seconds))),
        "an image, 95 % are faster than": _seconds(float(np.quantile(seconds, 0.95))),
        "images a second": f"{1 / run.evaluation['seconds_per_image']:.3g}",
        "peak memory": f"{run.evaluation['peak_rss_mb']:.0f} MB",
    }
    dataset = facts["dataset"]
    data = {
        "name": dataset["name"],
        "layout": dataset["layout"],
        "folder": str(run.root),
        **{f"{part} images": len(dataset[part]) for part in ("train", "validation", "test")},
    }
    return {
        "Configuration": _rows(run.evaluation["configuration"]),
        "Preprocessing": _rows(facts["preprocessing"]),
        "Calibration": _rows(facts["calibration"] or {"thresholds": None}),
        "Training": _rows(facts["training"]),
        "Data set": _rows(data),
        "Times": _rows(times),
        "Machine": _rows(facts["machine"]),
        "Versions": _rows(facts["versions"]),
    }


def _rows(values: Mapping[str, Any]) -> list[tuple[str, str]]:
    return [(name.replace("_", " "), _text(value)) for name, value in values.items()]


def _text(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Sequence) and not isinstance(value, str) and len(value) > _LONGEST_LIST:
        return f"{len(value)} values"
    if isinstance(value, float):
        return f"{value:.6g}"
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value)


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.2f} %"


def _score(score: float | None) -> str:
    return "-" if score is None else f"{score:#.4g}"


def _seconds(seconds: float) -> str:
    return f"{1000 * seconds:.3g} ms" if seconds < 1 else f"{seconds:.3g} s"


def _range(scores: np.ndarray[Any, Any]) -> str:
    return f"{np.median(scores):.4g} ({scores.min():.4g} to {scores.max():.4g})"
