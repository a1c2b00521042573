"""The measures of a sweep: names, directions, and what is best by them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal


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
