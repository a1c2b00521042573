"""What a hole hides, put back from other frames of the video in which it is visible.

Flow is estimated between neighbours and continued through the holes; every hidden pixel is
followed along it, in both directions, to the first frame that shows it, and the original pixel is
fetched from there, once. Nothing is learned, and what is hidden has no influence.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float32, Int

from ..videos import Frames, Mask, Masks, Pixels
from .completion import membrane
from .flow import look_up_points
from .tracking import Sighting, TrackedFrame, find, join

REACH = 50  # frames within which a hidden pixel is looked for, each way
SAME = 20  # 8-bit units by which both directions may differ and still show the same
HALF = 20.0  # expected error, in 8-bit units, of which half is trusted
SMOOTH = 8.0  # pixels; steps across a hole's border are averaged along it
STEP = 32.0  # 8-bit units; larger steps are edges of the scene, not of its light

Confidence = Float32[np.ndarray, "height width"]
Colours = Float32[np.ndarray, "points 3"]


class Propagated(NamedTuple):
    """A frame with what of its hole other frames show."""

    pixels: Pixels
    """Black where nothing was found."""
    confidence: Confidence
    """1 outside the hole; in it 0 where nothing was found, else how much to trust what was."""


def propagate(pairs: Iterable[tuple[Pixels, Mask]], reach: int = REACH) -> Iterator[Propagated]:
    """The frames of a video, in order, with what other frames show of their holes.

    Each depends on the frames up to `reach` before and after it alone, which are held in memory.
    Masks are 1 in the hole; the pixels there are not looked at.
    """
    frames: dict[int, TrackedFrame] = {}
    count = 0
    for t, (pixels, mask) in enumerate(pairs):
        frames[t], count = TrackedFrame.of(pixels, mask), t + 1
        if t:
            join(frames[t - 1], frames[t])
        if t >= reach:
            yield _fill(frames, t - reach, reach)
            frames.pop(t - 2 * reach, None)
    for t in range(max(0, count - reach), count):
        yield _fill(frames, t, reach)


def propagate_clip(
    clip: Frames, masks: Masks, reach: int = REACH
) -> tuple[Frames, Float32[np.ndarray, "frames height width"]]:
    """`propagate` for all frames of a clip at once: pixels and confidences."""
    done = list(propagate(zip(clip, masks, strict=True), reach))
    return np.stack([one.pixels for one in done]), np.stack([one.confidence for one in done])


def _fill(frames: Mapping[int, TrackedFrame], t: int, reach: int) -> Propagated:
    frame = frames[t]
    confidence = (1 - frame.mask).astype(np.float32)
    if not frame.mask.any():
        return Propagated(frame.pixels, confidence)
    pixels, hole = frame.pixels.copy(), frame.mask == 1
    guesses = [_guess(frames, t, find(frames, t, direction, reach)) for direction in (1, -1)]
    colours, trusted = _combine(*guesses)
    pixels[hole] = np.rint(colours).clip(0, 255)
    confidence[hole] = trusted
    return Propagated(pixels, confidence)


class Guess(NamedTuple):
    """What one direction says of a frame's hidden pixels, in the order of its mask."""

    colours: Colours
    variance: Float32[np.ndarray, " points"]
    """The squared error to expect, in 8-bit units; infinite where nothing was found."""


def _guess(frames: Mapping[int, TrackedFrame], t: int, seen: Sighting) -> Guess:
    colours = np.zeros((len(seen.distance), 3), np.float32)
    for distance, which in _by_distance(seen.distance):
        source = frames[t + distance].pixels
        colours[which] = look_up_points(source, seen.places[which], cv2.INTER_CUBIC)
    # Fitted to what clips of real cameras hide: docs/motion.md.
    drift = np.sqrt(np.minimum(np.where(seen.strays, 2, seen.error), 2))
    variance = np.where(seen.found, np.exp(4.2 + 2.7 * drift), np.inf)
    return Guess(colours + _match_light(frames, t, seen), variance.astype(np.float32))


def _by_distance(distance: Int[np.ndarray, " points"]) -> Iterator[tuple[int, np.ndarray]]:
    """The numbers of the points that were found in each of the frames."""
    for one in np.unique(distance[distance != 0]).tolist():
        yield one, np.flatnonzero(distance == one)


def _match_light(frames: Mapping[int, TrackedFrame], t: int, seen: Sighting) -> Colours:
    """What to add to fetched colours so that no step shows at the hole's border.

    Beside the border a pixel's visible neighbour is compared with its neighbour in the frame that
    it was fetched from; a membrane carries the difference, smoothed along the border, inwards.
    """
    mask = frames[t].mask
    rows, columns = np.nonzero(mask)
    steps, count = np.zeros((*mask.shape, 3), np.float32), np.zeros(mask.shape, np.float32)
    bordered = np.pad(mask, 1, constant_values=1)
    for right, down in ((1, 0), (-1, 0), (0, 1), (0, -1)):
        visible = bordered[rows + 1 + down, columns + 1 + right] == 0
        at_border = np.where(visible, seen.distance, 0)
        for distance, which in _by_distance(at_border):
            beside = rows[which] + down, columns[which] + right
            places = seen.places[which] + np.array([right, down], np.float32)
            theirs = look_up_points(frames[t + distance].pixels, places)
            np.add.at(steps, beside, frames[t].pixels[beside].astype(np.float32) - theirs)
            np.add.at(count, beside, 1)
    if not count.any():
        return np.zeros((len(rows), 3), np.float32)
    steps = np.where(np.abs(steps) <= STEP * count[..., None], steps, 0)
    weight = cv2.GaussianBlur(count, (0, 0), SMOOTH)[..., None]
    along = cv2.GaussianBlur(steps, (0, 0), SMOOTH) / np.maximum(weight, 1e-6)
    return membrane(along, count > 0)[rows, columns]


def _combine(ahead: Guess, behind: Guess) -> tuple[Colours, Float32[np.ndarray, " points"]]:
    """Colours and confidences: a mean where both directions agree, else the better of them."""
    apart = np.abs(ahead.colours - behind.colours).max(axis=-1)
    agreed = np.isfinite(ahead.variance + behind.variance) & (apart <= SAME)
    first = ahead.variance <= behind.variance
    better = np.minimum(ahead.variance, behind.variance)
    weight = 1 / ahead.variance, 1 / behind.variance
    share = np.where(agreed, weight[0] / np.maximum(sum(weight), 1e-12), first)
    colours = share[:, None] * ahead.colours + (1 - share[:, None]) * behind.colours
    colours[~np.isfinite(better)] = 0
    # Fitted likewise: what two directions show is seldom wrong.
    variance = np.where(agreed, better ** (2 / 3), better)
    return colours.astype(np.float32), (1 / (1 + variance / HALF**2)).astype(np.float32)
