"""What a finished sweep's folder says, and what its columns mean."""

from __future__ import annotations

import csv
import dataclasses
import functools
import json
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
from jaxtyping import UInt8

from .. import jobs
from .spread import Spread, read_spread
from .strips import read_strip


@dataclass(frozen=True)
class Measure:
    """A column of results.csv as a reader wants it; docs/metrics.md has the exact definitions."""

    column: str
    title: str
    unit: str
    digits: int
    better: int
    """1: higher is better; -1: lower is better; 0: neither."""
    meaning: str
    needs: str = ""
    """The network without which there is no such column: lpips or i3d."""
    of: Literal["completion", "clip", "set"] = "completion"
    """Of what it is one value: a completion, averaged over a clip's; all completions of a clip; all
    clips of a schedule."""
    best_of: str = ""
    """The column whose best value among a clip's completions this is."""

    @property
    def arrow(self) -> str:
        return {1: "↑", -1: "↓", 0: ""}[self.better]


MEASURES = (
    Measure("nfe", "NFE", "evaluations", 0, -1, "what one completion of a clip costs the network"),
    Measure(
        *("seconds_per_clip", "Time", "s", 2, -1),
        "of one completion of a clip; for the schedules, and for mean: the network's share of the "
        "wall time of sampling, an evaluation shared by several split evenly among them, without "
        "decoding; for the other baselines: the wall time of computing the clip",
    ),
    Measure(
        *("lpips", "LPIPS", "0 at best", 4, -1),
        "how different the whole frames look: LPIPS 0.1 with AlexNet, averaged over the frames",
        needs="lpips",
    ),
    Measure(
        *("temporal_error", "Temporal error", "8-bit units", 2, -1),
        "mean |change of the result − change of the truth| from one frame to the next, over the "
        "hole's pixels: flicker, and motion that is not the true one",
    ),
    Measure(
        *("colour_error", "Colour error", "8-bit units", 2, -1),
        "|mean of result − truth over the hole's pixels of all frames|, averaged over R, G and B: "
        "how far the colour of the whole hole is off",
    ),
    Measure(
        *("flicker", "Flicker", "8-bit units", 2, -1),
        "how much the mean colour error of the hole jumps from one frame to the next",
    ),
    Measure(
        *("seam_error", "Seam error", "8-bit units", 2, -1),
        "mean ||step of the result| − |step of the truth|| across the hole's border",
    ),
    Measure(
        *("warping_error", "Warping error", "of [0, 1]²", 6, 0),
        "mean squared difference of each frame and the next one warped back along the truth's DIS "
        "flow; a blurred result has less than the truth, so lower is not better",
    ),
    Measure(
        *("psnr", "PSNR", "dB", 2, 1),
        "10·log10(255² / mean squared error) of each whole frame, averaged over the frames, where "
        "a frame without error counts as 100",
    ),
    Measure(
        *("psnr_hole", "PSNR of the hole", "dB", 2, 1),
        "the same over the hole's pixels only; frames without a hole are left out",
    ),
    Measure(
        *("ssim", "SSIM", "1 at best", 4, 1),
        "structural similarity of each whole frame, in a Gaussian window of 11×11 pixels with "
        "σ = 1.5, averaged over RGB and frames",
    ),
    Measure(
        *("ssim_65", "SSIM 65", "1 at best", 4, 1),
        "the same in a flat window of 65×65 pixels, as papers of video inpainting have it",
    ),
    Measure(
        *("fvd", "FVD", "of the set", 1, -1),
        "Fréchet distance between the I3D logits of a schedule's clips and of the true ones; "
        "comparable only at an equal number of clips",
        *("i3d", "set"),
    ),
    Measure(
        *("vfid", "VFID", "of the set", 2, -1),
        "the same between the averages of I3D's last layer before its classifier",
        *("i3d", "set"),
    ),
    Measure("clips", "Clips", "", 0, 0, "how many a row is averaged over"),
)


COMPARED = (
    *("masks", "schedule", "reference", "measure", "clips"),
    *("difference", "low", "high", "improved", "margin", "verdict"),
)  # the columns of comparison.csv
LEADING = ("lpips", "temporal_error", "colour_error")
BEST_OF = (*LEADING, "psnr_hole")
DIVERSITY = Measure(
    *("diversity", "Diversity", "8-bit units", 2, 0),
    "root mean squared standard deviation of the hole's pixels over the completions of a clip; a "
    "model that knows what it does not know has 1/√2 of its completions' root mean squared error",
    of="clip",
)


def measures_with(networks: Collection[str], completions: int = 1) -> list[Measure]:
    """The columns of a sweep that was given these networks, and filled each hole so often."""
    there = [measure for measure in MEASURES if not measure.needs or measure.needs in networks]
    if completions == 1:
        return there
    bests = [_best_of(m, completions) for m in there if m.column in BEST_OF]
    return [*there[:-1], *bests, DIVERSITY, there[-1]]


def _best_of(measure: Measure, completions: int) -> Measure:
    return dataclasses.replace(
        measure,
        column=f"best_{measure.column}",
        title=f"{measure.title}, best",
        unit=f"of {completions}",
        meaning=f"{measure.title} of whichever completion of a clip has the best",
        of="clip",
        best_of=measure.column,
    )


def clip_columns(measures: Sequence[Measure]) -> list[str]:
    """The columns of clips.csv."""
    own = [m.column for m in measures if m.of == "completion" and m.column != "clips"]
    return ["schedule", "clip", "completion", *own]


@dataclass(frozen=True)
class Row:
    """A line of results.csv."""

    name: str
    """A baseline or a schedule."""
    texts: Mapping[str, str]

    def __getitem__(self, column: str) -> float:
        return float(self.texts[column])


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


def best_of(rows: Sequence[Row], measure: Measure) -> Row | None:
    """The best by one measure, of equals the cheapest; none where none has a value."""
    known = [row for row in rows if not math.isnan(row[measure.column])]
    return max(
        known, key=lambda row: (measure.better * row[measure.column], -row["nfe"]), default=None
    )


def front_of(rows: Sequence[Row], cost: str, measure: Measure) -> list[Row]:
    """The Pareto front, the cheapest first: no other row is as cheap and as good, and more so."""
    front: list[Row] = []
    known = [row for row in rows if not math.isnan(row[measure.column])]
    for row in sorted(known, key=lambda row: (row[cost], -measure.better * row[measure.column])):
        gain = measure.better * (row[measure.column] - front[-1][measure.column]) if front else 1.0
        equal = bool(front) and gain == 0 and row[cost] == front[-1][cost]
        if gain > 0 or equal:
            front.append(row)
    return front


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
        raise jobs.BadInput(f"sweep is {folder}, which is no folder: give `vidfill sweep`'s output")
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


def _unfinished(folder: Path, reason: str) -> jobs.BadInput:
    return jobs.BadInput(
        f"{folder} is no finished sweep ({reason}): give the output folder of `vidfill sweep`; "
        "the same sweep command continues one that was interrupted"
    )
