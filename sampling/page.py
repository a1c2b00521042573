"""A report's page: HTML that needs nothing beside itself."""

from __future__ import annotations

import base64
import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from .results import MEASURES, Measure, Row, Sweep

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
        style=_STYLE,
        title=html.escape(f"Schedules compared: {sweep.about['model']}"),
        summary=_summary(sweep),
        table=_table(sweep),
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
        f"network evaluations a clip, on {best['clips']:,.0f} clips."
    )


def _table(sweep: Sweep) -> str:
    heads = "".join(
        f'<th scope="col">{m.title}{f"&#160;{m.arrow}" if m.arrow else ""}'
        f'<span class="unit">{m.unit}</span></th>'
        for m in MEASURES
    )
    bests = _best_texts(sweep.schedules)
    return (
        f'<table><thead><tr><th scope="col">Schedule</th>{heads}</tr></thead>\n'
        f'<tbody class="baselines">{_group("Baselines")}{_rows(sweep.baselines, {})}</tbody>\n'
        f'<tbody class="schedules">{_group("Schedules")}{_rows(sweep.schedules, bests)}</tbody>'
        "</table>"
    )


def _group(title: str) -> str:
    return (
        f'<tr class="group"><th scope="rowgroup" colspan="{len(MEASURES) + 1}">{title}</th></tr>\n'
    )


def _rows(rows: Sequence[Row], bests: Mapping[str, str]) -> str:
    return "".join(
        f'<tr><th scope="row">{code(row.name)}</th>'
        + "".join(_cell(row, measure, bests.get(measure.column)) for measure in MEASURES)
        + "</tr>\n"
        for row in rows
    )


def _cell(row: Row, measure: Measure, best: str | None) -> str:
    """A value as a reader wants it, and to a machine exactly as results.csv has it."""
    text = _rounded(row, measure)
    value = f'<data value="{html.escape(row.texts[measure.column])}">{text}</data>'
    return f"<td>{f'<strong>{value}</strong>' if text == best else value}</td>"


def _best_texts(rows: Sequence[Row]) -> dict[str, str]:
    """By column the best value, as it is shown: schedules that show the same are equally good."""
    if len(rows) < 2:
        return {}
    return {
        m.column: _rounded(max(rows, key=lambda row: m.better * row[m.column]), m)
        for m in MEASURES
        if m.better
    }


def _rounded(row: Row, measure: Measure) -> str:
    return f"{row[measure.column]:,.{measure.digits}f}"


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
        "Noise": "the same for every schedule of a clip; a diffusion of "
        f"{about['timesteps']} timesteps",
        "Device": f"{html.escape(str(about['device']))}; the whole sweep took "
        f"{about['seconds'] / 60:,.1f} minutes",
        "Composited": "outside the hole every result is the input itself; all measures are taken "
        "on 8-bit RGB frames",
    }
    baselines = {code(row.name): BASELINES.get(row.name, "") for row in sweep.baselines}
    measures = {measure.title: measure.meaning for measure in MEASURES}
    return (
        f"{_definitions(facts)}\n<h3>What is measured</h3>{_definitions(measures)}\n"
        f"<h3>What the schedules are compared with</h3>{_definitions(baselines)}"
    )


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


def code(text: object) -> str:
    return f"<code>{html.escape(str(text))}</code>"


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
<div class="scroll">{table}</div>
<p class="key">Arrows point to better; bold is the best schedule of a column.</p>
<h2>Figures</h2>
{figures}
<h2>How this was made</h2>
{made}
</main>
</body>
</html>
"""

_STYLE = """
:root {
  color-scheme: light dark;
  --ink: #1a1a1a; --soft: #5c5c5c; --page: #ffffff; --panel: #f5f5f3; --rule: #d9d9d6;
}
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8e6; --soft: #a5a5a2; --page: #161617; --panel: #212123; --rule: #3a3a3d; }
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
img { display: block; max-width: none; width: 100%; background: #fff; border-radius: 4px; }
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
  img { width: 44rem; }
}
"""
