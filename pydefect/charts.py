"""Charts of scores (Matplotlib), as PNG files' bytes."""

from __future__ import annotations

import io

import numpy as np

from pydefect.calibration import Calibration
from pydefect.errors import InputError

__all__ = ["score_histogram"]

# Okabe and Ito's palette: told apart with every kind of colour vision, and by hatching without any.
_NORMAL, _DEFECTIVE, _LINE = "#0072B2", "#D55E00", "#000000"


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
    counts.set_ylim(bottom=0.5)
    counts.set_ylabel("images")
    line = f"threshold {calibration.image_threshold:.4g}"
    if calibration.interval is not None:
        lowest, highest = calibration.interval
        line += f"\nfalse alarms {lowest:.2%} to {highest:.2%} ({calibration.confidence:.0%} confidence)"
    counts.axvline(calibration.image_threshold, color=_LINE, linestyle="--", label=line)
    counts.legend(frameon=False)

    grid = np.linspace(edges[0], edges[-1], 1000)
    p_values = calibration.p_values(grid)
    assert p_values is not None
    # Far beyond the last held-out score the extrapolation says nothing any more.
    floor = 0.01 / (len(normal) + 1)
    trusted = p_values >= floor
    tail = calibration.tail
    counted = trusted if tail is None else trusted & (grid <= tail.start)
    probability.plot(grid[counted], p_values[counted], color=_NORMAL, label="counted")
    if tail is not None:
        fitted = trusted & (grid > tail.start)
        probability.plot(
            grid[fitted], p_values[fitted], color=_LINE, linestyle="-.", label="generalised Pareto tail"
        )
    probability.axvline(calibration.image_threshold, color=_LINE, linestyle="--")
    probability.set_yscale("log")
    probability.set_xlabel("image score")
    probability.set_ylabel("P(normal scores as high)")
    probability.legend(frameon=False, loc="upper right")
    for axes in (counts, probability):
        axes.spines[["top", "right"]].set_visible(False)
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png")
    return buffer.getvalue()
