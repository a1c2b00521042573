"""Videos made by PyAV, since FFmpeg's program may be missing, and how they are filled."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from vidfill.sampling.inpaint.output import open_output
from vidfill.sampling.inpaint.video import Footage, open_footage, read_pictures

SIZE = (48, 32)  # width, height


def _planes_of(frame: av.VideoFrame) -> list[np.ndarray]:
    """The samples of each plane, without what pads its rows; those of a position side by side."""
    planes = []
    for index, plane in enumerate(frame.planes):
        parts = [part for part in frame.format.components if part.plane == index]
        step = {"bgr0": 4, "bgra": 4}.get(
            frame.format.name, sum((part.bits + 7) // 8 for part in parts)
        )
        rows = np.frombuffer(plane, np.uint8).reshape(plane.height, plane.line_size)
        planes.append(rows[:, : plane.width * step].reshape(plane.height, plane.width, step).copy())
    return planes


def _make_noise(pixel_format: str, size: tuple[int, int], seed: int) -> av.VideoFrame:
    """Samples of any value that the format can hold."""
    random = np.random.default_rng(seed)
    frame = av.VideoFrame(*size, pixel_format)
    bits = frame.format.components[0].bits
    for plane in frame.planes:
        if bits > 8:
            samples = random.integers(0, 1 << bits, plane.buffer_size // 2, dtype=np.uint16)
        else:
            samples = random.integers(0, 256, plane.buffer_size, dtype=np.uint8)
            if pixel_format == "bgr0":
                samples[3::4] = 0
        plane.update(samples.tobytes())
    return frame


def _make_video(
    path: Path,
    frames: Sequence[av.VideoFrame] | None = None,
    *,
    rate: Fraction | int = 25,
    times: Sequence[int] | None = None,
    codec: str = "ffv1",
    sound: str = "",
    rotation: int | None = None,
    colours: tuple[int, int, int, int] | None = None,
    pixel_aspect: Fraction | None = None,
) -> Path:
    """`times` are in hundredths of a second; `colours` range, matrix, primaries and curve."""
    frames = frames or [_make_noise("yuv420p", SIZE, seed) for seed in range(6)]
    with av.open(str(path), "w") as container:
        time_base = Fraction(1, 100) if times else 1 / Fraction(rate)
        stream = container.add_stream(codec, rate=rate, time_base=time_base)
        stream.width, stream.height = frames[0].width, frames[0].height
        stream.pix_fmt = frames[0].format.name
        context = stream.codec_context
        if colours:
            context.color_range, context.colorspace = colours[:2]
            context.color_primaries, context.color_trc = colours[2:]
        if pixel_aspect:
            context.sample_aspect_ratio = pixel_aspect
        if rotation is not None:
            stream.set_display_rotation(rotation)
        voice = container.add_stream(sound, rate=8000) if sound else None
        for index, frame in enumerate(frames):
            frame.pts, frame.time_base = times[index] if times else index, time_base
            if colours:
                frame.color_range, frame.colorspace = colours[:2]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
        if voice is not None:
            last = (times[-1] if times else len(frames) - 1) * time_base + 1 / Fraction(rate)
            for samples in _make_sound(round(last * 8000), voice.codec_context.format.name):
                container.mux(voice.encode(samples))
            container.mux(voice.encode())
    return path


def _make_sound(length: int, sample_format: str) -> Iterator[av.AudioFrame]:
    tone = (8000 * np.sin(np.arange(length) / 5)).astype(np.int16)
    for first in range(0, length, 1024):
        part = tone[first : first + 1024]
        both = np.stack([part, part])
        planar = sample_format == "fltp"
        samples = both.astype(np.float32) / 32768 if planar else both.T.reshape(1, -1)
        frame = av.AudioFrame.from_ndarray(
            np.ascontiguousarray(samples), format=sample_format, layout="stereo"
        )
        frame.sample_rate, frame.pts, frame.time_base = 8000, first, Fraction(1, 8000)
        yield frame


def _make_masks(footage: Footage) -> np.ndarray:
    """A box at odd places, that moves, upright."""
    masks = np.zeros((footage.frames, footage.height, footage.width), np.uint8)
    for index, mask in enumerate(masks):
        mask[7:20, 5 + index : 30 + index] = 1
    return masks


def _fill(
    footage: Footage, out: Path, codec: str = "", masks: np.ndarray | None = None, red: int = 200
) -> Footage:
    """Write a video with its holes in one colour."""
    masks = _make_masks(footage) if masks is None else masks
    with open_output(footage, out, codec) as write:
        for picture in read_pictures(footage):
            mask = masks[picture.index]
            rgb = np.where(mask[..., None] == 1, np.uint8([red, 60, 30]), picture.rgb)
            write(picture, rgb, mask)
    return open_footage(out, frame_rate=footage.rate)


@pytest.fixture(scope="session")
def planes_of() -> Callable[[av.VideoFrame], list[np.ndarray]]:
    return _planes_of


@pytest.fixture(scope="session")
def make_noise() -> Callable[..., av.VideoFrame]:
    return _make_noise


@pytest.fixture(scope="session")
def make_video() -> Callable[..., Path]:
    return _make_video


@pytest.fixture(scope="session")
def make_masks() -> Callable[[Footage], np.ndarray]:
    return _make_masks


@pytest.fixture(scope="session")
def fill() -> Callable[..., Footage]:
    return _fill


@pytest.fixture(scope="session")
def times_of() -> Callable[[Footage], list[Fraction]]:
    def read(footage: Footage) -> list[Fraction]:
        frames = (picture.frame for picture in read_pictures(footage))
        return [frame.pts * frame.time_base for frame in frames]

    return read
