"""Thresholds from held-out normal images: the conformal quantile by hand and by simulation."""

from __future__ import annotations

import json
import warnings

import numpy as np
import pytest

from pydefect.calibration import Calibration, conformal_threshold, held_out_calibration
from pydefect.errors import InputError


@pytest.mark.parametrize(
    ("n", "rate", "rank", "implied"),
    [
        # k = ceil((n + 1)(1 - rate)), implied (n + 1 - k) / (n + 1).
        (
            9,
            0.1,
            9,
            0.1,
        ),  # ceil(10 * 0.9) = 9, though 10 * (1 - 0.1) is 9.000...02 in other orders of rounding
        (19, 0.1, 18, 0.1),
        (99, 0.01, 99, 0.01),
        (199, 0.01, 198, 0.01),
        (9, 0.5, 5, 0.5),
        (10, 0.5, 6, 5 / 11),
        (9, 0.25, 8, 0.2),  # 7.5 rounds up: never more false alarms than asked for
        (5, 0.01, 5, 1 / 6),  # too few for the rate: the largest
        (1, 0.5, 1, 0.5),
        (1, 0.01, 1, 0.5),
        (4, 0.0, 4, 0.2),
        (4, 1.0, 1, 0.8),
    ],
)
def test_the_rank_by_hand(n, rate, rank, implied):
    scores = np.random.default_rng(0).permutation(np.arange(1, n + 1)).astype(float).tolist()
    threshold, actual = conformal_threshold(scores, rate)
    assert threshold == rank
    assert actual == pytest.approx(implied, abs=1e-12)


@pytest.mark.parametrize(("n", "rate"), [(20, 0.1), (50, 0.05), (7, 0.3)])
def test_new_normal_images_pass_over_it_as_seldom_as_promised(n, rate):
    """20,000 draws: the observed rate has a standard deviation below sqrt(0.3 * 0.7 / 20000) = 0.0033."""
    rng = np.random.default_rng(1)
    alarms, implied = 0, 0.0
    for _ in range(20_000):
        *seen, new = rng.standard_gamma(2.0, n + 1).tolist()
        threshold, implied = conformal_threshold(seen, rate)
        alarms += new > threshold
    assert alarms / 20_000 == pytest.approx(implied, abs=4 * 0.0033)
    assert implied <= rate + 1e-12


def test_images_and_pixels_apart():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        calibration = held_out_calibration([3.0, 1.0, 2.0, 4.0], [30.0, 40.0, 20.0, 10.0], 0.4)
    # k = ceil(5 * 0.6) = 3.
    assert calibration == Calibration(
        3.0, 30.0, "held_out", 4, 0.4, (1.0, 2.0, 3.0, 4.0), (10.0, 20.0, 30.0, 40.0)
    )


def test_too_few_images_give_a_warning():
    with pytest.warns(
        UserWarning, match=r"3 held-out images support a false-alarm rate of 0\.25 at the lowest, not 0\.01"
    ):
        calibration = held_out_calibration([1.0, 2.0, 3.0], [1.0, 2.0, 3.0], 0.01)
    assert calibration.image_threshold == 3.0
    assert calibration.false_alarm_rate == 0.25


@pytest.mark.parametrize(
    ("scores", "rate", "message"),
    [
        ([], 0.1, "scores: none given; a threshold needs at least one held-out normal image"),
        ([1.0], -0.1, "false_alarm_rate: -0.1 given; allowed are 0 to 1"),
        ([1.0], 1.5, "false_alarm_rate: 1.5 given; allowed are 0 to 1"),
        ([1.0], float("nan"), "false_alarm_rate: nan given"),
        ([1.0], "1 %", "false_alarm_rate: '1 %' given"),
    ],
)
def test_bad_input(scores, rate, message):
    with pytest.raises(InputError, match=message):
        conformal_threshold(scores, rate)


def test_json_round_trip():
    calibration = Calibration(1.5, 2.5, "held_out", 2, 0.1, (0.1, 1.5), (0.2, 2.5))
    assert Calibration.from_dict(json.loads(json.dumps(calibration.to_dict()))) == calibration
