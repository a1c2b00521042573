"""A tiny dataset made by the real jobs, and a run's losses as TensorBoard holds them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderTiny
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from vidfill.data.encode import EncodeConfig, encode
from vidfill.data.synth import SynthConfig, synth
from vidfill.train.config import ModelConfig, OptimizerConfig, PreviewConfig, TrainConfig


@pytest.fixture(scope="session")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four training clips and one held-out one of 32×32, encoded by a random autoencoder."""
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


@pytest.fixture
def tiny_config(shards: Path, tmp_path: Path) -> TrainConfig:
    """The smallest run that does everything."""
    return TrainConfig(
        shards,
        tmp_path / "run",
        steps=6,
        batch_size=2,
        log_every=1,
        checkpoint_every=3,
        model=ModelConfig(block_out_channels=(16, 32), head_channels=8, norm_groups=8),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup=2),
        preview=PreviewConfig(every=0),
    )


@pytest.fixture(scope="session")
def losses() -> Callable[[Path], list[float]]:
    """The losses that a run wrote, in the order of its steps."""

    def read(run: Path) -> list[float]:
        events = EventAccumulator(str(run / "tensorboard"))
        events.Reload()
        return [event.value for event in events.Scalars("train/loss")]

    return read
