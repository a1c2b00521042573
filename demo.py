"""`vidfill demo`: the whole path on synthetic clips, every stage the job a person would run."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import jobs, options
from .data.encode.run import encode
from .data.encode.settings import EncodeConfig
from .data.synth.run import SynthConfig, synth
from .errors import say
from .modeling.settings import SHIPPED
from .options import PositiveInt, Seed
from .sampling.report.run import ReportConfig, report
from .sampling.sweep.inputs import SweepConfig
from .sampling.sweep.results import Sweep, read_sweep
from .sampling.sweep.run import sweep
from .sampling.sweep.show import show_results
from .train.config import RECIPES, TrainConfig
from .train.loop import train
from .train.monitor.tensorboard import tensorboard_command

EXAMPLES = """\
examples:
  vidfill demo
  vidfill demo --out /tmp/demo --steps 3000
"""


@dataclass(frozen=True)
class DemoConfig:
    """Make videos, encode them, train a small model, compare schedules and write the report.

    Takes about five minutes on two CPU cores; the same command continues where it was stopped.
    """

    out: Path = Path("runs/demo")
    """The folder for all of it."""
    clips: PositiveInt = 200
    """Training videos."""
    validation: PositiveInt = 8
    """Held-out videos."""
    size: PositiveInt = 64
    """Width and height of the videos, pixels."""
    steps: PositiveInt = 500
    """Optimizer steps."""
    schedules: str = "ddim:20 ddim:20+resample(n=4) ddpm:20 ddpm:20+resample(n=4)"
    """Schedules compared, separated by spaces."""
    seed: Seed = 0
    """Seed of everything."""


def demo(config: DemoConfig) -> None:
    """Run the five stages, then say what came out and where it is."""
    options.check(config)
    began = time.monotonic()
    stages = stages_of(config)
    for number, (name, run) in enumerate(stages, start=1):
        say("", f"[{number}/{len(stages)}] vidfill {name}")
        run()
    swept = read_sweep(config.out / "sweep")
    show_results([row.texts for row in (*swept.baselines, *swept.schedules)])
    say(
        _describe_gain(swept),
        f"report:      {config.out / 'report' / 'index.html'}",
        f"tensorboard: {tensorboard_command(config.out / 'train')}",
        f"took:        {time.monotonic() - began:.0f} s",
        file=sys.stdout,
    )


def stages_of(config: DemoConfig) -> list[tuple[str, Callable[[], object]]]:
    """Each stage's name and job."""
    out, seed = config.out, config.seed
    videos = SynthConfig(
        out / "videos",
        clips=config.clips,
        validation=config.validation,
        size=config.size,
        seed=seed,
    )
    shards = EncodeConfig(
        out / "videos",
        out / "shards",
        autoencoder=SHIPPED,
        masks="stationary variable",
        masks_per_clip=2,
        seed=seed,
    )
    words = [str(out / "shards"), str(out / "train"), "--config", str(RECIPES / "demo.yaml")]
    words += ["--steps", str(config.steps), "--seed", str(seed)]
    training = jobs.parse(TrainConfig, words, verb="train")
    compared = SweepConfig(
        out / "train",
        str(out / "shards"),
        out / "sweep",
        schedules=config.schedules,
        examples=2 * config.validation,
        seed=seed,
        precision="bfloat16",
    )
    page = ReportConfig(out / "sweep", out / "report")
    return [
        ("synth", lambda: synth(videos)),
        ("encode", lambda: encode(shards)),
        ("train", lambda: train(training)),
        ("sweep", lambda: sweep(compared)),
        ("report", lambda: report(page)),
    ]


def _describe_gain(swept: Sweep) -> str:
    (fill,) = (row for row in swept.baselines if row.name == "fill")
    best = swept.best
    gain = best["psnr_hole"] - fill["psnr_hole"]
    return (
        f"best schedule: {best.name}, {best['psnr_hole']:.2f} dB in the hole, "
        f"{gain:+.2f} dB against the masked input"
    )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of `vidfill demo`."""
    return jobs.main(DemoConfig, demo, argv, verb="demo", examples=EXAMPLES)
