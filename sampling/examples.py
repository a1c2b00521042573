"""From examples of a shard to sampled frames."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import torch

from ..data.shards.format import Example
from ..data.shards.reading import ShardedDataset
from ..data.videos import Frames
from ..errors import BadInput
from ..modeling.autoencoder import Autoencoder, latent_mask, refuse_another, to_frames
from ..modeling.denoiser import Denoiser
from ..modeling.diffusion import LatentMask, Latents
from .metrics.pixels import composite
from .sampler import ClipLatents, Condition, Known, Request, sample
from .schedules.language import parse
from .schedules.program import compile_schedule


def inpaint(
    denoiser: Denoiser,
    autoencoder: Autoencoder,
    examples: Sequence[Example],
    schedule: str,
    *,
    seed: int,
    capacity: int,
) -> Iterator[tuple[Example, Frames]]:
    """Fill the holes of a few examples under one schedule; yields each as it is finished.

    Put the network into evaluation mode first.

    Raises:
        BadInput: the schedule cannot be read, or an example's shard keeps no pixels.
    """
    program = compile_schedule(parse(schedule), denoiser.timesteps)
    by_key = {example.key: example for example in examples}
    requests = [
        Request(
            key,
            schedule,
            program,
            functools.partial(condition_of, denoiser, example),
            functools.partial(known_of, denoiser, example),
        )
        for key, example in by_key.items()
    ]
    for result in sample(denoiser, requests, capacity=capacity, seed=seed):
        example = by_key[result.request.key]
        yield example, decode_result(autoencoder, example, result.latents)


def check_shards(dataset: ShardedDataset, shards: str, denoiser: Denoiser, model: str) -> None:
    """Refuse a split whose latents are not of the space in which a network works.

    `shards` and `model` name them in the message.

    Raises:
        BadInput: They are of another autoencoder, or of clips of another shape.
    """
    manifest = dataset.manifest
    refuse_another(
        *(manifest.autoencoder, denoiser.autoencoder, f"{shards} holds latents of"),
        *(f"{model} was trained on those of", "encode with the model's"),
    )
    shape, trained = list(manifest.latent_shape), list(denoiser.space.shape)
    if shape != trained:
        raise BadInput(
            f"{shards} holds latents of the shape {shape} (frames, channels, height, width), "
            f"{model} was trained on {trained}: encode with the training clips' length and size"
        )


def condition_of(denoiser: Denoiser, example: Example) -> Condition:
    """The network's condition for an example, on the network's device."""
    return denoiser.condition(*_masked(denoiser, example))[0]


def known_of(denoiser: Denoiser, example: Example) -> Known:
    """The masked clip's latents, on the network's device.

    Not the clip's own: the autoencoder sees beyond a latent's cell, so those near the hole would
    reveal some of it.
    """
    masked_latents, hole = _masked(denoiser, example)
    return Known(denoiser.normalise(masked_latents)[0], hole[0])


def _masked(denoiser: Denoiser, example: Example) -> tuple[Latents, LatentMask]:
    device = next(denoiser.network.parameters()).device
    masked_latents = torch.from_numpy(example.masked_latents).float()
    hole = latent_mask(example.mask, *masked_latents.shape[-2:])
    return masked_latents[None].to(device), hole[None].to(device)


def decode_result(autoencoder: Autoencoder, example: Example, latents: ClipLatents) -> Frames:
    """Decode latents, and put the example's own pixels outside its hole.

    Raises:
        BadInput: the example's shard keeps no pixels.
    """
    frames = to_frames(autoencoder.decode(latents[None])[0])
    return composite(pixels_of(example), frames, example.mask)


def pixels_of(example: Example) -> Frames:
    """The pixels of an example.

    Raises:
        BadInput: its shard keeps none.
    """
    if example.pixels is None:
        raise BadInput(
            f"{example.key} is in a shard without pixels: encode again with --pixels all, "
            "or name the validation split, which keeps them"
        )
    return example.pixels
