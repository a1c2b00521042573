from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from vidfill.data import videos
from vidfill.jobs import BadInput


def make_frames(count: int = 6, height: int = 32, width: int = 48) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    ramp = np.stack([4 * x, 6 * y, np.full_like(x, 90)], axis=-1)
    return np.stack([ramp + 2 * i for i in range(count)]).astype(np.uint8)


def test_written_video_reads_back_nearly_the_same(tmp_path: Path) -> None:
    frames = make_frames()
    videos.write_video(tmp_path / "a.mp4", frames, Fraction(25, 2))
    again, fps = videos.read_video(tmp_path / "a.mp4")
    assert again.shape == frames.shape
    assert fps == Fraction(25, 2)
    assert np.abs(again.astype(int) - frames).mean() < 3


def test_same_frames_give_the_same_file(tmp_path: Path) -> None:
    written = set()
    for _ in range(20):  # x264's default differs about once in three
        videos.write_video(tmp_path / "a.mp4", make_frames(), 12.5)
        written.add((tmp_path / "a.mp4").read_bytes())
    assert len(written) == 1


def test_odd_size_is_refused_and_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="even"):
        videos.write_video(tmp_path / "a.mp4", make_frames(height=31), 25.0)
    assert not list(tmp_path.iterdir())


def test_size_takes_the_middle_square(tmp_path: Path) -> None:
    videos.write_video(tmp_path / "a.mp4", make_frames(height=32, width=64), 25.0, crf=0)
    whole, _ = videos.read_video(tmp_path / "a.mp4")
    square, _ = videos.read_video(tmp_path / "a.mp4", size=32)
    np.testing.assert_array_equal(square, whole[:, :, 16:48])
    small, _ = videos.read_video(tmp_path / "a.mp4", size=16)
    assert small.shape == (6, 16, 16, 3)


def test_header_says_what_decoding_finds(tmp_path: Path) -> None:
    videos.write_video(tmp_path / "a.mp4", make_frames(), 25.0)
    assert videos.read_header(tmp_path / "a.mp4") == (6, 32, 48)


def test_a_file_that_is_no_video_says_so(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"not a video")
    for read in (videos.read_video, videos.read_header):
        with pytest.raises(videos.UnreadableVideo, match="Invalid data"):
            read(tmp_path / "a.mp4")


def test_clips_are_whole_and_follow_the_stride() -> None:
    assert list(videos.cut_clips(47, 20, 20)) == [0, 20]
    assert list(videos.cut_clips(40, 20, 10)) == [0, 10, 20]
    assert list(videos.cut_clips(19, 20, 20)) == []


def touch(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


@pytest.mark.parametrize(
    ("train", "validation"), [("video_train", "video_validation"), ("train", "val")]
)
def test_splits_are_found_by_folder_names(tmp_path: Path, train: str, validation: str) -> None:
    a, b = touch(tmp_path / train / "1" / "a.mp4"), touch(tmp_path / validation / "b.mkv")
    touch(tmp_path / train / "notes.txt")
    assert videos.find_splits(tmp_path) == {"train": [a], "validation": [b]}


def test_a_folder_without_split_names_is_all_train(tmp_path: Path) -> None:
    b, a = touch(tmp_path / "b.mp4"), touch(tmp_path / "a.MP4")
    assert videos.find_splits(tmp_path) == {"train": [a, b]}


def test_folders_that_give_no_videos_are_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no folder"):
        videos.find_splits(tmp_path / "absent")
    with pytest.raises(BadInput, match="holds no video"):
        videos.find_splits(tmp_path)
    touch(tmp_path / "train" / "a.mp4")
    touch(tmp_path / "video_train" / "a.mp4")
    with pytest.raises(BadInput, match="both"):
        videos.find_splits(tmp_path)
