"""A report's clips: each a film that plays in the page, under all schedules at once."""

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
SHOWN = 99  # percent of a clip's pixels that a map tells apart: a few are far beyond the others


@dataclass(frozen=True)
class Film:
    """A clip's frames side by side in one JPEG."""

    name: str
    note: str
    """Shown beside the name."""
    alt: str
    jpeg: str
    """In base64."""


@dataclass(frozen=True)
class Player:
    """A clip's films, which play together."""

    clip: str
    films: Sequence[Film]
    spreads: Sequence[Film] = ()
    """Maps of how far the completions lie from each other, all in the same colours."""
    most: int = 0
    """The spread that has the last colour, in 8-bit units."""
    colours: str = ""
    """The colours of the maps, as CSS."""


def make_player(sweep: Sweep, clip: str) -> Player:
    """The films of a clip that the sweep kept."""
    films = [
        _film(clip, "masked", "", sweep.frames("masked", clip)),
        _film(clip, "ground truth", "", sweep.frames("truth", clip)),
    ]
    for row in (*sweep.baselines, *sweep.schedules):
        if row.name != "fill":  # it is what the model is given: the masked clip
            note = f"{sweep.hole_psnr[row.name, clip]:.1f} dB"
            films.append(_film(clip, row.name, note, sweep.frames(sweep.slug(row.name), clip)))
    if sweep.completions == 1:
        return Player(clip, films)
    truth, mask = sweep.frames("truth", clip), sweep.mask(clip)
    hole = mask == 1
    names = ["mean", *(row.name for row in sweep.schedules)]
    spreads = {name: sweep.spread(sweep.slug(name), clip) for name in names}
    values = [spread[hole] for spread in spreads.values()]
    most = max(1, math.ceil(np.percentile(values, SHOWN))) if hole.any() else 1
    maps = [
        _film(clip, name, f"{diversity(spread, mask):.1f}", _heat(spread, most, truth, hole))
        for name, spread in spreads.items()
    ]
    shades = np.round(255 * colormaps[HEAT](np.linspace(0, 1, 9))[:, :3]).astype(int)
    colours = ", ".join(f"rgb({red}, {green}, {blue})" for red, green, blue in shades)
    return Player(clip, films, maps, most, colours)


def _heat(
    spread: Spread, most: int, truth: Frames, hole: Bool[np.ndarray, "frames height width"]
) -> Frames:
    """The map in the hole; a pale truth around it."""
    heat = np.round(255 * colormaps[HEAT](np.minimum(spread / most, 1))[..., :3])
    pale = 160 + 0.35 * truth.mean(axis=-1, keepdims=True)
    return np.where(hole[..., None], heat, pale).astype(np.uint8)


def _film(clip: str, name: str, note: str, frames: Frames) -> Film:
    strip = rearrange(frames, "f h w rgb -> h (f w) rgb")[..., ::-1]
    written, jpeg = cv2.imencode(".jpg", strip, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    assert written
    return Film(name, note, f"{clip}: {name}", base64.b64encode(jpeg.tobytes()).decode())
