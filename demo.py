"""`vidfill demo`: the whole path on synthetic clips, every stage the job a person would run."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from . import jobs, options
from .data.encode.settings import EncodeConfig
from .data.synth.run import SynthConfig, synth
from .errors import say
from .modeling.settings import SHIPPED
from .options import PositiveInt, Seed
from .sampling.report.settings import ReportConfig
from .sampling.sweep.settings import SweepConfig
from .train.config import RECIPES, TrainConfig

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
    # Not above, where --help would wait for torch.
    from .sampling.sweep.results import read_sweep
    from .sampling.sweep.show import describe_gain, show_results
    from .train.monitor.tensorboard import tensorboard_command

    options.check(config)
    began = time.monotonic()
    stages = stages_of(config)
    for number, (name, run) in enumerate(stages, start=1):
        say("", f"[{number}/{len(stages)}] vidfill {name}")
        run()
    swept = read_sweep(config.out / "sweep")
    show_results([row.texts for row in (*swept.baselines, *swept.schedules)])
    say(
        describe_gain(swept),
        f"report:      {config.out / 'report' / 'index.html'}",
        f"tensorboard: {tensorboard_command(config.out / 'train')}",
        f"took:        {time.monotonic() - began:.0f} s",
        file=sys.stdout,
    )


def stages_of(config: DemoConfig) -> list[tuple[str, Callable[[], object]]]:
    """Each stage's name and job."""
    from .data.encode.run import encode
    from .sampling.report.run import report
    from .sampling.sweep.run import sweep
    from .train.loop import train

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


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of `vidfill demo`."""
    return jobs.main(DemoConfig, demo, argv, verb="demo", examples=EXAMPLES)
