"""What is said of a split's shards: how large they may become, and what they hold in the end."""

from __future__ import annotations

import json
import tarfile
from pathlib import Path

from ...errors import BadInput
from ...files import write_atomically
from ...modeling.autoencoder import Autoencoder
from ...records import read_small
from ..shards.format import Manifest, ShardTable
from ..shards.order import choose_lanes
from ..shards.writing import latent_moments, read_index
from ..storage.names import MANIFEST, SKIPPED, shard_name
from ..videos import FrameSize
from .settings import EncodeConfig

NPY_HEADER = 128  # bytes


def latent_shape(
    frames: int, size: FrameSize, autoencoder: Autoencoder
) -> tuple[int, int, int, int]:
    """Frames, channels, height and width of a clip's latents."""
    step = autoencoder.downsampling
    return frames, autoencoder.channels, size.height // step, size.width // step


def bound_example(
    latents: tuple[int, int, int, int], size: FrameSize, moments: bool, pixels: bool, label: int
) -> int:
    """Bytes in a tar that no example exceeds, with or without log-variances (`moments`) and pixels.

    `label` is the number of characters of the longest label, as JSON has it.
    """
    frames, channels, h, w = latents
    values = frames * size.height * size.width
    arrays = [frames * channels * h * w * 2] * (3 if moments else 2) + [frames * h * w * 2]
    arrays += [values * 3] if pixels else []
    mask = 1024 + values // 6  # deflate takes 0.16 of a byte for a random value out of two
    members = [*(NPY_HEADER + array for array in arrays), mask, 512 + label]
    return sum(members) + len(members) * 2 * tarfile.BLOCKSIZE  # a header each, and padding


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a split, where it is there and whole."""
    try:
        return Manifest.from_json(read_small(folder / MANIFEST))
    except (FileNotFoundError, ValueError):
        return None


def write_manifest(
    config: EncodeConfig, split: str, shards: int, size: FrameSize, autoencoder: Autoencoder
) -> dict[str, str]:
    """Write the manifest of a split once all of its shards are there.

    Returns:
        The videos that were skipped, each with the reason.

    Raises:
        BadInput: a shard is gone, or no video gave a clip.
    """
    folder = config.out / split
    indexes = []
    for number in range(shards):
        if (index := read_index(folder, number)) is None:
            raise BadInput(
                f"{folder / shard_name(number)} is gone: the same command makes it again"
            )
        indexes.append(index)
    skipped = {skip.source: skip.reason for index in indexes for skip in index.skipped}
    table = ShardTable.of(indexes)
    if not sum(table.examples):
        label, reason = next(iter(skipped.items()))
        raise BadInput(f"no video of the split {split} gave a clip: {label}: {reason}")
    mean, std = latent_moments(indexes)
    recorded = read_manifest(folder)
    lanes, block = choose_lanes(table.examples)
    manifest = Manifest(
        split=split,
        # In the words of the first time: they are compared, and a manifest is known by its hash.
        autoencoder=recorded.autoencoder if recorded else autoencoder.identity(),
        posterior=config.posterior,
        pixels=config.keeps_pixels(split),
        clip={"frames": config.frames, "height": size.height, "width": size.width},
        latent_shape=latent_shape(config.frames, size, autoencoder),
        masks={
            "families": config.mix(split).weights,
            "per_clip": config.masks_per_clip,
            "seed": config.seed,
        },
        fill="median" if config.fill_colour is None else list(config.fill_colour),
        latents_mean=tuple(mean),
        latents_std=tuple(std),
        examples=sum(table.examples),
        shards=table,
        lanes=lanes,
        block=block,
        skipped=len(skipped),
    )
    lines = "".join(
        json.dumps({"source": label, "reason": reason}) + "\n" for label, reason in skipped.items()
    )
    write_atomically(folder / SKIPPED, lines.encode())
    write_atomically(folder / MANIFEST, manifest.to_json().encode())
    return skipped
