"""Seams: measured, colours matched, edges feathered."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float

from ..metrics.pixels import Frames, Mask
from .boxes import Hole, Pixels

RING = 16  # pixels around the hole from which its colour is matched
FEATHER = 4  # pixels


class Seam(NamedTuple):
    """The steps across the holes' border, before anything is matched there."""

    total: float
    """Of |inside − outside| of pixels side by side, over RGB, in 8-bit units."""
    steps: int


def measure_seam(frames: Frames, mask: Mask) -> Seam:
    """The steps across the holes' border: of pixels side by side of which one is in a hole."""
    total, steps = 0.0, 0
    for axis in (1, 2):
        crossing = np.diff(mask, axis=axis) != 0
        found = np.abs(np.diff(frames.astype(np.int16), axis=axis))[crossing]
        total, steps = total + float(found.sum()), steps + found.size
    return Seam(total, steps)


def match_colour(results: Frames, sources: Frames, mask: Mask) -> Float[np.ndarray, " rgb"]:
    """What the results lack in colour: the mean of source − result near the holes, over a window.

    What is visible within `RING` pixels of a hole counts. One shift for all frames of a window:
    shifts of their own would make the hole flicker.
    """
    near = np.stack([_distance(1 - hole) <= RING for hole in mask]) & (mask == 0)
    if not near.any():
        return np.zeros(3)
    return (sources[near].astype(np.float64) - results[near]).mean(axis=0)


def feather(
    result: Float[np.ndarray, "height width 3"], source: Pixels, hole: Hole, reach: int
) -> Float[np.ndarray, "height width 3"]:
    """The result, led over into its surroundings within `reach` pixels of the hole's border.

    What it is off outside the hole, averaged around each place, is taken off inside, the less the
    farther from the border. Of the source only what is visible is used.
    """
    visible = (hole == 0).astype(np.float64)
    weight = cv2.GaussianBlur(visible, (0, 0), reach)
    off = cv2.GaussianBlur((source - result) * visible[..., None], (0, 0), reach)
    off /= np.maximum(weight, np.finfo(np.float64).tiny)[..., None]
    fading = np.clip(1 - (_distance(hole) - 1) / reach, 0, 1)
    return result + off * (fading * hole)[..., None]


def _distance(inside: Hole) -> Float[np.ndarray, "height width"]:
    """Pixels from each pixel that is 1 to the nearest that is 0."""
    return cv2.distanceTransform(inside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
