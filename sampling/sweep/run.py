"""`vidfill sweep`: a model + held-out shards -> schedules compared on the same clips and noise."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from ... import jobs
from ...data.shards.format import Example
from ...errors import BadInput
from ...files import hold, locate, write_atomically
from ...processes import Crew, wait_until_visible
from ..capacity import find_capacity
from ..examples import decode_result, pixels_of
from ..metrics.clip import describe_clip, score_clip
from ..metrics.pixels import Frames
from ..sampler import Request, sample_in_order
from . import baselines
from .averages import TRUTH, Finished, compare_all, format_number, group_by_clip
from .baselines import BASELINES
from .inputs import (
    Inputs,
    SweepConfig,
    _choose_families,
    _choose_reference,
    _networks,
    _place,
    fingerprint,
    open_inputs,
)
from .kept import (
    Task,
    completion_of,
    diversity,
    has_features,
    read_completions,
    slug,
    spread_of,
    strip_of,
    write_completion,
    write_features,
    write_spread,
    write_strip,
)
from .measures import COMPARED, clip_columns
from .requests import _share_of, make_requests, task_of
from .rows import Account, Key, Ledger, Row, write_table
from .show import show_plan, show_results

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
        crew.finish()
        if not work.account:
            return []
        _await_rows(work)
        return write_results(work, work.account)


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

    def begin() -> dict[str, object]:
        jobs.claim(config.out, "sweep", _located(config), may_change=("reference",))
        stack.enter_context(hold(config.out))
        found = functools.partial(find_capacity, inputs.denoiser, make_requests(inputs))
        accounts.append(Account(config.out, ours, lambda: config.batch_size or found()))
        ledger.read()
        ledger.gather()
        keep_inputs(config, inputs)
        described = [(TRUTH, clip) for clip in inputs.clips if _is_described(config, inputs, clip)]
        return {
            "inputs": ours,
            "capacity": accounts[0].capacity,
            "finished": [*ledger.rows, *described],
        }

    begun = crew.share("begun", begin)
    if begun["inputs"] != ours:
        raise BadInput(
            f"process {crew.rank} found another model, autoencoder, network or other shards than "
            "the first one: give all the same, none that is still being written"
        )
    finished = frozenset(Task(*task) for task in begun["finished"])
    account = accounts[0] if accounts else None
    return Work(config, inputs, crew, ledger, account, begun["capacity"], finished)


def _located(config: SweepConfig) -> SweepConfig:
    """With whole paths: the same command continues from another folder."""
    lpips, i3d = (locate(file) if file else "" for file in (config.lpips, config.i3d))
    shards = locate(config.shards)
    return dataclasses.replace(config, shards=shards, lpips=lpips, i3d=i3d)


def _is_described(config: SweepConfig, inputs: Inputs, clip: str) -> bool:
    columns = [measure.column for measure in inputs.measures if measure.of == "set"]
    return all(has_features(config.out, column, TRUTH, clip) for column in columns)


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
    if work.account:
        work.account.save()


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


def run_schedules(work: Work, requests: Sequence[Request]) -> None:
    """What the sampler runs; a clip is decoded and booked as its trajectory ends."""
    crew, inputs = work.crew, work.inputs
    total = sum(request.program.nfe for request in make_requests(inputs))
    pending = sum(request.program.nfe for request in requests)
    with crew.tally("sweep", total, "evaluations", total - pending) as tally:
        for result in sample_in_order(
            inputs.denoiser,
            crew.take("trajectories", requests),
            capacity=_share_of(work.capacity, requests, crew.size),
            seed=work.config.seed,
            on_evaluations=tally.add,
        ):
            task, program = task_of(result.request), result.request.program
            frames = decode_result(inputs.autoencoder, work.example(task.clip), result.latents)
            book(work, task, program.nfe, result.seconds, frames)


def run_baselines(work: Work, tasks: Sequence[Task]) -> None:
    """The baselines that need no sampler, once a clip, and what FVD needs of the truth."""
    inputs = work.inputs
    makers: dict[str, Callable[[Example], Frames]] = {
        "fill": baselines.fill,
        "classic": lambda example: baselines.classic(pixels_of(example), example.mask),
        "autoencoder": functools.partial(baselines.autoencoder, inputs.autoencoder),
    }
    with work.crew.tally("baselines", len(tasks), "clips") as tally:
        for task in work.crew.take("tasks", tasks):
            example = work.example(task.clip)
            if task.name == TRUTH:
                described = describe_clip(pixels_of(example), inputs.judges)
                write_features(work.config.out, TRUTH, task.clip, described)
            else:
                began = time.perf_counter()
                frames = makers[task.name](example)
                book(work, task, 0, time.perf_counter() - began, frames)
            tally.add()


def _await_rows(work: Work) -> None:
    """Wait until the rows of all processes can be read here; gather them."""
    wanted = rows_of(work.inputs)

    def find_missing() -> str:
        work.ledger.read()
        missing = next((row for row in wanted if row not in work.ledger.rows), None)
        if missing is None:
            return ""
        return f"the row of {missing[0]} and {missing[1]} is not in {work.config.out}"

    wait_until_visible(find_missing)
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
    write_atomically(config.out / "sweep.json", json.dumps(about, indent=2).encode())
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


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of `vidfill sweep`."""
    return jobs.main(
        SweepConfig,
        lambda config: show_results(sweep(config)),
        argv,
        verb="sweep",
        examples=EXAMPLES,
    )
