"""A report's page: HTML that needs nothing beside itself."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..sweep.measures import best_of, front_of
from ..sweep.results import Sweep
from . import players, tables
from .tables import code

BASELINES = {
    "fill": "the input itself, its hole in one colour: the median of the visible pixels unless "
    "encoding was given another",
    "classic": "each hole pixel from the nearest frame in which it is visible, or inpainted by "
    "OpenCV within its frame where it is visible in none",
    "mean": "one network evaluation from pure noise: the model's posterior mean",
    "autoencoder": "the true clip encoded and decoded: the ceiling for a model of its latents",
}


@dataclass(frozen=True)
class Drawing:
    """A figure of the page."""

    file: str
    title: str
    caption: str
    """HTML."""
    draw: Callable[[], bytes]
    """Gives the PNG."""


def render_page(sweep: Sweep, drawings: Sequence[Drawing], pictures: Sequence[bytes]) -> str:
    """The page's HTML, with every picture inside it."""
    return _PAGE.format(
        style=_STYLE + tables.STYLE + players.STYLE,
        script=tables.SCRIPT + players.SCRIPT,
        title=html.escape(f"Schedules compared: {sweep.about['model']}"),
        summary=_summary(sweep),
        results=tables.render_results(sweep),
        reference=code(sweep.about["reference"]),
        answer=tables.render_answer(sweep),
        comparison=tables.render_comparison(sweep),
        players=players.render_players(sweep) or "<p>No clip's frames were kept.</p>",
        figures="\n".join(map(_figure, drawings, pictures)),
        made=_how_made(sweep),
    )


def _summary(sweep: Sweep) -> str:
    best, count = sweep.best, len(sweep.schedules)
    fill = next(row for row in sweep.baselines if row.name == "fill")
    gain = best["psnr_hole"] - fill["psnr_hole"]
    found = f"{code(best.name)} fills the hole best" if count > 1 else code(best.name)
    return (
        f"{f'Of {count} schedules, ' if count > 1 else 'The only schedule, '}{found}"
        f"{': ' if count > 1 else ', reaches '}"
        f"{best['psnr_hole']:.2f} dB PSNR in the hole, <strong>{abs(gain):.2f} dB "
        f"{'above' if gain >= 0 else 'below'} {code('fill')}</strong>, for {best['nfe']:,.0f} "
        f"network evaluations a {'clip' if sweep.completions == 1 else 'completion'}, on "
        f"{best['clips']:,.0f} clips.{_leading(sweep)}"
    )


def _leading(sweep: Sweep) -> str:
    """Who is best by the lead measure, and who is on its front."""
    lead, best = sweep.lead, best_of(sweep.schedules, sweep.lead)
    if not best:
        return ""
    names = ", ".join(code(row.name) for row in front_of(sweep.schedules, "nfe", lead))
    return (
        f" By {lead.title}, which tells more than squared error does, {code(best.name)} is best "
        f"({tables.rounded(best, lead)}); on the front of {lead.title} against NFE: {names}."
    )


def _figure(drawing: Drawing, picture: bytes) -> str:
    encoded = base64.b64encode(picture).decode()
    return (
        f'<figure><div class="scroll"><img alt="{html.escape(drawing.title)}" '
        f'src="data:image/png;base64,{encoded}"/></div>\n'
        f"<figcaption><strong>{html.escape(drawing.title)}.</strong> {drawing.caption}"
        "</figcaption></figure>"
    )


def _how_made(sweep: Sweep) -> str:
    about, clip = sweep.about, sweep.about["clip"]
    facts = {
        "Model": code(about["model"]),
        "Shards": code(about["shards"]),
        "Autoencoder": _described(about["autoencoder"]),
        "Masks": _described(about["masks"]),
        "Clips": f"{sweep.best['clips']:,.0f} of {clip['frames']} frames, {clip['width']}×"
        f"{clip['height']} pixels; the frames of {len(sweep.kept)} were kept",
        "Without a value": _left_out(sweep),
        "Noise": "the same for every schedule of a clip; a diffusion of "
        f"{about['timesteps']} timesteps",
        "Completions": f"{sweep.completions} of each clip under each schedule"
        + ", averaged within the clip first" * (sweep.completions > 1),
        "Device": f"{html.escape(str(about['device']))}; the whole sweep took "
        f"{about['seconds'] / 60:,.1f} minutes",
        "Composited": "outside the hole every result is the input itself; all measures are taken "
        "on 8-bit RGB frames",
    }
    baselines = {code(row.name): BASELINES.get(row.name, "") for row in sweep.baselines}
    measures = {measure.title: measure.meaning for measure in sweep.measures}
    return (
        f"{_definitions(facts)}\n<h3>What is measured</h3>{_definitions(measures)}\n"
        f"<h3>What the schedules are compared with</h3>{_definitions(baselines)}"
    )


def _left_out(sweep: Sweep) -> str:
    titles = {measure.column: measure.title for measure in sweep.measures}
    counts = sweep.about["without_value"]
    said = (f"{count} clips of {titles[column]}" for column, count in counts.items())
    return f"left out of means and comparisons: {', '.join(said) or 'none'}"


def _definitions(entries: Mapping[str, str]) -> str:
    rows = "".join(f"<div><dt>{name}</dt><dd>{text}</dd></div>\n" for name, text in entries.items())
    return f"<dl>{rows}</dl>"


def _described(value: object) -> str:
    """HTML for a value of sweep.json: a text, a list, or a record."""
    if isinstance(value, Mapping):
        return ", ".join(
            f"{html.escape(str(key)).replace('_', ' ')} {code(entry)}"
            for key, entry in value.items()
        )
    if isinstance(value, list):
        return ", ".join(map(_described, value))
    return html.escape(str(value))


_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<title>{title}</title>
<style>{style}</style>
</head>
<body>
<main>
<h1>Which schedule fills the hole best</h1>
<p class="summary">{summary}</p>
<h2>Results</h2>
{results}
<h2>As good as {reference}, and at what cost</h2>
{answer}
<h2>Compared, clip by clip</h2>
{comparison}
<h2>Figures</h2>
{figures}
<h2>Clips</h2>
<p class="key">Beside a name, the clip's PSNR of the hole. The frames are compressed here;
the sweep's folder has them as they are.</p>
{players}
<h2>How this was made</h2>
{made}
</main>
<script>{script}</script>
</body>
</html>
"""

_STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1a1a1a; --soft: #5c5c5c; --page: #ffffff; --panel: #f5f5f3; --rule: #d9d9d6;
  --good: #00704f; --bad: #b03a00;
}
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e6; --soft: #a5a5a2; --page: #161617; --panel: #212123; --rule: #3a3a3d;
    --good: #4cc79a; --bad: #ff9a66; }
}
* { box-sizing: border-box; }
body {
  margin: 0; background: var(--page); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif;
}
main { max-width: 62rem; margin: 0 auto; padding: 1.5rem 1rem 4rem; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0.5rem 0; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 0.75rem; }
h3 { font-size: 1rem; margin: 1.75rem 0 0.5rem; }
.summary { font-size: 1.1rem; margin: 0; max-width: 48rem; }
.key { color: var(--soft); font-size: 0.85rem; margin: 0.5rem 0 0; }
code { font: 0.9em ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.scroll { overflow-x: auto; }
table { border-collapse: separate; border-spacing: 0; width: 100%; font-size: 0.9rem;
  line-height: 1.35; }
th, td { padding: 0.3rem 0.6rem; text-align: right; white-space: nowrap; }
td { font-variant-numeric: tabular-nums; }
thead th { vertical-align: bottom; white-space: normal; font-weight: 600;
  border-bottom: 2px solid var(--ink); }
.unit { display: block; white-space: nowrap; font-weight: 400; font-size: 0.8rem;
  color: var(--soft); }
tr > :first-child { text-align: left; position: sticky; left: 0; background: var(--page); }
tbody th { font-weight: 400; }
tbody .group th { font-size: 0.8rem; color: var(--soft); padding-top: 0.7rem; }
.baselines tr > * { background: var(--panel); color: var(--soft); }
.schedules tr + tr > * { border-top: 1px solid var(--rule); }
tbody:last-child tr:last-child > * { border-bottom: 2px solid var(--ink); }
figure { margin: 1.5rem 0 2.5rem; }
figure img { display: block; max-width: none; width: 100%; background: #fff; border-radius: 4px; }
figcaption { color: var(--soft); font-size: 0.9rem; margin-top: 0.6rem; max-width: 52rem; }
figcaption strong { color: var(--ink); }
figcaption code, dd code { overflow-wrap: anywhere; }
dl { margin: 0; }
dl div { display: grid; grid-template-columns: 10rem 1fr; gap: 1rem; padding: 0.35rem 0;
  border-top: 1px solid var(--rule); }
dt { font-weight: 600; }
dd { margin: 0; }
@media (max-width: 40rem) {
  dl div { grid-template-columns: 1fr; gap: 0; }
  figure img { width: 44rem; }
}
"""
