"""`vidfill demo` at its smallest size: the whole path by the real jobs."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
from vidfill.train.demo import main

SMALLEST = [
    *("--clips", "2", "--validation", "1", "--steps", "2"),
    *("--schedules", "ddim:2 ddim:2+resample(n=1)"),
]


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
        *("fill", "classic", "mean", "autoencoder"),
        *("ddim:2", "ddim:2+resample(n=1)"),
    ]
    assert [row["nfe"] for row in rows] == ["0", "0", "1", "0", "2", "4"]
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
