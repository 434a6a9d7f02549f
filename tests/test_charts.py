"""What is in the drawings of curves, read from their SVG elements."""

from __future__ import annotations

import re

import numpy as np
import pytest

from pydefect.charts import curves
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
