"""The smallest job: a folder with a link to shards, and the options that the examples name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

OPTIONS: dict[str, Any] = {
    "steps": 40,
    "batch_size": 2,
    "log_every": 1,
    "checkpoint_every": 5,
    "model": {"block_out_channels": [16, 32], "head_channels": 8, "norm_groups": 8},
    "optimizer": {"warmup": 2},
    "evaluation": {"every": 0},
    "preview": {"every": 0},
}


@pytest.fixture
def make_folder(tmp_path: Path, shards: Path) -> Callable[..., Path]:
    """Make a folder NAME in which `train shards run --config train.yaml` is the smallest run."""

    def make(name: str, **options: Any) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "shards").symlink_to(shards)
        (folder / "train.yaml").write_text(json.dumps({**OPTIONS, **options}))
        return folder

    return make
