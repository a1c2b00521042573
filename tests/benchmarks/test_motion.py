"""The benchmark of propagation, on two small clips: its tables are there, and are so."""

from __future__ import annotations

import re
from pathlib import Path

import cv2
import numpy as np
import pytest
from vidfill.data.videos import write_video

from benchmarks import motion


@pytest.fixture
def videos(tmp_path: Path) -> Path:
    """A picture that pans, and one that stands still."""
    noise = np.random.default_rng(0).normal(0, 1, (96, 160, 3)).astype(np.float32)
    smooth = cv2.GaussianBlur(noise, (0, 0), 2)
    wall = np.rint(128 + 40 * smooth / smooth.std()).clip(0, 255).astype(np.uint8)
    for name, speed in (("pan", 3), ("still", 0)):
        frames = np.stack([wall[:64, speed * t : speed * t + 96] for t in range(6)])
        write_video(tmp_path / f"{name}.mp4", frames, 25.0)
    return tmp_path


def test_flow_is_ahead_where_the_camera_moves(
    videos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert motion.main([str(videos), "--frames", "6", "--masks", "variable"]) == 0
    said = capsys.readouterr().out
    rows = {
        row[0]: [float(cell) for cell in row[2:]]
        for row in re.findall(
            r"^\| (pan|still|mean) \| (variable) " + r"\| ([\d.]+) " * 3, said, flags=re.MULTILINE
        )
    }
    assert rows["pan"][2] > rows["pan"][1] + 6
    assert rows["still"][2] > 35  # classic's copies are exact, 100 dB
    assert rows["mean"][2] == pytest.approx((rows["pan"][2] + rows["still"][2]) / 2, abs=0.1)
    for part in ("flow, of which DIS", "| 0.9–1 |", "OpenCV"):
        assert part in said


def test_a_folder_without_videos_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        motion.main([str(tmp_path)])
    assert "holds no video" in capsys.readouterr().err
