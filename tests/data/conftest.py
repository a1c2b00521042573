"""Small datasets of made-up latents, written by the real writer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from vidfill.data.shards.format import Example, Manifest, ShardTable
from vidfill.data.shards.order import choose_lanes
from vidfill.data.shards.writing import latent_moments, write_shard
from vidfill.data.storage.names import MANIFEST

FRAMES, CHANNELS, LATENT, SIDE = 3, 2, 2, 8


def _make_example(number: int, pixels: bool = False, moments: bool = False) -> Example:
    draw = np.random.default_rng(number)
    clip = (FRAMES, SIDE, SIDE)

    def latents() -> np.ndarray:
        return draw.normal(size=(FRAMES, CHANNELS, LATENT, LATENT)).astype(np.float16)

    return Example(
        key=f"video_{number:05}_00000_stationary",
        latents=latents(),
        masked_latents=latents(),
        mask=draw.integers(0, 2, clip, dtype=np.uint8),
        record={"source": f"{number}.mp4", "first_frame": 0, "family": "stationary"},
        pixels=draw.integers(0, 256, (*clip, 3), dtype=np.uint8) if pixels else None,
        log_variance=latents() if moments else None,
    )


def _write_dataset(
    root: Path,
    sizes: Sequence[int] = (2, 3),
    pixels: bool = False,
    moments: bool = False,
    lanes: tuple[int, int] | None = None,
) -> list[Example]:
    folder = root / "train"
    examples = [_make_example(number, pixels, moments) for number in range(sum(sizes))]
    indexes, rest = [], iter(examples)
    for number, size in enumerate(sizes):
        part = [next(rest) for _ in range(size)]
        indexes.append(write_shard(folder, number, [f"source {number}"], part))
    mean, std = latent_moments(indexes)
    chosen_lanes, block = lanes or choose_lanes(sizes)
    manifest = Manifest(
        split="train",
        autoencoder={
            "name": "tiny",
            "kind": "AutoencoderTiny",
            "sha256": "0",
            "scaling_factor": 1.0,
            "downsampling": 4,
            "channels": CHANNELS,
        },
        posterior="moments" if moments else "mean",
        pixels=pixels,
        clip={"frames": FRAMES, "height": SIDE, "width": SIDE},
        latent_shape=(FRAMES, CHANNELS, LATENT, LATENT),
        masks={"families": {"stationary": 1.0}, "per_clip": 1, "seed": 0},
        fill="median",
        latents_mean=tuple(mean),
        latents_std=tuple(std),
        examples=len(examples),
        shards=ShardTable.of(indexes),
        lanes=chosen_lanes,
        block=block,
        skipped=0,
    )
    (folder / MANIFEST).write_text(manifest.to_json())
    return examples


@pytest.fixture(scope="session")
def make_example() -> Callable[..., Example]:
    """Example NUMBER, with or without pixels and log-variance."""
    return _make_example


@pytest.fixture(scope="session")
def write_dataset() -> Callable[..., list[Example]]:
    """Write shards of SIZES examples under ROOT/train; return the examples."""
    return _write_dataset
