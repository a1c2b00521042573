"""Which part of the frame the network sees: a box around the holes."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

from ...data.videos import FrameSize, Mask

CONTEXT = 2  # the network sees this many times the height and width of the holes
ROOMY = 2  # a box is kept while it is at most this many times as large as a new one


class Box(NamedTuple):
    """A part of the frame, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def crop(self, frame: np.ndarray) -> np.ndarray:
        """This part of a frame or a mask: a view."""
        return frame[self.top : self.top + self.height, self.left : self.left + self.width]

    def holds(self, other: Box) -> bool:
        """Whether the other lies within this one."""
        return (
            self.top <= other.top
            and self.left <= other.left
            and other.top + other.height <= self.top + self.height
            and other.left + other.width <= self.left + self.width
        )


def choose_box(mask: Mask, area: FrameSize, before: Box | None = None) -> Box:
    """The part of a frame that the network sees of a window.

    It has the proportions of `area`, is at least that large, and is `CONTEXT` times as high and as
    wide as the holes of all frames in `mask`, as far as the frame reaches. The box before is kept,
    so that the picture does not jump, while it shows half of that context and is not much too
    large.
    """
    (top, bottom), (left, right) = (
        np.flatnonzero(mask.any(axis=axis))[[0, -1]].tolist() for axis in (1, 0)
    )
    tight = Box(top, left, bottom - top + 1, right - left + 1)
    height = max(area.height, CONTEXT * tight.height)
    width = max(area.width, CONTEXT * tight.width)
    height, width = (
        max(height, math.ceil(width * area.height / area.width)),
        max(width, math.ceil(height * area.width / area.height)),
    )
    box = _around(tight, height, width, mask.shape)
    half_height, half_width = ((1 + CONTEXT) * side // 2 for side in (tight.height, tight.width))
    least = _around(tight, half_height, half_width, mask.shape)
    if before and before.holds(least) and _pixels(before) <= ROOMY * _pixels(box):
        return before
    return box


def _around(inner: Box, height: int, width: int, frame: tuple[int, ...]) -> Box:
    """A box of this size around the middle of `inner`, moved and cut to fit into the frame."""
    height, width = min(height, frame[0]), min(width, frame[1])
    top = inner.top + (inner.height - height) // 2
    left = inner.left + (inner.width - width) // 2
    top, left = min(max(top, 0), frame[0] - height), min(max(left, 0), frame[1] - width)
    return Box(top, left, height, width)


def _pixels(box: Box) -> int:
    return box.height * box.width


def choose_size(box: Box, area: FrameSize, unit: int) -> FrameSize:
    """The size to scale a box to: about the pixels of `area`, each side a multiple of `unit`."""
    scale = math.sqrt(area.height * area.width / _pixels(box))
    height, width = (max(1, round(side * scale / unit)) * unit for side in (box.height, box.width))
    return FrameSize(width, height)
