"""`vidfill sweep`: a model + held-out shards -> schedules compared on the same examples."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ... import jobs
from ...data.shards.format import Example
from ...data.videos import Frames
from ...errors import BadInput, say
from ...files import hide_secrets, locate, write_atomically
from ...processes import Crew, wait_until_visible
from ...records import parse_strictly, read_small
from ..capacity import find_capacity, share_capacity
from ..examples import decode_result, pixels_of
from ..metrics.clip import describe_clip, score_clip
from ..sampler import Request, sample
from . import baselines
from .averages import TRUTH, Measurements, compare_all
from .baselines import BASELINES
from .inputs import SweepInputs, identify, make_requests, open_inputs
from .kept import (
    CompletionKey,
    SweepFolder,
    diversity,
    read_strip,
    slug,
    spread_of,
    write_spread,
    write_strip,
)
from .ledger import Ledger, RunLog, RunRecord
from .measures import clip_columns
from .results import (
    COMPARISON_COLUMNS,
    ClipSize,
    CompletionRow,
    ScheduleRecord,
    SweepRecord,
    write_table,
)
from .settings import EXAMPLES, SweepConfig
from .show import show_plan, show_results

# When a sweep is continued; of what may have moved, the content is compared.
SWEEP_MAY_CHANGE = ("reference", "model", "autoencoder", "shards")


def sweep(config: SweepConfig) -> list[dict[str, str]]:
    """Run every schedule and baseline that has no row yet, and write the tables.

    One process or many, under any launcher: each takes the next of what is left to do.

    Returns:
        The lines of results.csv; none if only the plan was wanted, and in a process that is not
        the first.

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
        worker = _begin(config, inputs, crew, stack)
        requests, others = worker.find_requests(), worker.find_others()
        run_schedules(worker, requests, config.seed)
        run_baselines(worker, others)
        crew.finish()
        if not worker.log:
            return []
        _await_rows(worker)
        return write_results(config, worker, worker.log)


@dataclass(frozen=True)
class SweepWorker:
    """What one of a sweep's processes works with."""

    inputs: SweepInputs
    crew: Crew
    folder: SweepFolder
    kept: Sequence[str]
    """The examples whose frames are kept."""
    ledger: Ledger
    log: RunLog | None
    """The first process's."""
    capacity: int
    """Trajectories that its network evaluates at once, at most."""
    finished: frozenset[CompletionKey]
    """What earlier runs did; for the examples that are described, with the name `TRUTH`."""

    def find_requests(self) -> list[Request]:
        """What the sampler has yet to do, the longest first."""
        requests = make_requests(self.inputs)
        return [request for key, request in requests.items() if key not in self.finished]

    def find_others(self) -> list[CompletionKey]:
        """What needs no sampler and is yet to do: baselines, and the true clips' features."""
        keys = _baseline_keys(self.inputs)
        if self.inputs.judges.i3d:
            keys = [CompletionKey(TRUTH, example) for example in self.inputs.examples] + keys
        return [key for key in keys if key not in self.finished]


def _baseline_keys(inputs: SweepInputs) -> list[CompletionKey]:
    names = [name for name in BASELINES if name != "mean"]
    return [CompletionKey(name, example) for example in inputs.examples for name in names]


def _begin(
    config: SweepConfig, inputs: SweepInputs, crew: Crew, stack: contextlib.ExitStack
) -> SweepWorker:
    """Claim the folder, and read what earlier runs did there: by the first process, for all."""
    logs: list[RunLog] = []
    ours, folder = identify(inputs), SweepFolder(config.out)
    kept = list(inputs.examples)[: config.keep]
    ledger = Ledger(config.out, clip_columns(inputs.measures), crew.rank)

    def find_capacity_for_all() -> int:
        return config.batch_size or find_capacity(
            inputs.denoiser, list(make_requests(inputs).values())
        )

    def begin() -> dict[str, object]:
        claim = jobs.claim(
            *(config.out, "sweep", _located(config)),
            stands_on=ours,
            may_change=SWEEP_MAY_CHANGE,
            renew=functools.partial(_renew, config.out),
        )
        stack.enter_context(claim)
        logs.append(RunLog(config.out, find_capacity_for_all))
        ledger.read()
        ledger.gather()
        for example in kept:
            _write_inputs(folder, inputs.load(example))
        columns = [measure.column for measure in inputs.measures if measure.of == "set"]
        described = [
            CompletionKey(TRUTH, example)
            for example in inputs.examples
            if all(folder.features(column, TRUTH, example).is_file() for column in columns)
        ]
        finished = [*ledger.rows, *described]
        return {"stands_on": ours, "capacity": logs[0].capacity, "finished": finished}

    begun = crew.share("begun", begin)
    if begun["stands_on"] != json.loads(json.dumps(ours)):
        raise BadInput(
            f"process {crew.rank} found another model, autoencoder, network or other shards than "
            "the first one: give all the same, none that is still being written"
        )
    finished = frozenset(CompletionKey(*key) for key in begun["finished"])
    log = logs[0] if logs else None
    return SweepWorker(inputs, crew, folder, kept, ledger, log, begun["capacity"], finished)


def _renew(out: Path, before: jobs.JobRecord) -> jobs.JobRecord:
    """Version 0.1 called examples clips, and had its hashes in run.json."""
    config = {"examples" if k == "clips" else k: value for k, value in before.config.items()}
    run = out / "run.json"
    recorded = parse_strictly(RunRecord, read_small(run)).inputs if run.is_file() else {}
    renamed = {
        "model": "model.weights",
        "autoencoder": "autoencoder.weights",
        "shards' manifest": "shards.manifest",
    }
    stands_on = {
        renamed.get(name, name.replace("network ", "networks.")): value
        for name, value in recorded.items()
    }
    return before.model_copy(update={"config": config, "stands_on": stands_on})


def _located(config: SweepConfig) -> SweepConfig:
    """With absolute paths: the same command continues from another folder."""
    lpips, i3d = (locate(file) if file else "" for file in (config.lpips, config.i3d))
    shards = locate(config.shards)
    return dataclasses.replace(config, shards=shards, lpips=lpips, i3d=i3d)


def _write_inputs(folder: SweepFolder, example: Example) -> None:
    """Keep the true, masked and mask strips of an example."""
    mask = np.repeat(example.mask[..., None] * np.uint8(255), 3, axis=-1)
    write_strip(folder.strip(TRUTH, example.key), pixels_of(example))
    write_strip(folder.strip("masked", example.key), baselines.fill(example))
    write_strip(folder.strip("mask", example.key), mask)


def record(
    worker: SweepWorker, key: CompletionKey, nfe: int, seconds: float, frames: Frames
) -> None:
    """Measure a completion, keep its frames where wanted, then write its row.

    In this order: a completion that has a row has its frames and its features.
    """
    inputs, folder, name = worker.inputs, worker.folder, slug(key.schedule)
    example = inputs.load(key.example)
    if key.completion == 0:
        if key.example in worker.kept:
            write_strip(folder.strip(name, key.example), frames)
        folder.write_features(name, key.example, describe_clip(frames, inputs.judges))
    if inputs.completions > 1 and key.schedule in inputs.sampled:
        # What it puts into the hole; the rest is 0.
        write_strip(folder.completion(key), frames * example.mask[..., None])
    scores = score_clip(frames, pixels_of(example), example.mask, inputs.judges)
    worker.ledger.add(
        CompletionRow.model_validate(
            {**key._asdict(), "nfe": nfe, "seconds_per_clip": seconds, **scores}
        )
    )
    if worker.log:
        worker.log.save()


def run_schedules(worker: SweepWorker, requests: Sequence[Request], seed: int) -> None:
    """Sample; each trajectory is decoded and recorded when it ends."""
    crew, inputs = worker.crew, worker.inputs
    everything = make_requests(inputs)
    keys = {(request.name, request.key): key for key, request in everything.items()}
    total = sum(request.program.nfe for request in everything.values())
    done = total - sum(request.program.nfe for request in requests)
    with crew.tally("sweep", total, "evaluations", done) as tally:
        for sampled in sample(
            inputs.denoiser,
            crew.take("trajectories", requests),
            capacity=share_capacity(worker.capacity, requests, crew.size),
            seed=seed,
            on_evaluations=tally.add,
        ):
            request = sampled.request
            key = keys[request.name, request.key]
            example = inputs.load(key.example)
            frames = decode_result(inputs.autoencoder, example, sampled.latents)
            record(worker, key, request.program.nfe, sampled.seconds, frames)


def run_baselines(worker: SweepWorker, keys: Sequence[CompletionKey]) -> None:
    """What needs no sampler: the other baselines, and the features of the true clips."""
    inputs = worker.inputs
    makers: Mapping[str, Callable[[Example], Frames]] = {
        "fill": baselines.fill,
        "classic": lambda example: baselines.classic(pixels_of(example), example.mask),
        "flow": lambda example: baselines.flow(pixels_of(example), example.mask),
        "autoencoder": functools.partial(baselines.autoencoder, inputs.autoencoder),
    }
    with worker.crew.tally("baselines", len(keys), "examples") as tally:
        for key in worker.crew.take("baselines", keys):
            example = inputs.load(key.example)
            if key.schedule == TRUTH:
                features = describe_clip(pixels_of(example), inputs.judges)
                worker.folder.write_features(TRUTH, key.example, features)
            else:
                began = time.perf_counter()
                frames = makers[key.schedule](example)
                record(worker, key, 0, time.perf_counter() - began, frames)
            tally.add()


def _await_rows(worker: SweepWorker) -> None:
    """Wait until the rows of all processes can be read here; gather them."""
    wanted = [*make_requests(worker.inputs), *_baseline_keys(worker.inputs)]

    def find_missing() -> str:
        worker.ledger.read()
        missing = next((key for key in wanted if key not in worker.ledger.rows), None)
        if missing is None:
            return ""
        return f"the row of {missing.schedule} and {missing.example} is not in {worker.folder.path}"

    wait_until_visible(find_missing)
    worker.ledger.gather()


def write_results(config: SweepConfig, worker: SweepWorker, log: RunLog) -> list[dict[str, str]]:
    """Write the tables and sweep.json; return the lines of results.csv."""
    inputs = worker.inputs
    measurements = Measurements(
        worker.folder,
        worker.ledger.rows,
        list(inputs.examples),
        inputs.measures,
        inputs.completions,
        measure_spreads(worker) if inputs.completions > 1 else {},
    )
    names = [*BASELINES, *inputs.programs]
    rows = [measurements.average(name) for name in names]
    compared = compare_all(measurements, list(inputs.programs), inputs.reference, config.seed)
    columns = ["schedule", *(measure.column for measure in inputs.measures)]
    write_table(config.out, "results", columns, rows)
    write_table(config.out, "comparison", COMPARISON_COLUMNS, [row.texts() for row in compared])
    log.save()
    about = SweepRecord(
        model=str(config.model),
        shards=hide_secrets(config.shards),
        autoencoder=inputs.autoencoder.identity(),
        networks=list(inputs.judges.networks),
        masks=list(inputs.families),
        clip=ClipSize(**inputs.dataset.manifest.clip),
        kept=list(worker.kept),
        completions=inputs.completions,
        schedules=[
            ScheduleRecord(schedule=name, slug=slug(name), nfe=program.nfe)
            for name, program in inputs.programs.items()
        ],
        baselines=list(BASELINES),
        timesteps=inputs.denoiser.timesteps,
        seconds=round(log.seconds, 1),
        processes=worker.crew.size,
        batch_size=log.capacity,
        device=_device_name(inputs.device),
        reference=inputs.reference,
        without_value=measurements.count_without_value(names),
    )
    write_atomically(config.out / "sweep.json", about.model_dump_json(indent=2).encode())
    return rows


def measure_spreads(worker: SweepWorker) -> dict[tuple[str, str], float]:
    """The diversity of each example under each schedule; kept examples' maps are written."""
    inputs, folder = worker.inputs, worker.folder
    found: dict[tuple[str, str], float] = {}
    for example in inputs.examples:
        mask = inputs.load(example).mask
        for name in inputs.sampled:
            keys = [CompletionKey(name, example, n) for n in range(inputs.completions)]
            strips = [read_strip(folder.completion(key), *mask.shape) for key in keys]
            spread = spread_of(np.stack(strips))
            found[name, example] = diversity(spread, mask)
            if example in worker.kept:
                write_spread(folder.spread(slug(name), example), spread)
    return found


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{device.type} ({torch.get_num_threads()} threads)"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of `vidfill sweep`."""
    words = sys.argv[1:] if argv is None else argv
    if any(word.partition("=")[0] == "--clips" for word in words):
        say("vidfill sweep: error: --clips is now --examples")
        return 2
    return jobs.main(
        SweepConfig,
        lambda config: show_results(sweep(config)),
        argv,
        verb="sweep",
        examples=EXAMPLES,
    )
