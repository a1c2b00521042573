"""How results join what is around them: steps measured, colours matched, edges feathered."""

from __future__ import annotations

from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import Float

from ...data.videos import Frames, Mask, Masks, Pixels

RING = 16  # pixels around the hole whose colour is matched


class BorderSteps(NamedTuple):
    """The steps across the holes' borders, before anything is matched there."""

    total: float
    """The sum of |inside − outside| over neighbouring pixels and RGB, in 8-bit units."""
    steps: int


def measure_border(frames: Frames, mask: Masks) -> BorderSteps:
    """The steps between neighbouring pixels of which one is in a hole and one is not."""
    total, steps = 0.0, 0
    for axis in (1, 2):
        crossing = np.diff(mask, axis=axis) != 0
        found = np.abs(np.diff(frames.astype(np.int16), axis=axis))[crossing]
        total, steps = total + float(found.sum()), steps + found.size
    return BorderSteps(total, steps)


def match_colour(results: Frames, sources: Frames, mask: Masks) -> Float[np.ndarray, " rgb"]:
    """The colour that the results lack: the mean of source − result near the holes of a window.

    Visible pixels within `RING` pixels of a hole count. All frames of a window get the same shift:
    a shift for each would make the hole flicker.
    """
    near = np.stack([_distance(1 - frame_mask) <= RING for frame_mask in mask]) & (mask == 0)
    if not near.any():
        return np.zeros(3)
    return (sources[near].astype(np.float64) - results[near]).mean(axis=0)


def feather(
    result: Float[np.ndarray, "height width 3"], source: Pixels, mask: Mask, reach: int
) -> Float[np.ndarray, "height width 3"]:
    """The result, blended into its surroundings within `reach` pixels of the hole's border.

    Its error outside the hole, averaged around each place, is subtracted inside, less so farther
    from the border. Only visible pixels of the source are used.
    """
    visible = (mask == 0).astype(np.float64)
    weight = cv2.GaussianBlur(visible, (0, 0), reach)
    error = cv2.GaussianBlur((source - result) * visible[..., None], (0, 0), reach)
    error /= np.maximum(weight, np.finfo(np.float64).tiny)[..., None]
    fading = np.clip(1 - (_distance(mask) - 1) / reach, 0, 1)
    return result + error * (fading * mask)[..., None]


def _distance(inside: Mask) -> Float[np.ndarray, "height width"]:
    """The distance in pixels from each pixel that is 1 to the nearest that is 0."""
    return cv2.distanceTransform(inside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
