"""Thresholds and probabilities from held-out normal images: by hand, by simulation, and against SciPy."""

from __future__ import annotations

import json
import math
import warnings

import cv2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from pydefect.calibration import (
    Calibration,
    ScoreTail,
    clopper_pearson,
    conformal_threshold,
    held_out_calibration,
    highest_held_out,
    images_needed,
    promised_confidence,
)
from pydefect.charts import score_histogram
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
    ascending = (1.0, 2.0, 3.0, 4.0), (10.0, 20.0, 30.0, 40.0)
    interval = clopper_pearson(1, 4)
    assert calibration == Calibration(3.0, 30.0, "held_out", 4, 0.4, *ascending, interval=interval)


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
        ([1.0, float("nan")], 0.1, "scores: some are not finite"),
        ([float("inf")], 0.1, "scores: some are not finite"),
    ],
)
def test_bad_input(scores, rate, message):
    with pytest.raises(InputError, match=message):
        conformal_threshold(scores, rate)


@pytest.mark.parametrize("kind", [np.float32, np.float64])
def test_rates_and_confidences_may_be_numpys(kind):
    scores = [float(score) for score in range(9)]
    calibration = held_out_calibration(scores, scores, kind(0.25), confidence=kind(0.75))
    assert calibration == held_out_calibration(scores, scores, 0.25, confidence=0.75)
    json.dumps(calibration.to_dict())
    assert images_needed(kind(0.25), kind(0.75)) == images_needed(0.25, 0.75)
    assert conformal_threshold(scores, np.int64(1)) == conformal_threshold(scores, 1)
    for wrong in (True, np.True_, kind(2), kind("nan")):
        with pytest.raises(InputError, match=r"false_alarm_rate: .* given; allowed are 0 to 1"):
            held_out_calibration(scores, scores, wrong)


def test_json_round_trip():
    calibration = Calibration(1.5, 2.5, "held_out", 2, 0.1, (0.1, 1.5), (0.2, 2.5), 0.9, (0.0, 0.5), (3.0,))
    assert Calibration.from_dict(json.loads(json.dumps(calibration.to_dict()))) == calibration


def test_printed_without_every_score():
    calibration = held_out_calibration(
        [1.0, 2.0, 3.5], [4.0, 5.0, 6.5], 0.5, part_maxima={"local": [7.0, 8.0, 9.5]}
    )
    assert "image_threshold=2.0" in repr(calibration)
    for inner in ("3.5", "6.5", "9.5"):
        assert inner not in repr(calibration)


def test_numpys_scores_can_be_written_into_a_model_file():
    """A Result's scores are float32: a detector that was calibrated by them could not be saved."""
    scores = np.arange(1, 31, dtype=np.float32) / 7
    calibration = held_out_calibration(
        scores, scores, 0.1, defective_scores=scores[:2], part_maxima={"local": scores}
    )
    assert json.loads(json.dumps(calibration.to_dict()))["image_scores"] == scores.tolist()
    assert calibration == held_out_calibration(
        scores.tolist(),
        scores.tolist(),
        0.1,
        defective_scores=scores[:2].tolist(),
        part_maxima={"local": scores.tolist()},
    )


def test_files_from_before_there_were_intervals():
    old = {
        "image_threshold": 1.5,
        "pixel_threshold": 2.5,
        "source": "held_out",
        "images": 2,
        "false_alarm_rate": 1 / 3,
        "image_scores": [0.1, 1.5],
        "map_maxima": [0.2, 2.5],
    }
    calibration = Calibration.from_dict(old)
    assert calibration.interval is None
    assert calibration.p_values([0.0, 1.0, 2.0]) == pytest.approx([1.0, 2 / 3, 1 / 3], abs=1e-12)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image_threshold", math.nan),
        ("pixel_threshold", None),
        ("source", "guessed"),
        ("images", -2),
        ("images", 2.5),
        ("false_alarm_rate", math.nan),
        ("confidence", 1.0),
        ("interval", [0.5, 0.1]),
        ("interval", [0.5]),
        ("image_scores", [0.1, math.nan]),
        ("map_maxima", [0.2, "2.5"]),
        ("defective_scores", [3.0, 1.0]),
    ],
)
def test_values_that_make_no_sense_are_refused_where_they_are_read(name, value):
    """Files from before there were digests may have changed; a NaN threshold found no defect, ever."""
    calibration = held_out_calibration([0.1, 1.5], [0.2, 2.5], 0.5, part_maxima={"local": [1.0, 2.0]})
    assert Calibration.from_dict(calibration.to_dict()) == calibration
    with pytest.raises(InputError, match=f"{name}: .*allowed are"):
        Calibration.from_dict({**calibration.to_dict(), name: value})
    with pytest.raises(InputError, match="local: allowed are"):
        Calibration.from_dict({**calibration.to_dict(), "part_maxima": {"local": [math.inf]}})


# -- intervals and promises
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
@pytest.mark.parametrize(("count", "images"), [(0, 1), (1, 1), (0, 50), (3, 50), (50, 50), (7, 1000)])
def test_the_interval_is_that_of_scipy(count, images, confidence):
    theirs = stats.binomtest(count, images).proportion_ci(confidence, method="exact")
    # SciPy searches for the root of the binomial distribution; its tolerance is 2e-12.
    assert clopper_pearson(count, images, confidence) == pytest.approx((theirs.low, theirs.high), abs=1e-9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((1, 0), "count: 1 of 0 images"),
        ((3, 2), "count: 3 of 2 images"),
        ((-1, 2), "count: -1 of 2 images"),
        ((1, 2, 1.0), "confidence: 1.0 given"),
        ((1, 2, 0), "confidence: 0 given"),
        ((1, 2, "95 %"), "confidence: '95 %' given"),
    ],
)
def test_the_interval_refuses(arguments, message):
    with pytest.raises(InputError, match=message):
        clopper_pearson(*arguments)


@pytest.mark.parametrize(
    ("rate", "confidence", "needed"),
    [
        (0.01, None, 99),
        (0.1, None, 9),
        (0.01, 0.95, 299),  # Wilks: 0.99**298 is 0.05003, 0.99**299 is 0.0495
        (0.05, 0.95, 59),
        (0.001, 0.99, 4603),
        # The table in docs/calibration.md.
        (0.05, None, 19),
        (0.001, None, 999),
        (0.1, 0.95, 29),
        (0.001, 0.95, 2995),
        (0.1, 0.99, 44),
        (0.05, 0.99, 90),
        (0.01, 0.99, 459),
        (1.0, 0.95, 1),
        (0.9, 0.5, 1),
        (0.0, 0.95, None),
        (0.0, None, None),
    ],
)
def test_how_many_images_a_promise_takes(rate, confidence, needed):
    assert images_needed(rate, confidence) == needed


@given(st.floats(0.002, 0.9), st.floats(0.05, 0.99))
def test_so_many_keep_the_promise_and_one_less_does_not(rate, confidence):
    needed = images_needed(rate, confidence)
    assert promised_confidence(needed, 0, rate) >= confidence - 1e-9
    if needed > 1:
        assert promised_confidence(needed - 1, 0, rate) < confidence


def test_a_guaranteed_rate_is_kept_as_often_as_promised():
    """Of 4,000 choices of held-out images 90 % or more keep the rate: less than 4 standard deviations,
    sqrt(0.9 * 0.1 / 4000) = 0.0047, may be missing. On average a rate is kept about every other time."""
    rng = np.random.default_rng(0)
    kept = {True: 0, False: 0}
    for _ in range(4_000):
        scores = rng.exponential(size=60).tolist()
        for guaranteed in kept:
            calibration = held_out_calibration(scores, scores, 0.1, confidence=0.9, guaranteed=guaranteed)
            kept[guaranteed] += math.exp(-calibration.image_threshold) <= 0.1
    # The rank is a whole number: the promise is kept a little more often than asked for.
    assert 0.9 - 4 * 0.0047 <= kept[True] / 4_000 <= 0.96
    assert 0.4 < kept[False] / 4_000 < 0.7


def test_the_interval_holds_for_a_threshold_chosen_on_the_same_images():
    """Of 4,000 choices at least 95 % cover the rate, less 4 standard deviations of 0.0034."""
    rng = np.random.default_rng(1)
    covered = 0
    for _ in range(4_000):
        scores = rng.exponential(size=80).tolist()
        calibration = held_out_calibration(scores, scores, 0.05)
        low, high = calibration.interval
        covered += low <= math.exp(-calibration.image_threshold) <= high
    assert covered / 4_000 >= 0.95 - 4 * 0.0034


def test_too_few_images_for_a_guarantee_give_a_warning():
    scores = np.arange(1.0, 101.0).tolist()
    message = (
        r"100 held-out images support .* 0\.0295 at the lowest with 95% confidence, not 0\.01 .*takes 299"
    )
    with pytest.warns(UserWarning, match=message):
        calibration = held_out_calibration(scores, scores, 0.01, guaranteed=True)
    assert calibration.image_threshold == 100.0
    assert calibration.interval[0] == 0


def test_no_number_of_images_promises_no_false_alarms():
    with pytest.warns(UserWarning, match="no number of images does"):
        held_out_calibration([1.0, 2.0], [1.0, 2.0], 0.0)
    # As good as 0: the number of images is no float any more.
    with pytest.warns(UserWarning, match="not 4.94066e-324 .no number of images does"):
        held_out_calibration([1.0, 2.0], [1.0, 2.0], 5e-324)
    assert images_needed(5e-324) is images_needed(5e-324, None) is None


def test_one_image():
    with pytest.warns(UserWarning, match="1 held-out images support"):
        calibration = held_out_calibration([2.0], [3.0], 0.01)
    assert (calibration.image_threshold, calibration.pixel_threshold) == (2.0, 3.0)
    assert calibration.interval == pytest.approx((0.0, 0.975))
    assert calibration.tail is None
    assert calibration.p_values([1.0, 2.0, 3.0]).tolist() == [1.0, 1.0, 0.5]
    assert score_histogram(calibration).startswith(b"\x89PNG")


def test_equal_scores():
    calibration = held_out_calibration([2.0] * 200, [2.0] * 200, 0.01)
    assert calibration.image_threshold == 2.0
    assert calibration.tail is None
    assert calibration.p_values([1.0, 2.0, 2.1]) == pytest.approx([1.0, 1.0, 1 / 201], abs=1e-12)
    assert score_histogram(calibration).startswith(b"\x89PNG")


# -- probabilities
# --------------------------------------------------------------------------------------------------


def calibrated(scores) -> Calibration:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return held_out_calibration(list(scores), list(scores), 0.01)


def test_the_counted_part_by_hand():
    calibration = calibrated([1.0, 2.0, 2.0, 3.0])
    assert calibration.tail is None  # four are too few
    expected = [1.0, 1.0, 4 / 5, 4 / 5, 2 / 5, 2 / 5, 1 / 5]
    given = [0.0, 1.0, 1.5, 2.0, 2.5, 3.0, 9.0]
    assert calibration.p_values(given) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("shape", [0.0, 0.2, 0.4])
def test_the_tail_is_found_again(shape):
    """40,000 excesses: the estimate of the shape has a standard deviation of about 0.01 (Hosking and Wallis,
    table 1), and more for heavy tails; of the scale 1 %."""
    scores = 1 + stats.genpareto.rvs(shape, scale=2, size=400_000, random_state=0)
    tail = ScoreTail.fit(scores.tolist())
    # Over a higher start it is the same shape, and its scale has grown with the start.
    assert tail.share == pytest.approx(0.1, abs=1e-4)
    assert tail.shape == pytest.approx(shape, abs=0.05)
    assert tail.scale == pytest.approx(2 + shape * (tail.start - 1), rel=0.05)
    beyond = np.quantile(scores, [0.99, 0.999])
    assert tail.survival(beyond) == pytest.approx([0.01, 0.001], rel=0.1)


@pytest.mark.parametrize("shape", [0.0, 1e-12, 0.3])
def test_the_survival_is_that_of_scipy(shape):
    tail = ScoreTail(start=1.0, share=0.25, shape=shape, scale=0.5)
    scores = np.array([1.0, 1.1, 2.0, 30.0])
    # Equal up to rounding; below a shape of 1e-9 the exponential stands in, x / scale <= 58 makes that 2e-6.
    expected = 0.25 * stats.genpareto.sf(scores - 1, shape, scale=0.5)
    assert tail.survival(scores) == pytest.approx(expected, rel=2e-6)


@pytest.mark.parametrize(
    "distribution",
    [stats.gamma(2), stats.lognorm(0.5), stats.norm(10, 1)],
    ids=["gamma", "lognormal", "normal"],
)
def test_new_normal_images_have_the_probabilities_promised(distribution):
    """Over 300 calibrations with 200 images the mean probability that a new image's p-value is at most p
    stays near p. Inside the sample (0.05, 0.01) within a third; at 0.002, the edge of the extrapolation,
    within a factor of three: 20 excesses do not know their shape any better."""
    rng = np.random.default_rng(0)
    grid = distribution.isf(np.geomspace(0.5, 1e-7, 400))
    observed = {0.05: [], 0.01: [], 0.002: []}
    for _ in range(300):
        p_values = calibrated(distribution.rvs(200, random_state=rng)).p_values(grid)
        for level, rates in observed.items():
            first = np.argmax(p_values <= level) if (p_values <= level).any() else -1
            rates.append(float(distribution.sf(grid[first])))
    for level, factor in ((0.05, 4 / 3), (0.01, 4 / 3), (0.002, 3)):
        assert level / factor < np.mean(observed[level]) < level * factor


@pytest.mark.parametrize("n", [10, 20, 50])
def test_few_held_out_images_promise_no_more_than_they_can(n):
    """At every level that n images can count, a new good image has it or less as often as it says at most,
    for scores that scatter widely too: 600 calibrations of 500 images, a standard error of some 0.004."""
    rng = np.random.default_rng(n)
    levels = np.array([0.1, 0.2, 2 / (n + 1), 1 / (n + 1)])
    hits = []
    for _ in range(600):
        p_values = calibrated(rng.lognormal(size=n)).p_values(rng.lognormal(size=500))
        hits.append((p_values[:, None] <= levels + 1e-9).mean(0))
    assert (np.mean(hits, 0) <= np.maximum(levels, 1 / (n + 1)) + 0.012).all()


def test_the_tail_goes_on_where_counting_ends():
    scores = np.random.default_rng(0).lognormal(size=100)
    calibration = calibrated(scores)
    highest = scores.max()
    just_over, far = calibration.p_values([np.nextafter(highest, np.inf), 3 * highest])
    assert just_over == pytest.approx(1 / 101)
    falls = calibration.tail.survival(np.array([highest, 3 * highest]))
    assert far == pytest.approx(falls[1] / falls[0] / 101)


def test_scores_and_maxima_are_those_of_the_same_images():
    with pytest.raises(InputError, match="map_maxima: 2 given for 3 image scores"):
        held_out_calibration([1.0, 2.0, 3.0], [1.0, 2.0], 0.5)
    with pytest.raises(InputError, match="local: 1 given for 2 image scores"):
        held_out_calibration([1.0, 2.0], [1.0, 2.0], 0.5, part_maxima={"local": [1.0]})


@given(
    st.lists(st.floats(0, 100, width=32), min_size=1, max_size=80),
    st.lists(st.floats(0, 1e6, width=32), min_size=2, max_size=20),
)
def test_probabilities_fall_with_the_score_and_depend_on_nothing_else(held_out, scores):
    calibration = calibrated(held_out)
    ascending = sorted(scores)
    p_values = calibration.p_values(ascending)
    assert (p_values > 0).all()
    assert (p_values <= 1).all()
    assert (np.diff(p_values) <= 1e-12).all()
    one_by_one = [float(calibration.p_values([score])[0]) for score in ascending]
    # Vectorised exponentials may differ from single ones in the last bit.
    assert p_values == pytest.approx(one_by_one, rel=1e-14)


def test_no_excess_over_the_start_means_no_tail():
    # The upper half is one value: nothing lies over the tail's start.
    assert ScoreTail.fit([1.0] * 10 + [2.0] * 20) is None


def test_equal_excesses_give_an_exponential_tail():
    tail = ScoreTail.fit([*np.linspace(0, 1, 90).tolist(), *[1.5] * 10])
    assert tail.shape == 0
    assert tail.scale == pytest.approx(0.5)


def test_without_held_out_scores_there_are_no_probabilities():
    calibration = Calibration(1.0, 2.0, "labelled", 10, 0.1)
    assert calibration.p_values([1.0]) is None
    with pytest.raises(InputError, match="it keeps no scores"):
        score_histogram(calibration)


# -- images that look defective among the good ones
# --------------------------------------------------------------------------------------------------


def gumbel(n: int, rng: np.random.Generator) -> np.ndarray:
    return np.exp(-2 + 0.1 * rng.gumbel(size=n))


def names_of(scores: np.ndarray) -> list[str]:
    return [f"{index:03d}.png" for index in range(len(scores))]


def test_the_highest_held_out_scores_are_kept_by_name():
    assert highest_held_out(["a", "b", "c"], [1.0, 3.0, 2.0]) == [["b", 3.0], ["c", 2.0], ["a", 1.0]]
    scores = gumbel(50, np.random.default_rng(0))
    kept = highest_held_out(names_of(scores), scores.tolist())
    assert kept == [[f"{index:03d}.png", scores[index]] for index in np.argsort(-scores)[:20]]
    assert highest_held_out(["a"], []) == []


def test_defective_images_among_the_good_ones_are_named():
    scores = gumbel(100, np.random.default_rng(0))
    scores[[7, 3, 50]] = np.array([3.5, 3.0, 3.2]) * np.median(scores)
    message = r"score far above the rest \(3 of 100\): 007.png, 050.png, 003.png; look at them"
    with pytest.warns(UserWarning, match=message):
        highest_held_out(names_of(scores), scores)
    scores[20:23] = 4 * np.median(scores)
    with pytest.warns(
        UserWarning, match=r"\(6 of 100\): 020.png, 021.png, 022.png, 007.png, 050.png and 1 more"
    ):
        highest_held_out(names_of(scores), scores)
    with pytest.warns(UserWarning, match=r"\(1 of 31\): 030.png; look"):
        highest_held_out(names_of(np.ones(31)), [1.0] * 30 + [2.0])


@pytest.mark.parametrize(
    "scores",
    [
        [0.0] * 30 + [2.0],  # copies of one image and another: nothing to compare with
        [1.0] * 30 + [1.2],  # equal, but no more than that speaks for the other
        [0.0] * 10 + [1.0, 2.0] * 10,
        [1.0, 1.1, 1.2, 1.3, 90.0],
        [1e-300] * 9 + [1e300] * 9,
    ],
)
def test_too_few_or_like_scores_give_no_warning(scores):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert len(highest_held_out(names_of(np.array(scores)), scores)) == min(20, len(scores))


@pytest.mark.parametrize(("n", "most"), [(20, 0.06), (60, 0.03), (400, 0.02)])
def test_good_images_alone_are_seldom_suspected(n, most):
    """SUSPECT_RATE and what the quartiles of n images, in place of the distribution's, add to it."""
    rng, sets = np.random.default_rng(n), 1000
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        for _ in range(sets):
            scores = gumbel(n, rng)
            highest_held_out(names_of(scores), scores)
    assert 0.003 < len(found) / sets < most


def test_the_histogram_is_a_picture():
    rng = np.random.default_rng(0)
    normal, defective = rng.gamma(9, 1, 200).tolist(), rng.gamma(40, 1, 30).tolist()
    calibration = held_out_calibration(normal, normal, 0.01, defective_scores=defective)
    picture = cv2.imdecode(np.frombuffer(score_histogram(calibration), np.uint8), cv2.IMREAD_COLOR)
    assert picture.shape == (648, 840, 3)
    # Bars in two colours on white, lines in black.
    colours = {tuple(pixel) for pixel in picture.reshape(-1, 3).tolist()}
    assert len(colours) > 10
    assert (0, 0, 0) in colours


@pytest.mark.parametrize("n", [6, 9, 33, 100, 299])
def test_the_rate_that_a_threshold_implies_gives_that_threshold_again(n: int) -> None:
    scores = list(map(float, range(1, n + 1)))
    for rank in range(1, n + 1):
        assert conformal_threshold(scores, (n + 1 - rank) / (n + 1))[0] == rank
    # Which is how the parts' thresholds are found.
    calibration = held_out_calibration(scores, scores, 0.4, part_maxima={"local": scores})
    assert calibration.part_thresholds["local"] == calibration.image_threshold


@pytest.mark.filterwarnings("ignore:.*held-out images support:UserWarning")
@pytest.mark.parametrize("edge", [20, 80])
def test_the_pixel_threshold_is_that_of_maps_at_the_images_own_size(colours, edge: int) -> None:
    detector = colours()  # which resizes to 40
    images = np.random.default_rng(0).integers(0, 256, (4, edge, edge, 3), dtype=np.uint8)
    calibration = detector.calibrate(images, false_alarm_rate=0.2)
    maxima = sorted(float(one.max()) for one in detector.score(images).anomaly_maps)
    assert calibration.map_maxima == tuple(maxima)
    assert calibration.pixel_threshold == maxima[3]


@pytest.mark.parametrize(("images", "rate", "guaranteed"), [(99, 0.01, False), (299, 0.01, True)])
def test_just_enough_images_give_no_warning(images: int, rate: float, guaranteed: bool) -> None:
    scores = list(map(float, range(images)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        held_out_calibration(scores, scores, rate, guaranteed=guaranteed)
    with pytest.warns(UserWarning, match=f"{images - 1} held-out images support"):
        held_out_calibration(scores[1:], scores[1:], rate, guaranteed=guaranteed)
