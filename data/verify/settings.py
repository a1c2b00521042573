"""The configuration of `vidfill verify`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ...options import NonNegativeInt

EXAMPLES = """examples:
  vidfill verify runs/shards
  vidfill verify runs/shards --repair
      what is damaged or missing is encoded again
  vidfill verify s3://bucket/shards --split validation --videos CLEVRER --samples 64
      shards behind a URL, and more of their clips compared with the videos
"""


@dataclass(frozen=True)
class VerifyConfig:
    """Check a data set of shards: its files, checksums and values, and a sample of its clips.

    A few clips of each split are encoded again if their videos are at hand, and compared.
    Nothing is written without `repair`. The exit status is 0 if all is well, 1 if something is
    wrong and 2 if nothing could be checked.
    """

    dataset: str
    """The folder that `vidfill encode` wrote, or its URL."""
    split: str = ""
    """One split; empty checks all."""
    videos: Path | None = None
    """The folder of videos; null looks where they were when they were encoded."""
    samples: NonNegativeInt = 8
    """Clips of a split to encode again and compare; 0 loads no autoencoder."""
    repair: bool = False
    """Encode what is damaged or missing again, with the same options, then check once more."""
    autoencoder: str = ""
    """Where the autoencoder is now; empty looks where it was."""
    device: str = "auto"
    """Where the autoencoder runs: "cpu", "cuda", "cuda:1"…; "auto" is a GPU if there is one."""
