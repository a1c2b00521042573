"""Small datasets of made-up latents, written by the real writer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from vidfill.data import shards
from vidfill.data.shards import Example, Manifest, ShardEntry

FRAMES, CHANNELS, LATENT, SIDE = 3, 2, 2, 8


def _make_example(number: int, pixels: bool = False) -> Example:
    draw = np.random.default_rng(number)
    clip = (FRAMES, SIDE, SIDE)
    return Example(
        key=f"video_{number:05}_00000_stationary",
        latents=draw.normal(size=(FRAMES, CHANNELS, LATENT, LATENT)).astype(np.float16),
        masked_latents=draw.normal(size=(FRAMES, CHANNELS, LATENT, LATENT)).astype(np.float16),
        mask=draw.integers(0, 2, clip, dtype=np.uint8),
        record={"source": f"{number}.mp4", "first_frame": 0},
        pixels=draw.integers(0, 256, (*clip, 3), dtype=np.uint8) if pixels else None,
    )


def _write_dataset(root: Path, count: int = 5, pixels: bool = False) -> list[Example]:
    examples = [_make_example(number, pixels) for number in range(count)]
    entries, indexes = [], []
    for number, part in enumerate([examples[: count // 2], examples[count // 2 :]]):
        name = shards.shard_name(number)
        index = shards.write_shard(root / "train" / name, [f"source {number}"], part)
        entries.append(ShardEntry(name, len(part), index.bytes, index.sha256))
        indexes.append(index)
    mean, std = shards.latent_moments(indexes)
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
        clip={"frames": FRAMES, "height": SIDE, "width": SIDE},
        latent_shape=(FRAMES, CHANNELS, LATENT, LATENT),
        masks={"protocols": ["stationary"], "grid": 4, "coverage": 0.25, "seed": 0},
        fill="median",
        latents_mean=tuple(mean),
        latents_std=tuple(std),
        examples=count,
        shards=tuple(entries),
        skipped=0,
    )
    (root / "train" / shards.MANIFEST).write_text(manifest.to_json())
    return examples


@pytest.fixture(scope="session")
def make_example() -> Callable[..., Example]:
    """Example NUMBER, with or without pixels."""
    return _make_example


@pytest.fixture(scope="session")
def write_dataset() -> Callable[..., list[Example]]:
    """Write COUNT examples as two shards under ROOT/train; return them."""
    return _write_dataset
