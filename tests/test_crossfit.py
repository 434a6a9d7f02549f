"""Folds, and calibration by detectors that have not seen what they score."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pydefect.calibration import held_out_calibration
from pydefect.crossfit import Fold, cross_fit, split_folds
from pydefect.errors import PydefectError
from pydefect.persistence import Checkpoint


@settings(deadline=None, max_examples=40)
@given(images=st.integers(1, 40), folds=st.integers(0, 12), seed=st.integers(0, 2**32 - 1))
def test_every_image_is_held_out_once(images, folds, seed):
    found = split_folds(images, folds, seed)
    if min(images, folds) < 2:
        assert found == []
        return
    assert len(found) == min(images, folds)
    assert sorted(index for fold in found for index in fold.held_out) == list(range(images))
    for fold in found:
        assert sorted([*fold.seen, *fold.held_out]) == list(range(images))
        assert images // len(found) <= len(fold.held_out) <= -(-images // len(found))
    assert found == split_folds(images, folds, seed)


def score_by_index(fold: Fold) -> tuple[list[float], list[float]]:
    return [float(index) for index in fold.held_out], [10.0 * index for index in fold.held_out]


def test_the_calibration_is_that_of_all_held_out_scores():
    calibration, scores = cross_fit(split_folds(7, 3, 0), score_by_index, false_alarm_rate=0.5)
    expected = held_out_calibration(list(map(float, range(7))), [10.0 * i for i in range(7)], 0.5)
    assert calibration == expected
    assert scores == list(map(float, range(7)))  # in the order of the images
    assert cross_fit([], score_by_index, false_alarm_rate=0.5) == (None, [])


@pytest.mark.parametrize("kept", [False, True])
@pytest.mark.parametrize("where", [0, 1])
def test_scores_that_are_not_finite_end_it(tmp_path, kept, where):
    def diverged(fold: Fold) -> tuple[list[float], list[float]]:
        found = score_by_index(fold)
        found[where][0] = float("nan")
        return found

    checkpoint = Checkpoint(tmp_path, {"run": 1}) if kept else None
    with pytest.raises(PydefectError, match="fold 1/3: scores of the held-out images are not finite; lower"):
        cross_fit(split_folds(9, 3, 1), diverged, false_alarm_rate=0.2, checkpoint=checkpoint)


def test_finished_folds_are_not_fitted_again(tmp_path):
    folds, fitted = split_folds(9, 3, 1), []

    def score_unseen(fold: Fold) -> tuple[list[float], list[float]]:
        fitted.append(fold.stage)
        if len(fitted) == 2:
            raise KeyboardInterrupt
        return score_by_index(fold)

    checkpoint = Checkpoint(tmp_path, {"run": 1})
    with pytest.raises(KeyboardInterrupt):
        cross_fit(folds, score_unseen, false_alarm_rate=0.2, checkpoint=checkpoint)
    found = cross_fit(folds, score_unseen, false_alarm_rate=0.2, checkpoint=checkpoint)
    assert fitted == ["fold-0", "fold-1", "fold-1", "fold-2"]
    assert found == cross_fit(folds, score_by_index, false_alarm_rate=0.2)
