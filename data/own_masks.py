"""Masks that a user brings along with a video: another video, one image, or a folder of images.

`vidfill encode --masks own` and `vidfill inpaint --mask` read them here, by the same rules.

- The hole is white: where the largest of red, green and blue is at least half of 255, so that what
  a codec leaves around edges is on its proper side. In an image with a palette the hole is every
  entry but the first, which is the background, as in the annotations of DAVIS; only where the first
  entry is white itself is such an image read by its colours. `all_but_zero` makes the hole whatever
  is not 0 in any image, for annotations that number objects in grey. Elsewhere dark areas that
  are not black are refused: they are such numbers. Where an image is transparent in parts and of
  one colour, the hole is what is opaque.
- Masks may be larger or smaller than the video if they have its shape. Each pixel takes the nearest
  value.
- There is one mask for each frame, or one image for all. Images named as the video's own images
  belong to those; a frame without one takes the nearest mask before it, else the nearest after.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Generator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Bool, UInt, UInt8

from .videos import (
    IMAGE_SUFFIXES,
    Fit,
    FrameSize,
    Header,
    Mask,
    UnreadableVideo,
    decode_frames,
    fit_mask,
    list_frames,
    open_image,
    read_header,
    upright_frames,
)

WHITE = 128  # of 255
SHADE = 64  # from which on what is dark is a shade of grey, and no number of an object
MOST_OBJECTS = 16  # values in an image whose dark areas are numbers of objects, not shades
LOSSY_IMAGES = ("JPEG", "WEBP")


@dataclass(frozen=True)
class OwnMasks:
    """Where a video's masks are, and what they have to fit."""

    path: Path
    video: Header
    frame_names: Sequence[str] = ()  # of a video that is a folder of images, without suffixes
    part: range | None = None  # frames that masks may be for, if not for all
    all_but_zero: bool = False  # the masks are annotations

    def check(self) -> None:
        """Read a first mask, and compare what the files' headers say with the video.

        Raises:
            UnreadableVideo: the masks cannot be read, or do not fit the video.
        """
        with contextlib.closing(self.read()) as masks:
            next(masks)

    def read(
        self, size: FrameSize | None = None, fit: Fit = "crop", first: int = 0
    ) -> Generator[Mask, None, None]:
        """The masks, upright, 1 in the hole, one for each frame, in memory one at a time.

        They begin with the video's frame `first`, and are brought to `size` (None is the video's)
        as `videos.read_frames` brings its frames.

        Raises:
            UnreadableVideo: the masks cannot be read, or do not fit the video.
        """
        size = size or FrameSize(self.video.width, self.video.height)
        try:
            if self.path.is_dir() or self.path.suffix.lower() in IMAGE_SUFFIXES:
                for image, repeated in itertools.groupby(self._images_by_frame()[first:]):
                    mask = fit_mask(self._load(image), size, fit)
                    yield from itertools.repeat(mask, len(list(repeated)))
            else:
                frames = itertools.islice(decode_frames(self.path), self._skip(first), None)
                for frame, rgb in upright_frames(frames):
                    values = rgb.max(axis=-1)
                    lossless = not frame.format.name.startswith("yuv")
                    yield fit_mask(_find_white(values, lossless, "it"), size, fit)
        except UnreadableVideo as error:
            raise UnreadableVideo(f"its masks {self.path.name}: {error}") from error

    def _images_by_frame(self) -> list[Path]:
        if not self.path.is_dir():
            return [self.path] * self.video.frames
        listed = list_frames(self.path)
        named = {image.stem: image for image in listed}
        if named.keys().isdisjoint(self.frame_names):
            return listed[:1] * self._find_first(len(listed)) + listed
        if stray := named.keys() - set(self.frame_names):
            raise UnreadableVideo(f"no frame has the name {min(stray)}")
        nearest = next(named[name] for name in self.frame_names if name in named)
        return [nearest := named.get(name, nearest) for name in self.frame_names]

    def _find_first(self, masks: int) -> int:
        """The frame that the first of so many masks is for."""
        if masks == self.video.frames:
            return 0
        if self.part and masks == len(self.part):
            return self.part.start
        raise UnreadableVideo(
            f"there are {masks} for {len(self.part or range(self.video.frames))} frames: "
            "give one for each frame, or one image for all"
        )

    def _load(self, path: Path) -> Mask:
        with open_image(path) as image:
            self._refuse_other_shape(image.width, image.height)
            palette = image.getpalette()
            if palette and (self.all_but_zero or max(palette[:3]) < WHITE):
                return (np.asarray(image) > 0).astype(np.uint8)
            if "A" in image.getbands() or "transparency" in image.info:
                rgba = np.asarray(image.convert("RGBA"))
                if rgba[..., 3].min() < 255:
                    return _find_shape(rgba, path.name)
            is_wide = image.mode.startswith("I;16")
            values = np.asarray(image if is_wide else image.convert("RGB"))
            is_lossless = image.format not in LOSSY_IMAGES
        if self.all_but_zero:
            return (values.reshape(*values.shape[:2], -1).max(axis=-1) > 0).astype(np.uint8)
        brightest = values >> 8 if is_wide else values.max(axis=-1)
        return _find_white(brightest, is_lossless, path.name)

    def _skip(self, first: int) -> int:
        """How many frames of a mask video, which fits, come before the one for frame `first`."""
        header = read_header(self.path, exact=True)
        self._refuse_other_shape(header.width, header.height)
        return first - self._find_first(header.frames)

    def _refuse_other_shape(self, width: int, height: int) -> None:
        video = self.video
        # A smaller copy has its sides rounded to whole pixels.
        longest = max(video.width, video.height, width, height)
        if abs(width * video.height - height * video.width) > longest:
            raise UnreadableVideo(
                f"they have {width}x{height} pixels, the video {video.width}x{video.height} as it "
                "is seen, another shape: scale or turn the masks"
            )


def _find_shape(rgba: UInt8[np.ndarray, "height width 4"], name: str) -> Mask:
    """The hole of an image that is transparent in parts: what is opaque, or what is white."""
    opaque = rgba[..., 3] >= WHITE
    colours = rgba[..., :3].reshape(-1, 3)
    white = rgba[..., :3].max(axis=-1) >= WHITE
    if (colours == colours[0]).all() or (white == opaque).all():
        return opaque.astype(np.uint8)
    raise UnreadableVideo(
        f"{name} has a shape in its transparency and another in its colours: "
        "save it without transparency, white where the hole is"
    )


def _find_white(brightest: UInt[np.ndarray, "height width"], is_lossless: bool, name: str) -> Mask:
    if is_lossless:  # a codec may leave grey around edges
        _refuse_numbers(brightest, name)
    return (brightest >= WHITE).astype(np.uint8)


def _refuse_numbers(brightest: UInt[np.ndarray, "height width"], name: str) -> None:
    """Refuse an image in which something is dark but not black, and all of one value."""
    count = np.bincount(brightest.ravel(), minlength=WHITE)
    numbers = np.flatnonzero(count[:SHADE])
    numbers = numbers[numbers > 0]
    if numbers.size and not count[SHADE:].any():
        raise UnreadableVideo(
            f"{name} holds nothing brighter than {numbers[-1]}: white is the hole, so write 255 "
            f"where it says {numbers[0]}"
        )
    if np.count_nonzero(count[:WHITE]) < MOST_OBJECTS:
        for number in numbers:
            if _is_flat(brightest == number):
                raise UnreadableVideo(
                    f"{name} has areas of {number}, which is neither black nor white: write 255 "
                    "where the hole is, and 0 elsewhere"
                )


def _is_flat(area: Bool[np.ndarray, "height width"]) -> bool:
    """Whether somewhere 3 by 3 pixels are in the area, which those along an edge are not."""
    import cv2

    return bool(cv2.erode(area.astype(np.uint8), np.ones((3, 3), np.uint8), borderValue=0).any())
