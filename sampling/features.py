"""The features of clips that FVD and VFID compare, kept on disk beside the rows of a sweep."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from .. import jobs
from .frechet import FeatureSet
from .networks import Features


def write_features(out: Path, folder: str, clip: str, features: Mapping[str, Features]) -> None:
    """Keep what `scores.describe_clip` gave for a clip; `folder` is its schedule's."""
    for column, vector in features.items():
        content = io.BytesIO()
        np.save(content, vector, allow_pickle=False)
        jobs.write_atomically(_path(out, column, folder, clip), content.getvalue())


def has_features(out: Path, column: str, folder: str, clip: str) -> bool:
    """Whether a clip's features for this column are there."""
    return _path(out, column, folder, clip).is_file()


def read_features(out: Path, column: str, folder: str, clips: Sequence[str]) -> FeatureSet:
    """A row for each clip."""
    paths = [_path(out, column, folder, clip) for clip in clips]
    return np.stack([np.load(path, allow_pickle=False) for path in paths])


def _path(out: Path, column: str, folder: str, clip: str) -> Path:
    return out / "features" / column / folder / f"{clip}.npy"
