"""The video whose holes are filled, and its masks.

A frame keeps the pixel format of its file and becomes RGB for the network alone. So what is outside
the hole is never converted, and a lossless codec returns it bit for bit.
"""

from __future__ import annotations

import array
import contextlib
import dataclasses
import itertools
import math
import re
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from av.video.reformatter import ColorRange

from ...data import videos
from ...data.own_masks import OwnMasks
from ...data.videos import UPRIGHT, Header, Mask, Orientation, Pixels, UnreadableVideo
from ...errors import BadInput
from .pixel_formats import common_format, convert


@dataclass(frozen=True)
class Picture:
    """One frame of a video."""

    index: int
    """Its number in the order of display, from 0 at the trim's start."""
    frame: av.VideoFrame
    """In the video's own pixel format, as stored."""
    rgb: Pixels
    """Upright, full range."""


@dataclass(frozen=True)
class Footage:
    """A video file, or a folder of images, or a part of one."""

    path: Path
    height: int
    """Upright, like all pixels and masks."""
    width: int
    rate: Fraction
    """Frames per second; the mean if it varies."""
    time_base: Fraction
    times: array.array
    """When each frame is shown, in units of `time_base`."""
    total: int
    """Frames of the whole video."""
    timed: bool
    """Whether `times` are what the file's frames say: a bare stream of frames says nothing."""
    pixel_aspect: Fraction = Fraction(1)
    """The width of a pixel divided by its height."""
    before: int = 0
    """Frames that the trim leaves out before the first one."""
    orientation: Orientation = UPRIGHT
    """How its stored frames become what is seen."""
    pixel_format: str = ""
    """What all frames are brought to where their pixel formats differ; empty where they do not."""

    @property
    def frames(self) -> int:
        """How many there are."""
        return len(self.times)

    @property
    def trimmed(self) -> bool:
        """Whether this is a part of the video."""
        return self.frames < self.total

    @property
    def start(self) -> Fraction:
        """The time stamp, in seconds, that becomes 0; in a whole video all stay as they are."""
        return self.times[0] * self.time_base if self.before else Fraction(0)

    @property
    def end(self) -> Fraction | float:
        """The time on the file's clock, in seconds, at which sound and subtitles end."""
        return self.times[-1] * self.time_base + 1 / self.rate if self.trimmed else math.inf

    @property
    def duration(self) -> Fraction:
        """In seconds, including the last frame's."""
        return (self.times[-1] - self.times[0]) * self.time_base + 1 / self.rate

    @property
    def variable(self) -> bool:
        """Whether the frame rate varies by more than the rounding of time stamps."""
        gaps = np.diff(np.asarray(self.times))
        return gaps.size > 0 and bool(np.ptp(gaps) > min(2, np.median(gaps) / 2))


def open_footage(path: Path, trim: str = "", frame_rate: Fraction | float = 24.0) -> Footage:
    """Describe a video, all of whose frames are decoded for it: no header is trusted with that.

    Args:
        path: Any file that FFmpeg reads, or a folder of images, which are ordered by name.
        trim: "START-END" in seconds or h:mm:ss after the first frame; either may be omitted.
        frame_rate: Frames per second of a folder of images.

    Raises:
        BadInput: It is no video, is damaged, or the trim leaves nothing.
    """
    if not path.exists():
        raise BadInput(f"{path} does not exist: name a video or a folder of images")
    with saying(path):
        footage = _scan_folder(path, frame_rate) if path.is_dir() else _scan_file(path)
    return _trim(footage, trim) if trim else footage


@contextlib.contextmanager
def saying(path: Path) -> Iterator[None]:
    """Name the video that cannot be read, in a BadInput."""
    try:
        yield
    except UnreadableVideo as error:
        raise BadInput(f"{path} cannot be read: {error}") from error


def _scan_folder(path: Path, frame_rate: Fraction | float) -> Footage:
    rate = Fraction(frame_rate).limit_denominator(1001)
    sizes, formats = [], set()
    for image in videos.list_frames(path):
        frame, rgb = _read_image(image)
        sizes.append(rgb.shape[:2])
        formats.add(frame.format.name)
        if sizes[-1] != sizes[0]:
            raise UnreadableVideo(f"{image.name} has another size than the first image")
    times, (height, width) = array.array("q", range(len(sizes))), sizes[0]
    return Footage(
        path,
        height,
        width,
        rate,
        1 / rate,
        times,
        len(times),
        timed=False,
        pixel_format=common_format(formats),
    )


def _scan_file(path: Path) -> Footage:
    shown: list[int | None] = []
    first, formats, end = None, set(), Fraction(0)
    with videos.open_video(path) as (container, stream):
        rate, time_base = videos.find_rate(stream), stream.time_base or Fraction(1)
        for packet in container.demux():
            if packet.pts is not None:
                end = max(end, (packet.pts + (packet.duration or 0)) * packet.time_base)
            if packet.stream_index == stream.index:
                for frame in videos.decode_packet(packet, len(shown), first):
                    first = first or frame
                    shown.append(frame.pts)
                    formats.add(frame.format.name)
        _refuse_cut(container, stream, end)
        aspect = stream.sample_aspect_ratio or Fraction(1)
    if first is None:
        raise UnreadableVideo("it has no frame")
    orientation = videos.find_orientation(first)
    videos.upright_rgb(first, orientation)  # its colours can be read
    height, width = orientation.size(first)
    times, time_base, timed = _find_times(shown, time_base, rate)
    return Footage(
        path,
        height,
        width,
        rate,
        time_base,
        times,
        len(times),
        timed,
        aspect,
        orientation=orientation,
        pixel_format=common_format(formats),
    )


def _find_times(
    shown: Sequence[int | None], time_base: Fraction, rate: Fraction
) -> tuple[array.array, Fraction, bool]:
    """When frames are shown, in which unit, and whether they say so themselves."""
    stamps = [stamp for stamp in shown if stamp is not None]
    rising = all(later > earlier for earlier, later in itertools.pairwise(stamps))
    if len(stamps) == len(shown) and rising:
        return array.array("q", stamps), time_base, True
    if len(stamps) < len(shown) or time_base * rate == 1:  # it counts frames, as an AVI does
        return array.array("q", range(len(shown))), 1 / rate, False
    ticks = itertools.accumulate(stamps, lambda earlier, stamp: max(earlier + 1, stamp))
    return array.array("q", ticks), time_base, False


def _refuse_cut(
    container: av.container.InputContainer, stream: av.VideoStream, end: Fraction
) -> None:
    """Raise UnreadableVideo if a file, read to its `end` in seconds, is shorter than it says."""
    size = container.size
    if any(entry.pos + entry.size > size for entry in stream.index_entries):
        raise UnreadableVideo("it is cut off: its table of frames names some beyond its end")
    # If Matroska's own duration is missing, FFmpeg guesses one from any known bit rate.
    contexts = [other.codec_context for other in container.streams if other.codec_context]
    stated = Fraction(container.duration or 0, av.time_base)
    known = not any(context.bit_rate for context in contexts)
    if "matroska" in container.format.name and known and end < stated - 1:
        raise UnreadableVideo(f"it is cut off after {float(end):.1f} of {float(stated):.1f} s")


_CLOCK = r"(?:\d+:){0,2}\d+(?:\.\d*)?"  # seconds, m:ss or h:mm:ss


def _trim(footage: Footage, trim: str) -> Footage:
    match = re.fullmatch(f"({_CLOCK})?-({_CLOCK})?", trim, re.ASCII)
    if not match:
        raise BadInput(f'trim is {trim!r}: give START-END, as in "2.5-10", "0:01:30-" or "-5"')
    start, end = (_seconds(clock) if clock else None for clock in match.groups())
    first = footage.times[0]
    seconds = [(time - first) * footage.time_base for time in footage.times]
    kept = [i for i, at in enumerate(seconds) if at >= (start or 0) and (end is None or at < end)]
    if not kept:
        raise BadInput(
            f"trim is {trim!r}, which leaves no frame of {footage.path}: "
            f"it has {float(footage.duration):.2f} seconds"
        )
    part = footage.times[kept[0] : kept[-1] + 1]
    return dataclasses.replace(footage, times=part, before=kept[0])


def _seconds(clock: str) -> Fraction:
    parts = reversed(clock.split(":"))
    return sum((Fraction(part) * 60**power for power, part in enumerate(parts)), Fraction(0))


def read_pictures(footage: Footage, start: int = 0) -> Iterator[Picture]:
    """The frames of a video from number `start` on, one in memory at a time.

    Raises:
        BadInput: The video is damaged, or its size changes.
    """
    with saying(footage.path):
        for index, (frame, rgb) in enumerate(_read_frames(footage)):
            if frame.format.name.startswith("yuvj"):
                frame.color_range = ColorRange.JPEG
            if index >= start:
                seen = videos.upright_rgb(frame, footage.orientation) if rgb is None else rgb
                if footage.pixel_format:
                    frame = _bring(frame, footage)
                yield Picture(index, frame, seen)


def _bring(frame: av.VideoFrame, footage: Footage) -> av.VideoFrame:
    converted = convert(frame, footage.pixel_format)
    converted.pts, converted.time_base = frame.pts, frame.time_base
    converted.duration = frame.duration
    return converted


def _read_frames(footage: Footage) -> Iterator[tuple[av.VideoFrame, Pixels | None]]:
    """The frames, with RGB pixels where those are not read off the frame."""
    if footage.timed:
        since = footage.times[0] if footage.before else None
        for index, frame in enumerate(videos.decode_frames(footage.path, since)):
            if since is not None and index == 0 and frame.pts != since:
                raise UnreadableVideo("it cannot be entered at the trim's start: cut it before")
            if footage.trimmed and (frame.pts is None or frame.pts > footage.times[-1]):
                return
            yield frame, None
        return
    frames: Iterator[tuple[av.VideoFrame, Pixels | None]]
    if footage.path.is_dir():
        frames = map(_read_image, videos.list_frames(footage.path)[footage.before :])
    else:
        decoded = videos.decode_frames(footage.path)
        frames = ((frame, None) for frame in itertools.islice(decoded, footage.before, None))
    for time, (frame, rgb) in zip(footage.times, frames, strict=False):
        frame.pts, frame.time_base = time, footage.time_base
        frame.duration = round(1 / footage.rate / footage.time_base)
        yield frame, rgb


def _read_image(path: Path) -> tuple[av.VideoFrame, Pixels]:
    """An image as it is stored, and as it is seen; the same where EXIF data turn it."""
    with videos.open_image(path) as image:
        rgb = videos.image_rgb(image)
    if videos.is_turned(path):
        return av.VideoFrame.from_ndarray(np.ascontiguousarray(rgb), format="rgb24"), rgb
    try:
        return next(videos.decode_frames(path)), rgb
    except UnreadableVideo as error:
        raise UnreadableVideo(f"{path.name}: {error}") from error


def read_masked(
    footage: Footage, mask: str, *, invert: bool = False, dilate: int = 0, start: int = 0
) -> Iterator[tuple[Picture, Mask]]:
    """Each frame of a video with its mask: see `read_pictures` and `read_masks`.

    Raises:
        BadInput: One of them cannot be read, or ends before the other.
    """
    masks = read_masks(mask, footage, invert=invert, dilate=dilate)
    pairs = itertools.zip_longest(
        read_pictures(footage, start), itertools.islice(masks, start, None)
    )
    for picture, picture_mask in pairs:
        if picture is None or picture_mask is None:
            ended = footage.path if picture is None else mask
            raise BadInput(f"{ended} ends early, before frame {footage.frames}: it is damaged")
        yield picture, picture_mask


def read_masks(
    mask: str, footage: Footage, *, invert: bool = False, dilate: int = 0
) -> Iterator[Mask]:
    """The masks of a video, upright, one for each frame; 1 is the hole.

    Args:
        mask: A video, an image or a folder of images, for the frames of the whole video or of its
            trimmed part, as `data.own_masks` reads them; or a rectangle "x,y,width,height".
        footage: The video.
        invert: Whether black is the hole.
        dilate: Pixels by which the hole is grown, in every direction.

    Raises:
        BadInput: The masks cannot be read, or do not fit the video.
    """
    disc = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * dilate + 1, 2 * dilate + 1))
    for given in _read_given(mask, footage):
        yield cv2.dilate(1 - given if invert else given, disc)


def check_masks(mask: str, footage: Footage) -> None:
    """Read a first mask, and compare all that files say of themselves.

    Raises:
        BadInput: The masks cannot be read, or do not fit the video.
    """
    with contextlib.closing(_read_given(mask, footage)) as masks:
        next(masks)


def _read_given(mask: str, footage: Footage) -> Generator[Mask, None, None]:
    if re.fullmatch(r"\s*-?\d+(\s*,\s*-?\d+){3}\s*", mask, re.ASCII):
        yield from itertools.repeat(_fill_box(mask, footage), footage.frames)
        return
    path = Path(mask)
    if not path.exists():
        raise BadInput(
            f"mask is {path}, which does not exist: name a video, an image or a folder, "
            "or give a rectangle as x,y,width,height in whole pixels"
        )
    is_folder = footage.path.is_dir()
    masks = OwnMasks(
        path,
        Header(footage.total, footage.height, footage.width, footage.rate),
        [image.stem for image in videos.list_frames(footage.path)] if is_folder else (),
        part=range(footage.before, footage.before + footage.frames),
    )
    try:
        read = masks.read(fit="resize", first=footage.before)
        yield from itertools.islice(read, footage.frames)
    except UnreadableVideo as error:
        raise BadInput(f"{footage.path}: {error}") from error


def _fill_box(box: str, footage: Footage) -> Mask:
    x, y, width, height = (int(number) for number in box.split(","))
    inside = x >= 0 and y >= 0 and x + width <= footage.width and y + height <= footage.height
    if not inside or width <= 0 or height <= 0:
        raise BadInput(
            f"mask is {box!r}, x,y,width,height: "
            f"give a rectangle within the {footage.width}x{footage.height} pixels of the video"
        )
    mask = np.zeros((footage.height, footage.width), np.uint8)
    mask[y : y + height, x : x + width] = 1
    return mask
