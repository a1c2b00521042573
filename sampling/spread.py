"""How far the completions of one hole lie from each other."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from einops import rearrange
from jaxtyping import Float, UInt8

from .. import jobs
from .metrics import Frames, Mask
from .strips import read_strip, write_strip

Spread = Float[np.ndarray, "frames height width"]

PARTS = 256  # of an 8-bit unit, in a map that is kept


def spread_of(completions: UInt8[np.ndarray, "completions frames height width 3"]) -> Spread:
    """The standard deviation of each pixel over two completions or more, in 8-bit units.

    The root of the variance over N − 1, averaged over R, G and B.
    """
    return np.sqrt(completions.var(axis=0, ddof=1, dtype=np.float64).mean(axis=-1))


def diversity(spread: Spread, mask: Mask) -> float:
    """The root of the mean squared spread of the hole's pixels; NaN where there is no hole."""
    hole = spread[mask == 1]
    return float(np.sqrt(np.mean(hole**2))) if hole.size else float("nan")


def write_spread(path: Path, spread: Spread) -> None:
    """Keep a map as a grey strip of 16 bits, in parts of an 8-bit unit."""
    strip = rearrange(np.round(spread * PARTS).astype(np.uint16), "f h w -> h (f w)")
    written, png = cv2.imencode(".png", strip)
    assert written
    jobs.write_atomically(path, png.tobytes())


def read_spread(path: Path, frames: int, height: int, width: int) -> Spread:
    """What `write_spread` kept.

    Raises:
        BadInput: the file is no map of so many frames of this size.
    """
    strip = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if strip is None or strip.shape != (height, frames * width) or strip.dtype != np.uint16:
        raise jobs.BadInput(
            f"{path} is no map of {frames} frames of {width}x{height}: "
            "run the same sweep command again"
        )
    return rearrange(strip, "h (f w) -> f h w", f=frames) / PARTS


def write_completion(path: Path, frames: Frames, mask: Mask) -> None:
    """Keep what a completion puts into the hole."""
    write_strip(path, np.where(mask[..., None] == 1, frames, np.uint8(0)))


def read_completions(
    paths: list[Path], mask: Mask
) -> UInt8[np.ndarray, "completions frames height width 3"]:
    """What `write_completion` kept; 0 outside the hole."""
    return np.stack([read_strip(path, *mask.shape) for path in paths])
