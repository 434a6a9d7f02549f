"""What is in the drawings of curves, read from their SVG elements, and where the histogram's legends are."""

from __future__ import annotations

import re

import numpy as np
import pytest
from matplotlib.figure import Figure

from pydefect.calibration import Calibration
from pydefect.charts import curves, score_histogram
from pydefect.metrics import Curve


def rising(count: int) -> dict[str, Curve]:
    x = np.linspace(0, 1, 20)
    return {f"curve {n}": Curve(x, x ** (n + 1), np.zeros(20, np.float32), 1 / (n + 2)) for n in range(count)}


def lines(drawn: str) -> list[str]:
    """The styles of the curves, each of which is there again in the legend."""
    styles = re.findall(r'style="(fill: none;[^"]*)"', drawn)
    return [style for style in styles if re.search(r"stroke-width: 2(;|$)", style)]


@pytest.mark.filterwarnings("error:constrained_layout not applied")
@pytest.mark.parametrize("count", [1, 4, 6, 30])
def test_every_curve_is_drawn_and_named(count: int) -> None:
    drawn = curves(rising(count), "x", "y", point=(0.2, 0.5))
    assert len(lines(drawn)) == 2 * count
    for name, curve in rising(count).items():
        assert f"{name} ({curve.area:.4f})" in drawn


def test_twelve_curves_differ_in_colour_or_dashes() -> None:
    looks = {
        tuple(re.findall(r"(?:stroke|stroke-dasharray): [^;]*", style))
        for style in lines(curves(rising(12), "x", "y"))
    }
    assert len(looks) == 12


@pytest.mark.parametrize("defective", [(), tuple(np.linspace(0.5, 3, 40))])
def test_the_histograms_legends_hide_no_bars(monkeypatch, defective) -> None:
    drawn = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **__: drawn.append(figure))
    scores = tuple(np.random.default_rng(0).gamma(4, 0.3, 300))
    score_histogram(
        Calibration(2.5, 2.5, "held_out", 300, 0.01, image_scores=scores, defective_scores=defective)
    )
    (figure,) = drawn
    figure.draw_without_rendering()
    whole = figure.bbox
    for axes in figure.axes:
        legend = axes.get_legend().get_window_extent()
        assert legend.y0 >= axes.bbox.y1
        assert legend.x0 >= whole.x0
        assert legend.x1 <= whole.x1
        assert legend.y1 <= whole.y1
