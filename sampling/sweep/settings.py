"""The configuration of `vidfill sweep`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from ...modeling.settings import Precision
from ...options import NonNegativeInt, PositiveInt

DEFAULT_SCHEDULES = (
    "ddim:50 ddpm:50 ddpm:50+resample(n=4) ddpm:50+resample(n=6) ddpm:50+resample(n=10)"
)

EXAMPLES = """examples:
  vidfill sweep runs/train runs/shards runs/sweep
      the paper's n = 0, 4, 6, 10 with 50 diffusion steps, and 50 DDIM steps
  vidfill sweep runs/train runs/shards runs/paper --examples 4 --plan \\
      --schedules "ddpm:1000 ddpm:1000+resample(n=4)"
      what two of the paper's own settings would cost; nothing is written
  vidfill launch "sweep runs/train runs/shards runs/sweep" --gpus_per_node 8 --out node
  accelerate launch --config_file node.yaml -m vidfill.sampling.sweep \\
      runs/train runs/shards runs/sweep --examples 0
      the same results on 8 GPUs, as the first command describes them to Accelerate
"""


@dataclass(frozen=True)
class SweepConfig:
    """Fill the holes of held-out clips under several schedules, and measure how well.

    An example is a clip under one mask. All schedules see the same examples and the same noise;
    what is visible stays as it was. Each completion gets a row when it is finished, so the same
    command continues a sweep that was stopped, on any number of processes. Beside the schedules
    there are five baselines: `fill` (the model's input), `classic` (the nearest frame in which
    a pixel is visible, else OpenCV's inpainting), `flow` (the same along optical flow), `mean`
    (one network evaluation) and `autoencoder` (the true clip encoded and decoded: the ceiling).
    Each schedule is compared, example by example, with the same one without resampling and with
    a reference. The tables are CSV and Parquet.
    """

    ESSENTIAL: ClassVar = (
        "schedules",
        "examples",
        "masks",
        "split",
        "plan",
        "device",
    )

    model: Path
    """Folder of a training run (its newest model is taken) or of a model."""
    shards: str
    """Folder that `vidfill encode` wrote, or its URL, with the model's autoencoder."""
    out: Path
    """Folder for the results: new, empty, or begun by this same command."""
    schedules: str = DEFAULT_SCHEDULES
    """Schedules, separated by spaces, each SOLVER:STEPS[(key=value)][+MOVE(key=value)];
    `vidfill schedule --help` explains them."""
    reference: str = ""
    """The schedule that each one is compared with, beside the same one without resampling; empty
    is the first."""
    examples: NonNegativeInt = 16
    """Examples to fill, the first of the split; 0 takes all. A clip under two masks is two."""
    completions: PositiveInt = 1
    """How often a schedule fills each example, each time with other noise. With two or more, the
    best of them and their spread are measured, and what they put into the hole is kept."""
    masks: str = ""
    """Take only examples with these mask families, separated by spaces; empty takes all."""
    split: str = "validation"
    """Split of the shards; it must keep the clips' pixels."""
    batch_size: NonNegativeInt = 0
    """Trajectories that the network evaluates at once; 0 finds once what is fastest."""
    seed: int = 0
    """Seed of the noise."""
    autoencoder: str = ""
    """Name or folder of the autoencoder, if it is no longer where the model's record says."""
    lpips: str = ""
    """LPIPS's network, a safetensors file or hf://OWNER/NAME/FILE; empty leaves LPIPS out."""
    i3d: str = ""
    """I3D, for FVD and VFID, likewise; FVD wants clips of ten frames or more."""
    keep: NonNegativeInt = 4
    """How many examples' frames are kept as pictures, the first ones."""
    precision: Precision = "float32"
    """Of the networks; bfloat16 is several times faster on hardware that supports it."""
    device: str = "auto"
    """Where the networks run: "cpu", "cuda", "cuda:1"…; "auto" is each process's own GPU if
    there is one."""
    plan: bool = False
    """Print what the sweep would cost, from one measured evaluation, and write nothing."""
