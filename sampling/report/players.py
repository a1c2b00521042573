"""A report's examples: each a film that plays in the page, under all schedules at once."""

from __future__ import annotations

import base64
import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import numpy as np
from einops import rearrange
from jaxtyping import Bool
from matplotlib import colormaps

from ...data.videos import Frames
from ..sweep.kept import Spread, diversity
from ..sweep.results import Sweep

QUALITY = 90  # of the JPEGs, in percent; the sweep's own frames are lossless
HEAT = "inferno"  # the colours of a map, from no spread to the most
SHOWN = 99  # percent of an example's pixels that a map tells apart: a few are far beyond the others


@dataclass(frozen=True)
class Film:
    """An example's frames side by side in one JPEG."""

    name: str
    note: str
    """Shown beside the name."""
    jpeg: str
    """In base64."""


@dataclass(frozen=True)
class Player:
    """An example's films, which play together."""

    example: str
    films: Sequence[Film]
    spreads: Sequence[Film] = ()
    """Maps of how far the completions lie from each other, all in the same colours."""
    most: int = 0
    """The spread that has the last colour, in 8-bit units."""
    colours: str = ""
    """The colours of the maps, as CSS."""


def make_player(sweep: Sweep, example: str) -> Player:
    """The films of an example that the sweep kept."""
    films = [
        _film("masked", "", sweep.frames("masked", example)),
        _film("ground truth", "", sweep.frames("truth", example)),
    ]
    for row in (*sweep.baselines, *sweep.schedules):
        if row.name != "fill":  # it is what the model is given: the masked example
            note = f"{sweep.hole_psnr[row.name, example]:.1f} dB"
            films.append(_film(row.name, note, sweep.frames(sweep.slug(row.name), example)))
    if sweep.about.completions == 1:
        return Player(example, films)
    truth, mask = sweep.frames("truth", example), sweep.mask(example)
    hole = mask == 1
    names = ["mean", *(row.name for row in sweep.schedules)]
    spreads = {name: sweep.spread(sweep.slug(name), example) for name in names}
    values = [spread[hole] for spread in spreads.values()]
    most = max(1, math.ceil(np.percentile(values, SHOWN))) if hole.any() else 1
    maps = [
        _film(name, f"{diversity(spread, mask):.1f}", _heat(spread, most, truth, hole))
        for name, spread in spreads.items()
    ]
    shades = np.round(255 * colormaps[HEAT](np.linspace(0, 1, 9))[:, :3]).astype(int)
    colours = ", ".join(f"rgb({red}, {green}, {blue})" for red, green, blue in shades)
    return Player(example, films, maps, most, colours)


def _heat(
    spread: Spread, most: int, truth: Frames, hole: Bool[np.ndarray, "frames height width"]
) -> Frames:
    """The map in the hole; a pale truth around it."""
    heat = np.round(255 * colormaps[HEAT](np.minimum(spread / most, 1))[..., :3])
    pale = 160 + 0.35 * truth.mean(axis=-1, keepdims=True)
    return np.where(hole[..., None], heat, pale).astype(np.uint8)


def _film(name: str, note: str, frames: Frames) -> Film:
    strip = rearrange(frames, "f h w rgb -> h (f w) rgb")[..., ::-1]
    written, jpeg = cv2.imencode(".jpg", strip, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    assert written
    return Film(name, note, base64.b64encode(jpeg.tobytes()).decode())
