"""The configuration of `vidfill encode`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from ... import options
from ...errors import BadInput
from ...modeling.settings import PAPERS, Precision
from ...options import NonNegativeInt, PositiveFloat, PositiveInt
from ..masks import Colour, Mix, describe_families
from ..videos import Fit, FrameSize

EXAMPLES = f"""examples:
  vidfill encode CLEVRER runs/clevrer --size 128 --masks "stationary variable" --masks_per_clip 2
      CLEVRER with the paper's autoencoder, each clip under both of the paper's masks
  vidfill launch "encode CLEVRER runs/clevrer" --gpus_per_node 8 --out node
  accelerate launch --config_file node.yaml -m vidfill.data.encode \\
      CLEVRER runs/clevrer --size 128 --precision bfloat16
      the same shards on 8 GPUs, as the first command describes them to Accelerate
  vidfill encode runs/videos runs/shards --autoencoder shipped
      synthetic videos: the package's own small autoencoder, which needs no download
  vidfill encode DAVIS runs/davis --size 432x240 --masks own
      folders of frames, each with the masks that come with it
  vidfill encode runs/videos runs/mixed --masks "stationary box:2" --held_out_masks strokes
      a mix for training; a family that training never sees for the other splits
  vidfill encode runs/videos runs/moments --posterior moments --max_skipped 10
      for fresh latents in every epoch; up to ten videos may be unusable

families of masks:
{describe_families()}
"""


@dataclass(frozen=True)
class EncodeConfig:
    """Cut videos into clips, mask them, and write both as shards of autoencoder latents.

    Folders of split names (train, validation, test; also CLEVRER's) give splits; anything else
    counts as training videos. A video is a file, or a folder of images. The same command continues
    a job that was stopped, on any number of processes. A video that cannot be read, or is shorter
    than a clip, gives no clip: it is counted and listed, and more of them than `max_skipped` end
    the job.
    """

    ESSENTIAL: ClassVar = (
        "autoencoder",
        "frames",
        "size",
        "masks",
        "mask_files",
        "pixels",
        "device",
    )

    videos: Path
    """Folder of videos, searched to the bottom."""
    out: Path
    """Folder for the shards: new, empty, or begun by this same command."""
    autoencoder: str = PAPERS
    """A name on the hub, a local folder, or "shipped": the package's own small one, for synthetic
    videos."""
    frames: PositiveInt = 20
    """Frames of a clip."""
    stride: PositiveInt | None = None
    """Frames from one clip's start to the next's; null makes clips follow on one another."""
    size: str = ""
    """Pixels of a frame, "128" for a square or "432x240", width by height; empty keeps them as they
    are."""
    fit: Fit = "crop"
    """How a frame becomes `size`: crop resizes its middle, resize all of it, out of proportion."""
    masks: str = "stationary"
    """Families of masks with their weights, as in "stationary:2 box"; "own" are the videos' own."""
    masks_per_clip: PositiveInt = 1
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
    shard_megabytes: PositiveFloat = 128.0
    """Size that no shard exceeds, in 10^6 bytes."""
    batch_size: PositiveInt = 64
    """Frames of one call of the autoencoder."""
    max_skipped: NonNegativeInt = 0
    """Unusable videos to put up with; raising it continues a job that ended for them."""
    precision: Precision = "float32"
    """Of the autoencoder; bfloat16 is several times faster where the hardware has it."""
    device: str = "auto"
    """Where the autoencoder runs: "cpu", "cuda", "cuda:1"…; "auto" is each process's own GPU if
    there is one."""
    frame_rate: PositiveFloat = 24.0
    """Frames per second of a video that is a folder of images."""

    @property
    def clip_stride(self) -> int:
        """Frames from one clip's start to the next's."""
        return self.stride or self.frames

    @property
    def frame_size(self) -> FrameSize | None:
        """What frames are brought to; None keeps them as they are."""
        return FrameSize.parse(self.size)

    @property
    def fill_colour(self) -> Colour | None:
        """None is the median of a clip's visible pixels."""
        if self.fill == "median":
            return None
        parts = self.fill.replace(" ", "").split(",")
        if len(parts) != 3 or not all(part.isdecimal() and int(part) <= 255 for part in parts):
            raise BadInput(f'fill is {self.fill!r}: give "median" or R,G,B, each 0 to 255')
        red, green, blue = map(int, parts)
        return red, green, blue

    def mix(self, split: str) -> Mix:
        """The families of masks for a split."""
        return Mix.parse(self.masks if split == "train" else self.held_out_masks or self.masks)

    def keeps_pixels(self, split: str) -> bool:
        """Whether the shards of a split hold the clips' pixels."""
        return self.pixels == "all" or (self.pixels == "held_out" and split != "train")

    def check(self) -> None:
        """Refuse a setting that is wrong whatever the videos are.

        Raises:
            BadInput: naming it.
        """
        options.check(self)
        for name in ("videos", "out", "mask_files"):
            if ":/" in str(getattr(self, name)):
                raise BadInput(f"{name} is a URL: encode reads and writes folders; upload them")
        _ = self.frame_size, self.fill_colour, self.mix("train"), self.mix("validation")
