"""Finished sweeps with made-up numbers and pictures, and their pages."""

from __future__ import annotations

import csv
import json
import re
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from xml.etree import ElementTree

import cv2
import numpy as np
import pytest
from vidfill.sampling.report.drawings import plan_drawings
from vidfill.sampling.report.page import render_page
from vidfill.sampling.report.run import cheapest_first
from vidfill.sampling.sweep.kept import write_spread
from vidfill.sampling.sweep.measures import clip_columns, measures_with
from vidfill.sampling.sweep.results import COMPARISON_COLUMNS, read_sweep

FRAMES, SIZE = 4, 16
BASELINES = ("fill", "classic", "mean", "autoencoder")
SCHEDULES = ("ddpm:5", "ddpm:5+resample(n=4)", "ddpm:5+resample(n=10)", "ddim:5")
KEPT = ("a_00000_stationary", "b_00000_variable")
ABOUT = {
    "model": "runs/train",
    "shards": "runs/shards",
    "autoencoder": {"name": "shipped", "sha256": "0123456789abcdef"},
    "networks": [],
    "completions": 1,
    "without_value": {},
    "masks": ["stationary", "variable"],
    "clip": {"frames": FRAMES, "height": SIZE, "width": SIZE},
    "baselines": list(BASELINES),
    "timesteps": 1000,
    "seconds": 90.0,
    "device": "cpu",
}


@pytest.fixture(scope="session")
def make_sweep() -> Callable[..., Path]:
    """Write a finished sweep into a folder."""
    return _make_sweep


def _make_sweep(
    folder: Path,
    schedules: Sequence[str] = SCHEDULES,
    kept: Sequence[str] = KEPT,
    verdicts: Mapping[tuple[str, str], str] = types.MappingProxyType({}),
    **about: object,
) -> Path:
    """Each schedule costs 5 more than the row before, and is better than the reference by each
    measure unless `verdicts` says otherwise; `about` is for sweep.json."""
    random = np.random.default_rng(0)
    slugs = {name: re.sub(r"[^\w.]+", "-", name).strip("-") for name in schedules}
    written = {**ABOUT, "reference": schedules[0], "kept": list(kept), **about}
    reference, completions = str(written["reference"]), int(str(written["completions"]))
    measures = measures_with([], completions)
    columns = ["schedule", *(measure.column for measure in measures)]
    of_clips = clip_columns(measures)
    rows, clips = [], []
    for number, name in enumerate((*BASELINES, *schedules)):
        texts = [f"{value:.6g}" for value in random.uniform(1, 40, len(columns))]
        row = dict(zip(columns, texts, strict=True))
        row |= {"schedule": name, "nfe": str(5 * number), "clips": "7"}
        rows.append(row)
        clips += [row | {"clip": clip, "completion": "0"} for clip in kept]
    write_csv(folder / "results.csv", columns, rows)
    write_csv(folder / "clips.csv", of_clips, clips)
    figures = {"difference": "-1.5", "low": "-2", "high": "-1", "improved": "0.875"}
    compared = [
        {
            **figures,
            "masks": masks,
            "schedule": name,
            "reference": reference,
            "measure": measure,
            "clips": "7",
            "margin": "0.25",
            "verdict": verdicts.get((name, measure), "better"),
        }
        for masks in written["masks"]
        for name in schedules
        for measure in ("temporal_error", "colour_error")
        if name != reference
    ]
    write_csv(folder / "comparison.csv", COMPARISON_COLUMNS, compared)
    for slug in ("truth", "masked", "mask", *BASELINES, *slugs.values()):
        for clip in kept:
            strip = random.integers(0, 256, (SIZE, FRAMES * SIZE, 3), np.uint8)
            if slug == "mask":
                strip[:, :] = 0
                strip[4:8, 4:8] = 255
            picture = folder / "frames" / slug / f"{clip}.png"
            picture.parent.mkdir(parents=True, exist_ok=True)
            assert cv2.imwrite(str(picture), strip)
            if completions > 1:
                smooth = cv2.blur(strip[..., 0].astype(float), (5, 5))
                spread = np.stack(np.split(smooth, FRAMES, axis=1))
                write_spread(folder / "spread" / slug / f"{clip}.png", spread)
    entries = [{"schedule": name, "slug": slug, "nfe": 5} for name, slug in slugs.items()]
    (folder / "sweep.json").write_text(json.dumps({**written, "schedules": entries}))
    return folder


def write_csv(path: Path, columns: Sequence[str], rows: Sequence[Mapping[str, str]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, extrasaction="ignore")
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture(scope="session")
def change_results() -> Callable[..., None]:
    """Rewrite a sweep's results.csv: what a function makes of its rows."""

    def change(folder: Path, edit: Callable[[list[dict[str, str]]], list[dict[str, str]]]) -> None:
        with (folder / "results.csv").open(newline="") as file:
            rows = list(csv.DictReader(file))
        write_csv(folder / "results.csv", list(rows[0]), edit(rows))

    return change


@pytest.fixture(scope="session")
def sweep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a sweep, to be read only."""
    return _make_sweep(tmp_path_factory.mktemp("sweep"))


@pytest.fixture(scope="session")
def read_page() -> Callable[[str], ElementTree.Element]:
    """A page's elements; that is XML, too, apart from its style and its script."""

    def read(page: str) -> ElementTree.Element:
        for tag in ("style", "script"):
            assert page.count(f"<{tag}>") == 1
            page = re.sub(f"<{tag}>.*</{tag}>", f"<{tag}/>", page, flags=re.DOTALL)
        return ElementTree.fromstring(page.removeprefix("<!DOCTYPE html>"))

    return read


@pytest.fixture(scope="session")
def page_of(read_page: Callable[[str], ElementTree.Element]) -> Callable[..., ElementTree.Element]:
    """The elements of a sweep's page, its figures left empty."""

    def read(folder: Path) -> ElementTree.Element:
        found = cheapest_first(read_sweep(folder))
        drawings = plan_drawings(found)
        return read_page(render_page(found, drawings, [b""] * len(drawings)))

    return read


@pytest.fixture(scope="session")
def page(sweep: Path, page_of: Callable[[Path], ElementTree.Element]) -> ElementTree.Element:
    """The elements of the page of `sweep`."""
    return page_of(sweep)
