"""The clips of a video, decoded and fitted to the size asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from ..videos import (
    Fit,
    FrameSize,
    UnreadableVideo,
    clips_of,
    read_frames,
    read_header,
)
from .plan import Piece


class Clip(NamedTuple):
    """One clip of a piece."""

    first: int  # the number of its first frame in the video
    frames: UInt8[np.ndarray, "frames height width 3"]
    mask: UInt8[np.ndarray, "frames height width"] | None  # its own, where that was asked for


def read_clips(
    piece: Piece,
    length: int,
    stride: int,
    size: FrameSize | None = None,
    fit: Fit = "crop",
    own_masks: bool = False,
) -> Generator[Clip, None, None]:
    """The clips of a piece, in memory one at a time; nothing after the last is decoded.

    What comes before the piece is decoded and dropped, so that its frames are those that reading
    the video from its start gives, to the bit.

    Args:
        piece: what to read.
        length: frames of a clip.
        stride: frames from one clip's start to the next's.
        size: what each frame becomes; None keeps the frames as they are.
        fit: see `videos.read_frames`; masks are cropped alike, and take the nearest value.
        own_masks: whether the clips come with the source's own masks.

    Raises:
        UnreadableVideo: the video, or its own masks, cannot be read, are damaged, or end before
            the piece does. This may come after some of the clips.
    """
    source, start = piece.source, piece.first_clip * stride
    with contextlib.ExitStack() as opened:
        pixels = opened.enter_context(
            contextlib.closing(read_frames(source.path, size, fit, start))
        )
        holes = None
        if own_masks:
            own = source.own_masks(read_header(source.path))
            masks = opened.enter_context(contextlib.closing(own.read(size, fit, start)))
            holes = clips_of(masks, length, stride, piece.clips)
        made = 0
        for first, frames in clips_of(pixels, length, stride, piece.clips):
            mask = None
            if holes is not None:
                _, mask = next(holes, (first, None))
                if mask is None:
                    raise UnreadableVideo(f"its masks end before frame {start + first + length}")
            yield Clip(start + first, frames, mask)
            made += 1
    if made < (piece.clips or 1):
        raise UnreadableVideo(f"it ends before frame {start + made * stride + length}")
