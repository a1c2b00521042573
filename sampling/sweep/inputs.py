"""What a sweep is told, and what it opens before it samples."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from ...data.shards.format import family_of
from ...data.shards.reading import ShardedDataset
from ...data.storage.names import MANIFEST
from ...errors import BadInput
from ...files import hide_secrets
from ...modeling.autoencoder import Autoencoder, hash_weights, identify, load_trained_autoencoder
from ...modeling.denoiser import Denoiser
from ...modeling.precision import Precision
from ...processes import choose_device
from ..examples import pixels_of
from ..metrics.clip import Judges, load_judges
from ..metrics.i3d import FVD_FRAMES
from ..schedules.language import parse
from ..schedules.program import Program, compile_schedule
from . import baselines
from .measures import Measure, measures_with

DEFAULT_SCHEDULES = (
    "ddim:50 ddpm:50 ddpm:50+resample(n=4) ddpm:50+resample(n=6) ddpm:50+resample(n=10)"
)


@dataclass(frozen=True)
class SweepConfig:
    """Fill the holes of held-out clips under several schedules, and measure how well.

    All schedules see the same clips, masks and noise; what is visible stays as it was. A row is
    written for every completion of a clip as it is finished: the same command continues a sweep
    that was stopped, on any number of processes. Beside the schedules stand four baselines: `fill`
    (the model's input), `classic` (the nearest frame in which a pixel is visible, else OpenCV's
    inpainting), `mean` (one network evaluation) and `autoencoder` (the true clip encoded and
    decoded: the ceiling). Each schedule is compared, clip by clip, with its own without resampling
    and with a reference. The tables are CSV and Parquet.
    """

    model: Path
    """Folder of a training run (its newest model is taken) or of a model."""
    shards: str
    """Folder that `vidfill encode` wrote, or its URL, with the model's autoencoder."""
    out: Path
    """Folder for the results: new, empty, or begun by this same command."""
    schedules: str = DEFAULT_SCHEDULES
    """Schedules, separated by spaces, each SOLVER:STEPS[(key=value)][+MOVE(key=value)], as
    `vidfill schedule --help` has them."""
    reference: str = ""
    """The schedule with which each is compared, beside its own without resampling; empty is the
    first."""
    clips: int = 16
    """Clips to fill: the split's first ones; 0 takes all."""
    completions: int = 1
    """Times that a schedule fills each clip, each with noise of its own. With two or more there is
    the best of them, and how far they lie from each other; what they put into the hole is kept."""
    masks: str = ""
    """Take only the clips under these mask families, separated by spaces; empty takes all."""
    split: str = "validation"
    """Split of the shards; it must keep its clips' pixels."""
    batch_size: int = 0
    """Clips that the network evaluates at once; 0 finds once what is fastest."""
    seed: int = 0
    """Seed of the noise."""
    autoencoder: str = ""
    """Where the autoencoder is now, if not where the model's record says: a name or a folder."""
    lpips: str = ""
    """LPIPS's network, a safetensors file or hf://OWNER/NAME/FILE; empty leaves its column out."""
    i3d: str = ""
    """I3D, for FVD and VFID, likewise; FVD wants clips of ten frames or more."""
    keep: int = 4
    """Clips whose frames are kept as pictures: the first ones."""
    precision: Precision = "float32"
    """Of the networks; bfloat16 is several times faster where the hardware has it."""
    device: str = "auto"
    """Where the networks run: "cpu", "cuda", "cuda:1"…; "auto" is each process's own GPU if
    there is one."""
    plan: bool = False
    """Say what the sweep would cost, from one measured evaluation, and write nothing."""


@dataclass(frozen=True)
class Inputs:
    """What a sweep works with, found to fit together."""

    denoiser: Denoiser
    autoencoder: Autoencoder
    dataset: ShardedDataset
    clips: Mapping[str, int]
    """The clips by their keys, in the split's order, and where each is in the dataset."""
    programs: Mapping[str, Program]
    """By their schedules' canonical texts."""
    completions: int
    judges: Judges
    device: torch.device

    @property
    def sampled(self) -> dict[str, Program]:
        """What runs in the sampler, by the name of its rows."""
        return {"mean": compile_schedule(parse(baselines.MEAN), self.denoiser.timesteps)} | dict(
            self.programs
        )

    @property
    def measures(self) -> list[Measure]:
        """The columns of the results."""
        return measures_with(_networks(self.judges), self.completions)


def _networks(judges: Judges) -> list[str]:
    found = dataclasses.fields(judges)
    return [field.name for field in found if getattr(judges, field.name) is not None]


def open_inputs(config: SweepConfig) -> Inputs:
    """Load and check everything; nothing is written.

    Raises:
        BadInput: naming what does not fit.
    """
    _check_settings(config)
    schedules = read_schedules(config.schedules)
    _choose_reference(config, schedules)
    device = choose_device(config.device)
    dataset = ShardedDataset(config.shards, config.split)
    denoiser = Denoiser.load(config.model, str(device), config.precision)
    programs = {name: compile_schedule(parse(name), denoiser.timesteps) for name in schedules}
    _check_latents(config, dataset, denoiser)
    clips = _choose_clips(config, dataset)
    autoencoder = load_trained_autoencoder(
        denoiser.autoencoder, config.autoencoder, device, config.precision
    )
    frames = dataset.manifest.clip["frames"]
    if config.i3d and frames < FVD_FRAMES:
        raise BadInput(
            f"i3d is {config.i3d}; the clips have {frames} frames, and FVD wants at least "
            f"{FVD_FRAMES}: leave --i3d out, or encode longer clips"
        )
    judges = load_judges(config.lpips, config.i3d, device)
    return Inputs(
        denoiser, autoencoder, dataset, clips, programs, config.completions, judges, device
    )


def _check_settings(config: SweepConfig) -> None:
    for field, least in {"clips": 0, "completions": 1, "batch_size": 0, "keep": 0}.items():
        if getattr(config, field) < least:
            raise BadInput(f"{field} is {getattr(config, field)}: give {least} or more")


def read_schedules(text: str) -> list[str]:
    """Schedules separated by spaces, each in canonical form.

    Raises:
        BadInput: there is none, one cannot be read, or one is given twice.
    """
    schedules = [str(parse(word)) for word in text.split()]
    if not schedules:
        raise BadInput(f'schedules is empty: give some, as in "{DEFAULT_SCHEDULES}"')
    for index, schedule in enumerate(schedules):
        if schedule in schedules[:index]:
            raise BadInput(f"schedules has {schedule} twice: give it once")
    return schedules


def _choose_reference(config: SweepConfig, schedules: Sequence[str]) -> str:
    if not config.reference:
        return schedules[0]
    reference = str(parse(config.reference))
    if reference not in schedules:
        raise BadInput(
            f"reference is {reference}; the schedules are {' '.join(schedules)}: choose of these, "
            "or add it to them"
        )
    return reference


def _place(config: SweepConfig) -> str:
    """The shards, as a message or a record may name them."""
    return hide_secrets(config.shards)


def _check_latents(config: SweepConfig, dataset: ShardedDataset, denoiser: Denoiser) -> None:
    ours, theirs = denoiser.autoencoder, dataset.manifest.autoencoder
    if ours["sha256"] != theirs["sha256"]:
        raise BadInput(
            f"the shards in {_place(config)} were encoded with {identify(theirs)}, the model in "
            f"{config.model} was trained on {identify(ours)}: encode with the model's"
        )
    shape, trained = list(dataset.manifest.latent_shape), list(denoiser.space.shape)
    if shape != trained:
        raise BadInput(
            f"the shards in {_place(config)} hold latents of the shape {shape} (frames, channels, "
            f"height, width), the model in {config.model} was trained on {trained}: encode with "
            "the training clips' length and size"
        )


def _choose_families(config: SweepConfig, dataset: ShardedDataset) -> list[str]:
    there = list(dataset.manifest.masks["families"])
    for family in config.masks.split():
        if family not in there:
            raise BadInput(
                f"masks has {family}; the split {config.split} of {_place(config)} holds "
                f"{', '.join(there)}: choose of these"
            )
    return config.masks.split() or there


def _choose_clips(config: SweepConfig, dataset: ShardedDataset) -> dict[str, int]:
    families = _choose_families(config, dataset)
    found = {key: i for i, key in enumerate(dataset.keys) if family_of(key) in families}
    if config.clips > len(found):
        raise BadInput(
            f"clips is {config.clips}; the split {config.split} of {_place(config)} holds "
            f"{len(found)}: give at most that, or 0 for all"
        )
    chosen = dict(itertools.islice(found.items(), config.clips or len(found)))
    pixels_of(dataset[next(iter(chosen.values()))])
    return chosen


def fingerprint(inputs: Inputs) -> dict[str, str]:
    """What must not change between the runs of one sweep."""
    manifest = inputs.dataset.store.read(MANIFEST)
    return {
        "model": hash_weights(inputs.denoiser.network),
        "shards' manifest": hashlib.sha256(manifest).hexdigest(),
        "autoencoder": inputs.autoencoder.sha256,
    } | {
        f"network {name}": hash_weights(getattr(inputs.judges, name))
        for name in _networks(inputs.judges)
    }
