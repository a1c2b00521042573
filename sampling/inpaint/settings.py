"""The configuration of `vidfill inpaint`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from annotated_types import Interval

from ...modeling.settings import SHIPPED, Precision
from ...options import NonNegativeInt, PositiveInt, Seed

FEATHER = 4  # pixels
SCHEDULE = "ddim:20"  # where neither the user nor the model gives one
Codec = Literal["", "ffv1", "h264", "h265", "vp9"]

EXAMPLES = """examples:
  vidfill inpaint street.mp4 --mask 40,60,120,80 -o filled.mkv
      a rectangle (x, y, width, height), the package's own small model, lossless outside the hole
  vidfill inpaint street.mp4 --mask masks/ --model runs/train -o filled.mp4 --dilate 4 \\
      --schedule "ddim:50+resample(n=4)"
      a mask for every frame, a model of one's own, and a schedule
  vidfill inpaint street.mp4 --mask logo.png --invert -o filled.mkv --plan
      how many windows have a hole, and how long they would take; nothing is written
  vidfill inpaint street.mp4 --mask mask.mp4 -o filled.mkv --samples 4 --choose
      of four completions the one that best joins what is around
"""


@dataclass(frozen=True)
class InpaintConfig:
    """Fill the holes of a video of any length, in constant memory.

    Outside the holes the result is the input, to the bit with a lossless codec; sound, rate and
    time stamps are kept. Windows as long as the model's clips follow one another, and each sees the
    frames that the one before has filled. What is filled is kept beside OUT until all is done: the
    same command continues where it was stopped.
    """

    ESSENTIAL: ClassVar = (
        "mask",
        "out",
        "model",
        "schedule",
        "samples",
        "dilate",
        "size",
        "trim",
        "plan",
        "device",
    )

    video: Path
    """The video: a file that FFmpeg reads, or a folder of images."""
    mask: str = ""
    """What to fill: a video, an image, a folder of images, or x,y,width,height; white is the
    hole."""
    out: Path | None = None
    """The result, which must not exist; -o for short. Its suffix chooses the container (.mkv is
    lossless); without a suffix it is a folder of images."""
    model: Path = Path(SHIPPED)
    """The folder of a model or of a training run (its newest model is used); "shipped" is the
    package's own."""
    schedule: str = ""
    """The schedule, SOLVER:STEPS[(key=value)][+MOVE(key=value)], as in `vidfill schedule --help`;
    empty takes the model's usual one."""
    samples: PositiveInt = 1
    """Completions; several are written with their numbers, as OUT-1."""
    choose: bool = False
    """Write only the completion with the smallest steps across the holes' borders."""
    seed: Seed = 0
    """Seed of the noise."""
    trim: str = ""
    """Use only this part of the video, BEGIN-END in seconds or h:mm:ss; either may be omitted."""
    frame_rate: Annotated[float, Interval(gt=0, le=1000)] = 24.0
    """Frames per second of a folder of images."""
    invert: bool = False
    """Black is the hole."""
    dilate: NonNegativeInt = 0
    """Pixels by which the holes grow."""
    size: str = ""
    """Scale what the network sees to about this size: "256" or "432x240", width by height; empty
    takes the size that it was trained on."""
    overlap: NonNegativeInt | None = None
    """Frames that a window takes over from the one before; null takes a quarter of a window."""
    feather: NonNegativeInt = FEATHER
    """Pixels, from the holes' borders inwards, over which the result blends into what is around."""
    colour_match: bool = True
    """Shift the result's colour by its error around the holes."""
    codec: Codec = ""
    """The codec of the result; empty takes the container's usual one: ffv1, lossless, in .mkv."""
    autoencoder: str = ""
    """Where the autoencoder is, if not where the model's record says: a name or a folder."""
    precision: Precision = "float32"
    """The precision of the networks; bfloat16 is several times faster if the hardware has it."""
    device: str = "auto"
    """Where the networks run: "cpu", "cuda", "cuda:1"…; "auto" is a GPU if there is one."""
    plan: bool = False
    """Print what the work would cost, from one measured evaluation, and write nothing."""
