from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from vidfill.sampling.metrics.comparison import Comparison, compare, compare_sets, judge
from vidfill.sampling.metrics.frechet import frechet_distance

INFINITE = (-np.inf, np.inf)


def draw(seed: int, clips: int = 12) -> tuple[np.ndarray, np.ndarray]:
    """A column of two schedules, on clips of which some are harder than others."""
    random = np.random.default_rng(seed)
    hard = random.normal(30, 5, clips)
    return hard + random.normal(0.5, 1, clips), hard + random.normal(0, 1, clips)


def interval(comparison: Comparison) -> tuple[float, float]:
    return comparison.low, comparison.high


def coverage(seed: int, clips: int, skewed: bool, worlds: int = 250) -> float:
    """How often the interval holds the true mean difference."""
    random = np.random.default_rng(seed)
    mean = np.exp(0.5) if skewed else 0.0
    held = 0
    for _ in range(worlds):
        values = random.lognormal(0, 1, clips) if skewed else random.normal(0, 1, clips)
        found = compare(values, np.zeros(clips), better=1)
        held += found.low <= mean <= found.high
    return held / worlds


# Four standard errors of 250 worlds are 0.055 about 0.95. A percentile interval of 8 clips holds
# 0.89 (normal) and 0.78 (lognormal), of 16 clips 0.91 and 0.85.
@pytest.mark.parametrize("clips", [8, 16])
def test_the_interval_holds_the_true_mean_as_often_as_it_says(clips: int) -> None:
    assert coverage(1, clips, skewed=False) == pytest.approx(0.95, abs=0.055)


@pytest.mark.parametrize(("clips", "least"), [(8, 0.84), (16, 0.87)])
def test_skewed_differences_cost_it_little(clips: int, least: float) -> None:
    assert coverage(2, clips, skewed=True) > least


def test_the_interval_of_many_clips_is_students() -> None:
    ours, reference = draw(0, clips=300)
    found = compare(ours, reference, better=1)
    low, high = stats.ttest_rel(ours, reference).confidence_interval(0.95)
    assert found.difference == pytest.approx((ours - reference).mean())
    # Ends drawn 10,000 times: their own error is about 2 % of the width.
    assert interval(found) == pytest.approx((low, high), abs=0.05 * (high - low))


def test_exchanging_the_schedules_mirrors_the_comparison() -> None:
    ours, reference = draw(0)
    forth, back = compare(ours, reference, better=1), compare(reference, ours, better=1)
    assert (back.difference, back.low, back.high) == (
        pytest.approx(-forth.difference),
        pytest.approx(-forth.high),
        pytest.approx(-forth.low),
    )
    assert back.improved == pytest.approx(1 - forth.improved)


def test_the_order_of_the_clips_does_not_matter() -> None:
    ours, reference = draw(0)
    order = np.random.default_rng(1).permutation(len(ours))
    forth, other = compare(ours, reference, 1), compare(ours[order], reference[order], 1)
    assert interval(other) == pytest.approx(interval(forth), rel=1e-12)
    assert other.improved == forth.improved


def test_another_unit_scales_the_comparison() -> None:
    ours, reference = draw(0)
    forth, scaled = compare(ours, reference, 1), compare(100 * ours, 100 * reference, 1)
    expected = [100 * value for value in (forth.difference, forth.low, forth.high)]
    assert [scaled.difference, scaled.low, scaled.high] == pytest.approx(expected)


def test_pairing_takes_out_how_hard_the_clips_are() -> None:
    ours, reference = draw(0, clips=40)
    paired = compare(ours, reference, 1)
    shuffled = compare(ours, np.random.default_rng(1).permutation(reference), 1)
    assert shuffled.difference == pytest.approx(paired.difference)
    assert shuffled.high - shuffled.low > 3 * (paired.high - paired.low)


def test_the_same_seed_draws_the_same_and_another_nearly_the_same() -> None:
    ours, reference = draw(0)
    first = compare(ours, reference, 1)
    assert compare(ours, reference, 1) == first
    other = compare(ours, reference, 1, seed=1)
    assert interval(other) != interval(first)
    assert interval(other) == pytest.approx(interval(first), abs=0.1 * (first.high - first.low))


def test_clips_that_improve_are_counted_by_the_columns_direction_and_ties_are_none() -> None:
    ours, reference = np.array([1.0, 2.0, 3.0, 4.0]), np.array([1.0, 1.0, 1.0, 5.0])
    assert compare(ours, reference, better=1).improved == 0.5
    assert compare(ours, reference, better=-1).improved == 0.25


def test_clips_without_a_value_are_left_out_of_both() -> None:
    ours, reference = draw(0)
    expected = compare(ours[2:], reference[2:], 1)
    ours[0] = reference[1] = np.nan
    assert compare(ours, reference, 1) == expected
    assert expected.examples == 10


def test_without_clips_there_is_no_comparison() -> None:
    nothing = compare(np.full(3, np.nan), np.ones(3), 1)
    assert nothing.examples == 0
    assert np.isnan([nothing.difference, *interval(nothing), nothing.improved]).all()
    assert judge(nothing, 1, margin=1.0) == "undecided"


@pytest.mark.parametrize("clips", [1, 2, 3])
def test_up_to_three_clips_say_nothing(clips: int) -> None:
    ours, reference = draw(0, clips)
    assert interval(compare(ours, reference, 1)) == INFINITE


def test_a_difference_that_is_the_same_on_all_clips_is_certain() -> None:
    ours, _ = draw(0)
    equal = compare(ours, ours, 1)
    assert equal == Comparison(12, 0.0, 0.0, 0.0, 0.0)
    assert judge(equal, 1, margin=0.0) == "as good"


def test_values_that_agree_on_most_clips_do_not_make_an_interval_too_narrow() -> None:
    ours = np.zeros(6)
    ours[0] = 1.0
    found = compare(ours, np.zeros(6), 1)
    assert found.low < 0 < found.high


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (-0.9, 0.9, "as good"),
        (-1.0, 1.0, "as good"),
        (0.1, 0.9, "as good"),
        (0.1, 1.1, "better"),
        (3.0, 4.0, "better"),
        (-1.1, -0.1, "worse"),
        (-0.9, 1.1, "no worse"),
        (-1.1, 0.9, "undecided"),
        (-1.1, 1.1, "undecided"),
        (*INFINITE, "undecided"),
    ],
)
def test_verdicts_are_read_off_the_interval_and_the_margin(
    low: float, high: float, verdict: str
) -> None:
    assert judge(Comparison(9, 0.0, low, high, 0.5), 1, margin=1.0) == verdict
    # The same where lower is better.
    assert judge(Comparison(9, 0.0, -high, -low, 0.5), -1, margin=1.0) == verdict


# Sets


def draw_sets(
    random: np.random.Generator, clips: int, features: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ours, shifted; the reference, with more spread; and the truth."""
    scale = 1 / np.sqrt(np.arange(1, features + 1))
    truth, ours, reference = (random.normal(0, 1, (clips, features)) for _ in range(3))
    ours, reference = truth + 0.3 * ours + 0.25, truth + 0.5 * reference + 0.1
    return ours * scale, reference * scale, truth * scale


def test_a_sets_difference_is_that_of_its_frechet_distances() -> None:
    ours, reference, truth = draw_sets(np.random.default_rng(0), 20, 8)
    found = compare_sets(ours, reference, truth)
    expected = frechet_distance(ours, truth) - frechet_distance(reference, truth)
    assert found.difference == pytest.approx(expected)
    assert found.low < found.difference < found.high
    assert found.examples == 20
    assert np.isnan(found.improved)


def test_exchanging_the_sets_mirrors_the_comparison() -> None:
    ours, reference, truth = draw_sets(np.random.default_rng(0), 20, 8)
    forth, back = compare_sets(ours, reference, truth), compare_sets(reference, ours, truth)
    assert back.difference == -forth.difference
    assert interval(back) == pytest.approx((-forth.high, -forth.low))


def test_a_set_compared_with_itself_differs_by_nothing() -> None:
    ours, _, truth = draw_sets(np.random.default_rng(0), 20, 8)
    found = compare_sets(ours, ours, truth)
    assert (found.difference, found.low, found.high) == (0, 0, 0)


def test_a_set_much_nearer_to_the_truth_is_found_better() -> None:
    random = np.random.default_rng(0)
    truth = random.normal(0, 1, (16, 40))
    near, far = truth + random.normal(0, 0.1, (16, 40)), truth + random.normal(0, 1, (16, 40))
    assert judge(compare_sets(near, far, truth), -1, margin=0.0) == "better"
    assert judge(compare_sets(far, near, truth), -1, margin=0.0) == "worse"


def test_one_clip_is_no_set() -> None:
    found = compare_sets(*(np.ones((1, 4)) for _ in range(3)))
    assert np.isnan([found.difference, *interval(found)]).all()


@pytest.mark.slow
def test_the_interval_of_a_sets_difference_holds_what_sets_of_its_size_have_on_average() -> None:
    # A percentile interval, which resampling moves aside, holds it in 14 of these 24 worlds.
    random = np.random.default_rng(3)
    clips, features, worlds = 40, 20, 24
    drawn = [draw_sets(random, clips, features) for _ in range(600)]
    true = np.mean([frechet_distance(o, t) - frechet_distance(r, t) for o, r, t in drawn])
    found = [compare_sets(*sets) for sets in drawn[:worlds]]
    assert np.mean([one.low <= true <= one.high for one in found]) >= 20 / 24
