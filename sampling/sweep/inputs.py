"""A sweep's settings, and what it opens before it samples."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ... import options
from ...data.shards.format import Example, family_of
from ...data.shards.reading import ShardedDataset
from ...errors import BadInput
from ...files import hide_secrets
from ...modeling.autoencoder import Autoencoder, hash_weights, load_trained_autoencoder
from ...modeling.denoiser import Denoiser
from ...processes import choose_device
from ..examples import check_shards, condition_of, known_of, pixels_of
from ..metrics.clip import Judges, load_judges
from ..metrics.i3d import FVD_FRAMES
from ..sampler import Request
from ..schedules.language import parse
from ..schedules.program import Program, compile_schedule
from . import baselines
from .kept import CompletionKey
from .measures import Measure, measures_with
from .settings import DEFAULT_SCHEDULES, SweepConfig


@dataclass(frozen=True)
class SweepInputs:
    """What a sweep works with, checked to fit together."""

    denoiser: Denoiser
    autoencoder: Autoencoder
    dataset: ShardedDataset
    families: Sequence[str]
    """The families of masks that are wanted."""
    examples: Mapping[str, int]
    """Their places in the dataset by key, in the split's order."""
    programs: Mapping[str, Program]
    """By their schedules' canonical texts."""
    reference: str
    """The schedule that the others are compared with."""
    completions: int
    judges: Judges
    device: torch.device

    @property
    def sampled(self) -> dict[str, Program]:
        """What runs in the sampler, by the name of its rows."""
        mean = compile_schedule(parse(baselines.MEAN), self.denoiser.timesteps)
        return {"mean": mean, **self.programs}

    @property
    def measures(self) -> list[Measure]:
        """The columns of the results."""
        return measures_with(self.judges.networks, self.completions)

    def load(self, example: str) -> Example:
        return self.dataset[self.examples[example]]


def open_inputs(config: SweepConfig) -> SweepInputs:
    """Load and check everything; nothing is written.

    Raises:
        BadInput: naming what does not fit.
    """
    options.check(config)
    schedules = read_schedules(config.schedules)
    reference = _choose_reference(config.reference, schedules)
    device = choose_device(config.device)
    dataset = ShardedDataset(config.shards, config.split)
    denoiser = Denoiser.load(config.model, str(device), config.precision)
    programs = {name: compile_schedule(parse(name), denoiser.timesteps) for name in schedules}
    shards = hide_secrets(config.shards)
    split = f"the split {config.split} of {shards}"
    check_shards(dataset, split, denoiser, f"the model in {config.model}")
    families = _choose_families(config.masks, dataset, split)
    examples = _choose_examples(config.examples, families, dataset, split)
    autoencoder = load_trained_autoencoder(
        denoiser.autoencoder, config.autoencoder, device, config.precision
    )
    frames = dataset.manifest.clip["frames"]
    if config.i3d and frames < FVD_FRAMES:
        raise BadInput(
            f"i3d is {config.i3d}; the clips have {frames} frames, and FVD wants at least "
            f"{FVD_FRAMES}: leave --i3d out, or encode longer clips"
        )
    return SweepInputs(
        denoiser=denoiser,
        autoencoder=autoencoder,
        dataset=dataset,
        families=families,
        examples=examples,
        programs=programs,
        reference=reference,
        completions=config.completions,
        judges=load_judges(config.lpips, config.i3d, device),
        device=device,
    )


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


def _choose_reference(asked: str, schedules: Sequence[str]) -> str:
    if not asked:
        return schedules[0]
    reference = str(parse(asked))
    if reference not in schedules:
        raise BadInput(
            f"reference is {reference}; the schedules are {' '.join(schedules)}: choose of these, "
            "or add it to them"
        )
    return reference


def _choose_families(asked: str, dataset: ShardedDataset, split: str) -> list[str]:
    there = list(dataset.manifest.masks["families"])
    for family in asked.split():
        if family not in there:
            raise BadInput(f"masks has {family}; {split} holds {', '.join(there)}: choose of these")
    return asked.split() or there


def _choose_examples(
    count: int, families: Sequence[str], dataset: ShardedDataset, split: str
) -> dict[str, int]:
    found = {key: i for i, key in enumerate(dataset.keys) if family_of(key) in families}
    if count > len(found):
        raise BadInput(
            f"examples is {count}; {split} holds {len(found)}: give at most that, or 0 for all"
        )
    chosen = dict(itertools.islice(found.items(), count or len(found)))
    pixels_of(dataset[next(iter(chosen.values()))])
    return chosen


def make_requests(inputs: SweepInputs) -> dict[CompletionKey, Request]:
    """All that the sampler runs, the longest first, so that none is left running alone."""
    return {
        CompletionKey(name, example, number): Request(
            # The first one's noise depends on the example alone, however many there are.
            f"{example}.{number}" if number else example,
            name,
            program,
            lambda example=example: condition_of(inputs.denoiser, inputs.load(example)),  # type: ignore[misc]
            lambda example=example: known_of(inputs.denoiser, inputs.load(example)),  # type: ignore[misc]
        )
        for name, program in sorted(inputs.sampled.items(), key=lambda item: -item[1].nfe)
        for example in inputs.examples
        for number in range(inputs.completions)
    }


def identify(inputs: SweepInputs) -> dict[str, Any]:
    """What a sweep stands on."""
    networks = inputs.judges.networks
    return {
        "model": inputs.denoiser.fingerprint(),
        "autoencoder": inputs.autoencoder.fingerprint(),
        "shards": inputs.dataset.fingerprint(),
        "networks": {name: hash_weights(network) for name, network in networks.items()},
    }
