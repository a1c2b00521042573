"""Masks that the user brings: images, arrays or videos beside the videos they belong to."""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Generator, Iterator
from pathlib import Path

import numpy as np
from jaxtyping import UInt8

from .encode.sources import Source
from .videos import (
    SUFFIXES,
    Fit,
    FrameSize,
    Header,
    UnreadableVideo,
    fit_mask,
    list_frames,
    open_image,
    read_frames,
    read_header,
)

HOLE_ABOVE = 127  # of 255; compression blurs a mask

Hole = UInt8[np.ndarray, "height width"]


def _read_masks(
    source: Source, first: int, size: FrameSize | None, fit: Fit
) -> Generator[Hole, None, None]:
    """A source's own masks from frame `first` on, 1 in the hole, as large as its frames become."""
    header = read_header(source.path)
    masks = _check_masks(source, header)
    size = size or FrameSize(header.width, header.height)
    if isinstance(masks, list):
        for image, used in itertools.groupby(masks[first:]):
            hole = _load_hole(image, source.annotated)
            _check_shape(hole.shape[1], hole.shape[0], header)
            yield from itertools.repeat(fit_mask(hole, size, fit), len(list(used)))
    else:
        with _naming(masks), contextlib.closing(read_frames(masks, first=first)) as frames:
            for pixels in frames:
                yield fit_mask((pixels.max(axis=-1) > HOLE_ABOVE).astype(np.uint8), size, fit)


def _check_masks(source: Source, header: Header) -> Path | list[Path]:
    """The source's mask video, or one image for each of its frames; all that fits is checked.

    Raises:
        UnreadableVideo: there are none, or they are not of as many frames or of another shape.
    """
    masks = source.masks
    if masks is None:
        raise UnreadableVideo("it has no masks of its own")
    if not masks.is_dir() and masks.suffix.lower() in SUFFIXES:
        with _naming(masks):
            found = read_header(masks)
        _check_count(found.frames, header)
        _check_shape(found.width, found.height, header)
        return masks
    images = _images_by_frame(source, header) if masks.is_dir() else [masks] * header.frames
    with open_image(images[0]) as image:
        _check_shape(image.width, image.height, header)
    return images


@contextlib.contextmanager
def _naming(masks: Path) -> Iterator[None]:
    try:
        yield
    except UnreadableVideo as error:
        raise UnreadableVideo(f"of its masks {masks.name}: {error}") from error


def _images_by_frame(source: Source, header: Header) -> list[Path]:
    """One image for each frame out of a folder of masks: by the frames' names, or by order."""
    assert source.masks is not None
    with _naming(source.masks):
        images = {image.stem: image for image in list_frames(source.masks)}
    frames = [image.stem for image in list_frames(source.path)] if source.path.is_dir() else []
    if images.keys().isdisjoint(frames):
        _check_count(len(images), header)
        return list(images.values())
    if stray := images.keys() - set(frames):
        raise UnreadableVideo(f"its mask {min(stray)} has no frame of that name")
    nearest = next(images[name] for name in frames if name in images)
    return [nearest := images.get(name, nearest) for name in frames]


def _check_count(found: int, header: Header) -> None:
    if found != header.frames:
        raise UnreadableVideo(f"it has {header.frames} frames, its masks have {found}")


def _check_shape(width: int, height: int, header: Header) -> None:
    # A smaller copy has its sides rounded to whole pixels.
    if abs(width * header.height - height * header.width) > max(
        header.width, header.height, width, height
    ):
        raise UnreadableVideo(
            f"it is {header.width}x{header.height}, its mask {width}x{height}, another shape"
        )


def _load_hole(path: Path, annotated: bool) -> Hole:
    with open_image(path) as image:
        indexed = image.mode == "P"
        values = np.asarray(image if indexed else image.convert("RGB"))
    highest = values if indexed else values.max(axis=-1)
    return (highest > (0 if indexed or annotated else HOLE_ABOVE)).astype(np.uint8)
