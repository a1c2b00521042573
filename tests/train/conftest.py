"""The smallest training run."""

from __future__ import annotations

from pathlib import Path

import pytest
from vidfill.train.config import ModelConfig, OptimizerConfig, PreviewConfig, TrainConfig
from vidfill.train.loop import train


def tiny(shards: Path, out: Path) -> TrainConfig:
    return TrainConfig(
        str(shards),
        out,
        steps=6,
        batch_size=3,
        log_every=1,
        checkpoint_every=3,
        model=ModelConfig(block_out_channels=(16, 32), head_channels=8, norm_groups=8),
        optimizer=OptimizerConfig(learning_rate=2e-3, warmup=2),
        preview=PreviewConfig(every=0),
    )


@pytest.fixture
def tiny_config(shards: Path, tmp_path: Path) -> TrainConfig:
    """The smallest run that does everything."""
    return tiny(shards, tmp_path / "run")


@pytest.fixture(scope="session")
def trained(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """`tiny_config` with a folder in which it has run, to read and to copy."""
    config = tiny(shards, tmp_path_factory.mktemp("trained") / "run")
    train(config)
    return config
