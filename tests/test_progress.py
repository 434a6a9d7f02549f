"""Progress bars: on standard error, where there is one."""

from __future__ import annotations

import sys

from pydefect.progress import ProgressBars


def test_a_bar_shows_what_is_done_and_goes(capsys):
    bars = ProgressBars()
    bars("training", 1, 2)
    bars("training", 2, 2)
    assert "training" in capsys.readouterr().err
    bars = ProgressBars(enabled=False)
    bars("training", 1, 2)
    bars.close()
    assert capsys.readouterr().err == ""


def test_services_have_no_standard_error(monkeypatch):
    monkeypatch.setattr(sys, "stderr", None)
    bars = ProgressBars()
    bars("training", 1, 2)
    bars.close()


def test_a_bar_shows_before_its_first_step_has_ended(capsys):
    bars = ProgressBars()
    bars("training", 0, 3)
    assert "training:   0%" in capsys.readouterr().err
    bars("training", 3, 3)
    bars("scoring", 0, 2)
    assert "scoring:   0%" in capsys.readouterr().err
    bars.close()
