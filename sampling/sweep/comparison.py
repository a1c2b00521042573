"""Whether one schedule fills holes better than another: paired over the same clips and noise."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import numpy as np
from jaxtyping import Float, Int

from ...seeding import derive_seed
from ..metrics.frechet import FeatureSet, frechet_distance

Values = Float[np.ndarray, " clips"]
Better = Literal[1, -1]  # higher is better; lower is better
Verdict = Literal["as good", "better", "worse", "no worse", "undecided"]

LEVEL = 0.95  # of the intervals
DRAWS = 10_000  # resamples of the clips
SET_DRAWS = 1_000  # of which each costs two Fréchet distances

# What makes no difference, by column and in its unit: chosen by what rounding and an autoencoder
# cost, not by what schedules reached (docs/metrics.md). FVD and VFID have none: their scale depends
# on the number of clips.
MARGINS: Mapping[str, float] = {
    "lpips": 0.002,
    "temporal_error": 0.25,
    "colour_error": 0.5,
    "flicker": 0.1,
    "seam_error": 0.25,
    "psnr": 0.25,
    "psnr_hole": 0.25,
    "ssim": 0.002,
    "ssim_65": 0.002,
    "warping_error": 1e-5,
    "diversity": 0.5,
}


@dataclass(frozen=True)
class Comparison:
    """A schedule's column minus a reference's, on the same clips."""

    clips: int
    """Those in which both have a value."""
    difference: float
    """Of the means over the clips, or of the sets' distances; in the column's unit."""
    low: float
    """Where the 95 % confidence interval of the difference begins."""
    high: float
    """Where it ends."""
    improved: float
    """Share of the clips that the schedule does strictly better; NaN for a set's distance."""


def compare(ours: Values, reference: Values, better: Better, seed: int = 0) -> Comparison:
    """Compare two schedules by a column that every clip has.

    The interval is the bootstrap-t one (Efron & Tibshirani 1993, Section 12.5): of 8 to 32 clips
    it holds the true mean nearly as often as it says, where percentile and BCa intervals are too
    narrow. Up to three clips say nothing: their interval is infinite. It depends neither on the
    clips' order, nor, but for its sign, on which schedule is the reference.

    Args:
        ours: One value a clip; NaN where the clip has none, which leaves it out.
        reference: The same clips under the schedule that is compared with.
        better: Whether the higher or the lower value is better.
        seed: Of the resamples.
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
    """Compare two schedules by the Fréchet distance of their clips' features to the true clips'.

    Row i is the same clip in all three. The clips are resampled together. A resample repeats clips
    and so moves the distances, their difference too: the interval has the resamples' spread about
    their own mean, laid about the difference that was measured.
    """
    clips = len(truth)
    nan = float("nan")
    if clips < 2:
        return Comparison(clips, nan, nan, nan, nan)

    def difference(rows: Int[np.ndarray, " clips"]) -> float:
        true = truth[rows]
        return frechet_distance(ours[rows], true) - frechet_distance(reference[rows], true)

    measured = difference(np.arange(clips))
    resampled = np.array([difference(rows) for rows in _resample(clips, SET_DRAWS, seed)])
    low, high = _tails(resampled - resampled.mean())
    return Comparison(clips, measured, measured + low, measured + high, nan)


def judge(comparison: Comparison, better: Better, margin: float) -> Verdict:
    """What a comparison shows, given the difference that counts as none.

    "as good": the whole interval lies within the margin on both sides of 0. Else "better" or
    "worse": it lies on one side of 0. Else "no worse": it ends within the margin on the worse side.
    Else "undecided".

    Args:
        comparison: Its interval is read.
        better: Whether the higher or the lower value is better.
        margin: In the column's unit, chosen before the results were seen, as in `MARGINS`.
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


def _interval_of_mean(differences: Values, seed: int) -> tuple[float, float]:
    clips = len(differences)
    if clips == 1:
        return -float("inf"), float("inf")
    if (differences == differences[0]).all():
        return float(differences[0]), float(differences[0])
    # By size, not sign: so neither the clips' order shows in the draws, nor which is the reference.
    ordered = differences[np.argsort(np.abs(differences), kind="stable")]
    drawn = ordered[_resample(clips, DRAWS, seed)]
    mean, error = differences.mean(), differences.std(ddof=1) / np.sqrt(clips)
    errors = np.where(np.ptp(drawn, axis=1) == 0, 0, drawn.std(axis=1, ddof=1)) / np.sqrt(clips)
    with np.errstate(divide="ignore", invalid="ignore"):
        t = np.nan_to_num((drawn.mean(axis=1) - mean) / errors, posinf=np.inf, neginf=-np.inf)
    low, high = _tails(t)
    return float(mean - high * error), float(mean - low * error)


def _resample(clips: int, draws: int, seed: int) -> Int[np.ndarray, "draws clips"]:
    generator = np.random.default_rng(derive_seed(seed, "resample"))
    return generator.integers(0, clips, (draws, clips))


def _tails(values: Float[np.ndarray, " draws"]) -> tuple[float, float]:
    """What as many values lie below as above the other, and `LEVEL` of all between."""
    outside = int(len(values) * (1 - LEVEL) / 2)
    ordered = np.sort(values)
    return float(ordered[outside]), float(ordered[-1 - outside])
