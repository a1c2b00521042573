"""A model, its autoencoder and shards on disk, and finished sweeps of them."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import pytest
from vidfill.data.shards.format import Example, Manifest, ShardTable, family_of
from vidfill.data.shards.writing import latent_moments, write_shard
from vidfill.data.storage.names import MANIFEST
from vidfill.modeling.denoiser import Denoiser
from vidfill.sampling.sweep.run import sweep
from vidfill.sampling.sweep.settings import SweepConfig

SCHEDULES = "ddim:2 ddpm:3+resample(n=1)"
EXAMPLES = [f"video_{n}_00000_stationary" for n in range(3)]

MakeExample = Callable[[str], Example]
WriteShards = Callable[[Path, list[Example]], str]


def write_split(root: Path, examples: list[Example], autoencoder: dict[str, object]) -> str:
    index = write_shard(root / "validation", 0, [], examples)
    mean, std = latent_moments([index])
    families = dict.fromkeys((family_of(example.key) for example in examples), 1.0)
    frames, height, width = examples[0].mask.shape
    manifest = Manifest(
        split="validation",
        autoencoder=autoencoder,
        clip={"frames": frames, "height": height, "width": width},
        latent_shape=examples[0].latents.shape,  # type: ignore[arg-type]
        posterior="mean",
        pixels=examples[0].pixels is not None,
        masks={"families": families, "per_clip": 1, "seed": 0},
        fill="median",
        latents_mean=tuple(mean),
        latents_std=tuple(std),
        examples=len(examples),
        shards=ShardTable.of([index]),
        lanes=1,
        block=len(examples),
        skipped=0,
    )
    (root / "validation" / MANIFEST).write_text(manifest.to_json())
    return str(root)


@pytest.fixture(scope="session")
def write_shards(model_on_disk: Path) -> WriteShards:
    """Writes a validation split, encoded by the model's autoencoder or by what it is told."""
    own = Denoiser.load(model_on_disk, "cpu", "float32").autoencoder

    def write(root: Path, examples: list[Example], **identity: str) -> str:
        return write_split(root, examples, {**own, **identity})

    return write


@pytest.fixture
def examples(make_example: MakeExample) -> list[Example]:
    return [make_example(key) for key in EXAMPLES]


@pytest.fixture(scope="session")
def shared_config(
    tmp_path_factory: pytest.TempPathFactory,
    model_on_disk: Path,
    write_shards: WriteShards,
    make_example: MakeExample,
) -> SweepConfig:
    root = tmp_path_factory.mktemp("sweep")
    shards = write_shards(root / "shards", [make_example(key) for key in EXAMPLES])
    return SweepConfig(
        model_on_disk,
        shards,
        root / "one",
        schedules=SCHEDULES,
        examples=0,
        batch_size=2,
        keep=1,
        device="cpu",
    )


@pytest.fixture
def config(shared_config: SweepConfig, tmp_path: Path) -> SweepConfig:
    """A sweep of two schedules that has not begun."""
    return dataclasses.replace(shared_config, out=tmp_path / "out")


@pytest.fixture(scope="session")
def swept(shared_config: SweepConfig) -> Path:
    """The folder of that sweep when it is finished; not to be changed."""
    sweep(shared_config)
    return shared_config.out


@pytest.fixture(scope="session")
def swept_thrice(shared_config: SweepConfig) -> Path:
    """The same with three completions of each example."""
    several = dataclasses.replace(
        shared_config, out=shared_config.out.with_name("three"), completions=3
    )
    sweep(several)
    return several.out
