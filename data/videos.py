"""Videos: files that FFmpeg reads and folders of images, frame by frame, and cut into clips."""

from __future__ import annotations

import collections
import contextlib
import itertools
import re
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NamedTuple

import av
import numpy as np
from av.sidedata.sidedata import Type as SideData
from av.stream import Disposition
from av.video.reformatter import ColorRange, Colorspace
from jaxtyping import Int32, UInt8
from PIL import ExifTags, Image, ImageOps

from ..errors import BadInput
from ..files import aside

CONTAINERS = """
3g2 3gp asf avi divx dv f4v flv gif m2ts m2v m4v mj2 mjpeg mkv mov mp4 mpeg mpg mts mxf nut
ogm ogv qt rm rmvb ts vob webm wmv y4m
"""
SUFFIXES = frozenset(f".{name}" for name in CONTAINERS.split())
IMAGE_SUFFIXES = frozenset({".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp"})

# No playlist leads to another file or host, and % in an image's name counts no sequence.
AS_NAMED = {"protocol_whitelist": "file", "pattern_type": "none"}

PLAYLISTS = ("concat", "dash", "hls", "imf", "sdp")

LEAD = 10  # seconds: longer than what a key frame leaves damaged behind it

Fit = Literal["crop", "resize"]
Pixels = UInt8[np.ndarray, "height width 3"]
Frames = UInt8[np.ndarray, "frames height width 3"]
Mask = UInt8[np.ndarray, "height width"]  # 1 in the hole
Masks = UInt8[np.ndarray, "frames height width"]


class UnreadableVideo(Exception):
    """Why a video gives no frames, in one line without its name."""


@dataclass(frozen=True)
class FrameSize:
    """What frames are brought to, in pixels."""

    width: int
    height: int

    def __str__(self) -> str:
        return f"{self.width}x{self.height}"

    @classmethod
    def parse(cls, text: str) -> FrameSize | None:
        """Of "128", a square; of "432x240", width by height; of "", which keeps frames as they are.

        Raises:
            BadInput: `text` is none of these.
        """
        if not text:
            return None
        match = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", text, re.ASCII)
        if not match:
            raise BadInput(
                f'size is {text!r}: give "128" for a square, or "432x240", width by height'
            )
        width, height = match[1], match[2] or match[1]
        return cls(int(width), int(height))


class Header(NamedTuple):
    """What a video is, with no more than its first frame decoded."""

    frames: int
    height: int  # upright, as the frames are read
    width: int
    fps: Fraction


def read_header(path: Path, frame_rate: Fraction | float = 24.0, *, exact: bool = False) -> Header:
    """A video's length, size and rate; `frame_rate` is that of a folder of images.

    A container that does not say its length has its packets counted, which reads the whole file
    but decodes nothing. Some packets show no frame, so that a video may have fewer frames than
    that; `exact` decodes and counts all that it shows.

    Raises:
        UnreadableVideo: it is no video, or its first frame is damaged.
    """
    if path.is_dir():
        images = list_frames(path)
        with open_image(images[0]) as image:
            fps = Fraction(frame_rate).limit_denominator(1001)
            return Header(len(images), image.height, image.width, fps)
    with open_video(path) as (container, stream):
        rate = find_rate(stream)
        packets, shown, first = 0, 0, None
        for packet in container.demux(stream):
            packets += packet.size > 0
            for frame in packet.decode() if exact or first is None else ():
                first = first or frame
                shown += 1
            if first and stream.frames and not exact:
                break
        if first is None:
            raise UnreadableVideo("it has no frame")
        height, width = find_orientation(first).size(first)
        return Header(shown if exact else stream.frames or packets, height, width, rate)


def find_rate(stream: av.VideoStream) -> Fraction:
    """A stream's frames per second.

    Raises:
        UnreadableVideo: it has none.
    """
    mean, least = stream.average_rate, stream.guessed_rate
    # Of raw DV FFmpeg says a mean of 60,000, and rightly that time stamps come 25 times a second.
    rate = least if mean and least and mean > 1.5 * least else mean or least
    if not rate:
        raise UnreadableVideo("it has no frame rate")
    return Fraction(rate)


@contextlib.contextmanager
def open_video(path: Path) -> Iterator[tuple[av.container.InputContainer, av.VideoStream]]:
    """A file that FFmpeg reads, and its first video stream that is more than a cover.

    Raises:
        UnreadableVideo: FFmpeg cannot read it, or there is no video in it.
    """
    if path.exists() and not path.is_file():
        raise UnreadableVideo("it is no file")
    try:
        # A title in some old encoding is no reason to refuse the pictures.
        with av.open(name_file(path), metadata_errors="replace", options=AS_NAMED) as container:
            if container.format.name.split(",")[0] in PLAYLISTS:
                raise UnreadableVideo("it is a list of other files")
            streams = (
                stream
                for stream in container.streams.video
                if not stream.disposition & Disposition.attached_pic
            )
            if (stream := next(streams, None)) is None:
                raise UnreadableVideo("it has no video stream")
            yield container, stream
    except (av.error.FFmpegError, OSError) as error:
        raise UnreadableVideo(f"FFmpeg says: {error.strerror or error}") from error


def name_file(path: Path) -> str:
    """What FFmpeg takes for the file of this name, even where it looks like a URL: "12:30.mkv"."""
    return f"file:{path}"


@contextlib.contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """An image, whole and turned upright as its EXIF data tell; its mode is the file's.

    Raises:
        UnreadableVideo: it is no image, or is damaged.
    """
    try:
        with Image.open(path) as image:
            image.load()
            ImageOps.exif_transpose(image, in_place=True)
            yield image
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or error
        raise UnreadableVideo(f"{path.name} is no whole image ({reason})") from error


def is_turned(path: Path) -> bool:
    """Whether an image's EXIF data ask that it be turned or mirrored."""
    with Image.open(path) as image:
        return image.getexif().get(ExifTags.Base.Orientation, 1) != 1


def image_rgb(image: Image.Image) -> Pixels:
    """The pixels of an image as RGB, of 16 bits the upper 8; what is transparent is shown."""
    if image.mode.startswith("I;16"):
        grey = (np.asarray(image) >> 8).astype(np.uint8)
        return np.repeat(grey[..., None], 3, axis=-1)
    return np.asarray(image.convert("RGB"))


def list_images(folder: Path) -> list[Path]:
    """The images that lie directly in `folder`, by name; numbers in names count as numbers."""
    found = [
        path
        for path in folder.iterdir()
        if path.suffix.lower() in IMAGE_SUFFIXES and not path.name.startswith(".")
    ]

    def with_numbers(path: Path) -> tuple[list[str | int], str]:
        parts = re.split(r"(\d+)", path.name)
        return [int(part) if i % 2 else part for i, part in enumerate(parts)], path.name

    return sorted(found, key=with_numbers)


def list_frames(folder: Path) -> list[Path]:
    """The images of a folder that is a video: one or more, one for each name.

    Raises:
        UnreadableVideo: there are none, or two of one name.
    """
    images = list_images(folder)
    if not images:
        raise UnreadableVideo("its folder holds no image")
    stems = {image.stem: image for image in images}
    if twice := [image for image in images if stems[image.stem] != image]:
        raise UnreadableVideo(
            f"its folder holds both {twice[0].name} and {stems[twice[0].stem].name}"
        )
    return images


def read_frames(
    path: Path, size: FrameSize | None = None, fit: Fit = "crop", first: int = 0
) -> Generator[Pixels, None, None]:
    """A video's frames, RGB and upright, from frame `first` on, one in memory at a time.

    `path` is any file that FFmpeg reads, whose first video stream is taken, or a folder of images,
    which are taken by name. Frames before `first` are decoded and dropped. The others become of
    `size`, if that is given: `fit` "crop" takes the middle of a frame in its proportions, "resize"
    all of it; what is taken is shrunk by area average and grown by cubic interpolation.

    Raises:
        UnreadableVideo: it is no video, is damaged, or changes its size on the way.
    """
    pixels: Iterable[Pixels]
    if path.is_dir():
        pixels = _read_images(path, first)
    else:
        pixels = (
            rgb for _, rgb in upright_frames(itertools.islice(decode_frames(path), first, None))
        )
    for frame in pixels:
        yield frame if size is None else fit_frame(frame, size, fit)


def _read_images(folder: Path, first: int) -> Iterator[Pixels]:
    shape = None
    for path in list_frames(folder)[first:]:
        with open_image(path) as image:
            pixels = image_rgb(image)
        shape = shape or pixels.shape
        if pixels.shape != shape:
            raise UnreadableVideo("its frames change their size")
        yield pixels


def decode_frames(path: Path, since: int | None = None) -> Generator[av.VideoFrame, None, None]:
    """A file's frames as they are stored, one in memory at a time.

    Frames before the time stamp `since` are left out, and what lies well before it is not read
    where the file can be entered there.

    Raises:
        UnreadableVideo: it is no video, is damaged, or changes its size on the way.
    """
    first, index = None, 0
    with open_video(path) as (container, stream):
        if since is not None:
            enter(container, stream, since)
        for packet in container.demux(stream):
            for frame in decode_packet(packet, index, first, since):
                first = first or frame
                yield frame
                index += 1
    if first is None:
        raise UnreadableVideo("it has no frame")


def decode_packet(
    packet: av.Packet, index: int, first: av.VideoFrame | None, since: int | None = None
) -> Iterator[av.VideoFrame]:
    """The frames that a packet completes, which are often none; those before `since` are left out.

    `index` is the number of the next frame, and `first` the first one of all.

    Raises:
        UnreadableVideo: they are damaged, or of another size than the first.
    """
    for frame in packet.decode():
        assert isinstance(frame, av.VideoFrame)
        if since is not None and (frame.pts is None or frame.pts < since):
            continue
        if frame.is_corrupt or packet.is_corrupt:
            raise UnreadableVideo(f"it is damaged at about frame {index}")
        if first and (frame.height, frame.width) != (first.height, first.width):
            raise UnreadableVideo("its frames change their size")
        yield frame


def enter(container: av.container.InputContainer, stream: av.VideoStream, since: int) -> None:
    """Go to a key frame so long before a time stamp that frames are whole by then."""
    ahead = since - round(LEAD / (stream.time_base or 1))
    if ahead > (stream.start_time or 0):
        container.seek(ahead, stream=stream)


def upright_frames(
    frames: Iterable[av.VideoFrame],
) -> Iterator[tuple[av.VideoFrame, Pixels]]:
    """Each frame of a video with what is seen of it, turned as the first one's file asks."""
    orientation = None
    for frame in frames:
        orientation = orientation or find_orientation(frame)
        yield frame, upright_rgb(frame, orientation)


def upright_rgb(frame: av.VideoFrame, orientation: Orientation) -> Pixels:
    """A frame as it is seen: turned, RGB."""
    try:
        pixels = frame.to_ndarray(format="rgb24")
    except OSError:
        reason = f"its colours ({frame.format.name}, matrix {frame.colorspace}) cannot be read"
        raise UnreadableVideo(reason) from None
    return np.ascontiguousarray(orientation.show(pixels))


class Orientation(NamedTuple):
    """How stored frames become what is seen: a phone held upright writes frames that lie."""

    lies: bool = False  # rows are shown as columns
    rows: int = 1  # the step between rows, then: -1 shows the last one first
    columns: int = 1

    def size(self, frame: av.VideoFrame) -> tuple[int, int]:
        """Height and width of a stored frame as it is seen."""
        return (frame.width, frame.height) if self.lies else (frame.height, frame.width)

    def show(self, stored: np.ndarray) -> np.ndarray:
        """A stored frame or mask as it is seen."""
        turned = np.swapaxes(stored, 0, 1) if self.lies else stored
        return turned[:: self.rows, :: self.columns]

    def store(self, shown: np.ndarray) -> np.ndarray:
        """A frame or mask as it is stored: the inverse of `show`."""
        turned = shown[:: self.rows, :: self.columns]
        return np.swapaxes(turned, 0, 1) if self.lies else turned


UPRIGHT = Orientation()


def find_orientation(frame: av.VideoFrame) -> Orientation:
    """The orientation that a file's display matrix asks for.

    Raises:
        UnreadableVideo: it turns by no multiple of a right angle.
    """
    matrix = display_matrix(frame)
    if matrix is None:
        return UPRIGHT
    # Of a stored x and y: shown x = a·x + c·y, shown y = b·x + d·y.
    a, b, _, c, d = (int(value) for value in np.sign(matrix[:5]))
    if (a or d) and (b or c):
        raise UnreadableVideo(f"its frames are turned by {frame.rotation} degrees")
    return Orientation(a == 0, (b if a == 0 else d) or 1, (c if a == 0 else a) or 1)


def display_matrix(frame: av.VideoFrame) -> Int32[np.ndarray, "9"] | None:
    """What a file says of how its frames are shown, in FFmpeg's fixed point.

    To be asked of one frame, not of all: PyAV keeps a frame that was asked until Python looks for
    cycles.
    """
    try:
        side_data: Any = frame.side_data
        matrix = side_data.get(SideData.DISPLAYMATRIX)
    except ValueError:  # a photograph's EXIF data, which PyAV does not know
        return None
    return None if matrix is None else np.frombuffer(matrix, np.int32)


def read_video(
    path: Path, size: FrameSize | None = None, fit: Fit = "crop"
) -> tuple[Frames, Fraction]:
    """All frames of a video at once, as `read_frames` gives them, and its frames per second.

    Raises:
        UnreadableVideo: it is no video, is damaged, or changes its size on the way.
    """
    return np.stack(list(read_frames(path, size, fit))), read_header(path).fps


def fit_frame(
    pixels: Pixels, size: FrameSize, fit: Fit
) -> UInt8[np.ndarray, "{size.height} {size.width} 3"]:
    """One frame brought to `size`: see `read_frames`."""
    import cv2

    taken = _crop(pixels, size) if fit == "crop" else pixels
    height, width = taken.shape[:2]
    # One side may shrink while the other grows.
    least = (min(width, size.width), min(height, size.height))
    shrunk = cv2.resize(taken, least, interpolation=cv2.INTER_AREA)
    return cv2.resize(shrunk, (size.width, size.height), interpolation=cv2.INTER_CUBIC)


def fit_mask(
    mask: Mask, size: FrameSize, fit: Fit
) -> UInt8[np.ndarray, "{size.height} {size.width}"]:
    """A mask of a frame, brought to `size` as `fit_frame` brings the frame; the nearest value."""
    import cv2

    taken = _crop(mask, size) if fit == "crop" else mask
    return cv2.resize(taken, (size.width, size.height), interpolation=cv2.INTER_NEAREST_EXACT)


def _crop(pixels: np.ndarray, size: FrameSize) -> np.ndarray:
    """The largest middle part in `size`'s proportions."""
    height, width = pixels.shape[:2]
    kept_height, kept_width = height, width
    if width * size.height > height * size.width:
        kept_width = max(1, round(Fraction(height * size.width, size.height)))
    else:
        kept_height = max(1, round(Fraction(width * size.height, size.width)))
    top, left = (height - kept_height) // 2, (width - kept_width) // 2
    return pixels[top : top + kept_height, left : left + kept_width]


def cut_clips(video_frames: int, frames: int, stride: int) -> range:
    """First frames of the whole clips in a video: one every `stride` frames, none past its end."""
    return range(0, video_frames - frames + 1, stride)


def clips_of(
    frames: Iterable[UInt8[np.ndarray, "..."]], length: int, stride: int, clips: int | None = None
) -> Iterator[tuple[int, UInt8[np.ndarray, "frames ..."]]]:
    """The clips that `cut_clips` names, each with its first frame's number; at most `clips`.

    Between two clips no more than `length` frames are held, and no frame past the last clip is
    asked for.
    """
    window: collections.deque[np.ndarray] = collections.deque(maxlen=length)
    made = 0
    for last, frame in enumerate(frames):
        window.append(frame)
        first = last + 1 - length
        if first >= 0 and first % stride == 0:
            yield first, np.stack(window)
            made += 1
            if made == clips:
                return


def write_video(path: Path, frames: Frames, fps: Fraction | float, crf: int = 18) -> None:
    """Write RGB frames as H.264 (yuv420p, BT.601); the file appears whole or not at all.

    The same frames give the same bytes with the same FFmpeg, on any number of cores. The path's
    suffix chooses the container, `.mp4` as a rule; its folder is made. `crf` is x264's rate factor,
    0 (lossless) to 51; 18 shows no difference to the eye.

    Raises:
        BadInput: an odd height or width.
    """
    height, width = frames.shape[1:3]
    if height % 2 or width % 2:
        raise BadInput(
            f"{path} would be {width}x{height}: H.264 in 4:2:0 asks for an even width and height"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    rate = Fraction(fps).limit_denominator(1001)
    with aside(path) as partial, av.open(str(partial), "w") as container:
        # x264's macroblock tree gives small frames other bytes from run to run.
        options = {"crf": str(crf), "mbtree": "0"}
        stream = container.add_stream("libx264", rate=rate, options=options)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        # With several threads x264's bits depend on their number.
        stream.codec_context.thread_count = 1
        stream.codec_context.colorspace = Colorspace.SMPTE170M
        stream.codec_context.color_range = ColorRange.MPEG
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            converted = frame.reformat(
                format="yuv420p",
                dst_colorspace=Colorspace.SMPTE170M,
                dst_color_range=ColorRange.MPEG,
            )
            converted.pts = index
            container.mux(stream.encode(converted))
        container.mux(stream.encode())
