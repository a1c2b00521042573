from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2
from vidfill.sampling.sweep.measures import COMPARED, clip_columns, measures_with
from vidfill.sampling.sweep.results import read_sweep
from vidfill.sampling.sweep.tensorboard import write_board

BASELINES = ("fill", "classic", "mean", "autoencoder")
SCHEDULES = {"ddpm:5": "a", "ddpm:5+resample(n=4)": "b", "ddpm:9": "c"}
CLIP, FRAMES, SIDE = "a_00000_stationary", 3, 8


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A finished sweep, its numbers and pictures made up."""
    random = np.random.default_rng(0)
    measures = measures_with([])
    (tmp_path / "comparison.csv").write_text(",".join(COMPARED))
    columns = {
        "results.csv": ["schedule", *(measure.column for measure in measures)],
        "clips.csv": clip_columns(measures),
    }
    lines = {name: [",".join(own)] for name, own in columns.items()}
    for number, name in enumerate((*BASELINES, *SCHEDULES)):
        for file, own in columns.items():
            numbers = {column: f"{random.uniform(1, 9):.6g}" for column in own}
            numbers |= {
                "schedule": name,
                "clip": CLIP,
                "completion": "0",
                "nfe": str(number),
                "ssim_65": "nan",
            }
            lines[file].append(",".join(numbers[column] for column in own))
    for name, written in lines.items():
        (tmp_path / name).write_text("\n".join(written) + "\n")
    for slug in ("truth", "masked", "mask", *BASELINES, *SCHEDULES.values()):
        (tmp_path / "frames" / slug).mkdir(parents=True)
        strip = random.integers(0, 256, (SIDE, FRAMES * SIDE, 3), np.uint8)
        cv2.imwrite(str(tmp_path / "frames" / slug / f"{CLIP}.png"), strip)
    about = dict.fromkeys(
        ("model", "shards", "autoencoder", "seconds", "device", "timesteps", "reference"), ""
    )
    entries = [{"schedule": name, "slug": slug} for name, slug in SCHEDULES.items()]
    about |= {
        "networks": [],
        "completions": 1,
        "without_value": {},
        "masks": ["stationary"],
        "kept": [CLIP],
        "schedules": entries,
    }
    about |= {"clip": {"frames": FRAMES, "height": SIDE, "width": SIDE}}
    about |= {"baselines": list(BASELINES)}
    (tmp_path / "sweep.json").write_text(json.dumps(about))
    return tmp_path


def events(folder: Path) -> EventAccumulator:
    found = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 0})
    return found.Reload()


def test_tensorboard_has_the_values_of_results_csv_at_their_nfe(folder: Path) -> None:
    sweep = read_sweep(folder)
    write_board(sweep)
    for row in (*sweep.baselines, *sweep.schedules):
        found = events(folder / "tensorboard" / "schedules" / sweep.slug(row.name))
        assert "ssim_65" not in found.Tags()["scalars"]  # it has no value
        for column in ("psnr", "temporal_error", "seconds_per_clip"):
            (event,) = found.Scalars(column)
            assert event.step == row["nfe"]
            assert event.value == pytest.approx(row[column], rel=1e-6)
    kinds = {path.name for path in (folder / "tensorboard" / "by_nfe").iterdir()}
    assert kinds == {"ddpm", "ddpm+resample"}
    plain = events(folder / "tensorboard" / "by_nfe" / "ddpm").Scalars("psnr")
    assert [event.step for event in plain] == [4, 6]


def test_tensorboard_shows_the_kept_frames_and_what_a_schedule_is(folder: Path) -> None:
    sweep = read_sweep(folder)
    write_board(sweep)
    for run, slug in (("schedules/b", "b"), ("clips/truth", "truth"), ("schedules/fill", "fill")):
        (image,) = events(folder / "tensorboard" / run).Images(CLIP)
        assert image.encoded_image_string == sweep.strip(slug, CLIP).read_bytes()
        assert (image.width, image.height) == (FRAMES * SIDE, SIDE)
    found = events(folder / "tensorboard" / "schedules" / "b")
    content = found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    said = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    assert said["steps"].number_value == 5
    assert said["moves"].string_value == "resample(n=4)"


def test_a_board_that_is_there_is_left_as_it_is(folder: Path) -> None:
    sweep = read_sweep(folder)
    write_board(sweep)
    before = sorted((folder / "tensorboard").rglob("*"))
    write_board(sweep)
    assert sorted((folder / "tensorboard").rglob("*")) == before
