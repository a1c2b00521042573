"""`vidfill export`: the averaged weights of a run -> a model folder that can be given away."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import jobs
from ..modeling.checkpoint import newest_first, newest_whole, verify
from .checkpoints import folder_of_average

EXAMPLES = """\
examples:
  vidfill export runs/first models/first
  vidfill export runs/first models/first-long --ema 0.9999
  vidfill export runs/first models/first-20k --checkpoint step-00020000
"""

CARD = """\
---
library_name: diffusers
tags: [video-inpainting]
---

# {name}

A latent video diffusion model that fills the holes of a video, trained by vidfill. It works on
clips of {latents}, of the autoencoder that
`denoiser.json` names, and is good for videos like those of `{data}` only.

    vidfill sweep MODEL SHARDS OUT

    from pathlib import Path
    from vidfill.modeling.diffusion import Denoiser
    denoiser = Denoiser.load(Path("MODEL"))

## Training

- Data: `{data}`, its training split.
- {step} steps of {batch_size} clips{left_out}.
- Forward pass in {precision}; weights in float32.
- These are not the last weights but their average, of decay {decay} a step.

## Figures

{figures}
"""

FIGURES = """\
The mean squared error of what this average predicts on held-out clips, at fixed noise and
timesteps: of all latents, of those inside the hole and outside, and by ranges of the timesteps.

| measure | value | at step |
| --- | --- | --- |
"""


@dataclass(frozen=True)
class ExportConfig:
    """Write a run's averaged weights as a model folder, with a model card.

    OUT/unet is a diffusers model; `vidfill sweep` and `Denoiser.load` take OUT itself.
    """

    run: Path
    """The run's folder, which `vidfill train` wrote; it may still be at work."""
    out: Path
    """The folder to write; it must not exist."""
    ema: float = 0.0
    """The decay of the average to write, one of the run's optimizer.ema_decays; 0 takes the first,
    which is the one that the run evaluates and shows."""
    checkpoint: str = ""
    """The checkpoint to take, as step-00020000; empty takes the newest that is whole."""


def export(config: ExportConfig) -> None:
    """Write the model folder.

    Raises:
        BadInput: The run has no such checkpoint or average, or `out` is taken.
    """
    if config.out.exists():
        raise jobs.BadInput(f"{config.out} exists: choose another folder or remove it")
    options = _read_options(config.run)
    checkpoint, facts = _find(config.run / "checkpoints", config.checkpoint)
    which = _choose_average(facts["ema_decays"], config.ema)
    with jobs.aside(config.out) as partial:
        try:
            shutil.copytree(checkpoint / folder_of_average(which), partial)
        except OSError:
            if checkpoint.exists():
                raise
            raise jobs.BadInput(
                f"the run has removed {checkpoint} meanwhile: give the same command again"
            ) from None
        card = _write_card(config, options, facts, which)
        (partial / "README.md").write_text(card)


def _read_options(run: Path) -> dict[str, Any]:
    """The options of `vidfill train` that began the run."""
    try:
        job = json.loads((run / "job.json").read_bytes())
        options = job["config"] if job["verb"] == "train" else None
    except (OSError, ValueError, KeyError, TypeError):
        options = None
    if not isinstance(options, dict):
        raise jobs.BadInput(f"run is {run}: name a folder that `vidfill train` wrote")
    return options


def _find(folder: Path, name: str) -> tuple[Path, dict[str, Any]]:
    """A checkpoint that is whole, and what its state.json says."""
    there = newest_first(folder)
    if not there:
        raise jobs.BadInput(f"{folder} holds no checkpoint yet: the run has to write its first")
    if not name:
        return newest_whole(folder)
    if name not in [path.name for path in there]:
        listed = ", ".join(path.name for path in there)
        raise jobs.BadInput(f"checkpoint is {name!r}; {folder} holds {listed}: give one of them")
    return folder / name, verify(folder / name)


def _choose_average(decays: list[float], wanted: float) -> int:
    if not wanted:
        return 0
    if wanted not in decays:
        listed = " and ".join(str(decay) for decay in decays)
        raise jobs.BadInput(f"ema is {wanted}; the run averaged with {listed}: give one of them")
    return decays.index(wanted)


def _write_card(
    config: ExportConfig, options: dict[str, Any], facts: dict[str, Any], which: int
) -> str:
    """The model card, in Markdown."""
    step, skipped = facts["counters"]["step"], facts["counters"]["skipped"]
    frames, channels, height, width = facts["latents"]["shape"]
    return CARD.format(
        name=config.out.name,
        latents=f"{frames} frames as latents of {channels} channels, {height}×{width}",
        data=options["shards"].rstrip("/").rpartition("/")[2],
        step=step,
        batch_size=options["batch_size"],
        left_out=f", {skipped} of them left out as not finite" if skipped else "",
        precision=options["precision"],
        decay=facts["ema_decays"][which],
        figures=_table(_held_out(config.run, step) if which == 0 else {}),
    )


def _table(figures: dict[str, tuple[int, float]]) -> str:
    rows = [f"| {name} | {value:.4g} | {step} |" for name, (step, value) in figures.items()]
    return FIGURES + "\n".join(rows) if rows else "None were measured on this average."


def _held_out(run: Path, step: int) -> dict[str, tuple[int, float]]:
    """What the run measured last on held-out clips up to `step`: by name the step and the value."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    folder = run / "tensorboard"
    if not folder.is_dir():
        return {}
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "images": 1, "tensors": 1})
    events.Reload()
    measured = {}
    for tag in events.Tags()["scalars"]:
        until = [event for event in events.Scalars(tag) if event.step <= step]
        if tag.startswith("held_out/") and until:
            measured[tag.removeprefix("held_out/")] = (until[-1].step, until[-1].value)
    return measured


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of `vidfill export`."""
    return jobs.main(ExportConfig, export, argv, verb="export", examples=EXAMPLES)
