"""`vidfill sweep`: a model + held-out shards -> schedules compared on the same clips and noise."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from .. import jobs
from ..crew import Crew, choose_device
from ..data.shards import MANIFEST, Example, ShardedDataset, family_of
from ..modeling.autoencoder import Autoencoder, hash_weights, identify, load_trained_autoencoder
from ..modeling.diffusion import Denoiser
from ..modeling.precision import Precision
from . import baselines
from .board import write_board
from .columns import write_table
from .features import has_features, write_features
from .ledger import Account, Key, Ledger, Row
from .metrics import Frames
from .networks import FVD_FRAMES
from .outcome import TRUTH, Finished, compare_all, format_number, group_by_clip
from .results import COMPARED, Measure, clip_columns, measures_with, read_sweep
from .sampler import (
    Condition,
    Known,
    Request,
    condition_of,
    decode_result,
    find_capacity,
    known_of,
    pixels_of,
    sample_in_order,
    time_evaluation,
)
from .schedules import Program, compile_schedule, parse
from .scores import Judges, describe_clip, load_judges, score_clip
from .spread import diversity, read_completions, spread_of, write_completion, write_spread
from .strips import write_strip

EXAMPLES = """examples:
  vidfill sweep runs/train runs/shards runs/sweep
      the paper's n = 0, 4, 6, 10 with 50 diffusion steps, and 50 DDIM steps
  vidfill sweep runs/train runs/shards runs/paper --clips 4 --plan \\
      --schedules "ddpm:1000 ddpm:1000+resample(n=4)"
      what two of the paper's own settings would cost; nothing is written
  accelerate launch --config_file launch/node.yaml --num_processes 8 -m vidfill.sampling.sweep \\
      runs/train runs/shards runs/sweep --clips 0
      the same results on any number of GPUs
"""

DEFAULT_SCHEDULES = (
    "ddim:50 ddpm:50 ddpm:50+resample(n=4) ddpm:50+resample(n=6) ddpm:50+resample(n=10)"
)

BASELINES = ("fill", "classic", "mean", "autoencoder")
TABLE_WIDTH = 200  # characters, where there is no terminal to ask
VISIBLE = 60.0  # seconds in which a file on a shared file system shows on every node


@dataclass(frozen=True)
class SweepConfig:
    """Fill the holes of held-out clips under several schedules, and measure how well.

    All schedules see the same clips, masks and noise; what is visible stays as it was. A row is
    written for every completion of a clip as it is finished: the same command continues a sweep
    that was stopped, on any number of processes. Beside the schedules stand four baselines: `fill`
    (the model's input), `classic` (the nearest frame in which a pixel is visible, else OpenCV's
    inpainting), `mean` (one network evaluation) and `autoencoder` (the true clip encoded and
    decoded: the ceiling). Each schedule is compared, clip by clip, with its own without resampling
    and with a reference. The tables are CSV and Parquet.
    """

    model: Path
    """Folder of a training run (its newest model is taken) or of a model."""
    shards: str
    """Folder that `vidfill encode` wrote, or its URL, with the model's autoencoder."""
    out: Path
    """Folder for the results: new, empty, or begun by this same command."""
    schedules: str = DEFAULT_SCHEDULES
    """Schedules, separated by spaces, each SOLVER:STEPS[(key=value)][+MOVE(key=value)], as
    `vidfill schedule --help` has them."""
    reference: str = ""
    """The schedule with which each is compared, beside its own without resampling; empty is the
    first."""
    clips: int = 16
    """Clips to fill: the split's first ones; 0 takes all."""
    completions: int = 1
    """Times that a schedule fills each clip, each with noise of its own. With two or more there is
    the best of them, and how far they lie from each other; what they put into the hole is kept."""
    masks: str = ""
    """Take only the clips under these mask families, separated by spaces; empty takes all."""
    split: str = "validation"
    """Split of the shards; it must keep its clips' pixels."""
    batch_size: int = 0
    """Clips that the network evaluates at once; 0 finds once what is fastest."""
    seed: int = 0
    """Seed of the noise."""
    autoencoder: str = ""
    """Where the autoencoder is now, if not where the model's record says: a name or a folder."""
    lpips: str = ""
    """LPIPS's network, a safetensors file or hf://OWNER/NAME/FILE; empty leaves its column out."""
    i3d: str = ""
    """I3D, for FVD and VFID, likewise; FVD wants clips of ten frames or more."""
    keep: int = 4
    """Clips whose frames are kept as pictures: the first ones."""
    precision: Precision = "float32"
    """Of the networks; bfloat16 is several times faster where the hardware has it."""
    device: str = "auto"
    """Where the networks run: "cpu", "cuda", "cuda:1"…; "auto" is each process's own GPU if
    there is one."""
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
    completions: int
    judges: Judges
    device: torch.device

    @property
    def sampled(self) -> dict[str, Program]:
        """What runs in the sampler, by the name of its rows."""
        return {"mean": compile_schedule(parse(baselines.MEAN), self.denoiser.timesteps)} | dict(
            self.programs
        )

    @property
    def measures(self) -> list[Measure]:
        """The columns of the results."""
        return measures_with(_networks(self.judges), self.completions)


def _networks(judges: Judges) -> list[str]:
    found = dataclasses.fields(judges)
    return [field.name for field in found if getattr(judges, field.name) is not None]


def sweep(config: SweepConfig) -> list[Row]:
    """Run every schedule and baseline that has no row yet, and write the tables.

    One process or many, under any launcher: each takes the next of what is left to do.

    Returns:
        The lines of results.csv; none where only the plan was asked for, and in a process that is
        not the first.

    Raises:
        BadInput: a setting is wrong, or model, shards and autoencoder do not fit together.
    """
    with contextlib.ExitStack() as stack:
        crew = stack.enter_context(Crew.join("sweep"))
        inputs = open_inputs(config)
        if config.plan:
            if crew.rank == 0:
                show_plan(inputs, config.batch_size, crew.size)
            return []
        work = _begin(config, inputs, crew, stack)
        tasks, requests = work.tasks(), work.requests()
        run_schedules(work, requests)
        run_baselines(work, tasks)
        if not work.account:
            return []
        _await_rows(work, len(tasks) + len(requests))
        return write_results(work, work.account)


# What goes in


def open_inputs(config: SweepConfig) -> Inputs:
    """Load and check everything; nothing is written.

    Raises:
        BadInput: naming what does not fit.
    """
    _check_settings(config)
    schedules = read_schedules(config.schedules)
    _choose_reference(config, schedules)
    device = choose_device(config.device)
    dataset = ShardedDataset(config.shards, config.split)
    denoiser = Denoiser.load(config.model, str(device), config.precision)
    programs = {name: compile_schedule(parse(name), denoiser.timesteps) for name in schedules}
    _check_latents(config, dataset, denoiser)
    clips = _choose_clips(config, dataset)
    autoencoder = load_trained_autoencoder(
        denoiser.autoencoder, config.autoencoder, device, config.precision
    )
    frames = dataset.manifest.clip["frames"]
    if config.i3d and frames < FVD_FRAMES:
        raise jobs.BadInput(
            f"i3d is {config.i3d}; the clips have {frames} frames, and FVD wants at least "
            f"{FVD_FRAMES}: leave --i3d out, or encode longer clips"
        )
    judges = load_judges(config.lpips, config.i3d, device)
    return Inputs(
        denoiser, autoencoder, dataset, clips, programs, config.completions, judges, device
    )


def _check_settings(config: SweepConfig) -> None:
    for field, least in {"clips": 0, "completions": 1, "batch_size": 0, "keep": 0}.items():
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


def _choose_reference(config: SweepConfig, schedules: Sequence[str]) -> str:
    if not config.reference:
        return schedules[0]
    reference = str(parse(config.reference))
    if reference not in schedules:
        raise jobs.BadInput(
            f"reference is {reference}; the schedules are {' '.join(schedules)}: choose of these, "
            "or add it to them"
        )
    return reference


def _place(config: SweepConfig) -> str:
    """The shards, as a message or a record may name them."""
    return jobs.hide_secrets(config.shards)


def _check_latents(config: SweepConfig, dataset: ShardedDataset, denoiser: Denoiser) -> None:
    ours, theirs = denoiser.autoencoder, dataset.manifest.autoencoder
    if ours["sha256"] != theirs["sha256"]:
        raise jobs.BadInput(
            f"the shards in {_place(config)} were encoded with {identify(theirs)}, the model in "
            f"{config.model} was trained on {identify(ours)}: encode with the model's"
        )
    shape, trained = list(dataset.manifest.latent_shape), list(denoiser.space.shape)
    if shape != trained:
        raise jobs.BadInput(
            f"the shards in {_place(config)} hold latents of the shape {shape} (frames, channels, "
            f"height, width), the model in {config.model} was trained on {trained}: encode with "
            "the training clips' length and size"
        )


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


def show_plan(inputs: Inputs, batch_size: int, processes: int = 1) -> None:
    """Print each schedule's evaluations, and the network's time from one measured evaluation.

    The time is t(C) · max(ΣNFE / C, longest), t(C) that of one evaluation of a full batch of C,
    of all processes together.
    """
    count = len(inputs.clips) * inputs.completions
    requests = make_requests(inputs)
    batch = batch_size or find_capacity(inputs.denoiser, requests)
    batch = min(_share_of(batch, requests, processes), len(requests))
    condition = condition_of(inputs.denoiser, inputs.dataset[next(iter(inputs.clips.values()))])
    seconds = time_evaluation(inputs.denoiser, condition, batch)
    slots = batch * processes
    shown = Table("schedule", "NFE", "completions", "evaluations", "network time")
    for name, program in inputs.sampled.items():
        evaluations = program.nfe * count
        spent = f"{evaluations * seconds / slots:,.1f} s"
        shown.add_row(name, f"{program.nfe:,}", f"{count:,}", f"{evaluations:,}", spent)
    nfes = [program.nfe for program in inputs.sampled.values()]
    whole = seconds * max(sum(nfes) * count / slots, max(nfes))
    shown.add_section()
    shown.add_row("all", "", f"{count:,}", f"{sum(nfes) * count:,}", f"{whole:,.1f} s")
    _console().print(shown)
    print(
        f"one evaluation of a batch of {batch} takes {seconds:.3f} s on {inputs.device}; "
        "decoding and metrics come on top"
    )


# What is done


class Task(NamedTuple):
    """A clip to finish under a schedule or a baseline; under `TRUTH`, to be described."""

    name: str
    clip: str
    completion: int = 0


@dataclass(frozen=True)
class Work:
    """A sweep that has begun, as one of its processes sees it."""

    config: SweepConfig
    inputs: Inputs
    crew: Crew
    ledger: Ledger
    account: Account | None
    """The first process's."""
    capacity: int
    """Clips that a process's network evaluates at once, at most."""
    finished: frozenset[Task]
    """By earlier runs."""

    def requests(self) -> list[Request]:
        """What the sampler has yet to do, the longest first."""
        everything = make_requests(self.inputs)
        return [request for request in everything if task_of(request) not in self.finished]

    def tasks(self) -> list[Task]:
        """What else there is to do."""
        makers = [TRUTH] if self.inputs.judges.i3d else []
        makers += [name for name in BASELINES if name != "mean"]
        everything = [Task(name, clip) for clip in self.inputs.clips for name in makers]
        return [task for task in everything if task not in self.finished]

    def example(self, clip: str) -> Example:
        return self.inputs.dataset[self.inputs.clips[clip]]


def _begin(config: SweepConfig, inputs: Inputs, crew: Crew, stack: contextlib.ExitStack) -> Work:
    """Claim the folder, and read what earlier runs did there: by the first process, for all."""
    accounts: list[Account] = []
    ours = fingerprint(inputs)
    ledger = Ledger(config.out, clip_columns(inputs.measures), crew.rank)

    def begin() -> str:
        jobs.claim(config.out, "sweep", _located(config), may_change=("reference",))
        stack.enter_context(jobs.hold(config.out))
        found = functools.partial(find_capacity, inputs.denoiser, make_requests(inputs))
        accounts.append(Account(config.out, ours, lambda: config.batch_size or found()))
        ledger.read()
        ledger.gather()
        keep_inputs(config, inputs)
        described = [(TRUTH, clip) for clip in inputs.clips if _is_described(config, inputs, clip)]
        return json.dumps(
            {
                "inputs": ours,
                "capacity": accounts[0].capacity,
                "finished": [*ledger.rows, *described],
            }
        )

    begun = json.loads(crew.share("begun", begin))
    if begun["inputs"] != ours:
        raise jobs.BadInput(
            f"process {crew.rank} found another model, autoencoder, network or other shards than "
            "the first one: give all the same, none that is still being written"
        )
    finished = frozenset(Task(*task) for task in begun["finished"])
    account = accounts[0] if accounts else None
    return Work(config, inputs, crew, ledger, account, begun["capacity"], finished)


def _located(config: SweepConfig) -> SweepConfig:
    """With whole paths: the same command continues from another folder."""
    lpips, i3d = (jobs.locate(file) if file else "" for file in (config.lpips, config.i3d))
    shards = jobs.locate(config.shards)
    return dataclasses.replace(config, shards=shards, lpips=lpips, i3d=i3d)


def _is_described(config: SweepConfig, inputs: Inputs, clip: str) -> bool:
    columns = [measure.column for measure in inputs.measures if measure.of == "set"]
    return all(has_features(config.out, column, TRUTH, clip) for column in columns)


def fingerprint(inputs: Inputs) -> dict[str, str]:
    """What must not change between the runs of one sweep."""
    manifest = inputs.dataset.store.read(MANIFEST)
    return {
        "model": hash_weights(inputs.denoiser.network),
        "shards' manifest": hashlib.sha256(manifest).hexdigest(),
        "autoencoder": inputs.autoencoder.sha256,
    } | {
        f"network {name}": hash_weights(getattr(inputs.judges, name))
        for name in _networks(inputs.judges)
    }


def book(work: Work, task: Task, nfe: int, seconds: float, frames: Frames) -> None:
    """Measure a finished clip, keep its frames where asked, then write its row.

    In this order: a completion that has a row has its frames and its features.
    """
    config, inputs, example = work.config, work.inputs, work.example(task.clip)
    judges = inputs.judges
    if task.completion == 0:
        if task.clip in _kept(config, inputs):
            write_strip(strip_of(config.out, slug(task.name), task.clip), frames)
        write_features(config.out, slug(task.name), task.clip, describe_clip(frames, judges))
    if inputs.completions > 1 and task.name in inputs.sampled:
        write_completion(completion_of(config.out, task), frames, example.mask)
    scores = score_clip(frames, pixels_of(example), example.mask, judges)
    numbers = {"seconds_per_clip": seconds, **scores}
    formatted = {column: format_number(value) for column, value in numbers.items()}
    which = {"schedule": task.name, "clip": task.clip, "completion": str(task.completion)}
    work.ledger.add({**which, "nfe": str(nfe), **formatted})
    _count(work)


def _count(work: Work) -> None:
    if work.account:
        work.account.save()
    work.crew.add("finished")


def _kept(config: SweepConfig, inputs: Inputs) -> Sequence[str]:
    return list(inputs.clips)[: config.keep]


def keep_inputs(config: SweepConfig, inputs: Inputs) -> None:
    """Write the true, masked and mask strips of the clips that are kept."""
    for key in _kept(config, inputs):
        example = inputs.dataset[inputs.clips[key]]
        mask = np.repeat(example.mask[..., None] * np.uint8(255), 3, axis=-1)
        write_strip(strip_of(config.out, "truth", key), pixels_of(example))
        write_strip(strip_of(config.out, "masked", key), baselines.fill(example))
        write_strip(strip_of(config.out, "mask", key), mask)


def strip_of(out: Path, folder: str, clip: str) -> Path:
    return out / "frames" / folder / f"{clip}.png"


def completion_of(out: Path, task: Task) -> Path:
    return out / "completions" / slug(task.name) / task.clip / f"{task.completion}.png"


def slug(name: str) -> str:
    """A schedule's text as a file's name: ddpm:50+resample(n=4) is ddpm-50-resample-n-4."""
    return re.sub(r"[^\w.]+", "-", name).strip("-")


def make_requests(inputs: Inputs) -> list[Request]:
    """All that the sampler runs, the longest first, so that none is left running alone."""

    def condition(key: str) -> Condition:
        return condition_of(inputs.denoiser, inputs.dataset[inputs.clips[key]])

    def known(key: str) -> Known:
        return known_of(inputs.denoiser, inputs.dataset[inputs.clips[key]])

    requests = [
        Request(
            *(noise_key(key, completion), name, program, functools.partial(condition, key)),
            known=functools.partial(known, key),
        )
        for name, program in inputs.sampled.items()
        for key in inputs.clips
        for completion in range(inputs.completions)
    ]
    return sorted(requests, key=lambda request: -request.program.nfe)


def noise_key(clip: str, completion: int) -> str:
    """What the noise of a completion depends on: the first one's on the clip's own key alone.

    A dot stands in no clip's key.
    """
    return f"{clip}.{completion}" if completion else clip


def task_of(request: Request) -> Task:
    """What a request of `make_requests` does."""
    clip, _, completion = request.clip.partition(".")
    return Task(request.name, clip, int(completion or 0))


def run_schedules(work: Work, requests: Sequence[Request]) -> None:
    """What the sampler runs; a clip is decoded and booked as its trajectory ends."""
    crew, inputs = work.crew, work.inputs
    total = sum(request.program.nfe for request in make_requests(inputs))
    pending = sum(request.program.nfe for request in requests)
    with _show_progress(work, "sweep", total, "evaluations", total - pending) as progress:
        tally = Tally(crew, "evaluations", progress)
        for result in sample_in_order(
            inputs.denoiser,
            (requests[turn] for turn in _turns(crew, "trajectories", len(requests))),
            capacity=_share_of(work.capacity, requests, crew.size),
            seed=work.config.seed,
            on_evaluations=tally.add,
        ):
            task, program = task_of(result.request), result.request.program
            frames = decode_result(inputs.autoencoder, work.example(task.clip), result.latents)
            book(work, task, program.nfe, result.seconds, frames)


def _share_of(capacity: int, requests: Sequence[Request], processes: int) -> int:
    """Slots of one of several processes: no more than leave work for the others."""
    if processes == 1 or not requests:
        return capacity
    nfes = [request.program.nfe for request in requests]
    return min(capacity, math.ceil(sum(nfes) / max(nfes) / processes))


def _turns(crew: Crew, queue: str, count: int) -> Iterator[int]:
    """This process's numbers of a queue of all."""
    while (turn := crew.take(queue)) < count:
        yield turn


def run_baselines(work: Work, tasks: Sequence[Task]) -> None:
    """The baselines that need no sampler, once a clip, and what FVD needs of the truth."""
    inputs = work.inputs
    makers: dict[str, Callable[[Example], Frames]] = {
        "fill": baselines.fill,
        "classic": lambda example: baselines.classic(pixels_of(example), example.mask),
        "autoencoder": functools.partial(baselines.autoencoder, inputs.autoencoder),
    }
    with _show_progress(work, "baselines", len(tasks), "clips") as progress:
        tally = Tally(work.crew, "baselines", progress)
        for turn in _turns(work.crew, "tasks", len(tasks)):
            task = tasks[turn]
            example = work.example(task.clip)
            if task.name == TRUTH:
                described = describe_clip(pixels_of(example), inputs.judges)
                write_features(work.config.out, TRUTH, task.clip, described)
                _count(work)
            else:
                began = time.perf_counter()
                frames = makers[task.name](example)
                book(work, task, 0, time.perf_counter() - began, frames)
            tally.add(1)


def _show_progress(
    work: Work, description: str, total: int, unit: str, done: int = 0
) -> contextlib.AbstractContextManager[jobs.Progress]:
    """The progress of all processes, which the first one shows."""
    if not work.account or done == total:
        return contextlib.nullcontext(jobs.Progress())
    return jobs.progress(description, total, unit, done)


class Tally:
    """Counts what all processes have done, and shows it."""

    def __init__(self, crew: Crew, counter: str, progress: jobs.Progress) -> None:
        self._crew, self._counter, self._progress = crew, counter, progress
        self._shown = 0

    def add(self, count: int) -> None:
        reached = self._crew.add(self._counter, count)
        self._progress.advance(reached - self._shown)
        self._shown = reached


# What comes out


def _await_rows(work: Work, count: int) -> None:
    """Wait until all processes have done their work and their rows can be read; gather them.

    Raises:
        BadInput: a row does not show on this node.
    """
    work.crew.wait_for("finished", count)
    wanted = rows_of(work.inputs)
    ends = time.monotonic() + VISIBLE
    work.ledger.read()
    while missing := [row for row in wanted if row not in work.ledger.rows]:
        if time.monotonic() > ends:
            raise jobs.BadInput(
                f"the row of {missing[0][0]} and {missing[0][1]} is not in {work.config.out}: "
                "give a folder that all nodes share; the same command continues"
            )
        time.sleep(1)
        work.ledger.read()
    work.ledger.gather()


def rows_of(inputs: Inputs) -> list[Key]:
    """The rows of clips.csv, when all is done."""
    tasks = [task_of(request) for request in make_requests(inputs)]
    makers = [name for name in BASELINES if name != "mean"]
    return [*tasks, *(Task(name, clip) for name in makers for clip in inputs.clips)]


def write_results(work: Work, account: Account) -> list[Row]:
    """Write the tables and sweep.json; return the lines of results.csv."""
    config, inputs = work.config, work.inputs
    names = [*BASELINES, *inputs.programs]
    folders = {name: slug(name) for name in names}
    finished = Finished(
        config.out,
        group_by_clip(work.ledger.rows),
        list(inputs.clips),
        folders,
        inputs.measures,
        measure_spreads(config, inputs) if inputs.completions > 1 else {},
    )
    rows = [finished.average(name) for name in names]
    columns = ["schedule", *(measure.column for measure in inputs.measures)]
    reference = _choose_reference(config, list(inputs.programs))
    compared = compare_all(finished, list(inputs.programs), reference, config.seed)
    write_table(config.out, "results", columns, rows)
    write_table(config.out, "comparison", COMPARED, compared)
    account.save()
    about = describe(work, account) | {
        "reference": reference,
        "without_value": finished.left_out(names),
    }
    jobs.write_atomically(config.out / "sweep.json", json.dumps(about, indent=2).encode())
    write_board(read_sweep(config.out))
    return rows


def measure_spreads(config: SweepConfig, inputs: Inputs) -> dict[tuple[str, str], float]:
    """The diversity of each clip's completions under each schedule; kept clips' maps are kept."""
    found: dict[tuple[str, str], float] = {}
    for clip, place in inputs.clips.items():
        mask = inputs.dataset[place].mask
        for name in inputs.sampled:
            tasks = [Task(name, clip, number) for number in range(inputs.completions)]
            paths = [completion_of(config.out, task) for task in tasks]
            spread = spread_of(read_completions(paths, mask))
            found[name, clip] = diversity(spread, mask)
            if clip in _kept(config, inputs):
                write_spread(config.out / "spread" / slug(name) / f"{clip}.png", spread)
    return found


def describe(work: Work, account: Account) -> dict[str, object]:
    """sweep.json: what was swept, and where its frames are."""
    config, inputs = work.config, work.inputs
    manifest = inputs.dataset.manifest
    return {
        "model": str(config.model),
        "shards": _place(config),
        "autoencoder": inputs.autoencoder.identity(),
        "networks": _networks(inputs.judges),
        "masks": _choose_families(config, inputs.dataset),
        "clip": manifest.clip,
        "kept": list(_kept(config, inputs)),
        "completions": inputs.completions,
        "schedules": [
            {"schedule": name, "slug": slug(name), "nfe": program.nfe}
            for name, program in inputs.programs.items()
        ],
        "baselines": list(BASELINES),
        "timesteps": inputs.denoiser.timesteps,
        "seconds": round(account.seconds, 1),
        "processes": work.crew.size,
        "batch_size": account.capacity,
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
    shown = Table(*(column.replace("_", " ") for column in rows[0]))
    shown.columns[0].overflow = "fold"
    for column in shown.columns[1:]:
        column.justify = "right"
    for row in rows:
        name, *numbers = row.values()
        shown.add_row(name, *(f"{float(number):.4g}" for number in numbers))
        if name == BASELINES[-1]:
            shown.add_section()
    _console().print(shown)


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
