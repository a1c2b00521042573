"""What a sweep comes to: its means, and each schedule paired with what it is to be better than."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...data.shards.format import family_of
from ..metrics.frechet import frechet_distance
from ..schedules.language import SWITCHES, parse
from .comparison import MARGINS, Better, Comparison, Values, compare, compare_sets, judge
from .kept import read_features
from .measures import Measure
from .rows import Key, Row

TRUTH = "truth"  # folder of the true clips' frames and features


@dataclass(frozen=True)
class Finished:
    """All that a sweep measured."""

    out: Path
    rows: Mapping[tuple[str, str], Sequence[Row]]
    """By baseline or schedule, and clip: one for each completion."""
    clips: Sequence[str]
    folders: Mapping[str, str]
    """The folder of the features of each baseline and schedule, by its name."""
    measures: Sequence[Measure]
    diversities: Mapping[tuple[str, str], float]
    """By schedule and clip, where there are several completions."""

    def values(self, name: str, measure: Measure, clips: Sequence[str]) -> Values:
        """One for each clip: the mean or the best over its completions; NaN where it has none."""
        if measure.column == "diversity":
            # What draws no noise always comes to the same.
            return np.array([self.diversities.get((name, clip), 0.0) for clip in clips])
        column = measure.best_of or measure.column
        found = [[float(row[column]) for row in self.rows[name, clip]] for clip in clips]
        if not measure.best_of:
            return np.array(found).mean(axis=1)
        return measure.better * (measure.better * np.array(found)).max(axis=1)

    def average(self, name: str) -> Row:
        """A row of results.csv. What has no value is left out; NaN is left where nothing has."""
        means = {
            m.column: format_number(self._mean(name, m))
            for m in self.measures
            if m.column not in ("nfe", "clips")
        }
        nfe = self.rows[name, self.clips[0]][0]["nfe"]
        return {"schedule": name, "nfe": nfe, **means, "clips": str(len(self.clips))}

    def _mean(self, name: str, measure: Measure) -> float:
        if measure.of == "set":
            ours, theirs = (
                read_features(self.out, measure.column, folder, self.clips)
                for folder in (self.folders[name], TRUTH)
            )
            return frechet_distance(ours, theirs)
        values = self.values(name, measure, self.clips)
        known = values[~np.isnan(values)]
        return float(known.mean()) if known.size else float("nan")

    def left_out(self, names: Sequence[str]) -> dict[str, int]:
        """By column the clips without a value, the most that a schedule has of them."""
        counts = {
            m.column: max(int(np.isnan(self.values(name, m, self.clips)).sum()) for name in names)
            for m in self.measures
            if m.of != "set" and m.column != "clips"
        }
        return {column: count for column, count in counts.items() if count}


def format_number(value: float) -> str:
    return f"{value:.6g}"


def compare_all(
    finished: Finished, schedules: Sequence[str], reference: str, seed: int
) -> list[Row]:
    """comparison.csv: each schedule against its own without detours, and against the reference.

    Of each family of masks by itself: two masks of one clip are not independent.
    """
    families = dict.fromkeys(map(family_of, finished.clips))
    return [
        _compare(finished, (family, schedule, against), measure, seed)
        for family in families
        for schedule in schedules
        for against in references_of(schedule, schedules, reference)
        for measure in finished.measures
        if measure.of == "set" or _margin(measure)
    ]


def references_of(schedule: str, schedules: Sequence[str], reference: str) -> list[str]:
    """What a schedule is compared with: the paper's n = 0 of its solver and steps, the reference.

    The first where the sweep has it, with the schedule's switches rather than without.
    """
    parsed = parse(schedule)
    switches = tuple(move for move in parsed.moves if move.name in SWITCHES)
    plain = [str(dataclasses.replace(parsed, moves=moves)) for moves in (switches, ())]
    own = [name for name in plain if name in schedules][:1]
    return [name for name in dict.fromkeys([*own, reference]) if name != schedule]


def _compare(finished: Finished, who: tuple[str, str, str], measure: Measure, seed: int) -> Row:
    family, schedule, reference = who
    column = measure.column
    better: Better = 1 if measure.better == 1 else -1
    clips = [clip for clip in finished.clips if family_of(clip) == family]
    names = (schedule, reference)
    if measure.of == "set":
        folders = (*(finished.folders[name] for name in names), TRUTH)
        first, second, truth = (read_features(finished.out, column, f, clips) for f in folders)
        comparison = compare_sets(first, second, truth, seed)
    else:
        ours, theirs = (finished.values(name, measure, clips) for name in names)
        comparison = compare(ours, theirs, better, seed)
    verdict = judge(comparison, better, _margin(measure))
    if not measure.better and verdict != "as good":
        verdict = "undecided"  # neither way is better
    return {
        "masks": family,
        "schedule": schedule,
        "reference": reference,
        "measure": column,
        **_written(comparison, bool(measure.better)),
        "margin": format_number(_margin(measure)) if _margin(measure) else "",
        "verdict": verdict,
    }


def _margin(measure: Measure) -> float:
    """That of the column it is the best of; 0 where there is none."""
    return MARGINS.get(measure.best_of or measure.column, 0.0)


def _written(comparison: Comparison, ordered: bool) -> Row:
    numbers = {
        field: format_number(value)
        for field, value in dataclasses.asdict(comparison).items()
        if field != "clips"
    }
    if not ordered or np.isnan(comparison.improved):
        numbers["improved"] = ""
    return {"clips": str(comparison.clips), **numbers}


def group_by_clip(rows: Mapping[Key, Row]) -> dict[tuple[str, str], list[Row]]:
    """The completions of each clip under each schedule, in their order."""
    grouped = itertools.groupby(sorted(rows.items()), lambda item: item[0][:2])
    return {clip: [row for _, row in completions] for clip, completions in grouped}
