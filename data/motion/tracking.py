"""Where hidden pixels are visible: each is followed along the flow, frame by frame."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Bool, Float32, Int, UInt8

from ..videos import Mask, Pixels
from .completion import KnownPixels, complete_flow, membrane
from .flow import (
    Flow,
    Grey,
    Points,
    agree,
    grid,
    look_up,
    look_up_points,
    steady_flow,
)

UNSURE = 4  # pixels around a hole in which flow is not trusted: DIS compares patches of 8 pixels
SUPPORT = 2  # pixels around a fetched one that must be visible too, for bicubic interpolation
STEADY = 1  # frames within which a pixel is followed whose flows there and back disagreed once
CUT = 0.4  # share of a frame's contrast that flow leaves unexplained where the video has a cut


class Way(NamedTuple):
    """From one frame to a neighbour and back."""

    there: Flow
    back: Flow
    cut: bool  # whether the two show different scenes


@dataclass(frozen=True)
class TrackedFrame:
    """A frame, without what its hole hides."""

    pixels: Pixels
    mask: Mask
    grey: Grey
    """Its hole filled smoothly from what is around it."""
    ways: dict[int, Way] = field(default_factory=dict)
    """To the frame before (-1) and to the one after (1)."""

    @classmethod
    def of(cls, pixels: Pixels, mask: Mask) -> TrackedFrame:
        """A frame whose mask is 1 in the hole; what is there is not looked at."""
        known = mask == 0
        visible = np.where(known[..., None], pixels, np.uint8(0))
        whole = np.rint(membrane(visible.astype(np.float32), known)).astype(np.uint8)
        return cls(visible, mask, cv2.cvtColor(whole, cv2.COLOR_RGB2GRAY))

    @functools.cached_property
    def usable(self) -> UInt8[np.ndarray, "height width"]:
        """1 where a pixel and what its interpolation needs are visible."""
        brush = np.ones((2 * SUPPORT + 1, 2 * SUPPORT + 1), np.uint8)
        return cv2.erode(1 - self.mask, brush)

    @functools.cached_property
    def near_hole(self) -> UInt8[np.ndarray, "height width"]:
        """1 where what a hole hides could influence the flow."""
        return cv2.dilate(self.mask, np.ones((2 * UNSURE + 1, 2 * UNSURE + 1), np.uint8))


def join(earlier: TrackedFrame, later: TrackedFrame) -> None:
    """Find the ways between two neighbours; flow is continued through their holes."""
    there, back = (
        steady_flow(*pair) for pair in ((earlier.grey, later.grey), (later.grey, earlier.grey))
    )
    seen, seen_back = _is_seen(earlier, later, there), _is_seen(later, earlier, back)
    cut = _is_cut(earlier.grey, later.grey, there, seen)
    there, back = complete_flow(there, seen), complete_flow(back, seen_back)
    earlier.ways[1] = Way(there, back, cut)
    later.ways[-1] = Way(back, there, cut)


def _is_cut(here: Grey, there: Grey, flow: Flow, seen: KnownPixels) -> bool:
    if not seen.any():
        return False
    moved = look_up(there, grid(*here.shape) + flow)[seen]
    shown = here[seen].astype(np.float32)
    contrast = np.abs(shown - np.median(shown)).mean()
    change = shown - moved
    unexplained = np.abs(change - np.median(change)).mean()  # but for the light's
    return bool(unexplained > CUT * contrast + 1)


def _is_seen(here: TrackedFrame, there: TrackedFrame, flow: Flow) -> KnownPixels:
    """Where a flow neither starts nor ends in a hole, or close to one."""
    ends = look_up(there.near_hole, grid(*here.mask.shape) + flow, cv2.INTER_NEAREST)
    return (here.near_hole == 0) & (ends == 0)


@dataclass(frozen=True)
class Sighting:
    """Where the hidden pixels of a frame are found in one direction, in the order of its mask."""

    distance: Int[np.ndarray, " points"]
    """Frames away, negative before; 0 where a pixel is not found."""
    places: Points
    error: Float32[np.ndarray, " points"]
    """How far the flows there and back are apart, summed along the way, in pixels."""
    strays: Bool[np.ndarray, " points"]
    """Whether they once did not agree."""

    @property
    def found(self) -> Bool[np.ndarray, " points"]:
        """Which pixels are found."""
        return self.distance != 0


def find(frames: Mapping[int, TrackedFrame], t: int, direction: int, reach: int) -> Sighting:
    """Follow each hidden pixel of frame `t` to the first frame that shows it.

    At most `reach` frames are passed, and no cut. A pixel is given up that leaves the frame, and
    one whose flows there and back disagree twice, or once and it is not found soon.
    """
    rows, columns = np.nonzero(frames[t].mask)
    count, (height, width) = len(rows), frames[t].mask.shape
    distance, strays = np.zeros(count, np.int64), np.zeros(count, bool)
    error, places = np.zeros(count, np.float32), np.zeros((count, 2), np.float32)
    left, points = np.arange(count), np.stack([columns, rows], axis=-1).astype(np.float32)
    for s in range(t, t + direction * reach, direction):
        if not len(left) or s + direction not in frames or frames[s].ways[direction].cut:
            break
        way, there = frames[s].ways[direction], frames[s + direction]
        vectors = look_up_points(way.there, points)
        points = points + vectors
        inverse = look_up_points(way.back, points)
        agreed = agree(vectors, inverse)
        inside = ((points >= 0) & (points <= (width - 1, height - 1))).all(axis=-1)
        soon = abs(s + direction - t) <= STEADY
        alive = inside & (~strays[left] & (agreed | soon) | strays[left] & agreed & soon)
        error[left] += np.sqrt(((vectors + inverse) ** 2).sum(axis=-1))
        strays[left] |= ~agreed
        left, points = left[alive], points[alive]
        seen = look_up_points(there.usable, points, cv2.INTER_NEAREST)[:, 0] == 1
        distance[left[seen]], places[left[seen]] = s + direction - t, points[seen]
        left, points = left[~seen], points[~seen]
    return Sighting(distance, places, error, strays)
