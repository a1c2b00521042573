"""Whether one schedule fills holes better than another, paired over the same examples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from ...seeding import derive_seed
from .frechet import FeatureSet, frechet_distance

ExampleValues = Float[np.ndarray, " examples"]
Direction = Literal[1, -1]  # higher is better; lower is better
Verdict = Literal["as good", "better", "worse", "no worse", "undecided"]

LEVEL = 0.95  # of the intervals
DRAWS = 10_000  # resamples of the examples
SET_DRAWS = 1_000  # fewer: each costs two Fréchet distances


@dataclass(frozen=True)
class Comparison:
    """A schedule's values minus a reference's, on the same examples."""

    examples: int
    """Those where both have a value."""
    difference: float
    """Of the means over the examples, or of the sets' distances; in the measure's unit."""
    low: float
    """The lower end of the difference's 95 % confidence interval."""
    high: float
    """Its upper end."""
    improved: float
    """Share of the examples where the schedule is strictly better; NaN for a set's distance."""


def compare(
    ours: ExampleValues, reference: ExampleValues, better: Direction, seed: int = 0
) -> Comparison:
    """Compare two schedules by a measure of single examples.

    The interval is the bootstrap-t one (Efron & Tibshirani 1993, Section 12.5): with 8 to 32
    examples it holds the true mean nearly as often as it says, where percentile and BCa intervals
    are too narrow. Up to three examples say nothing: their interval is infinite. It does not depend
    on the order of the examples nor, except for its sign, on which schedule is the reference.
    Examples where either value is NaN are left out.
    """
    differences = ours - reference
    differences = differences[~np.isnan(differences)]
    if not differences.size:
        return Comparison(0, *[float("nan")] * 4)
    low, high = _interval_of_mean(differences, seed)
    improved = float((differences * better > 0).mean())
    return Comparison(len(differences), float(differences.mean()), low, high, improved)


def compare_sets(
    ours: FeatureSet, reference: FeatureSet, truth: FeatureSet, seed: int = 0
) -> Comparison:
    """Compare two schedules by the Fréchet distance of their features to those of the true clips.

    Row i is the same example in all three; the three are resampled together. A resample repeats
    examples, which moves the distances and their difference too: so the interval is the resamples'
    spread about their own mean, put around the difference that was measured.
    """
    examples, nan = len(truth), float("nan")
    if examples < 2:
        return Comparison(examples, nan, nan, nan, nan)

    def difference(rows: Int[np.ndarray, " examples"]) -> float:
        true = truth[rows]
        return frechet_distance(ours[rows], true) - frechet_distance(reference[rows], true)

    measured = difference(np.arange(examples))
    resampled = np.array([difference(rows) for rows in _resample(examples, SET_DRAWS, seed)])
    low, high = _tails(resampled - resampled.mean())
    return Comparison(examples, measured, measured + low, measured + high, nan)


def judge(comparison: Comparison, better: Direction, margin: float) -> Verdict:
    """What a comparison's interval shows, given the difference that counts as none.

    "as good": the whole interval lies within the margin on both sides of 0. Otherwise "better" or
    "worse": it lies on one side of 0. Otherwise "no worse": its worse end is within the margin.
    Otherwise "undecided". The margin is in the measure's unit, chosen before the results were seen.
    """
    ends = (comparison.low * better, comparison.high * better)
    worst, best = min(ends), max(ends)
    if -margin <= worst and best <= margin:
        return "as good"
    if worst > 0:
        return "better"
    if best < 0:
        return "worse"
    return "no worse" if worst >= -margin else "undecided"


def _interval_of_mean(differences: ExampleValues, seed: int) -> tuple[float, float]:
    examples = len(differences)
    if examples == 1:
        return -float("inf"), float("inf")
    if (differences == differences[0]).all():
        return float(differences[0]), float(differences[0])
    # By size, not sign: neither the order nor which is the reference may change the draws.
    ordered = differences[np.argsort(np.abs(differences), kind="stable")]
    drawn = ordered[_resample(examples, DRAWS, seed)]
    mean, error = differences.mean(), differences.std(ddof=1) / np.sqrt(examples)
    errors = np.where(np.ptp(drawn, axis=1) == 0, 0, drawn.std(axis=1, ddof=1)) / np.sqrt(examples)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.nan_to_num((drawn.mean(axis=1) - mean) / errors, posinf=np.inf, neginf=-np.inf)
    low, high = _tails(t)
    return float(mean - high * error), float(mean - low * error)


def _resample(examples: int, draws: int, seed: int) -> Int[np.ndarray, "draws examples"]:
    generator = np.random.default_rng(derive_seed(seed, "resample"))
    return generator.integers(0, examples, (draws, examples))


def _tails(values: Float[np.ndarray, " draws"]) -> tuple[float, float]:
    """The two values between which `LEVEL` of all lie, with equally many outside on both sides."""
    outside = int(len(values) * (1 - LEVEL) / 2)
    ordered = np.sort(values)
    return float(ordered[outside]), float(ordered[-1 - outside])
