"""A report's clips: each as a film that plays in the page, under all schedules at once."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence

import cv2
from einops import rearrange

from .results import Sweep

QUALITY = 90  # of the JPEGs, in percent; the sweep's own frames are lossless


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
        f'<div class="films">{"".join(_film(sweep, clip, *film) for film in _films(sweep, clip))}'
        "</div></details>"
    )


def _films(sweep: Sweep, clip: str) -> Sequence[tuple[str, str, str]]:
    """Of each film its name, its folder, and a note."""
    rows = [*sweep.baselines, *sweep.schedules]
    given = [("masked", "masked", ""), ("ground truth", "truth", "")]
    return given + [
        (row.name, sweep.slug(row.name), f"{sweep.hole_psnr[row.name, clip]:.1f} dB")
        for row in rows
        if row.name != "fill"  # it is what the model is given: the masked clip
    ]


def _film(sweep: Sweep, clip: str, name: str, folder: str, note: str) -> str:
    strip = rearrange(sweep.frames(folder, clip), "f h w rgb -> h (f w) rgb")[..., ::-1]
    written, jpeg = cv2.imencode(".jpg", strip, [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    assert written
    encoded = base64.b64encode(jpeg.tobytes()).decode()
    return (
        f'<div><div class="film"><img alt="{html.escape(f"{clip}: {name}")}" '
        f'src="data:image/jpeg;base64,{encoded}"/></div>'
        f'<span class="name">{html.escape(name)}</span> <span class="note">{note}</span></div>\n'
    )


STYLE = """
.player { margin: 0.75rem 0; border-top: 1px solid var(--rule); padding-top: 0.5rem; }
.player summary { cursor: pointer; padding: 0.3rem 0; overflow-wrap: anywhere; }
.controls { display: flex; gap: 0.5rem; align-items: center; margin: 0.5rem 0; }
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
