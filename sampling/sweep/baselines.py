"""The baselines: what a schedule has to beat, and the best that it can reach.

`mean` is the schedule `MEAN` and runs in the sampler; the others are functions here.
"""

from __future__ import annotations

import cv2
import numpy as np
import torch
from jaxtyping import Bool

from ...data.masks import fill_hole
from ...data.motion.propagation import propagate_clip
from ...data.shards.format import Example
from ...data.videos import Frames, Masks
from ...modeling.autoencoder import Autoencoder
from ..examples import decode_result, pixels_of

BASELINES = {
    "fill": "the input itself, its hole in one colour: the median of the visible pixels unless "
    "the encoding set another",
    "classic": "each pixel of the hole from the nearest frame in which it is visible; where it is "
    "visible in none, inpainted within its frame by OpenCV",
    "flow": "each pixel of the hole from the nearest frame, before or after, to which optical flow "
    "follows it; where it is found in none, inpainted as by classic",
    "mean": "one network evaluation from pure noise: the model’s posterior mean",
    "autoencoder": "the true clip encoded and decoded: the ceiling for a model of its latents",
}
MEAN = "ddim:1"  # from T − 1 to the clean estimate in one step
INPAINT_RADIUS = 3  # pixels around a missing one that OpenCV uses


def fill(example: Example) -> Frames:
    """The masked input, its hole in the recorded fill colour."""
    red, green, blue = example.record["fill"]
    return fill_hole(pixels_of(example), example.mask, (red, green, blue))


def classic(truth: Frames, mask: Masks) -> Frames:
    """Each hole pixel from the nearest frame in time in which that place is visible.

    The earlier of two that are equally near. What no frame shows is then inpainted frame by frame
    (Telea 2004, by OpenCV). Only visible pixels of `truth` are used.
    """
    result = np.where(mask[..., None] == 1, 0, truth).astype(np.uint8)
    missing = mask == 1
    frames = len(mask)
    for distance in range(1, frames):
        for step in (-distance, distance):
            t = np.arange(max(0, -step), min(frames, frames - step))
            taken = missing[t] & (mask[t + step] == 0)
            result[t] = np.where(taken[..., None], truth[t + step], result[t])
            missing[t] &= ~taken
    return _inpaint(result, missing)


def _inpaint(frames: Frames, missing: Bool[np.ndarray, "frames height width"]) -> Frames:
    holes, result = missing.astype(np.uint8), frames.copy()
    for frame in np.flatnonzero(missing.any(axis=(1, 2))):
        result[frame] = cv2.inpaint(frames[frame], holes[frame], INPAINT_RADIUS, cv2.INPAINT_TELEA)
    return result


def flow(truth: Frames, mask: Masks) -> Frames:
    """Each hole pixel from where optical flow follows it to, the rest inpainted as by `classic`.

    See `data.motion.propagation`. Only visible pixels of `truth` are used.
    """
    pixels, confidence = propagate_clip(truth, mask)
    return _inpaint(pixels, confidence == 0)


def autoencoder(model: Autoencoder, example: Example) -> Frames:
    """The clip encoded (its latents are in the shard) and decoded again, composited."""
    return decode_result(model, example, torch.from_numpy(example.latents).float())
