"""Optical flow between two frames, and whether its two directions agree."""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import Bool, Float32, UInt8

Grey = UInt8[np.ndarray, "height width"]
Flow = Float32[np.ndarray, "height width 2"]  # x and y, in pixels
Points = Float32[np.ndarray, "points 2"]  # x and y, in pixels

LEAST_SIDE = 12  # pixels; DIS needs one side of a frame to be this long
PATCH = 9  # pixels, height and width of the surroundings that are compared
ROW = 1024  # points that OpenCV looks up in a row; it takes no more than 32,767


def estimate_flow(here: Grey, there: Grey) -> Flow:
    """Where the pixels of one frame are in another, relative to where they are here.

    DIS flow (Kroeger et al. 2016; OpenCV's, medium preset), and zero in frames that are too small
    for it.
    """
    if max(here.shape) < LEAST_SIDE:
        return np.zeros((*here.shape, 2), np.float32)
    estimator = cv2.DISOpticalFlow.create(cv2.DISOPTICAL_FLOW_PRESET_MEDIUM)
    return estimator.calc(here, there, None)  # type: ignore[call-overload]


def steady_flow(here: Grey, there: Grey) -> Flow:
    """`estimate_flow`, but zero where standing still explains a pixel's surroundings as well.

    So nothing moves that need not move: a fetched pixel then is an exact copy, and what has no
    texture keeps its place.
    """
    flow = estimate_flow(here, there)
    moved = look_up(there, grid(*here.shape) + flow)
    stands = _difference(here, there) <= 1.1 * _difference(here, moved) + 0.5
    return np.where(stands[..., None], np.float32(0), flow)


def _difference(here: Grey, there: Grey) -> Float32[np.ndarray, "height width"]:
    """How much each pixel's surroundings differ, but for their light."""
    difference = here.astype(np.float32) - there
    difference -= cv2.boxFilter(difference, -1, (PATCH, PATCH))
    return cv2.boxFilter(np.abs(difference), -1, (PATCH, PATCH))


def agree(
    forward: Float32[np.ndarray, "*places 2"], backward: Float32[np.ndarray, "*places 2"]
) -> Bool[np.ndarray, "*places"]:
    """Whether flows are each other's inverse, `backward` taken where `forward` leads.

    |f + b|² ≤ 0.01·(|f|² + |b|²) + 0.5 (Sundaram et al. 2010, equation 5).
    """
    apart = ((forward + backward) ** 2).sum(axis=-1)
    length = (forward**2).sum(axis=-1) + (backward**2).sum(axis=-1)
    return apart <= 0.01 * length + 0.5


def grid(height: int, width: int) -> Flow:
    """x and y of every pixel."""
    rows, columns = np.indices((height, width), np.float32)
    return np.stack([columns, rows], axis=-1)


def look_up(picture: np.ndarray, places: Flow, method: int = cv2.INTER_LINEAR) -> np.ndarray:
    """A picture at `places`; beyond its edges it is as at them. Bilinear unless `method` says."""
    x, y = np.moveaxis(places, -1, 0)
    return cv2.remap(picture, x, y, method, borderMode=cv2.BORDER_REPLICATE)


def look_up_points(
    picture: np.ndarray, points: Points, method: int = cv2.INTER_LINEAR
) -> np.ndarray:
    """`look_up` at any number of points: one row of values for each."""
    rows = max(1, -(-len(points) // ROW))
    padded = np.zeros((rows * ROW, 2), np.float32)
    padded[: len(points)] = points
    values = look_up(picture, padded.reshape(rows, ROW, 2), method)
    return values.reshape(rows * ROW, -1)[: len(points)]
