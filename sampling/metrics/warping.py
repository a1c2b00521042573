"""Whether a result moves as the truth does: the warping error."""

from __future__ import annotations

from dataclasses import dataclass

import cv2
import numpy as np
from jaxtyping import Bool, Float32

from ...data.motion.flow import LEAST_SIDE, agree, estimate_flow, grid, look_up
from ...data.videos import Frames
from .pixels import PEAK


@dataclass(frozen=True)
class Motion:
    """Where the pixels of each frame are in the next one."""

    places: Float32[np.ndarray, "pairs height width 2"]
    """x and y in frame t + 1 of each pixel of frame t, in pixels."""
    seen: Bool[np.ndarray, "pairs height width"]
    """Whether frame t + 1 shows the pixel too."""


def follow(truth: Frames) -> Motion:
    """The motion from every frame to the next, by optical flow on the original frames.

    DIS flow (Kroeger et al. 2016; OpenCV's, medium preset) of grey frames, forward and backward. A
    pixel counts as seen in the next frame if it stays within the frame and the flows agree:
    |f + b|² ≤ 0.01·(|f|² + |b|²) + 0.5, b taken where f leads (Sundaram et al. 2010). In
    frames under 12 pixels in height and width nothing is seen.
    """
    frames, height, width, _ = truth.shape
    places = np.zeros((max(frames - 1, 0), height, width, 2), np.float32)
    seen = np.zeros(places.shape[:3], bool)
    if max(height, width) < LEAST_SIDE:
        return Motion(places, seen)
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in truth]
    here = grid(height, width)
    for t in range(frames - 1):
        forward, backward = estimate_flow(grey[t], grey[t + 1]), estimate_flow(grey[t + 1], grey[t])
        places[t] = here + forward
        seen[t] = agree(forward, look_up(backward, places[t]))
        seen[t] &= ((places[t] >= 0) & (places[t] <= (width - 1, height - 1))).all(axis=-1)
    return Motion(places, seen)


def warping_error(result: Frames, motion: Motion) -> float:
    """How much the result changes along the true motion, as mean squared error.

    Lai et al. 2018, "Learning Blind Video Temporal Consistency", Section 4: each frame is compared
    with the next one, warped back to it (bilinear), where a pixel is seen in both; squares over RGB
    of values in [0, 1], averaged over a pair's pixels, then over the pairs. The truth has some too.
    NaN where no pair has such a pixel.
    """
    values = result.astype(np.float32) / np.float32(PEAK)
    errors = [
        float(((look_up(after, places) - before)[seen] ** 2).mean())
        for before, after, places, seen in zip(
            values, values[1:], motion.places, motion.seen, strict=False
        )
        if seen.any()
    ]
    return float(np.mean(errors)) if errors else float("nan")
