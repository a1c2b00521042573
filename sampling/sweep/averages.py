"""What a sweep found: means over the examples, and schedules compared in pairs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ...data.shards.format import family_of
from ..metrics.comparison import Direction, ExampleValues, compare, compare_sets, judge
from ..metrics.frechet import frechet_distance
from ..schedules.language import SWITCHES, parse
from .kept import CompletionKey, SweepFolder, slug
from .measures import Measure
from .results import ComparisonRow, CompletionRow, format_value

TRUTH = "truth"  # folder of the true clips' frames and features


@dataclass(frozen=True)
class Measurements:
    """All that a sweep measured."""

    folder: SweepFolder
    rows: Mapping[CompletionKey, CompletionRow]
    examples: Sequence[str]
    measures: Sequence[Measure]
    completions: int
    """Of each example under a schedule; a baseline that draws no noise has one."""
    diversities: Mapping[tuple[str, str], float]
    """By schedule and example, if there are several completions."""

    def values(self, name: str, measure: Measure, examples: Sequence[str]) -> ExampleValues:
        """The mean or the best over each example's completions; NaN where there is no value."""
        if measure.column == "diversity":
            # Without noise all completions are the same.
            return np.array([self.diversities.get((name, example), 0.0) for example in examples])
        column = measure.best_of or measure.column
        keys = [
            [CompletionKey(name, example, number) for number in range(self.completions)]
            for example in examples
        ]
        found = np.array([[self.rows[k][column] for k in own if k in self.rows] for own in keys])
        if not measure.best_of:
            return found.mean(axis=1)
        return measure.better * (measure.better * found).max(axis=1)

    def features(self, name: str, measure: Measure, examples: Sequence[str]) -> np.ndarray:
        """A row for each example, of its first completion."""
        return self.folder.read_features(measure.column, slug(name), examples)

    def average(self, name: str) -> dict[str, str]:
        """A row of results.csv. Examples without a value are left out; NaN if all are."""
        means = {
            measure.column: format_value(self._mean(name, measure))
            for measure in self.measures
            if measure.column not in ("nfe", "clips")
        }
        nfe = self.rows[CompletionKey(name, self.examples[0])].nfe
        return {"schedule": name, "nfe": str(nfe), **means, "clips": str(len(self.examples))}

    def _mean(self, name: str, measure: Measure) -> float:
        if measure.of == "set":
            ours, truth = (self.features(n, measure, self.examples) for n in (name, TRUTH))
            return frechet_distance(ours, truth)
        values = self.values(name, measure, self.examples)
        known = values[~np.isnan(values)]
        return float(known.mean()) if known.size else float("nan")

    def count_without_value(self, names: Sequence[str]) -> dict[str, int]:
        """By column the examples without a value, the most that a schedule has of them."""
        counts = {
            m.column: max(
                int(np.isnan(self.values(name, m, self.examples)).sum()) for name in names
            )
            for m in self.measures
            if m.of != "set" and m.column not in ("nfe", "clips")
        }
        return {column: count for column, count in counts.items() if count}


def compare_all(
    measurements: Measurements, schedules: Sequence[str], reference: str, seed: int
) -> list[ComparisonRow]:
    """Compare each schedule with its own without detours, and with the reference.

    Each family of masks by itself: two masks of one clip are not independent.
    """
    families: dict[str, list[str]] = {}
    for example in measurements.examples:
        families.setdefault(family_of(example), []).append(example)
    return [
        _compare(measurements, schedule, against, measure, family, seed)
        for family in families.items()
        for schedule in schedules
        for against in references_of(schedule, schedules, reference)
        for measure in measurements.measures
        if measure.of == "set" or measure.margin
    ]


def references_of(schedule: str, schedules: Sequence[str], reference: str) -> list[str]:
    """What a schedule is compared with: the paper's n = 0 of its solver and steps, the reference.

    The first only if the sweep has it, with the schedule's switches rather than without.
    """
    parsed = parse(schedule)
    switches = tuple(move for move in parsed.moves if move.name in SWITCHES)
    plain = [str(dataclasses.replace(parsed, moves=moves)) for moves in (switches, ())]
    own = [name for name in plain if name in schedules][:1]
    return [name for name in dict.fromkeys([*own, reference]) if name != schedule]


def _compare(
    measurements: Measurements,
    schedule: str,
    reference: str,
    measure: Measure,
    family: tuple[str, Sequence[str]],
    seed: int,
) -> ComparisonRow:
    masks, examples = family
    better: Direction = 1 if measure.better == 1 else -1
    if measure.of == "set":
        ours, theirs, truth = (
            measurements.features(name, measure, examples) for name in (schedule, reference, TRUTH)
        )
        found = compare_sets(ours, theirs, truth, seed)
    else:
        ours, theirs = (
            measurements.values(name, measure, examples) for name in (schedule, reference)
        )
        found = compare(ours, theirs, better, seed)
    verdict = judge(found, better, measure.margin)
    if not measure.better and verdict != "as good":
        verdict = "undecided"  # neither direction is better
    counted = measure.better and not np.isnan(found.improved)
    return ComparisonRow(
        masks=masks,
        schedule=schedule,
        reference=reference,
        measure=measure.column,
        clips=found.examples,
        difference=found.difference,
        low=found.low,
        high=found.high,
        improved=found.improved if counted else None,
        margin=measure.margin or None,
        verdict=verdict,
    )
