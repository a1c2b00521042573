"""What is missing of a picture or a flow, continued from what surrounds it."""

from __future__ import annotations

import cv2
import numpy as np
from jaxtyping import Bool, Float32, Int

from .flow import Flow, Points, grid

Surface = Float32[np.ndarray, "height width channels"]
KnownPixels = Bool[np.ndarray, "height width"]

BAND = 24  # pixels around a hole whose flow tells how the scene moves there
LEAST_KNOWN = 32  # vectors that an affine motion is fitted to, at least
MOST_USED = 2000  # vectors that it is fitted to, at most
OUTLIER = 1.0  # pixels by which a vector may differ from the affine motion that it supports
RELAXATIONS = 8  # rounds of averaging on each level of the pyramid
NEIGHBOURS = np.array([[0, 1, 0], [1, 0, 1], [0, 1, 0]], np.float32) / 4


def membrane(values: Surface, known: KnownPixels) -> Surface:
    """`values` where they are known, elsewhere a smooth surface through them.

    Laplace's equation, solved approximately from coarse to fine. Zero where nothing is known.
    """
    height, width = known.shape
    if known.all():
        return values
    if not known.any():
        return np.zeros_like(values)
    if max(height, width) <= 2:
        surface = np.broadcast_to(values[known].mean(axis=0), values.shape)
    else:
        surface = _from_half_size(values, known)
    for _ in range(RELAXATIONS):
        surface = np.where(known[..., None], values, surface).astype(np.float32)
        surface = cv2.filter2D(surface, -1, NEIGHBOURS, borderType=cv2.BORDER_REPLICATE)
        surface = surface.reshape(values.shape)
    return np.where(known[..., None], values, surface)


def _from_half_size(values: Surface, known: KnownPixels) -> Surface:
    height, width = known.shape
    half = (-(-width // 2), -(-height // 2))
    weight = known.astype(np.float32)
    weights = cv2.resize(weight, half, interpolation=cv2.INTER_AREA)
    sums = cv2.resize(values * weight[..., None], half, interpolation=cv2.INTER_AREA)
    means = sums.reshape(half[1], half[0], -1) / np.maximum(weights, 1e-6)[..., None]
    coarse = membrane(means.astype(np.float32), weights > 0)
    return cv2.resize(coarse, (width, height)).reshape(values.shape)


def complete_flow(flow: Flow, known: KnownPixels) -> Flow:
    """A flow whose unknown parts move as what surrounds them does.

    In each connected part it is the affine motion that most of its surroundings share, plus a
    membrane through what these differ from it.
    """
    missing = (~known).astype(np.uint8)
    count, labels, boxes, _ = cv2.connectedComponentsWithStats(missing, connectivity=8)
    completed = flow.copy()
    for label in range(1, count):
        window = _around(boxes[label], known.shape)
        inside = labels[window] == label
        completed[window][inside] = _continue(flow[window], known[window], inside)[inside]
    return completed


def _around(box: Int[np.ndarray, "5"], shape: tuple[int, ...]) -> tuple[slice, slice]:
    left, top, width, height = box[:4].tolist()
    return (
        slice(max(0, top - BAND), min(shape[0], top + height + BAND)),
        slice(max(0, left - BAND), min(shape[1], left + width + BAND)),
    )


def _continue(flow: Flow, known: KnownPixels, inside: KnownPixels) -> Flow:
    brush = np.ones((2 * BAND + 1, 2 * BAND + 1), np.uint8)
    band = known & (cv2.dilate(inside.astype(np.uint8), brush) == 1)
    places = grid(*known.shape)
    affine = _fit_affine(places[band], flow[band])
    if affine is None:
        return membrane(flow, known)
    motion = (places @ affine[:, :2].T + affine[:, 2]).astype(np.float32)
    rest = flow - motion
    close = band & ((rest**2).sum(axis=-1) <= (2 * OUTLIER) ** 2)
    return motion + membrane(rest, close)


def _fit_affine(places: Points, vectors: Points) -> Float32[np.ndarray, "2 3"] | None:
    """The affine motion that most vectors share; None where there are too few, or it has none.

    Random sample consensus by OpenCV, whose samples are the same each time.
    """
    if len(places) < LEAST_KNOWN:
        return None
    if (vectors == 0).all(axis=-1).mean() >= 0.5:
        return np.zeros((2, 3), np.float32)
    source = np.ascontiguousarray(places[:: -(-len(places) // MOST_USED)])
    target = source + vectors[:: -(-len(places) // MOST_USED)]
    matrix, _ = cv2.estimateAffine2D(
        source, target, method=cv2.RANSAC, ransacReprojThreshold=OUTLIER, maxIters=500
    )
    if matrix is None:
        return None
    return (np.asarray(matrix) - np.eye(2, 3)).astype(np.float32)
