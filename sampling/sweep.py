"""`vidfill sweep`: a model + held-out shards -> schedules compared on the same clips and noise."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import itertools
import json
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import torch
from einops import rearrange
from rich.console import Console
from rich.table import Table

from .. import jobs
from ..data.shards import MANIFEST, Example, ShardedDataset, family_of
from ..modeling.autoencoder import Autoencoder, Precision, hash_weights, load_autoencoder
from ..modeling.diffusion import Denoiser
from . import baselines
from .ledger import Ledger, Row, csv_line
from .metrics import Frames, measure
from .results import MEASURES
from .sampler import Condition, Request, condition_of, decode_result, pixels_of, sample
from .schedules import Program, compile_schedule, parse

EXAMPLES = """examples:
  vidfill sweep runs/train runs/shards runs/sweep
      the paper's n = 0, 4, 6, 10 with 50 diffusion steps, and 50 DDIM steps
  vidfill sweep runs/train runs/shards runs/paper --clips 4 --plan \\
      --schedules "ddpm:1000 ddpm:1000+resample(n=4)"
      what two of the paper's own settings would cost; nothing is written
"""

DEFAULT_SCHEDULES = (
    "ddim:50 ddpm:50 ddpm:50+resample(n=4) ddpm:50+resample(n=6) ddpm:50+resample(n=10)"
)

RESULT_COLUMNS = ("schedule", *(m.column for m in MEASURES))
AVERAGED = RESULT_COLUMNS[2:-1]  # all but the schedule, its NFE and the number of clips
BASELINES = ("fill", "classic", "mean", "autoencoder")
TABLE_WIDTH = 120  # characters, where there is no terminal to ask


@dataclass(frozen=True)
class SweepConfig:
    """Fill the holes of held-out clips under several schedules, and measure how well.

    All schedules see the same clips, masks and noise; what is visible stays as it was. A row is
    written for every clip and schedule as it is finished: the same command continues a sweep that
    was stopped. Beside the schedules stand four baselines: `fill` (the model's input), `classic`
    (the nearest frame in which a pixel is visible, else OpenCV's inpainting), `mean` (one network
    evaluation) and `autoencoder` (the true clip encoded and decoded: the ceiling).
    """

    model: Path
    """Folder of a training run (its newest model is taken) or of a model."""
    shards: str
    """Folder that `vidfill encode` wrote, or its URL, with the model's autoencoder."""
    out: Path
    """Folder for the results: new, empty, or begun by this same command."""
    schedules: str = DEFAULT_SCHEDULES
    """Schedules, separated by spaces, each SOLVER:STEPS[(key=value)][+MOVE(key=value)]. Solvers:
    ddpm (variance=small or large), ddim. Moves: resample(n=K), the paper's resampling."""
    clips: int = 16
    """Clips to fill: the split's first ones; 0 takes all."""
    masks: str = ""
    """Take only the clips under these mask families, separated by spaces; empty takes all."""
    split: str = "validation"
    """Split of the shards; it must keep its clips' pixels."""
    batch_size: int = 16
    """Clips that the network evaluates at once."""
    seed: int = 0
    """Seed of the noise."""
    autoencoder: str = ""
    """Where the autoencoder is now, if not where the model's record says: a name or a folder."""
    keep: int = 4
    """Clips whose frames are kept as pictures: the first ones."""
    precision: Precision = "float32"
    """Of the networks; bfloat16 is several times faster where the hardware has it."""
    device: str = "auto"
    """Where the networks run: "cpu", "cuda", "cuda:1"…; "auto" is a GPU if there is one."""
    plan: bool = False
    """Say what the sweep would cost, from one measured evaluation, and write nothing."""


@dataclass(frozen=True)
class Inputs:
    """What a sweep works with, found to fit together."""

    denoiser: Denoiser
    autoencoder: Autoencoder
    dataset: ShardedDataset
    clips: Mapping[str, int]
    """The clips by their keys, in the split's order, and where each is in the dataset."""
    programs: Mapping[str, Program]
    """By their schedules' canonical texts."""
    device: torch.device

    @property
    def sampled(self) -> dict[str, Program]:
        """What runs in the sampler, by the name of its rows."""
        return {"mean": compile_schedule(parse(baselines.MEAN), self.denoiser.timesteps)} | dict(
            self.programs
        )


def sweep(config: SweepConfig) -> list[Row]:
    """Run every schedule and baseline that has no row yet, and write the tables.

    Returns:
        The lines of results.csv; none where only the plan was asked for.

    Raises:
        BadInput: a setting is wrong, or model, shards and autoencoder do not fit together.
    """
    inputs = open_inputs(config)
    if config.plan:
        show_plan(inputs, config.batch_size)
        return []
    located = dataclasses.replace(config, shards=jobs.locate(config.shards))
    jobs.claim(config.out, "sweep", located)
    ledger = Ledger(config.out, fingerprint(inputs))
    book = functools.partial(_book, config, inputs, ledger)
    keep_inputs(config, inputs)
    run_baselines(inputs, ledger, book)
    run_schedules(config, inputs, ledger, book)
    return write_results(config, inputs, ledger)


# What goes in


def open_inputs(config: SweepConfig) -> Inputs:
    """Load and check everything; nothing is written.

    Raises:
        BadInput: naming what does not fit.
    """
    _check_settings(config)
    schedules = read_schedules(config.schedules)
    device = jobs.choose_device(config.device)
    dataset = ShardedDataset(config.shards, config.split)
    denoiser = Denoiser.load(config.model, str(device), config.precision)
    programs = {name: compile_schedule(parse(name), denoiser.timesteps) for name in schedules}
    _check_latents(config, dataset, denoiser)
    clips = _choose_clips(config, dataset)
    name = config.autoencoder or denoiser.autoencoder["name"]
    autoencoder = load_autoencoder(name, device, config.precision)
    if autoencoder.sha256 != denoiser.autoencoder["sha256"]:
        raise jobs.BadInput(
            f"autoencoder is {name} (sha256 {autoencoder.sha256[:12]}); the model was trained on "
            f"{_identity(denoiser.autoencoder)}: give that one with --autoencoder"
        )
    return Inputs(denoiser, autoencoder, dataset, clips, programs, device)


def _check_settings(config: SweepConfig) -> None:
    jobs.refuse_launcher("sweep")
    for field, least in {"clips": 0, "batch_size": 1, "keep": 0}.items():
        if getattr(config, field) < least:
            raise jobs.BadInput(f"{field} is {getattr(config, field)}: give {least} or more")


def read_schedules(text: str) -> list[str]:
    """Schedules separated by spaces, each in canonical form.

    Raises:
        BadInput: there is none, one cannot be read, or one is given twice.
    """
    schedules = [str(parse(word)) for word in text.split()]
    if not schedules:
        raise jobs.BadInput(f'schedules is empty: give some, as in "{DEFAULT_SCHEDULES}"')
    for index, schedule in enumerate(schedules):
        if schedule in schedules[:index]:
            raise jobs.BadInput(f"schedules has {schedule} twice: give it once")
    return schedules


def _place(config: SweepConfig) -> str:
    """The shards, as a message or a record may name them."""
    return jobs.hide_secrets(config.shards)


def _check_latents(config: SweepConfig, dataset: ShardedDataset, denoiser: Denoiser) -> None:
    ours, theirs = denoiser.autoencoder, dataset.manifest.autoencoder
    if ours["sha256"] != theirs["sha256"]:
        raise jobs.BadInput(
            f"the shards in {_place(config)} were encoded with {_identity(theirs)}, the model in "
            f"{config.model} was trained on {_identity(ours)}: encode with the model's"
        )
    shape, trained = list(dataset.manifest.latent_shape), list(denoiser.space.shape)
    if shape != trained:
        raise jobs.BadInput(
            f"the shards in {_place(config)} hold latents of the shape {shape} (frames, channels, "
            f"height, width), the model in {config.model} was trained on {trained}: encode with "
            "the training clips' length and size"
        )


def _identity(autoencoder: Mapping[str, str]) -> str:
    return f"{autoencoder['name']} (sha256 {autoencoder['sha256'][:12]})"


def _choose_families(config: SweepConfig, dataset: ShardedDataset) -> list[str]:
    there = list(dataset.manifest.masks["families"])
    for family in config.masks.split():
        if family not in there:
            raise jobs.BadInput(
                f"masks has {family}; the split {config.split} of {_place(config)} holds "
                f"{', '.join(there)}: choose of these"
            )
    return config.masks.split() or there


def _choose_clips(config: SweepConfig, dataset: ShardedDataset) -> dict[str, int]:
    families = _choose_families(config, dataset)
    found = {key: i for i, key in enumerate(dataset.keys) if family_of(key) in families}
    if config.clips > len(found):
        raise jobs.BadInput(
            f"clips is {config.clips}; the split {config.split} of {_place(config)} holds "
            f"{len(found)}: give at most that, or 0 for all"
        )
    chosen = dict(itertools.islice(found.items(), config.clips or len(found)))
    pixels_of(dataset[next(iter(chosen.values()))])
    return chosen


# What is planned


def show_plan(inputs: Inputs, batch_size: int) -> None:
    """Print each schedule's evaluations, and the network's time from one measured evaluation.

    The time is t(C) · max(ΣNFE / C, longest), t(C) that of one evaluation of a full batch of C.
    """
    clips = len(inputs.clips)
    slots = min(batch_size, clips * len(inputs.sampled))
    seconds = time_evaluation(inputs, slots)
    table = Table("schedule", "NFE", "clips", "evaluations", "network time")
    for name, program in inputs.sampled.items():
        evaluations = program.nfe * clips
        spent = f"{evaluations * seconds / slots:,.1f} s"
        table.add_row(name, f"{program.nfe:,}", str(clips), f"{evaluations:,}", spent)
    nfes = [program.nfe for program in inputs.sampled.values()]
    whole = seconds * max(sum(nfes) * clips / slots, max(nfes))
    table.add_section()
    table.add_row("all", "", str(clips), f"{sum(nfes) * clips:,}", f"{whole:,.1f} s")
    _console().print(table)
    print(
        f"one evaluation of {slots} clips takes {seconds:.3f} s on {inputs.device}; "
        "decoding and metrics come on top"
    )


def time_evaluation(inputs: Inputs, slots: int) -> float:
    """Wall seconds of one network call on `slots` clips, the second of two."""
    condition = condition_of(inputs.denoiser, inputs.dataset[next(iter(inputs.clips.values()))])
    program = compile_schedule(parse("ddim:2"), inputs.denoiser.timesteps)
    requests = [Request(str(slot), "ddim:2", program, lambda: condition) for slot in range(slots)]
    moments: list[float] = []
    for _ in sample(
        inputs.denoiser,
        requests,
        capacity=slots,
        seed=0,
        on_evaluations=lambda count: moments.append(time.perf_counter()),
    ):
        pass
    return moments[1] - moments[0]


# What is done


Book = Callable[[str, int, float, Example, Frames], None]


def fingerprint(inputs: Inputs) -> dict[str, str]:
    """What must not change between the runs of one sweep."""
    manifest = inputs.dataset.store.read(MANIFEST)
    return {
        "model": hash_weights(inputs.denoiser.network),
        "shards' manifest": hashlib.sha256(manifest).hexdigest(),
        "autoencoder": inputs.autoencoder.sha256,
    }


def _book(
    config: SweepConfig,
    inputs: Inputs,
    ledger: Ledger,
    name: str,
    nfe: int,
    seconds: float,
    example: Example,
    frames: Frames,
) -> None:
    """Measure a finished clip, keep its frames where asked, then write its row.

    In this order: a clip that has a row has its frames.
    """
    if example.key in _kept(config, inputs):
        write_strip(config.out, slug(name), example.key, frames)
    metrics = measure(frames, pixels_of(example), example.mask)
    numbers = {"seconds_per_clip": seconds, **metrics}
    formatted = {column: f"{value:.6g}" for column, value in numbers.items()}
    ledger.add({"schedule": name, "clip": example.key, "nfe": str(nfe), **formatted})


def _kept(config: SweepConfig, inputs: Inputs) -> Sequence[str]:
    return list(inputs.clips)[: config.keep]


def keep_inputs(config: SweepConfig, inputs: Inputs) -> None:
    """Write the true, masked and mask strips of the clips that are kept."""
    for key in _kept(config, inputs):
        example = inputs.dataset[inputs.clips[key]]
        mask = np.repeat(example.mask[..., None] * np.uint8(255), 3, axis=-1)
        write_strip(config.out, "truth", key, pixels_of(example))
        write_strip(config.out, "masked", key, baselines.fill(example))
        write_strip(config.out, "mask", key, mask)


def write_strip(out: Path, folder: str, clip: str, frames: Frames) -> None:
    """Write a clip's frames side by side as a lossless picture."""
    strip = rearrange(frames, "f h w rgb -> h (f w) rgb")
    written, png = cv2.imencode(".png", cv2.cvtColor(strip, cv2.COLOR_RGB2BGR))
    assert written
    jobs.write_atomically(out / "frames" / folder / f"{clip}.png", png.tobytes())


def slug(name: str) -> str:
    """A schedule's text as a file's name: ddpm:50+resample(n=4) is ddpm-50-resample-n-4."""
    return re.sub(r"[^\w.]+", "-", name).strip("-")


def run_baselines(inputs: Inputs, ledger: Ledger, book: Book) -> None:
    """The baselines that need no sampler, once a clip."""
    makers: dict[str, Callable[[Example], Frames]] = {
        "fill": baselines.fill,
        "classic": lambda example: baselines.classic(pixels_of(example), example.mask),
        "autoencoder": functools.partial(baselines.autoencoder, inputs.autoencoder),
    }
    pending = [
        (index, name)
        for key, index in inputs.clips.items()
        for name in makers
        if (name, key) not in ledger
    ]
    with jobs.progress("baselines", len(pending), "clips") as progress:
        for index, name in pending:
            example = inputs.dataset[index]
            began = time.perf_counter()
            frames = makers[name](example)
            book(name, 0, time.perf_counter() - began, example, frames)
            progress.advance(note=name)


def run_schedules(config: SweepConfig, inputs: Inputs, ledger: Ledger, book: Book) -> None:
    """Everything that the sampler runs; a clip is decoded and booked as its trajectory ends."""

    def condition(key: str) -> Condition:
        return condition_of(inputs.denoiser, inputs.dataset[inputs.clips[key]])

    requests = [
        Request(key, name, program, functools.partial(condition, key))
        for name, program in inputs.sampled.items()
        for key in inputs.clips
        if (name, key) not in ledger
    ]
    total = sum(program.nfe for program in inputs.sampled.values()) * len(inputs.clips)
    pending = sum(request.program.nfe for request in requests)
    with jobs.progress("sweep", total, "evaluations", done=total - pending) as progress:
        for result in sample(
            inputs.denoiser,
            requests,
            capacity=config.batch_size,
            seed=config.seed,
            on_evaluations=progress.advance,
        ):
            request = result.request
            example = inputs.dataset[inputs.clips[request.clip]]
            frames = decode_result(inputs.autoencoder, example, result.latents)
            book(request.name, request.program.nfe, result.seconds, example, frames)


# What comes out


def write_results(config: SweepConfig, inputs: Inputs, ledger: Ledger) -> list[Row]:
    """Write results.csv and sweep.json; return the lines of the first."""
    rows = [average(ledger, inputs, name) for name in (*BASELINES, *inputs.programs)]
    lines = [csv_line(RESULT_COLUMNS)]
    lines += [csv_line([row[column] for column in RESULT_COLUMNS]) for row in rows]
    jobs.write_atomically(config.out / "results.csv", b"".join(lines))
    about = describe(config, inputs, ledger)
    jobs.write_atomically(config.out / "sweep.json", json.dumps(about, indent=2).encode())
    return rows


def average(ledger: Ledger, inputs: Inputs, name: str) -> Row:
    """A schedule's row of results.csv: the mean over its clips."""
    rows = [ledger.rows[name, key] for key in inputs.clips]
    means = {column: f"{np.mean([float(row[column]) for row in rows]):.6g}" for column in AVERAGED}
    return {"schedule": name, "nfe": rows[0]["nfe"], **means, "clips": str(len(rows))}


def describe(config: SweepConfig, inputs: Inputs, ledger: Ledger) -> dict[str, object]:
    """sweep.json: what was swept, and where its frames are."""
    manifest = inputs.dataset.manifest
    return {
        "model": str(config.model),
        "shards": _place(config),
        "autoencoder": inputs.autoencoder.identity(),
        "masks": _choose_families(config, inputs.dataset),
        "clip": manifest.clip,
        "kept": list(_kept(config, inputs)),
        "schedules": [
            {"schedule": name, "slug": slug(name), "nfe": program.nfe}
            for name, program in inputs.programs.items()
        ],
        "baselines": list(BASELINES),
        "timesteps": inputs.denoiser.timesteps,
        "seconds": round(ledger.seconds, 1),
        "device": _device_name(inputs.device),
    }


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"


def show_results(rows: Sequence[Mapping[str, str]]) -> None:
    """Print the results as a table, where there are any."""
    if not rows:
        return
    table = Table(*(column.replace("_", " ") for column in RESULT_COLUMNS))
    for column in table.columns[1:]:
        column.justify = "right"
    for row in rows:
        numbers = [f"{float(row[column]):.4g}" for column in AVERAGED]
        table.add_row(row["schedule"], row["nfe"], *numbers, row["clips"])
        if row["schedule"] == BASELINES[-1]:
            table.add_section()
    _console().print(table)


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=TABLE_WIDTH)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of `vidfill sweep`."""
    return jobs.main(
        SweepConfig,
        lambda config: show_results(sweep(config)),
        argv,
        verb="sweep",
        examples=EXAMPLES,
    )


if __name__ == "__main__":
    sys.exit(main())
