"""Tables of a benchmark's results: Markdown, CSV and LaTeX, by methods and categories."""

from __future__ import annotations

import csv
import io
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydefect.benchmark.results import FAILED, FINISHED
from pydefect.persistence import write_atomically

__all__ = ["MEASURES", "Cell", "Measure", "cell", "render_tables", "write_tables"]

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Measure:
    """A figure of a row.

    Attributes
    ----------
    name
        In CSV files.
    title
        Of its table.
    value
        Takes it from a finished row; None where the row has none.
    digits
        Behind the point.
    """

    name: str
    title: str
    value: Callable[[Row], float | None]
    digits: int


def _metric(name: str) -> Callable[[Row], float | None]:
    def value(row: Row) -> float | None:
        figure = row["metrics"].get(name)
        return None if figure is None else 100 * figure

    return value


def _best(name: str) -> Callable[[Row], float | None]:
    def value(row: Row) -> float | None:
        chosen = (row.get("best_epoch") or {}).get(name)
        return None if chosen is None else 100 * chosen["value"]

    return value


def _figure(name: str, factor: float = 1.0) -> Callable[[Row], float | None]:
    def value(row: Row) -> float | None:
        figure = row.get(name)
        return None if figure is None else factor * figure

    return value


MEASURES = (
    Measure("image_auroc", "Image AUROC, %", _metric("image_auroc"), 2),
    Measure("pixel_auroc", "Pixel AUROC, %", _metric("pixel_auroc"), 2),
    Measure("pixel_aupro", "AUPRO up to a false positive rate of 0.3, %", _metric("pixel_aupro"), 2),
    Measure(
        "pixel_spro_0.05", "AUsPRO up to a false positive rate of 0.05, %", _metric("pixel_spro_0.05"), 2
    ),
    Measure("image_ap", "Image average precision, %", _metric("image_ap"), 2),
    Measure("pixel_ap", "Pixel average precision, %", _metric("pixel_ap"), 2),
    Measure("image_f1_max", "Image F1-max, %", _metric("image_f1_max"), 2),
    Measure("pixel_f1_max", "Pixel F1-max, %", _metric("pixel_f1_max"), 2),
    Measure("fit_seconds", "Fit, s", _figure("fit_seconds"), 1),
    Measure("ms_per_image", "Score, ms an image", _figure("seconds_per_image", 1000), 0),
    Measure("peak_rss_mb", "Peak memory of the process, MB", _figure("peak_rss_mb"), 0),
    Measure(
        "best_epoch_image_auroc",
        "Best epoch's image AUROC, %, chosen on the test set",
        _best("image_auroc"),
        2,
    ),
    Measure(
        "best_epoch_pixel_auroc",
        "Best epoch's pixel AUROC, %, chosen on the test set",
        _best("pixel_auroc"),
        2,
    ),
)
"""In the order of the tables; those that no row has are left out."""


@dataclass(frozen=True)
class Cell:
    """A figure over some seeds.

    Attributes
    ----------
    mean
        Over the seeds.
    spread
        Standard deviation over the seeds (n - 1); None for one seed.
    seeds
        Their number.
    """

    mean: float
    spread: float | None
    seeds: int

    def text(self, digits: int, plus_minus: str = "±") -> str:
        """Mean and, with several seeds, spread."""
        mean = f"{self.mean:.{digits}f}"
        return mean if self.spread is None else f"{mean} {plus_minus} {self.spread:.{digits}f}"


def cell(figures: Sequence[float]) -> Cell | None:
    """Mean and spread of a figure over seeds; None without figures."""
    if not figures:
        return None
    mean = math.fsum(figures) / len(figures)
    if len(figures) == 1:
        return Cell(mean, None, 1)
    return Cell(
        mean, math.sqrt(math.fsum((one - mean) ** 2 for one in figures) / (len(figures) - 1)), len(figures)
    )


@dataclass(frozen=True)
class _Table:
    """A measure by labels and categories, with the mean over the categories at the end."""

    measure: Measure
    categories: list[str]
    rows: dict[str, list[Cell | None]]


def render_tables(rows: Iterable[Row], *, measures: Sequence[Measure] = MEASURES) -> str:
    """Render results as Markdown.

    Parameters
    ----------
    rows
        From :func:`pydefect.benchmark.read_results`.
    measures
        Those to show.

    Returns
    -------
    str
        A table for every measure that some row has, and a list of failures. Where rows of one label differ in
        their settings, the label says in which.
    """
    rows = list(rows)
    parts = []
    for table in _tables(rows, measures):
        header = ["", *table.categories, *(["mean"] if len(table.categories) > 1 else [])]
        lines = [
            f"### {table.measure.title}",
            "",
            _line(header),
            _line(["---"] + ["---:"] * (len(header) - 1)),
        ]
        for label, cells in table.rows.items():
            shown = cells if len(table.categories) > 1 else cells[:-1]
            lines.append(_line([label, *(one.text(table.measure.digits) if one else "" for one in shown)]))
        parts.append("\n".join(lines))
    failed = [row for row in rows if row["status"] == FAILED]
    if failed:
        lines = ["### Failed", ""]
        lines += [
            f"- {row['label']} on {row['category']}, seed {row['seed']}: {row['error']}" for row in failed
        ]
        parts.append("\n".join(lines))
    notes = _notes(rows)
    return "\n\n".join([*parts, *([notes] if notes else [])]) + "\n"


def write_tables(rows: Iterable[Row], out: str | os.PathLike[str]) -> None:
    """Write ``table.md``, ``table.csv`` (a line a figure) and ``table.tex`` (booktabs) into a folder.

    Parameters
    ----------
    rows
        From :func:`pydefect.benchmark.read_results`.
    out
        The folder.
    """
    rows, folder = list(rows), Path(out)
    write_atomically(folder / "table.md", _encoded(render_tables(rows)))
    write_atomically(folder / "table.csv", _encoded(_as_csv(rows)))
    write_atomically(folder / "table.tex", _encoded(_as_latex(rows)))


def _encoded(text: str) -> bytes:
    # Names of folders may hold bytes that are no text.
    return text.encode("utf-8", "backslashreplace")


def _told_apart(rows: Sequence[Row]) -> list[Row]:
    """Put what differs behind a label that several settings have: their figures have no mean."""
    packages = ("package", "backbone_package")
    settings = [
        {**row.get("configuration", {}), **{name: row.get(name) for name in packages}} for row in rows
    ]
    of_label: dict[str, list[dict[str, Any]]] = {}
    for row, given in zip(rows, settings, strict=True):
        of_label.setdefault(row["label"], []).append(given)
    differing = {label: _differing(given) for label, given in of_label.items()}
    told = []
    for row, given in zip(rows, settings, strict=True):
        what = ", ".join(f"{name}={_shown(given[name])}" for name in differing[row["label"]])
        told.append({**row, "label": f"{row['label']} ({what})"} if what else row)
    return told


def _shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _differing(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    # What one of them lacks is a setting of a later version.
    known = set.intersection(*(set(one) for one in settings)) - {"seed"}
    return sorted(name for name in known if any(one[name] != settings[0][name] for one in settings))


def _finished(rows: Sequence[Row]) -> list[Row]:
    return _told_apart([row for row in rows if row["status"] == FINISHED])


def _tables(rows: Sequence[Row], measures: Sequence[Measure]) -> list[_Table]:
    finished = _finished(rows)
    labels = list(dict.fromkeys(row["label"] for row in finished))
    tables = []
    for measure in measures:
        figures: dict[tuple[str, str], dict[int, float]] = {}
        for row in finished:
            figure = measure.value(row)
            if figure is not None:
                figures.setdefault((row["label"], row["category"]), {})[row["seed"]] = figure
        if not figures:
            continue
        categories = list(dict.fromkeys(row["category"] for row in finished))
        categories = [name for name in categories if any(name == of for _, of in figures)]
        lines: dict[str, list[Cell | None]] = {}
        for label in labels:
            by_category = [figures.get((label, name), {}) for name in categories]
            if any(by_category):
                lines[label] = [cell(list(one.values())) for one in by_category] + [_mean(by_category)]
        tables.append(_Table(measure, categories, lines))
    return tables


def _mean(by_category: Sequence[Mapping[int, float]]) -> Cell | None:
    """The mean over categories, of every seed that all of them have; none where a category is missing.

    A mean over the categories that happen to be there could not be compared with those of other rows.
    """
    seeds = set.intersection(*(set(one) for one in by_category))
    return cell([math.fsum(one[seed] for one in by_category) / len(by_category) for seed in sorted(seeds)])


def _without_chance(rows: Sequence[Row]) -> list[str]:
    """Labels whose metrics are the same with every seed, of several, in all categories."""
    metrics: dict[str, dict[str, list[Any]]] = {}
    for row in rows:
        metrics.setdefault(row["label"], {}).setdefault(row["category"], []).append(row["metrics"])
    return [
        label
        for label, by_category in metrics.items()
        if any(len(of_seeds) > 1 for of_seeds in by_category.values())
        and all(one == of_seeds[0] for of_seeds in by_category.values() for one in of_seeds)
    ]


def _notes(rows: Sequence[Row]) -> str:
    finished = _finished(rows)
    notes = []
    if len({row["seed"] for row in finished}) > 1:
        notes.append("Mean ± standard deviation over seeds.")
        if same := _without_chance(finished):
            notes.append(
                f"No seed changes a figure of {', '.join(same)}: what draws no random number has no spread, "
                "though another order of the training images may move it."
            )
    if any("best_epoch" in row for row in finished):
        notes.append(
            "All figures are those of the last epoch, but for the tables named best epoch, whose number of "
            "epochs was chosen on the test images, for images and pixels apart: no one who uses a method can "
            "do that."
        )
    if any(row["resumed"] for row in finished):
        notes.append("Some fits were interrupted: their seconds count from the last start.")
    return " ".join(notes)


def _line(cells: Iterable[str]) -> str:
    return "| " + " | ".join(text.replace("|", "\\|") for text in cells) + " |"


def _as_csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(["measure", "method", "category", "mean", "spread", "seeds"])
    for table in _tables(rows, MEASURES):
        for label, cells in table.rows.items():
            for category, one in zip([*table.categories, "mean"], cells, strict=True):
                if one is not None:
                    spread = "" if one.spread is None else f"{one.spread:.6g}"
                    lines.writerow(
                        [table.measure.name, label, category, f"{one.mean:.6g}", spread, one.seeds]
                    )
    return text.getvalue()


_LATEX = str.maketrans(
    {
        "\\": r"\textbackslash{}",
        "~": r"\textasciitilde{}",
        "^": r"\textasciicircum{}",
        **{letter: f"\\{letter}" for letter in "&%$#_{}"},
    }
)


def _as_latex(rows: Sequence[Row]) -> str:
    parts = ["% needs \\usepackage{booktabs}"]
    for table in _tables(rows, MEASURES):
        columns = [*table.categories, *(["mean"] if len(table.categories) > 1 else [])]
        lines = [
            r"\begin{table}",
            rf"  \caption{{{table.measure.title.translate(_LATEX)}}}",
            rf"  \begin{{tabular}}{{l{'r' * len(columns)}}}",
            r"    \toprule",
            "    & " + " & ".join(name.translate(_LATEX) for name in columns) + r" \\",
            r"    \midrule",
        ]
        for label, cells in table.rows.items():
            texts = [one.text(table.measure.digits, r"$\pm$") if one else "" for one in cells[: len(columns)]]
            lines.append("    " + " & ".join([label.translate(_LATEX), *texts]) + r" \\")
        lines += [r"    \bottomrule", r"  \end{tabular}", r"\end{table}"]
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"
