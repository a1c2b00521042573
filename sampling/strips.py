"""A clip's frames side by side in one lossless picture: a strip."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
from einops import rearrange
from jaxtyping import UInt8

from .. import jobs
from .metrics import Frames


def write_strip(path: Path, frames: Frames) -> None:
    """Write a clip's frames as a PNG; it appears whole or not at all."""
    strip = rearrange(frames, "f h w rgb -> h (f w) rgb")
    written, png = cv2.imencode(".png", cv2.cvtColor(strip, cv2.COLOR_RGB2BGR))
    assert written
    jobs.write_atomically(path, png.tobytes())


def read_strip(
    path: Path, frames: int, height: int, width: int
) -> UInt8[np.ndarray, "frames height width 3"]:
    """The frames that `write_strip` wrote.

    Raises:
        BadInput: the file is no strip of so many frames of this size.
    """
    strip = cv2.imread(str(path))
    if strip is None or strip.shape != (height, frames * width, 3):
        raise jobs.BadInput(
            f"{path} is no strip of {frames} frames of {width}x{height}: "
            "run the sweep again into a new folder"
        )
    return rearrange(strip[..., ::-1], "h (f w) rgb -> f h w rgb", f=frames)
