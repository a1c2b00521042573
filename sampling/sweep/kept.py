"""What a sweep keeps of each clip: frames, completions, features."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from einops import rearrange
from jaxtyping import Float, UInt8

from ...errors import BadInput
from ...files import write_atomically
from ..metrics.frechet import FeatureSet
from ..metrics.networks import Features
from ..metrics.pixels import Frames, Mask


def write_strip(path: Path, frames: Frames) -> None:
    """Write a clip's frames as a PNG; it appears whole or not at all."""
    strip = rearrange(frames, "f h w rgb -> h (f w) rgb")
    written, png = cv2.imencode(".png", cv2.cvtColor(strip, cv2.COLOR_RGB2BGR))
    assert written
    write_atomically(path, png.tobytes())


def read_strip(
    path: Path, frames: int, height: int, width: int
) -> UInt8[np.ndarray, "frames height width 3"]:
    """The frames that `write_strip` wrote.

    Raises:
        BadInput: the file is no strip of so many frames of this size.
    """
    strip = cv2.imread(str(path))
    if strip is None or strip.shape != (height, frames * width, 3):
        raise BadInput(
            f"{path} is no strip of {frames} frames of {width}x{height}: "
            "run the sweep again into a new folder"
        )
    return rearrange(strip[..., ::-1], "h (f w) rgb -> f h w rgb", f=frames)


def write_features(out: Path, folder: str, clip: str, features: Mapping[str, Features]) -> None:
    """Keep what `scores.describe_clip` gave for a clip; `folder` is its schedule's."""
    for column, vector in features.items():
        content = io.BytesIO()
        np.save(content, vector, allow_pickle=False)
        write_atomically(_path(out, column, folder, clip), content.getvalue())


def has_features(out: Path, column: str, folder: str, clip: str) -> bool:
    """Whether a clip's features for this column are there."""
    return _path(out, column, folder, clip).is_file()


def read_features(out: Path, column: str, folder: str, clips: Sequence[str]) -> FeatureSet:
    """A row for each clip."""
    paths = [_path(out, column, folder, clip) for clip in clips]
    return np.stack([np.load(path, allow_pickle=False) for path in paths])


def _path(out: Path, column: str, folder: str, clip: str) -> Path:
    return out / "features" / column / folder / f"{clip}.npy"


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
    write_atomically(path, png.tobytes())


def read_spread(path: Path, frames: int, height: int, width: int) -> Spread:
    """What `write_spread` kept.

    Raises:
        BadInput: the file is no map of so many frames of this size.
    """
    strip = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if strip is None or strip.shape != (height, frames * width) or strip.dtype != np.uint16:
        raise BadInput(
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


class Task(NamedTuple):
    """A clip to finish under a schedule or a baseline; under `TRUTH`, to be described."""

    name: str
    clip: str
    completion: int = 0


def strip_of(out: Path, folder: str, clip: str) -> Path:
    return out / "frames" / folder / f"{clip}.png"


def completion_of(out: Path, task: Task) -> Path:
    return out / "completions" / slug(task.name) / task.clip / f"{task.completion}.png"


def slug(name: str) -> str:
    """A schedule's text as a file's name: ddpm:50+resample(n=4) is ddpm-50-resample-n-4."""
    return re.sub(r"[^\w.]+", "-", name).strip("-")
