"""The measures of a sweep: names, directions, and what is best by them."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Measure:
    """A column of results.csv; docs/metrics.md has the exact definitions."""

    column: str
    title: str
    unit: str
    digits: int
    better: int
    """1: higher is better; -1: lower is better; 0: neither."""
    margin: float = 0.0
    """The difference that counts as none, in the unit; 0 where there is no such difference."""
    needs: str = ""
    """The network without which the column is left out: lpips or i3d."""
    of: Literal["completion", "example", "set"] = "completion"
    """What has one value: a completion, averaged over an example's; all completions of an example;
    all examples of a schedule."""
    best_of: str = ""
    """The column whose best value among an example's completions this is."""

    @property
    def arrow(self) -> str:
        return {1: "↑", -1: "↓", 0: ""}[self.better]

    @property
    def meaning(self) -> str:
        if self.best_of:
            return f"{BY_COLUMN[self.best_of].title} of an example's best completion by it"
        return MEANINGS[self.column]


# The margins come from what rounding and an autoencoder cost, not from what schedules reached
# (docs/metrics.md). FVD and VFID have none: their scale depends on the number of examples.
MEASURES = (
    Measure("nfe", "NFE", "evaluations", 0, -1),
    Measure("seconds_per_clip", "Time", "s", 2, -1),
    Measure("lpips", "LPIPS", "0 at best", 4, -1, margin=0.002, needs="lpips"),
    Measure("temporal_error", "Temporal error", "8-bit units", 2, -1, margin=0.25),
    Measure("colour_error", "Colour error", "8-bit units", 2, -1, margin=0.5),
    Measure("flicker", "Flicker", "8-bit units", 2, -1, margin=0.1),
    Measure("seam_error", "Seam error", "8-bit units", 2, -1, margin=0.25),
    Measure("warping_error", "Warping error", "of [0, 1]²", 6, 0, margin=1e-5),
    Measure("psnr", "PSNR", "dB", 2, 1, margin=0.25),
    Measure("psnr_hole", "PSNR of the hole", "dB", 2, 1, margin=0.25),
    Measure("ssim", "SSIM", "1 at best", 4, 1, margin=0.002),
    Measure("ssim_65", "SSIM 65", "1 at best", 4, 1, margin=0.002),
    Measure("fvd", "FVD", "of the set", 1, -1, needs="i3d", of="set"),
    Measure("vfid", "VFID", "of the set", 2, -1, needs="i3d", of="set"),
    Measure("clips", "Examples", "", 0, 0),
)
DIVERSITY = Measure("diversity", "Diversity", "8-bit units", 2, 0, margin=0.5, of="example")
MEANINGS = {
    "nfe": "the network evaluations of one completion",
    "seconds_per_clip": "of one completion; for the schedules and for mean: the network's share of "
    "the wall time of sampling, where an evaluation of several is split evenly among them, without "
    "decoding; for the other baselines: the wall time of computing it",
    "lpips": "how different the whole frames look: LPIPS 0.1 with AlexNet, averaged over frames",
    "temporal_error": "mean |change of the result − change of the truth| from one frame to the "
    "next, over the hole's pixels: flicker, and motion that differs from the true one",
    "colour_error": "|mean of result − truth over the hole's pixels of all frames|, averaged over "
    "R, G and B: how far the colour of the whole hole is off",
    "flicker": "how much the mean colour error of the hole jumps from one frame to the next",
    "seam_error": "mean ||step of the result| − |step of the truth|| across the hole's border",
    "warping_error": "mean squared difference of each frame and the next one warped back along the "
    "truth's DIS flow; a blurred result has less than the truth, so lower is not better",
    "psnr": "10·log10(255² / mean squared error) of each whole frame, averaged over the frames, "
    "where a frame without error counts as 100",
    "psnr_hole": "the same over the hole's pixels only; frames without a hole are left out",
    "ssim": "structural similarity of each whole frame, in a Gaussian window of 11×11 pixels with "
    "σ = 1.5, averaged over RGB and frames",
    "ssim_65": "the same in a flat window of 65×65 pixels, as papers of video inpainting use it",
    "fvd": "Fréchet distance between the I3D logits of a schedule's completions and of the true "
    "clips; comparable only at an equal number of examples",
    "vfid": "the same between the averages of I3D's last layer before its classifier",
    "clips": "how many a row is averaged over",
    "diversity": "root mean squared standard deviation of the hole's pixels over the completions "
    "of an example; a model that knows what it does not know has 1/√2 of its completions' root "
    "mean squared error",
}
BY_COLUMN = {measure.column: measure for measure in MEASURES}
LEADING = ("lpips", "temporal_error", "colour_error")  # what schedules are judged by first


def measures_with(networks: Collection[str], completions: int = 1) -> list[Measure]:
    """The columns of a sweep with these networks and this number of completions."""
    found = [measure for measure in MEASURES if not measure.needs or measure.needs in networks]
    if completions == 1:
        return found
    bests = [
        dataclasses.replace(
            measure,
            column=f"best_{measure.column}",
            title=f"{measure.title}, best",
            unit=f"of {completions}",
            of="example",
            best_of=measure.column,
        )
        for measure in found
        if measure.column in (*LEADING, "psnr_hole")
    ]
    return [*found[:-1], *bests, DIVERSITY, found[-1]]


def clip_columns(measures: Sequence[Measure]) -> list[str]:
    """The columns of clips.csv."""
    own = [m.column for m in measures if m.of == "completion" and m.column != "clips"]
    return ["schedule", "clip", "completion", *own]


@dataclass(frozen=True)
class ResultRow:
    """A line of results.csv."""

    name: str
    """A baseline or a schedule."""
    texts: Mapping[str, str]

    def __getitem__(self, column: str) -> float:
        return float(self.texts[column])


def best_of(rows: Sequence[ResultRow], measure: Measure) -> ResultRow | None:
    """The best by one measure, of equals the cheapest; None if none has a value."""
    known = [row for row in rows if not math.isnan(row[measure.column])]
    return max(
        known, key=lambda row: (measure.better * row[measure.column], -row["nfe"]), default=None
    )


def front_of(rows: Sequence[ResultRow], cost: str, measure: Measure) -> list[ResultRow]:
    """The Pareto front, the cheapest first: no other row is as cheap and as good, and more so."""
    front: list[ResultRow] = []
    known = [row for row in rows if not math.isnan(row[measure.column])]
    for row in sorted(known, key=lambda row: (row[cost], -measure.better * row[measure.column])):
        gain = measure.better * (row[measure.column] - front[-1][measure.column]) if front else 1.0
        equal = bool(front) and gain == 0 and row[cost] == front[-1][cost]
        if gain > 0 or equal:
            front.append(row)
    return front
