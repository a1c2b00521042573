"""A small data set to damage, and ways to damage and to verify it."""

from __future__ import annotations

import dataclasses
import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

# The fixtures import what they need of the package themselves: it comes after its hook.


@pytest.fixture(scope="session")
def pristine(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data set of two splits, several shards and kinds of masks, beside its videos."""
    import torch
    from diffusers import AutoencoderTiny
    from vidfill.data.encode.run import encode
    from vidfill.data.encode.settings import EncodeConfig
    from vidfill.data.synth.run import SynthConfig, synth

    root = tmp_path_factory.mktemp("pristine")
    synth(SynthConfig(root / "videos", clips=5, validation=2, size=32, frames=12))
    torch.manual_seed(0)
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
        scaling_factor=0.5,
    ).save_pretrained(root / "autoencoder")
    encode(
        EncodeConfig(
            root / "videos",
            root / "shards",
            autoencoder=str(root / "autoencoder"),
            frames=6,
            masks="stationary variable border prediction",
            masks_per_clip=2,
            fill="255,0,0",  # far from all that the videos show
            shard_megabytes=0.12,
            device="cpu",
        )
    )
    assert len(list((root / "shards" / "train").glob("*.tar"))) > 2
    return root / "shards"


@pytest.fixture
def dataset(pristine: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return shutil.copytree(pristine, tmp_path / "shards")


def hash_files(root: Path) -> dict[str, str]:
    files = [path for path in root.rglob("*") if path.is_file()]
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }


@pytest.fixture(name="hash_files", scope="session")
def _hash_files() -> Callable[[Path], dict[str, str]]:
    """SHA-256 of every file in a folder, by name."""
    return hash_files


@pytest.fixture(scope="session")
def find() -> Callable[..., tuple[dict[str, int], str]]:
    """Verify a data set: how much is wrong, by check, and the defects in one text."""
    from vidfill.data.verify.run import verify
    from vidfill.data.verify.settings import VerifyConfig

    def find(root: Path, **options: Any) -> tuple[dict[str, int], str]:
        before = hash_files(root)
        found = verify(VerifyConfig(str(root), **{"samples": 0, "device": "cpu", **options}))
        assert hash_files(root) == before
        bad = {check: count for one in found for check, count in one.bad.items() if count}
        return bad, "\n".join(" ".join(defect) for one in found for defect in one.defects)

    return find


@pytest.fixture(scope="session")
def rewrite() -> Callable[..., None]:
    """Change the examples of a training split, with everything said of them made consistent."""
    from vidfill.data.shards.format import Example, Manifest, ShardTable
    from vidfill.data.shards.reading import Shard
    from vidfill.data.shards.writing import latent_moments, write_shard
    from vidfill.data.storage.names import MANIFEST, shard_name

    def rewrite(
        root: Path, change: Callable[[Example], Example], numbers: set[int] | None = None
    ) -> None:
        folder = root / "train"
        manifest = Manifest.from_json((folder / MANIFEST).read_bytes())
        indexes = []
        for number in range(len(manifest.shards.bytes)):
            shard = Shard(folder / shard_name(number), number, manifest)
            if numbers is None or number in numbers:
                examples = [change(shard.read(row)) for row in range(len(shard.keys))]
                indexes.append(write_shard(folder, number, shard.index.sources, examples))
            else:
                indexes.append(shard.index)
        mean, std = latent_moments(indexes)
        manifest = dataclasses.replace(
            manifest,
            shards=ShardTable.of(indexes),
            latents_mean=tuple(mean),
            latents_std=tuple(std),
        )
        (folder / MANIFEST).write_text(manifest.to_json())

    return rewrite
