"""The clips of a video, decoded and fitted to the size asked for."""

from __future__ import annotations

import contextlib
from collections.abc import Generator
from typing import NamedTuple

from ..videos import (
    Fit,
    Frames,
    FrameSize,
    Masks,
    UnreadableVideo,
    clips_of,
    read_frames,
    read_header,
)
from .plan import ClipRange
from .sources import Source


class Clip(NamedTuple):
    """Consecutive frames of a video."""

    source: Source
    first: int  # the number of its first frame in the video
    frames: Frames
    mask: Masks | None  # its own, where that was asked for


def read_clips(
    part: ClipRange,
    length: int,
    stride: int,
    size: FrameSize | None = None,
    fit: Fit = "crop",
    own_masks: bool = False,
) -> Generator[Clip, None, None]:
    """A range of a video's clips, in memory one at a time; nothing after the last is decoded.

    What comes before the range is decoded and dropped, so that its frames are those that reading
    the video from its start gives, to the bit.

    Args:
        part: what to read.
        length: frames of a clip.
        stride: frames from one clip's start to the next's.
        size: what each frame becomes; None keeps the frames as they are.
        fit: see `videos.read_frames`; masks are cropped alike, and take the nearest value.
        own_masks: whether the clips come with the video's own masks.

    Raises:
        UnreadableVideo: the video, or its own masks, cannot be read, are damaged, or end before
            the range does. This may come after some of the clips.
    """
    source, start = part.source, part.first_clip * stride
    with contextlib.ExitStack() as opened:
        frames = read_frames(source.path, size, fit, start)
        clips = clips_of(
            opened.enter_context(contextlib.closing(frames)), length, stride, part.clips
        )
        if own_masks:
            masks = source.own_masks(read_header(source.path)).read(size, fit, start)
            opened.enter_context(contextlib.closing(masks))
            mask_clips = clips_of(masks, length, stride, part.clips)
        made = 0
        for first, pixels in clips:
            mask = next(mask_clips, (first, None))[1] if own_masks else None
            if own_masks and mask is None:
                raise UnreadableVideo(f"its masks end before frame {start + first + length}")
            yield Clip(source, start + first, pixels, mask)
            made += 1
    if made < (part.clips or 1):
        raise UnreadableVideo(f"it ends before frame {start + made * stride + length}")
