"""Shapes in signatures are checked while the tests run, and nothing asks a hub for anything.

Also here: a tiny dataset made by the real jobs, and a run's losses as TensorBoard holds them.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest
from jaxtyping import install_import_hook

os.environ["HF_HUB_OFFLINE"] = "1"

CHECKED = ("data", "files", "launch", "modeling", "processes", "progress", "sampling", "train")
install_import_hook([f"vidfill.{part}" for part in CHECKED], "beartype.beartype")

# The fixtures import what they need themselves: the package comes after its hook.


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four training clips and one held-out one of 32×32, encoded by a random autoencoder."""
    import torch
    from diffusers import AutoencoderTiny
    from vidfill.data.encode.run import encode
    from vidfill.data.encode.settings import EncodeConfig
    from vidfill.data.synth.run import SynthConfig, synth

    root = tmp_path_factory.mktemp("tiny")
    torch.manual_seed(0)
    AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    ).save_pretrained(root / "autoencoder")
    synth(SynthConfig(root / "videos", clips=4, validation=1, size=32, frames=20))
    encode(EncodeConfig(root / "videos", root / "shards", autoencoder=str(root / "autoencoder")))
    return root / "shards"


@pytest.fixture(scope="session")
def losses() -> Callable[[Path], list[float]]:
    """The losses that a run wrote, in the order of its steps."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def read(run: Path) -> list[float]:
        events = EventAccumulator(str(run / "tensorboard"))
        events.Reload()
        return [event.value for event in events.Scalars("train/loss")]

    return read
