"""`vidfill demo` at its smallest size: the whole path by the real jobs."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from vidfill import cli
from vidfill.demo import main

SHARED = Path(__file__).parents[2] / "shared"

SMALLEST = [
    *("--clips", "2", "--validation", "1", "--steps", "2"),
    *("--schedules", "ddim:2 ddim:2+resample(n=1)"),
]


@pytest.mark.slow
def test_demo_makes_everything_and_continues_where_it_was(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "demo"
    assert main(["--out", str(out), *SMALLEST]) == 0
    said = capsys.readouterr().out
    assert str(out / "report" / "index.html") in said
    assert f"tensorboard --logdir {out / 'train' / 'tensorboard'}" in said
    with (out / "sweep" / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["schedule"] for row in rows] == [
        *("fill", "classic", "flow", "mean", "autoencoder"),
        *("ddim:2", "ddim:2+resample(n=1)"),
    ]
    assert [row["nfe"] for row in rows] == ["0", "0", "0", "1", "0", "2", "4"]
    assert {row["clips"] for row in rows} == {"2"}
    before = (out / "sweep" / "results.csv").read_bytes()
    assert main(["--out", str(out), *SMALLEST]) == 0
    assert (out / "sweep" / "results.csv").read_bytes() == before


def test_demo_refuses_a_folder_of_something_else(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos" / "mine.txt").write_text("keep me")
    assert main(["--out", str(tmp_path), *SMALLEST]) == 2
    assert "choose another folder" in capsys.readouterr().err
    assert (tmp_path / "videos" / "mine.txt").read_text() == "keep me"


@pytest.mark.slow
@pytest.mark.skipif(not SHARED.is_dir(), reason="no real videos in ../shared")
def test_the_path_runs_on_real_videos(tmp_path: Path) -> None:
    """Rendered H.264 clips and TAESD, by the commands of docs/results.md."""
    for split, name in (("train", "video_00000.mp4"), ("val", "video_00900.mp4")):
        (tmp_path / "videos" / split).mkdir(parents=True)
        source = SHARED / "videos" / "collisions" / split / name
        (tmp_path / "videos" / split / name).symlink_to(source)
    shards, run, swept = (str(tmp_path / name) for name in ("shards", "run", "sweep"))
    taesd = str(SHARED / "weights" / "taesd")
    fast = ["--precision", "bfloat16"]
    steps = ["--steps", "1", "--batch_size", "2", "--preview.every", "0"]
    videos = str(tmp_path / "videos")
    masks = ["--masks", "stationary variable", "--masks_per_clip", "2"]
    assert not cli.main(["encode", videos, shards, "--autoencoder", taesd, *masks, *fast])
    assert not cli.main(["train", shards, run, *steps, *fast])
    assert not cli.main(
        ["sweep", run, shards, swept, "--examples", "2", "--schedules", "ddim:1", *fast]
    )
    assert not cli.main(["report", swept])
    with (tmp_path / "sweep" / "results.csv").open(newline="") as file:
        psnr = {row["schedule"]: float(row["psnr_hole"]) for row in csv.DictReader(file)}
    assert psnr["autoencoder"] > 30 > psnr["fill"]
