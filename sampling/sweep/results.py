"""What a finished sweep's folder says, and what its columns mean."""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from ...errors import BadInput
from .kept import Spread, read_spread, read_strip
from .measures import (
    COMPARED,
    LEADING,
    MEASURES,
    Measure,
    Row,
    best_of,
    clip_columns,
    measures_with,
)


@dataclass(frozen=True)
class Sweep:
    """What a finished sweep's folder says."""

    folder: Path
    about: Mapping[str, Any]
    """sweep.json."""
    baselines: Sequence[Row]
    schedules: Sequence[Row]
    measures: Sequence[Measure]
    """Those that it has columns of."""
    hole_psnr: Mapping[tuple[str, str], float]
    """Decibels by (schedule, clip), of the first completion, whose frames are kept."""
    comparison: Sequence[Mapping[str, str]]
    """The lines of comparison.csv."""

    @functools.cached_property
    def best(self) -> Row:
        """The schedule with the highest PSNR of the hole; of equals the cheapest."""
        measure = next(measure for measure in MEASURES if measure.column == "psnr_hole")
        return best_of(self.schedules, measure) or self.schedules[0]

    @functools.cached_property
    def lead(self) -> Measure:
        """What schedules are judged by first."""
        by_column = {measure.column: measure for measure in self.measures}
        there = [by_column[column] for column in (*LEADING, "psnr") if column in by_column]
        return next((m for m in there if best_of(self.schedules, m)), there[-1])

    @property
    def kept(self) -> Sequence[str]:
        return self.about["kept"]

    @property
    def completions(self) -> int:
        """Of each clip under each schedule."""
        return self.about["completions"]

    def slug(self, name: str) -> str:
        """The folder of a baseline's or a schedule's frames."""
        return {entry["schedule"]: entry["slug"] for entry in self.about["schedules"]}.get(
            name, name
        )

    def frames(self, slug: str, clip: str) -> UInt8[np.ndarray, "frames height width 3"]:
        return read_strip(self.strip(slug, clip), *self._shape)

    def spread(self, slug: str, clip: str) -> Spread:
        """The map of the completions' standard deviation, in 8-bit units."""
        return read_spread(self.folder / "spread" / slug / f"{clip}.png", *self._shape)

    @property
    def _shape(self) -> tuple[int, int, int]:
        size = self.about["clip"]
        return size["frames"], size["height"], size["width"]

    def strip(self, slug: str, clip: str) -> Path:
        return self.folder / "frames" / slug / f"{clip}.png"

    def mask(self, clip: str) -> UInt8[np.ndarray, "frames height width"]:
        return np.any(self.frames("mask", clip) > 0, axis=-1).astype(np.uint8)


def read_sweep(folder: Path) -> Sweep:
    """What a finished sweep's folder says.

    Raises:
        BadInput: something that a finished sweep has is missing or malformed.
    """
    about = _read_about(folder)
    measures = measures_with(about["networks"], about["completions"])
    columns = ["schedule", *(m.column for m in measures)]
    rows = [Row(line["schedule"], line) for line in _read_csv(folder, "results.csv", columns)]
    named = [row.name for row in rows]
    for name in [*about["baselines"], *(entry["schedule"] for entry in about["schedules"])]:
        if name not in named:
            raise _unfinished(folder, f"results.csv has no row {name}")
    sweep = Sweep(
        folder,
        about,
        baselines=[row for row in rows if row.name in about["baselines"]],
        schedules=[row for row in rows if row.name not in about["baselines"]],
        measures=measures,
        hole_psnr={
            (line["schedule"], line["clip"]): float(line["psnr_hole"])
            for line in _read_csv(folder, "clips.csv", clip_columns(measures))
            if line["completion"] == "0"
        },
        comparison=_read_csv(folder, "comparison.csv", list(COMPARED)),
    )
    for slug in ["truth", "masked", "mask", *(sweep.slug(row.name) for row in rows)]:
        for clip in sweep.kept:
            if not sweep.strip(slug, clip).is_file():
                raise _unfinished(folder, f"frames/{slug}/{clip}.png is missing")
    return sweep


def _read_about(folder: Path) -> dict[str, Any]:
    if not folder.is_dir():
        raise BadInput(f"sweep is {folder}, which is no folder: give `vidfill sweep`'s output")
    if not (folder / "sweep.json").is_file():
        raise _unfinished(folder, "sweep.json is missing")
    try:
        about = json.loads((folder / "sweep.json").read_text())
    except json.JSONDecodeError as error:
        raise _unfinished(folder, f"sweep.json: {error}") from None
    wanted = ("model", "shards", "autoencoder", "masks", "clip", "kept", "schedules")
    for field in (
        *wanted,
        "networks",
        "completions",
        "reference",
        "without_value",
        "baselines",
        "timesteps",
        "seconds",
        "device",
    ):
        if field not in about:
            raise _unfinished(folder, f"sweep.json has no {field}")
    if not about["schedules"]:
        raise _unfinished(folder, "it has no schedules")
    return about


def _read_csv(folder: Path, name: str, columns: list[str]) -> list[dict[str, str]]:
    if not (folder / name).is_file():
        raise _unfinished(folder, f"{name} is missing")
    with (folder / name).open(newline="") as file:
        reader = csv.DictReader(file)
        lines = list(reader)
    if reader.fieldnames != columns:
        raise _unfinished(folder, f"the columns of {name} are not {','.join(columns)}")
    return lines


def _unfinished(folder: Path, reason: str) -> BadInput:
    return BadInput(
        f"{folder} is no finished sweep ({reason}): give the output folder of `vidfill sweep`; "
        "the same sweep command continues one that was interrupted"
    )
