"""What a finished sweep's folder says, and what its columns mean."""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from einops import rearrange
from jaxtyping import UInt8

from .. import jobs


@dataclass(frozen=True)
class Measure:
    """A column of results.csv as a reader wants it."""

    column: str
    title: str
    unit: str
    digits: int
    better: int
    """1: higher is better; -1: lower is better; 0: neither."""
    meaning: str

    @property
    def arrow(self) -> str:
        return {1: "↑", -1: "↓", 0: ""}[self.better]


MEASURES = (
    Measure("nfe", "NFE", "per clip", 0, -1, "network evaluations that one clip costs"),
    Measure(
        *("seconds_per_clip", "Time", "s per clip", 2, -1),
        "for the schedules, and for mean: the network's share of the wall time of sampling, an "
        "evaluation shared by several clips split evenly among them, without decoding; for the "
        "other baselines: the wall time of computing the clip",
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
        *("colour_error", "Colour error", "8-bit units", 2, -1),
        "|mean of result − truth over the hole's pixels of all frames|, averaged over R, G and B: "
        "how far the colour of the whole hole is off",
    ),
    Measure(
        *("temporal_error", "Temporal error", "8-bit units", 2, -1),
        "mean |change of the result − change of the truth| from one frame to the next, over the "
        "hole's pixels: flicker, and motion that is not the true one",
    ),
    Measure("clips", "Clips", "", 0, 0, "how many a row is averaged over"),
)


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
    hole_psnr: Mapping[tuple[str, str], float]
    """Decibels by (schedule, clip)."""

    @functools.cached_property
    def best(self) -> Row:
        """The schedule with the highest PSNR of the hole; of equals the cheapest."""
        return max(self.schedules, key=lambda row: (row["psnr_hole"], -row["nfe"]))

    @property
    def kept(self) -> Sequence[str]:
        return self.about["kept"]

    def slug(self, name: str) -> str:
        """The folder of a baseline's or a schedule's frames."""
        return {entry["schedule"]: entry["slug"] for entry in self.about["schedules"]}.get(
            name, name
        )

    def frames(self, slug: str, clip: str) -> UInt8[np.ndarray, "frames height width 3"]:
        strip = cv2.imread(str(self.strip(slug, clip)))
        size = self.about["clip"]
        wanted = (size["height"], size["frames"] * size["width"], 3)
        if strip is None or strip.shape != wanted:
            raise jobs.BadInput(
                f"{self.strip(slug, clip)} is no strip of {size['frames']} frames of "
                f"{size['width']}x{size['height']}: run the sweep again into a new folder"
            )
        return rearrange(strip[..., ::-1], "h (f w) rgb -> f h w rgb", f=size["frames"])

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
    rows = [
        Row(line["schedule"], line)
        for line in _read_csv(folder, "results.csv", ["schedule", *(m.column for m in MEASURES)])
    ]
    named = [row.name for row in rows]
    for name in [*about["baselines"], *(entry["schedule"] for entry in about["schedules"])]:
        if name not in named:
            raise _unfinished(folder, f"results.csv has no row {name}")
    per_clip = [m.column for m in MEASURES if m.column != "clips"]
    sweep = Sweep(
        folder,
        about,
        baselines=[row for row in rows if row.name in about["baselines"]],
        schedules=[row for row in rows if row.name not in about["baselines"]],
        hole_psnr={
            (line["schedule"], line["clip"]): float(line["psnr_hole"])
            for line in _read_csv(folder, "clips.csv", ["schedule", "clip", *per_clip])
        },
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
    for field in (*wanted, "baselines", "timesteps", "seconds", "device"):
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
