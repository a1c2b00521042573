"""`vidfill export`: the averaged weights of a run -> a model folder for others to use."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .. import jobs
from ..errors import BadInput
from ..files import aside, refuse_existing
from ..modeling.autoencoder import load_trained_autoencoder, refuse_another
from ..modeling.denoiser import Denoiser
from ..modeling.run_folder import CHECKPOINTS, newest_first, newest_whole, verify
from ..sampling.pipeline import CARD, VideoInpaintPipeline
from ..sampling.sweep.results import Sweep, read_sweep
from .card import public_name, write_card
from .checkpoints import folder_of_average
from .config import EXPORT_EXAMPLES as EXAMPLES
from .config import ExportConfig


def export(config: ExportConfig) -> None:
    """Write the model folder.

    Raises:
        BadInput: The run has no such checkpoint or average, its autoencoder cannot be found, or
            `out` exists.
    """
    refuse_existing(config.out)
    job = jobs.read_job(config.run)
    if not job or job.verb != "train":
        raise BadInput(f"run is {config.run}: name a folder that `vidfill train` wrote")
    sweep = read_sweep(config.sweep) if config.sweep else None
    checkpoint, facts = _find(config.run / CHECKPOINTS, config.checkpoint)
    decays = facts["ema_decays"]
    if config.ema and config.ema not in decays:
        listed = " and ".join(map(str, decays))
        raise BadInput(f"ema is {config.ema}; the run averaged with {listed}: give one of them")
    which = decays.index(config.ema) if config.ema else 0
    pipeline = _open(config, checkpoint, which, sweep)
    card = write_card(
        config.out.name,
        job.config,
        facts,
        _held_out(config.run, facts["counters"]["step"]) if which == 0 else {},
        sweep,
        decay=decays[which],
        schedule=config.schedule,
        weights=config.precision,
    )
    with aside(config.out, new=True) as partial:
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
            f"the run has just removed {checkpoint}: give the same command again"
        ) from None
    autoencoder = load_trained_autoencoder(denoiser.autoencoder, config.autoencoder)
    if sweep:
        refuse_another(
            *(sweep.about.autoencoder, autoencoder.identity(), f"sweep is {config.sweep}, of"),
            *("the model was trained on", "give one of this model"),
        )
        _refuse_other_weights(sweep.folder, denoiser)
    if config.precision == "float16":
        denoiser.network.half()
    # A path would mean nothing elsewhere, and reveal something of this machine.
    identity = {**denoiser.autoencoder, "name": public_name(denoiser.autoencoder["name"])}
    space = dataclasses.replace(denoiser.space, autoencoder=identity)
    exported = Denoiser(denoiser.network, denoiser.config, space)
    return VideoInpaintPipeline.of(exported, autoencoder, config.schedule)


def _refuse_other_weights(sweep: Path, denoiser: Denoiser) -> None:
    """Refuse a sweep that its record knows to be of another average or another checkpoint."""
    job = jobs.read_job(sweep)
    swept = job.stands_on.get("model") if job and job.stands_on else None
    if isinstance(swept, dict) and swept.get("weights") != denoiser.fingerprint()["weights"]:
        raise BadInput(
            f"sweep is {sweep}, of other weights than these: sweep this checkpoint's, or leave "
            "--sweep out"
        )


def _find(folder: Path, name: str) -> tuple[Path, dict[str, Any]]:
    """An intact checkpoint, and what its state.json says."""
    names = [path.name for path in newest_first(folder)]
    if not names:
        raise BadInput(f"{folder} holds no checkpoint yet: wait for the run's first one")
    if not name:
        return newest_whole(folder)
    if name not in names:
        raise BadInput(
            f"checkpoint is {name!r}; {folder} holds {', '.join(names)}: give one of them"
        )
    return folder / name, verify(folder / name)


def _held_out(run: Path, step: int) -> dict[str, tuple[int, float]]:
    """The last step, up to `step`, and value of each figure on held-out clips, by name."""
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
