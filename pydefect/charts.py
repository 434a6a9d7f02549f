"""Charts of scores (Matplotlib): PNG files' bytes, and SVG elements for pages."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping
from itertools import cycle
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pydefect.calibration import Calibration
from pydefect.errors import InputError
from pydefect.metrics import Curve

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["PAGE_COLOURS", "curves", "score_histogram", "scores_by_label"]

# Okabe and Ito's palette: told apart with every kind of colour vision, and by hatching without any.
_NORMAL, _DEFECTIVE, _LINE = "#0072B2", "#D55E00", "#000000"

PAGE_COLOURS = {"#010101": "ink", "#020202": "faint", "#030303": "normal", "#040404": "defective"}
"""What SVG elements are drawn in, and the name of the page's own colour that takes its place:
``var(--ink)``. So one drawing serves bright and dark pages."""
_LEGEND: dict[str, Any] = {
    "loc": "outside upper center",
    "ncols": 2,
    "frameon": False,
    "handlelength": 1.8,
    "columnspacing": 1.2,
}
_INK, _FAINT, _PAGE_NORMAL, _PAGE_DEFECTIVE = PAGE_COLOURS


def score_histogram(calibration: Calibration) -> bytes:
    """Draw held-out scores, the threshold, and the probability of every score below them.

    Parameters
    ----------
    calibration
        With held-out scores.

    Returns
    -------
    bytes
        A PNG file.

    Raises
    ------
    InputError
        The calibration keeps no scores.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullLocator

    normal = np.asarray(calibration.image_scores)
    if not len(normal):
        raise InputError("calibration: it keeps no scores of held-out normal images to draw")
    defective = np.asarray(calibration.defective_scores)
    together = np.concatenate([normal, defective, [calibration.image_threshold]])
    low, high = float(together.min()), float(together.max())
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    edges = np.linspace(low - margin, high + margin, 61)

    figure = Figure(figsize=(7.0, 5.4), dpi=120, layout="constrained")
    counts, probability = figure.subplots(2, 1, sharex=True, height_ratios=[3, 2])
    counts.hist(normal, edges, color=_NORMAL, alpha=0.75, label=f"normal, held out ({len(normal)})")
    if len(defective):
        counts.hist(
            defective,
            edges,
            color=_DEFECTIVE,
            alpha=0.55,
            hatch="///",
            edgecolor=_DEFECTIVE,
            label=f"defective ({len(defective)})",
        )
    # A single image must show beside hundreds.
    counts.set_yscale("log")
    counts.set_ylim(bottom=0.6)
    counts.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    counts.yaxis.set_major_formatter("{x:g}")
    counts.yaxis.set_minor_locator(NullLocator())
    counts.set_ylabel("images")
    line = f"threshold {calibration.image_threshold:.4g}"
    if calibration.interval is not None:
        lowest, highest = calibration.interval
        line += f"\nfalse alarms {lowest:.2%} to {highest:.2%} ({calibration.confidence:.0%} confidence)"
    counts.axvline(calibration.image_threshold, color=_LINE, linestyle="--", label=line)

    grid = np.linspace(edges[0], edges[-1], 1000)
    p_values = calibration.p_values(grid)
    assert p_values is not None
    # Far beyond the last held-out score the extrapolation says nothing any more.
    floor = 0.01 / (len(normal) + 1)
    trusted = p_values >= floor
    counted = trusted if calibration.tail is None else trusted & (grid <= max(normal))
    probability.plot(grid[counted], p_values[counted], color=_NORMAL, label="counted")
    if calibration.tail is not None:
        fitted = trusted & (grid > max(normal))
        probability.plot(
            grid[fitted], p_values[fitted], color=_LINE, linestyle="-.", label="generalised Pareto tail"
        )
    probability.axvline(calibration.image_threshold, color=_LINE, linestyle="--")
    probability.set_yscale("log")
    probability.set_xlabel("image score")
    probability.set_ylabel("P(normal scores as high)")
    for axes in (counts, probability):
        axes.spines[["top", "right"]].set_visible(False)
        # Over the axes: bars and curves may be anywhere in them.
        axes.legend(frameon=False, loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()


def scores_by_label(
    normal: NDArray[Any], defective: NDArray[Any], threshold: float | None, name: str = "threshold"
) -> str:
    """Draw how often which image scores are, of normal and of defective images.

    Parameters
    ----------
    normal, defective
        [n] and [m] image scores; one of them may be empty.
    threshold
        Marked by a line.
    name
        What the line is called.

    Returns
    -------
    str
        An ``<svg>`` element in :data:`PAGE_COLOURS`.
    """
    from matplotlib.ticker import MaxNLocator

    figure = _page_figure()
    axes = figure.subplots()
    together = np.concatenate([normal, defective, [] if threshold is None else [threshold]])
    low, high = float(together.min()), float(together.max())
    margin = 0.02 * (high - low) or 0.05 * abs(high) or 1.0
    edges = np.linspace(low - margin, high + margin, 41).tolist()
    axes.hist(normal, edges, color=_PAGE_NORMAL, alpha=0.75, label=f"good ({len(normal)})")
    axes.hist(
        defective,
        edges,
        facecolor="none",
        edgecolor=_PAGE_DEFECTIVE,
        hatch="////",
        histtype="stepfilled",
        label=f"defective ({len(defective)})",
    )
    if threshold is not None:
        axes.axvline(threshold, color=_INK, linestyle="--", label=f"{name} {threshold:.4g}")
    axes.set_xlabel("image score")
    axes.set_ylabel("images")
    axes.yaxis.set_major_locator(MaxNLocator("auto", integer=True))
    figure.legend(**_LEGEND)
    return _svg(figure)


def curves(
    named: Mapping[str, Curve],
    x_label: str,
    y_label: str,
    *,
    limit: float = 1.0,
    point: tuple[float, float] | None = None,
) -> str:
    """Draw curves over the unit square, or over its left part.

    Parameters
    ----------
    named
        Curves by their names; the area goes into the legend. Twelve can be told apart.
    x_label, y_label
        What the axes are.
    limit
        The last x that is shown.
    point
        (x, y) of the threshold, marked by a ring.

    Returns
    -------
    str
        See :func:`scores_by_label`.
    """
    labels = [f"{name} ({curve.area:.4f})" for name, curve in named.items()]
    # What the width has room for twice.
    columns = 2 if max(map(len, labels), default=0) <= 22 else 1
    figure = _page_figure(-(-(len(labels) + (point is not None)) // columns))
    axes = figure.subplots()
    # Three colours and four dashes meet in every pair before one comes again.
    colours, dashes = cycle((_PAGE_NORMAL, _PAGE_DEFECTIVE, _INK)), cycle(("-", "--", ":", "-."))
    for label, curve, colour, dash in zip(labels, named.values(), colours, dashes, strict=False):
        axes.plot(curve.x, curve.y, dash, color=colour, linewidth=2, label=label)
    if point is not None:
        axes.plot(
            *point,
            "o",
            color=_INK,
            fillstyle="none",
            markersize=9,
            markeredgewidth=2,
            clip_on=False,
            label="threshold",
        )
    axes.set_xlim(-0.01 * limit, 1.01 * limit)
    axes.set_ylim(-0.01, 1.01)
    axes.set_xlabel(x_label)
    axes.set_ylabel(y_label)
    figure.legend(**_LEGEND | {"ncols": columns})
    return _svg(figure)


def _page_figure(rows: int = 0) -> Figure:
    """A figure that grows with the rows of its legend, where they would leave the axes no room."""
    from matplotlib.figure import Figure

    return Figure(figsize=(4.1, 3.2 + 0.21 * max(0, rows - 3)), layout="constrained")


def _svg(figure: Figure) -> str:
    """The figure as an element of a page: of any width, in the page's colours and font."""
    from matplotlib import rc_context

    for axes in figure.axes:
        axes.grid(color=_FAINT, alpha=0.35, linewidth=0.6)
        axes.set_axisbelow(True)
        axes.set_facecolor("none")
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(_FAINT)
        axes.tick_params(colors=_FAINT, labelcolor=_INK)
        axes.xaxis.label.set_color(_INK)
        axes.yaxis.label.set_color(_INK)
    for legend in figure.legends:
        for text in legend.get_texts():
            text.set_color(_INK)
    buffer = io.StringIO()
    # Text stays text: it is smaller, can be read aloud and takes the page's font.
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": "pydefect", "path.simplify_threshold": 0.2}):
        figure.savefig(
            buffer,
            format="svg",
            transparent=True,
            metadata=dict.fromkeys(("Creator", "Date", "Format", "Type")),
        )
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :]
    start, _, rest = drawn.partition(">")
    view = start[start.index("viewBox") :].split('"')[1]
    # A page holds several drawings, whose groups have the same names.
    rest = re.sub(r'<g id="[^"]*">', "<g>", rest)
    drawn = f'<svg viewBox="{view}" aria-hidden="true">{rest}'
    for colour, name in PAGE_COLOURS.items():
        drawn = drawn.replace(colour, f"var(--{name})")
    return drawn
