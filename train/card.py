"""The model card: what a model was trained on, its measurements and its limits."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..data.shards.format import Manifest
from ..data.shards.reading import ShardedDataset, has_split
from ..errors import BadInput, describe, say
from ..files import hide_secrets
from ..sampling.report.tables import rounded
from ..sampling.sweep.measures import ResultRow
from ..sampling.sweep.results import Sweep
from .config import RATE_OPTIONS
from .state import describe_event

CARD_TEMPLATE = """\
---
library_name: diffusers
tags: [video-inpainting]
---

# {name}

A latent video diffusion model that fills the holes of a video, trained with vidfill. It was trained
on `{data}`, clips of {clips}, and works only on videos like those.

    vidfill inpaint VIDEO --mask MASK --model MODEL --out OUT

    from vidfill import VideoInpaintPipeline
    pipe = VideoInpaintPipeline.from_pretrained("MODEL")
    frames = pipe(video, mask).frames[0]

The default schedule is `{schedule}`.

## Training

- Data: `{data}`, its training split{examples}.
- Masks: {masks}.
- Autoencoder: {autoencoder}.
- {step} steps of {batch_size} examples{left_out}.{history}
- Forward pass in {precision}; the weights here are {weights}.
- These are not the last weights but their moving average, with a decay of {decay} per step.

## Figures

{figures}

## Limits

- What it fills in is made up: plausible at best, and no evidence of what was there.
- It knows the data and the masks above. It was not trained on other scenes, larger holes, holes
  that move differently, or other frame rates.
- It looks at {frames} frames at a time. In longer videos, a window sees the last frames of the one
  before, and nothing that is visible only earlier or later.
- It sees the surroundings of the holes at about {size} pixels, and makes no finer detail.
- What it fills in has gone through the autoencoder, which blurs and may shift colours a little.
  Pixels outside the holes are not touched.
"""

LOSSES = """\
The mean squared error of this average's predictions on held-out clips, at fixed noise and
timesteps: over all latents, inside the hole and outside, and by ranges of timesteps.

| measure | value | at step |
| --- | --- | --- |
"""

SWEPT = """\
Schedules and baselines on {clips} held-out clips of `{data}` with masks of the families {masks};
vidfill's docs/metrics.md explains the columns.

"""


def write_card(
    name: str,
    options: Mapping[str, Any],
    facts: Mapping[str, Any],
    losses: Mapping[str, tuple[int, float]],
    sweep: Sweep | None,
    **chosen: str | float,
) -> str:
    """The card, in Markdown.

    Args:
        name: Of the model.
        options: Of `vidfill train`.
        facts: Of the checkpoint.
        losses: The step and the value of each figure on held-out clips, by name.
        sweep: Of this model.
        chosen: decay, schedule and weights.
    """
    skipped = facts["counters"]["skipped"]
    frames, _, height, width = facts["latents"]["shape"]
    autoencoder = facts["latents"]["autoencoder"]
    unit = autoencoder["downsampling"]
    size = f"{width * unit}x{height * unit}"
    manifest = _find_manifest(options["shards"])
    return CARD_TEMPLATE.format(
        name=name,
        clips=f"{frames} frames of {size}",
        data=public_name(options["shards"]),
        examples=f", {manifest.examples} examples" if manifest else "",
        masks=_describe_masks(manifest),
        autoencoder="{kind} {name} (sha256 of its weights {sha256:.12})".format(
            **{**autoencoder, "name": public_name(autoencoder["name"])}
        ),
        step=facts["counters"]["step"],
        batch_size=options["batch_size"],
        left_out=f"; {skipped} were left out because they were not finite" if skipped else "",
        history="".join(f"\n- {line}." for line in _tell(facts.get("history", []))),
        precision=options["precision"],
        figures="\n\n".join(_figures(losses, sweep)),
        frames=frames,
        size=size,
        **chosen,
    )


def public_name(name: str) -> str:
    """A name on the hub as it is; only the last part of a path or a URL, to name no machine."""
    local = "://" in name or Path(name).is_absolute() or Path(name).exists()
    return name.rstrip("/").rpartition("/")[2] if local else name


def _find_manifest(shards: str) -> Manifest | None:
    """The training split's manifest; None, with a line on stderr, if it cannot be read any more."""
    try:
        if has_split(shards, "train"):
            return ShardedDataset(shards, "train").manifest
        reason = "there is no training split"
    except (BadInput, OSError) as error:
        reason = describe(error)
    place = hide_secrets(shards)
    say(f"vidfill: the card cannot name the masks of {place}: {reason}")
    return None


def _describe_masks(manifest: Manifest | None) -> str:
    if manifest is None:
        return "not known any more when this card was written"
    families = manifest.masks["families"]
    if len(families) == 1:
        (family,) = families
        return family
    return ", ".join(f"{name} (weight {weight:g})" for name, weight in families.items())


def _tell(history: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """What changed how the weights came about."""
    for event in history:
        if "from" in event:
            shown = {**event, "from": public_name(event["from"])}
        else:
            rate = {n: v for n, v in event["changed"].items() if n in (*RATE_OPTIONS, "steps")}
            shown = {**event, "changed": rate}
        if said := describe_event(shown):
            yield said[0].upper() + said[1:]


def _figures(losses: Mapping[str, tuple[int, float]], sweep: Sweep | None) -> list[str]:
    figures = []
    if sweep:
        figures.append(_table_of(sweep))
    if losses:
        rows = [f"| {name} | {value:.4g} | {step} |" for name, (step, value) in losses.items()]
        figures.append(LOSSES + "\n".join(rows))
    return figures or ["None were measured on this average."]


def _table_of(sweep: Sweep) -> str:
    rows: list[ResultRow] = [*sweep.baselines, *sweep.schedules]
    said = SWEPT.format(
        clips=rows[0].texts["clips"],
        data=public_name(sweep.about.shards),
        masks=", ".join(sweep.about.masks),
    )
    shown = [measure for measure in sweep.measures if measure.column != "clips"]
    lines = [["schedule", *(f"{m.title} ({m.unit}) {m.arrow}".rstrip() for m in shown)]]
    lines.append(["---"] * len(lines[0]))
    lines += [[f"`{row.name}`", *(rounded(row, measure) for measure in shown)] for row in rows]
    return said + "\n".join(f"| {' | '.join(line)} |" for line in lines)
