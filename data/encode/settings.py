"""What an encoding is told, and what it settled on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

from ...errors import BadInput
from ...files import locate
from ...modeling.autoencoder import PAPERS, Autoencoder
from ...modeling.precision import Precision
from .. import masks
from ..videos import Fit, FrameSize, cut_clips
from .plan import Piece, Plan


@dataclass(frozen=True)
class EncodeConfig:
    """Cut videos into clips, mask them, and write both as shards of autoencoder latents.

    Folders of split names (train, validation, test; also CLEVRER's) give splits, anything else is
    all training videos. A video is a file, or a folder of images. The same command continues a job
    that was stopped, on any number of processes. A video that cannot be read, or is shorter than a
    clip, gives no clip: it is counted and listed, and more of them than `max_skipped` end the job.
    """

    videos: Path
    """Folder of videos, searched to the bottom."""
    out: Path
    """Folder for the shards: new, empty, or begun by this same command."""
    autoencoder: str = PAPERS
    """A name on the hub, a local folder, or "shipped": the package's own small one, for synthetic
    videos."""
    frames: int = 20
    """Frames of a clip."""
    stride: int | None = None
    """Frames from one clip's start to the next's; null makes clips follow on one another."""
    size: str = ""
    """Pixels of a frame, "128" for a square or "432x240", width by height; empty keeps them as they
    are."""
    fit: Fit = "crop"
    """How a frame gets to `size`: its middle is resized, or all of it, whatever its proportions."""
    masks: str = "stationary"
    """Families of masks with their weights, as in "stationary:2 box"; "own" are the videos' own."""
    masks_per_clip: int = 1
    """Examples of a clip, each under another mask."""
    held_out_masks: str = ""
    """Families for the splits other than train; empty takes those of `masks`."""
    mask_files: Path | None = None
    """Folder of the videos' own masks, laid out as the videos are; null looks beside them."""
    fill: str = "median"
    """Colour of the hole: "median" of the clip's visible pixels, or "R,G,B", each 0 to 255."""
    seed: int = 0
    """Seed of the masks."""
    posterior: Literal["mean", "moments"] = "mean"
    """What is kept of the autoencoder's posterior: "moments" adds the log-variance, from which
    training draws fresh latents."""
    pixels: Literal["held_out", "all", "none"] = "held_out"
    """Splits whose shards keep the clips' pixels too, for metrics; "held_out" is all but train."""
    shard_megabytes: float = 128.0
    """Size that no shard exceeds, in 10^6 bytes."""
    batch_size: int = 64
    """Frames of one call of the autoencoder."""
    max_skipped: int = 0
    """Unusable videos to put up with; raising it continues a job that ended for them."""
    precision: Precision = "float32"
    """Of the autoencoder; bfloat16 is several times faster where the hardware has it."""
    device: str = "auto"
    """Where the autoencoder runs: "cpu", "cuda", "cuda:1"…; "auto" is each process's own GPU if
    there is one."""
    frame_rate: float = 24.0
    """Frames per second of a video that is a folder of images."""


@dataclass(frozen=True)
class Settings:
    """What a configuration's texts say."""

    stride: int
    size: FrameSize | None
    colour: masks.Colour | None  # None is the median of the visible pixels
    training: masks.Mix
    held_out: masks.Mix

    def mix(self, split: str) -> masks.Mix:
        return self.training if split == "train" else self.held_out


class Task(NamedTuple):
    """A shard to be."""

    split: str
    number: int


@dataclass(frozen=True)
class Encoding:
    """How videos become examples."""

    config: EncodeConfig
    settings: Settings
    plan: Plan
    height: int
    width: int
    autoencoder: Autoencoder

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        step = self.autoencoder.downsampling
        channels = self.autoencoder.channels
        return self.config.frames, channels, self.height // step, self.width // step

    def keeps_pixels(self, split: str) -> bool:
        kept = self.config.pixels
        return kept == "all" or (kept == "held_out" and split != "train")

    def tasks(self) -> Iterator[Task]:
        for split, listed in self.plan.shards.items():
            yield from (Task(split, number) for number in range(len(listed)))

    def pieces(self, task: Task) -> Sequence[Piece]:
        return self.plan.shards[task.split][task.number]

    def sources(self, task: Task) -> tuple[str, ...]:
        """What a shard's index says that it is made of."""
        return tuple(str(piece) for piece in self.pieces(task))

    def count_clips(self, piece: Piece) -> int:
        """The clips that a piece should have."""
        header = self.plan.surveyed[piece.source.label].header
        if piece.clips is not None or header is None:
            return piece.clips or 0
        clips = cut_clips(header.frames, self.config.frames, self.settings.stride)
        return len(clips) - piece.first_clip


def _locate_autoencoder(config: EncodeConfig) -> EncodeConfig:
    """With the autoencoder's whole path where it is a folder: the manifest will name it."""
    if not Path(config.autoencoder).is_dir():
        return config
    return dataclasses.replace(config, autoencoder=locate(config.autoencoder))


def _check(config: EncodeConfig) -> Settings:
    """Check every setting that can be wrong by itself."""
    for name in ("frames", "stride", "masks_per_clip", "batch_size"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise BadInput(f"{name} is {value}: give 1 or more")
    for name in ("shard_megabytes", "frame_rate"):
        value = getattr(config, name)
        if not 0 < value < math.inf:
            raise BadInput(f"{name} is {value}: give more than 0")
    for name in ("videos", "out", "mask_files"):
        if ":/" in str(getattr(config, name)):
            raise BadInput(f"{name} is a URL: encode reads and writes folders; upload them")
    if config.max_skipped < 0:
        raise BadInput(f"max_skipped is {config.max_skipped}: give 0 or more")
    return Settings(
        stride=config.stride or config.frames,
        size=FrameSize.parse(config.size),
        colour=_parse_fill(config.fill),
        training=masks.Mix.parse(config.masks),
        held_out=masks.Mix.parse(config.held_out_masks or config.masks),
    )


def _parse_fill(fill: str) -> masks.Colour | None:
    if fill == "median":
        return None
    parts = fill.replace(" ", "").split(",")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) <= 255 for part in parts):
        raise BadInput(f'fill is {fill!r}: give "median" or R,G,B, each 0 to 255')
    red, green, blue = map(int, parts)
    return red, green, blue
