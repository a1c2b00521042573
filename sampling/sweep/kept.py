"""The files of a sweep's folder other than its tables: frames, completions, maps, features."""

from __future__ import annotations

import contextlib
import io
import re
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from einops import rearrange
from jaxtyping import Float, UInt8

from ...data.videos import Frames, Masks
from ...errors import BadInput
from ...files import write_atomically
from ...records import Malformed, read_array, read_small
from ..metrics.frechet import FeatureSet
from ..metrics.networks import Features

Spread = Float[np.ndarray, "frames height width"]  # standard deviations, in 8-bit units

SPREAD_SCALE = 256  # a map that is kept counts in this fraction of an 8-bit unit


class CompletionKey(NamedTuple):
    """Which completion: the columns by which a row of clips.csv is known."""

    schedule: str
    """Or a baseline."""
    example: str
    completion: int = 0


def slug(name: str) -> str:
    """A schedule as the name of a file: ddpm:50+resample(n=4) is ddpm-50-resample-n-4."""
    return re.sub(r"[^\w.]+", "-", name).strip("-")


@dataclass(frozen=True)
class SweepFolder:
    """Where the files of a sweep are; `name` is a schedule's slug, a baseline, or "truth"."""

    path: Path

    def strip(self, name: str, example: str) -> Path:
        return self.path / "frames" / name / f"{example}.png"

    def spread(self, name: str, example: str) -> Path:
        return self.path / "spread" / name / f"{example}.png"

    def completion(self, key: CompletionKey) -> Path:
        folder = self.path / "completions" / slug(key.schedule)
        return folder / key.example / f"{key.completion}.png"

    def features(self, column: str, name: str, example: str) -> Path:
        return self.path / "features" / column / name / f"{example}.npy"

    def write_features(self, name: str, example: str, features: Mapping[str, Features]) -> None:
        """Keep what `metrics.clip.describe_clip` gives."""
        for column, vector in features.items():
            content = io.BytesIO()
            np.save(content, vector, allow_pickle=False)
            write_atomically(self.features(column, name, example), content.getvalue())

    def read_features(self, column: str, name: str, examples: Sequence[str]) -> FeatureSet:
        """A row for each example.

        Raises:
            BadInput: A file is damaged.
        """
        rows: list[np.ndarray] = []
        for example in examples:
            path = self.features(column, name, example)
            shape = rows[0].shape if rows else (None,)
            try:
                rows.append(read_array(read_small(path), np.float32, shape))
            except Malformed as error:
                raise BadInput(f"{path}: {error}: run the sweep again into a new folder") from None
        return np.stack(rows)


def write_strip(path: Path, frames: Frames) -> None:
    """Write frames side by side as a PNG."""
    _write_png(path, rearrange(frames[..., ::-1], "f h w bgr -> h (f w) bgr"))


def read_strip(path: Path, frames: int, height: int, width: int) -> Frames:
    """The frames that `write_strip` wrote.

    Raises:
        BadInput: the file is no strip of so many frames of this size.
    """
    strip = _read_png(path, (height, frames * width, 3), "strip", "into a new folder")
    return rearrange(strip[..., ::-1], "h (f w) rgb -> f h w rgb", f=frames)


def spread_of(completions: UInt8[np.ndarray, "completions frames height width 3"]) -> Spread:
    """The standard deviation of each pixel over two completions or more.

    The root of the variance over N − 1, averaged over R, G and B.
    """
    return np.sqrt(completions.var(axis=0, ddof=1, dtype=np.float64).mean(axis=-1))


def diversity(spread: Spread, mask: Masks) -> float:
    """The root of the mean squared spread of the hole's pixels; NaN if there is no hole."""
    hole = spread[mask == 1]
    return float(np.sqrt(np.mean(hole**2))) if hole.size else float("nan")


def write_spread(path: Path, spread: Spread) -> None:
    """Keep a map as a grey strip of 16 bits, in units of 1/`SPREAD_SCALE`."""
    _write_png(path, rearrange(np.round(spread * SPREAD_SCALE), "f h w -> h (f w)").astype("u2"))


def read_spread(path: Path, frames: int, height: int, width: int) -> Spread:
    """The map that `write_spread` kept; raises as `read_strip` does."""
    strip = _read_png(path, (height, frames * width), "map", "with the same command")
    return rearrange(strip, "h (f w) -> f h w", f=frames) / SPREAD_SCALE


def _write_png(path: Path, picture: np.ndarray) -> None:
    written, png = cv2.imencode(".png", np.ascontiguousarray(picture))
    assert written
    write_atomically(path, png.tobytes())


def _read_png(path: Path, shape: tuple[int, ...], kind: str, how: str) -> np.ndarray:
    wanted = np.uint8 if len(shape) == 3 else np.uint16
    picture = None
    with contextlib.suppress(FileNotFoundError), path.open("rb") as file:
        # What is larger is not decoded.
        if file.read(24)[12:] == b"IHDR" + struct.pack(">II", shape[1], shape[0]):
            picture = cv2.imread(str(path), cv2.IMREAD_UNCHANGED)
    if picture is None or picture.shape != shape or picture.dtype != wanted:
        raise BadInput(
            f"{path} is no {kind} of {shape[1]}x{shape[0]} pixels: run the sweep again {how}"
        )
    return picture
