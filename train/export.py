"""`vidfill export`: the averaged weights of a run -> a model folder that can be given away."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from .. import jobs
from ..errors import BadInput
from ..files import aside
from ..modeling.autoencoder import load_trained_autoencoder
from ..modeling.denoiser import Denoiser
from ..modeling.run_folder import newest_first, newest_whole, verify
from ..sampling.inpaint.windows import SCHEDULE
from ..sampling.pipeline import CARD, VideoInpaintPipeline
from ..sampling.sweep.results import Sweep, read_sweep
from .card import public_name, write_card
from .checkpoints import folder_of_average

EXAMPLES = """\
examples:
  vidfill export runs/first models/first
  vidfill export runs/first models/first-long --ema 0.9999
  vidfill export runs/first models/first-20k --checkpoint step-00020000
  vidfill export runs/first models/first --schedule ddim:50 --sweep sweeps/first
      the schedule that it is used with, and its figures in the card
"""


@dataclass(frozen=True)
class ExportConfig:
    """Write a run's averaged weights as a model folder, with a model card.

    OUT is a diffusers pipeline, with the autoencoder in it; `vidfill inpaint` and `vidfill sweep`
    take it, and `VideoInpaintPipeline.from_pretrained` and `Denoiser.load`.
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
    autoencoder: str = ""
    """Where the autoencoder is, if no longer where the shards were encoded with it: a folder, a
    name on the Hugging Face hub, or shipped, which every vidfill has and is not written."""
    schedule: str = SCHEDULE
    """The schedule that is used where none is given, as `vidfill schedule --help` has them."""
    precision: Literal["float32", "float16"] = "float32"
    """Of the network's weights in the file: float16 halves it; they are used in float32."""
    sweep: Path | None = None
    """A sweep of this model, which `vidfill sweep` wrote: the card gets its figures."""


def export(config: ExportConfig) -> None:
    """Write the model folder.

    Raises:
        BadInput: The run has no such checkpoint or average, its autoencoder is not to be found, or
            `out` is taken.
    """
    if config.out.exists():
        raise BadInput(f"{config.out} exists: choose another folder or remove it")
    options = _read_options(config.run)
    sweep = read_sweep(config.sweep) if config.sweep else None
    checkpoint, facts = _find(config.run / "checkpoints", config.checkpoint)
    which = _choose_average(facts["ema_decays"], config.ema)
    pipeline = _open(config, checkpoint, which, sweep)
    card = write_card(
        config.out.name,
        options,
        facts,
        _held_out(config.run, facts["counters"]["step"]) if which == 0 else {},
        sweep,
        decay=facts["ema_decays"][which],
        schedule=config.schedule,
        weights=config.precision,
    )
    with aside(config.out) as partial:
        pipeline.save_pretrained(partial)
        (partial / CARD).write_text(card)


def _open(
    config: ExportConfig, checkpoint: Path, which: int, sweep: Sweep | None
) -> VideoInpaintPipeline:
    try:
        denoiser = Denoiser.load(checkpoint / folder_of_average(which))
    except BadInput:
        if checkpoint.exists():
            raise
        raise BadInput(
            f"the run has removed {checkpoint} meanwhile: give the same command again"
        ) from None
    autoencoder = load_trained_autoencoder(denoiser.autoencoder, config.autoencoder)
    if sweep and sweep.about.autoencoder["sha256"] != autoencoder.sha256:
        raise BadInput(f"{config.sweep} is of a model with another autoencoder: give its own")
    if config.precision == "float16":
        denoiser.network.half()
    # A path would say nothing elsewhere, and tell of this machine.
    identity = {**denoiser.autoencoder, "name": public_name(denoiser.autoencoder["name"])}
    space = dataclasses.replace(denoiser.space, autoencoder=identity)
    given = Denoiser(denoiser.network, denoiser.config, space)
    return VideoInpaintPipeline.of(given, autoencoder, config.schedule)


def _read_options(run: Path) -> dict[str, Any]:
    """The options of `vidfill train` that began the run."""
    try:
        job = json.loads((run / "job.json").read_bytes())
        options = job["config"] if job["verb"] == "train" else None
    except (OSError, ValueError, KeyError, TypeError):
        options = None
    if not isinstance(options, dict):
        raise BadInput(f"run is {run}: name a folder that `vidfill train` wrote")
    return options


def _find(folder: Path, name: str) -> tuple[Path, dict[str, Any]]:
    """A checkpoint that is whole, and what its state.json says."""
    there = newest_first(folder)
    if not there:
        raise BadInput(f"{folder} holds no checkpoint yet: the run has to write its first")
    if not name:
        return newest_whole(folder)
    if name not in [path.name for path in there]:
        listed = ", ".join(path.name for path in there)
        raise BadInput(f"checkpoint is {name!r}; {folder} holds {listed}: give one of them")
    return folder / name, verify(folder / name)


def _choose_average(decays: list[float], wanted: float) -> int:
    if not wanted:
        return 0
    if wanted not in decays:
        listed = " and ".join(str(decay) for decay in decays)
        raise BadInput(f"ema is {wanted}; the run averaged with {listed}: give one of them")
    return decays.index(wanted)


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
