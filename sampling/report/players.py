"""A report's clips: each as a film that plays in the page, under all schedules at once."""

from __future__ import annotations

import base64
import html
import math
from collections.abc import Iterator

import cv2
import numpy as np
from einops import rearrange
from jaxtyping import Bool
from matplotlib import colormaps

from ..metrics.pixels import Frames
from ..sweep.kept import Spread, diversity
from ..sweep.results import Sweep
from .tables import breakable

QUALITY = 90  # of the JPEGs, in percent; the sweep's own frames are lossless
HEAT = "inferno"  # the colours of a map, from no spread to the most
SHOWN = 99  # percent of a clip's pixels that a map tells apart: a few are far beyond the others


def render_players(sweep: Sweep) -> str:
    """HTML with a player for each kept clip, the first one open."""
    return "\n".join(_player(sweep, clip, index == 0) for index, clip in enumerate(sweep.kept))


def _player(sweep: Sweep, clip: str, opened: bool) -> str:
    size = sweep.about["clip"]
    state = ' open=""' if opened else ""
    shape = f"--frames:{size['frames']};--shape:{size['width']}/{size['height']};--frame:0"
    return (
        f'<details class="player" style="{shape}"{state}>'
        f"<summary><code>{html.escape(clip)}</code></summary>\n"
        '<p class="controls"><button type="button" class="back" title="one frame back">‹</button>'
        '<button type="button" class="play">Play</button>'
        '<button type="button" class="on" title="one frame on">›</button>'
        f'<input type="range" min="0" max="{size["frames"] - 1}" value="0" aria-label="frame"/>'
        "<output>frame 0</output></p>\n"
        f'<div class="films">{"".join(_films(sweep, clip))}</div>\n'
        f"{_spreads(sweep, clip) if sweep.completions > 1 else ''}</details>"
    )


def _films(sweep: Sweep, clip: str) -> Iterator[str]:
    for name, folder in (("masked", "masked"), ("ground truth", "truth")):
        yield _film(clip, name, "", sweep.frames(folder, clip))
    for row in (*sweep.baselines, *sweep.schedules):
        if row.name != "fill":  # it is what the model is given: the masked clip
            note = f"{sweep.hole_psnr[row.name, clip]:.1f} dB"
            yield _film(clip, row.name, note, sweep.frames(sweep.slug(row.name), clip))


def _spreads(sweep: Sweep, clip: str) -> str:
    """The maps of how far the completions lie from each other, all in the same colours."""
    names = ["mean", *(row.name for row in sweep.schedules)]
    spreads = {name: sweep.spread(sweep.slug(name), clip) for name in names}
    truth, mask = sweep.frames("truth", clip), sweep.mask(clip)
    hole = mask == 1
    drawn = [spread[hole] for spread in spreads.values()]
    most = max(1, math.ceil(np.percentile(drawn, SHOWN))) if hole.any() else 1
    films = (
        _film(
            clip,
            name,
            f"{diversity(spread, mask):.1f}",
            _heat(spread, most, truth, hole),
        )
        for name, spread in spreads.items()
    )
    colours = ", ".join(f"rgb{_colour(share / 8)}" for share in range(9))
    return (
        f'<p class="key">Standard deviation of {sweep.completions} completions, in 8-bit units: '
        f'0 <span class="heat" style="background:linear-gradient(to right, {colours})"></span> '
        f"{most} and more; beside a name, the diversity.</p>\n"
        f'<div class="films spreads">{"".join(films)}</div>\n'
    )


def _colour(share: float) -> tuple[int, ...]:
    return tuple(round(255 * part) for part in colormaps[HEAT](share)[:3])


def _heat(
    spread: Spread,
    most: int,
    truth: Frames,
    hole: Bool[np.ndarray, "frames height width"],
) -> Frames:
    """The map in the hole; a pale truth around it."""
    heat = np.round(255 * colormaps[HEAT](np.minimum(spread / most, 1))[..., :3])
    pale = 160 + 0.35 * truth.mean(axis=-1, keepdims=True)
    return np.where(hole[..., None], heat, pale).astype(np.uint8)


def _film(clip: str, name: str, note: str, frames: Frames) -> str:
    strip = rearrange(frames, "f h w rgb -> h (f w) rgb")[..., ::-1]
    written, jpeg = cv2.imencode(".jpg", strip, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    assert written
    encoded = base64.b64encode(jpeg.tobytes()).decode()
    return (
        f'<div><div class="film"><img alt="{html.escape(f"{clip}: {name}")}" '
        f'src="data:image/jpeg;base64,{encoded}"/></div>'
        f'<span class="name">{breakable(name)}</span> <span class="note">{note}</span></div>\n'
    )


STYLE = """
.player { margin: 0.75rem 0; border-top: 1px solid var(--rule); padding-top: 0.5rem; }
.player summary { cursor: pointer; padding: 0.3rem 0; overflow-wrap: anywhere; }
.heat { display: inline-block; width: 6rem; height: 0.7em; border-radius: 2px; }
.player > .key { margin: 1rem 0 0.5rem; }
.controls { display: flex; gap: 0.5rem; align-items: center; margin: 0.5rem 0; }
.controls button { font: inherit; padding: 0.3rem 0.8rem; }
.controls input { flex: 1; min-width: 4rem; max-width: 24rem; }
.controls output { color: var(--soft); font-size: 0.85rem; white-space: nowrap; }
.films { display: grid; gap: 0.8rem 0.6rem;
  grid-template-columns: repeat(auto-fill, minmax(8.5rem, 1fr)); }
.film { overflow: hidden; aspect-ratio: var(--shape); border-radius: 4px;
  background: var(--panel); }
.film img { display: block; height: 100%; width: calc(100% * var(--frames)); max-width: none;
  image-rendering: pixelated;
  transform: translateX(calc(-100% * var(--frame) / var(--frames))); }
.films .name { font-size: 0.8rem; overflow-wrap: anywhere; line-height: 1.3; }
.films .note { font-size: 0.8rem; color: var(--soft); white-space: nowrap; }
"""

# Neither < nor an ampersand stands in it: the page is XML, too.
SCRIPT = """
for (const player of document.querySelectorAll(".player")) {
  const range = player.querySelector("input"), play = player.querySelector(".play");
  const count = Number(range.max) + 1;
  let timer = 0;
  const show = frame => {
    range.value = frame;
    player.style.setProperty("--frame", frame);
    player.querySelector("output").textContent = "frame " + frame;
  };
  const step = by => show((Number(range.value) + by + count) % count);
  const stop = () => { clearInterval(timer); timer = 0; play.textContent = "Play"; };
  play.onclick = () => {
    if (timer) return stop();
    timer = setInterval(step, 125, 1);
    play.textContent = "Pause";
  };
  player.querySelector(".back").onclick = () => { stop(); step(-1); };
  player.querySelector(".on").onclick = () => { stop(); step(1); };
  range.oninput = () => { stop(); show(Number(range.value)); };
}
"""
