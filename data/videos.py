"""Video files: found, read, cut into clips and written."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import NamedTuple

import av
import numpy as np
from av.video.reformatter import ColorRange, Colorspace
from jaxtyping import UInt8

from .. import jobs

SUFFIXES = frozenset({".avi", ".m4v", ".mkv", ".mov", ".mp4", ".mpeg", ".mpg", ".webm"})
SPLITS = {
    "train": ("video_train", "train"),
    "validation": ("video_validation", "validation", "val"),
}


class UnreadableVideo(Exception):
    """Why a file gives no frames, in one line without the file's name."""


def find_splits(root: Path) -> dict[str, list[Path]]:
    """The videos under `root`, sorted, by split.

    "train" is the folder `video_train` or `train`, "validation" is `video_validation`,
    `validation` or `val` (CLEVRER's names first). Where neither exists, every video under `root`
    belongs to the one split "train". Hidden files are left out, folders are searched to the bottom.

    Raises:
        jobs.BadInput: `root` is no folder, one split has two folders, or a folder has no video.
    """
    if not root.is_dir():
        raise jobs.BadInput(f"videos is {root}, which is no folder: name a folder of videos")
    folders = {}
    for split, names in SPLITS.items():
        present = [name for name in names if (root / name).is_dir()]
        if len(present) > 1:
            raise jobs.BadInput(
                f"{root} has both {' and '.join(present)} for the split {split}: keep one of them"
            )
        if present:
            folders[split] = root / present[0]
    return {split: _list_videos(folder) for split, folder in (folders or {"train": root}).items()}


def find_outside(root: Path, splits: Mapping[str, Sequence[Path]]) -> list[Path]:
    """The videos under `root` that are in none of its `splits`, sorted."""
    inside = {path for listed in splits.values() for path in listed}
    return [path for path in _walk(root) if path not in inside]


def _walk(folder: Path) -> list[Path]:
    return sorted(
        Path(parent) / name
        for parent, _, names in os.walk(folder, followlinks=True)
        for name in names
        if Path(name).suffix.lower() in SUFFIXES and not name.startswith(".")
    )


def _list_videos(folder: Path) -> list[Path]:
    found = _walk(folder)
    if not found:
        raise jobs.BadInput(
            f"{folder} holds no video (looked for {', '.join(sorted(SUFFIXES))}): "
            "name a folder that does"
        )
    return found


class Header(NamedTuple):
    """What a file says of its video, before anything is decoded."""

    frames: int | None  # None where the container does not say
    height: int
    width: int


def read_header(path: Path) -> Header:
    """A video's length and size, read in constant time.

    Raises:
        UnreadableVideo: the file is no video.
    """
    with _open(path) as (_, stream):
        return Header(stream.frames or None, stream.height, stream.width)


@contextlib.contextmanager
def _open(path: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    try:
        with av.open(str(path)) as container:
            if not container.streams.video:
                raise UnreadableVideo("it has no video stream")
            yield container, container.streams.video[0]
    except (av.error.FFmpegError, OSError) as error:
        raise UnreadableVideo(f"FFmpeg says: {error.strerror or error}") from error


def read_video(
    path: Path, size: int | None = None
) -> tuple[UInt8[np.ndarray, "frames height width 3"], Fraction]:
    """All frames of a video, RGB, and its frames per second.

    Args:
        path: any file that FFmpeg reads; its first video stream is taken.
        size: pixels of the square that each frame becomes: its middle square, resized (area
            average where it shrinks). None keeps the frames as they are.

    Raises:
        UnreadableVideo: the file is no video, is damaged, or changes its size on the way.
    """
    with _open(path) as (container, stream):
        fps = stream.average_rate or stream.guessed_rate
        frames = [_to_square(frame, size) for frame in container.decode(stream)]
    if not fps:
        raise UnreadableVideo("it has no frame rate")
    if not frames:
        raise UnreadableVideo("it has no frame")
    if len({frame.shape for frame in frames}) > 1:
        raise UnreadableVideo("its frames change their size")
    return np.stack(frames), Fraction(fps)


def _to_square(frame: av.VideoFrame, size: int | None) -> UInt8[np.ndarray, "height width 3"]:
    pixels = frame.to_ndarray(format="rgb24")
    if size is None:
        return pixels
    import cv2

    side = min(pixels.shape[:2])
    top, left = (pixels.shape[0] - side) // 2, (pixels.shape[1] - side) // 2
    square = pixels[top : top + side, left : left + side]
    shrinks = cv2.INTER_AREA if size < side else cv2.INTER_CUBIC
    return cv2.resize(square, (size, size), interpolation=shrinks)


def cut_clips(video_frames: int, frames: int, stride: int) -> range:
    """First frames of the whole clips in a video: one every `stride` frames, none past its end."""
    return range(0, video_frames - frames + 1, stride)


def write_video(
    path: Path,
    frames: UInt8[np.ndarray, "frames height width 3"],
    fps: Fraction | float,
    crf: int = 18,
) -> None:
    """Write RGB frames as H.264 (yuv420p, BT.601); the file appears whole or not at all.

    The same frames give the same bytes with the same FFmpeg, on any number of cores.

    Args:
        path: its suffix chooses the container, `.mp4` as a rule; its folder is made.
        frames: height and width even, as 4:2:0 asks for.
        fps: frames per second.
        crf: x264's rate factor, 0 (lossless) to 51; 18 shows no difference to the eye.

    Raises:
        jobs.BadInput: an odd height or width.
    """
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise jobs.BadInput(
            f"{path} would be {width}x{height}: H.264 in 4:2:0 asks for an even width and height"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    rate = Fraction(fps).limit_denominator(1001)
    with jobs.aside(path) as partial, av.open(str(partial), "w") as container:
        # x264's macroblock tree gives small frames other bytes from run to run.
        options = {"crf": str(crf), "mbtree": "0"}
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # With several threads x264's bits depend on their number.
        stream.codec_context.thread_count = 1
        stream.codec_context.colorspace = Colorspace.SMPTE170M
        stream.codec_context.color_range = ColorRange.MPEG
        for pixels in _yuv_frames(frames):
            container.mux(stream.encode(pixels))
        container.mux(stream.encode())


def _yuv_frames(frames: np.ndarray) -> Iterator[av.VideoFrame]:
    for index, pixels in enumerate(frames):
        frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
        converted = frame.reformat(
            format="yuv420p",
            dst_colorspace=Colorspace.SMPTE170M,
            dst_color_range=ColorRange.MPEG,
        )
        converted.pts = index
        yield converted
