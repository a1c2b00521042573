"""Which part of the frame the network sees: a box around the holes."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from jaxtyping import UInt8

from ...data.videos import FrameSize

Pixels = UInt8[np.ndarray, "height width 3"]
Hole = UInt8[np.ndarray, "height width"]

CONTEXT = 2  # the network sees so many times the sides of what the holes take up
ROOMY = 2  # the box before is kept while it is at most so many times as large as a new one


class Box(NamedTuple):
    """A part of the frame, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def of(self, frame: np.ndarray) -> np.ndarray:
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


def choose_box(holes: Hole, area: FrameSize, before: Box | None = None) -> Box:
    """The part of a frame that the network sees of a window whose holes lie in `holes`.

    In the proportions of `area`, no smaller than that, and `CONTEXT` times as high and as wide as
    what the holes take up, as far as the frame reaches. The box before is kept, so that the picture
    does not jump, while it shows half of that context and is not much too large.
    """
    frame = Box(0, 0, *holes.shape)
    tight = _bounds(holes)
    height, width = (
        max(a, CONTEXT * b) for a, b in zip((area.height, area.width), tight[2:], strict=True)
    )
    height, width = (
        max(height, math.ceil(width * area.height / area.width)),
        max(width, math.ceil(height * area.width / area.height)),
    )
    box = _around(tight, height, width, frame)
    half = [(1 + CONTEXT) * side // 2 for side in tight[2:]]
    least = _around(tight, half[0], half[1], frame)
    if before and before.holds(least) and _pixels(before) <= ROOMY * _pixels(box):
        return before
    return box


def _bounds(holes: Hole) -> Box:
    """The smallest box around all that is hidden."""
    (top, bottom), (left, right) = (
        np.flatnonzero(holes.any(axis=axis))[[0, -1]].tolist() for axis in (1, 0)
    )
    return Box(top, left, bottom - top + 1, right - left + 1)


def _around(inner: Box, height: int, width: int, frame: Box) -> Box:
    """A box of these sides with `inner` in its middle, moved and cut to lie within the frame."""
    height, width = min(height, frame.height), min(width, frame.width)
    top = inner.top + (inner.height - height) // 2
    left = inner.left + (inner.width - width) // 2
    return Box(
        min(max(top, 0), frame.height - height),
        min(max(left, 0), frame.width - width),
        height,
        width,
    )


def _pixels(box: Box) -> int:
    return box.height * box.width


def choose_size(box: Box, area: FrameSize, unit: int) -> FrameSize:
    """What a box is brought to: its proportions, about `area`'s pixels, in multiples of `unit`."""
    scale = math.sqrt(area.height * area.width / _pixels(box))
    height, width = (max(1, round(side * scale / unit)) * unit for side in (box.height, box.width))
    return FrameSize(width, height)
