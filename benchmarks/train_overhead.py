"""The cost of a training step beyond forward, backward and optimizer, compared with a bare loop.

Every process trains with `vidfill.train.loop.train` itself. Between blocks of its steps, it trains
the same network in a bare loop: one batch held in memory, forward, backward, clip, AdamW and
nothing else; on several processes in plain DistributedDataParallel.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import functools
import io
import json
import multiprocessing
import shlex
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from accelerate import Accelerator
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import distributed
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.launcher.api import LaunchConfig, elastic_launch
from torch.nn.parallel import DistributedDataParallel
from vidfill import jobs
from vidfill.data.shards.format import Manifest
from vidfill.data.shards.reading import ShardedDataset
from vidfill.data.shards.stream import Batch, Stream
from vidfill.errors import BadInput
from vidfill.modeling.denoiser import Denoiser
from vidfill.modeling.precision import autocast
from vidfill.train import loop, step
from vidfill.train.checkpoints import Checkpoints
from vidfill.train.config import EvaluationConfig, PreviewConfig, TrainConfig, find_recipe
from vidfill.train.control import Control
from vidfill.train.monitor.rates import peak_rate
from vidfill.train.monitor.tensorboard import Monitor
from vidfill.train.preflight.plan import measure_step, training_cost
from vidfill.train.state import TrainState, make_denoiser
from vidfill.train.step import StepResult

from . import readers
from .machine import describe, in_new_process, spread, summarise

EXAMPLES = """examples:
  python -m benchmarks.train_overhead
      preset `tiny`, 8 clips per process, on one process and on two; ten minutes on two cores
  python -m benchmarks.train_overhead --processor-time
      the same on a shared machine
  python -m benchmarks.train_overhead --shards shards --processes 1 -- --config collisions
      a recipe, on your own data; after -- come options of `vidfill train`
  python -m benchmarks.train_overhead --latent 32 --processes 8 -- --config base --batch_size 16
      on GPUs; memory is then compared with the plan
"""

SMALLEST = ("--model.preset", "tiny")  # the default
BLOCK = 10  # steps of one loop before the other's turn, and between logged steps
FIRST = BLOCK // 2  # steps before the first block, so that no block begins or ends with a log
EXAMPLES_MADE, SHARDS_MADE = 256, 8

# The parts of a step that are neither forward, backward nor optimizer.
PARTS = {
    "transfer": [(Batch, "to")],
    "draws": [(step, "draw_timesteps"), (step, "draw_noise"), (step, "draw_latents")],
    "noising": [(Denoiser, name) for name in ("condition", "normalise", "training_pair")],
    "averages": [(step, "update_averages")],
    "logging": [(Monitor, "step")],
    "checkpoint": [(Checkpoints, "save"), (Monitor, "checkpoint")],
    "signals": [(Control, "stop")],
}


class Seconds(NamedTuple):
    """A time, or how long something took."""

    wall: float
    process: float  # processor time of all threads of this process
    thread: float  # processor time of this thread

    def since(self, before: Seconds) -> Seconds:
        return Seconds(*(a - b for a, b in zip(self, before, strict=True)))


class Times(NamedTuple):
    """What one process measured, summed over all blocks."""

    ours: Seconds
    bare: Seconds
    parts: dict[str, Seconds]  # of ours


# In each process


def now() -> Seconds:
    return Seconds(time.perf_counter(), time.process_time(), time.thread_time())


def when_done(device: torch.device) -> Seconds:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return now()


def total(times: Sequence[Seconds]) -> Seconds:
    return Seconds(*(sum(column) for column in zip(*times, strict=True)))


class Tally:
    """The time spent in functions, by part; of nested calls only the outermost counts."""

    def __init__(self) -> None:
        self.spent: dict[str, list[Seconds]] = defaultdict(list)
        self._inside = False

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def call(*given: Any, **named: Any) -> Any:
            if self._inside:
                return function(*given, **named)
            self._inside, began = True, now()
            try:
                return function(*given, **named)
            finally:
                self.spent[part].append(now().since(began))
                self._inside = False

        return call


@contextlib.contextmanager
def timing(tally: Tally) -> Iterator[None]:
    """Time the parts of the loop while this is open."""
    read = Stream.run

    def run(stream: Stream, *given: int) -> Generator[Batch, None, None]:
        with contextlib.closing(read(stream, *given)) as batches:
            take = tally.timed("data", functools.partial(next, batches))
            while True:
                yield take()

    with contextlib.ExitStack() as patches:
        patches.enter_context(patch.object(Stream, "run", run))
        for part, places in PARTS.items():
            for owner, name in places:
                timed = tally.timed(part, getattr(owner, name))
                patches.enter_context(patch.object(owner, name, timed))
        yield


def start_bare(
    config: TrainConfig, manifest: Manifest, clips: int, device: torch.device
) -> Callable[[int], None]:
    """The same network and optimizer in a minimal loop; the result takes a number of steps."""
    network = make_denoiser(config, manifest).network.to(device).train()
    if config.model.gradient_checkpointing:
        network.enable_gradient_checkpointing()
    optimizer = torch.optim.AdamW(
        network.parameters(),
        lr=config.optimizer.learning_rate,
        weight_decay=config.optimizer.weight_decay,
        fused=True,
    )
    engine: Any = network
    if distributed.is_initialized():
        engine = DistributedDataParallel(network, gradient_as_bucket_view=True)
    if config.compile:
        network.compile()
    frames, channels, height, width = manifest.latent_shape
    sizes = (channels, channels, network.config["condition_channels"])
    latents, target, condition = (
        torch.randn(clips, frames, size, height, width, device=device) for size in sizes
    )
    timestep = torch.arange(clips, device=device)

    def train(steps: int) -> None:
        for _ in range(steps):
            with autocast(device, config.precision):
                prediction = engine(latents, timestep, condition)
            (prediction.float() - target).square().mean().backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), config.optimizer.clip)
            optimizer.step()
            optimizer.zero_grad()

    return train


class Turns:
    """Replaces `train_step` in the loop, and lets the bare loop train between blocks."""

    def __init__(self, manifest: Manifest, tally: Tally) -> None:
        self.ours: list[Seconds] = []
        self.bare: list[Seconds] = []
        self.parts: dict[str, Seconds] = {}
        self._manifest, self._tally = manifest, tally
        self._calls = 0
        self._began = now()

    def __call__(
        self,
        state: TrainState,
        batch: Batch,
        denoiser: Denoiser,
        accelerator: Accelerator,
        config: TrainConfig,
    ) -> StepResult:
        if self._calls % BLOCK == FIRST:
            self._change(len(batch.keys), accelerator.device, config)
        self._calls += 1
        return step.train_step(state, batch, denoiser, accelerator, config)

    def _change(self, clips: int, device: torch.device, config: TrainConfig) -> None:
        """Record the block of ours that has just ended, then run a block of the bare loop."""
        began = when_done(device)
        if self._calls == FIRST:
            self._train_bare = start_bare(config, self._manifest, clips, device)
            self._train_bare(FIRST)
            self._tally.spent.clear()
        else:
            self.ours.append(began.since(self._began))
            self.parts = {part: total(times) for part, times in self._tally.spent.items()}
        if self._calls == config.steps - 1:
            return
        began = when_done(device)
        self._train_bare(BLOCK)
        self._began = when_done(device)
        self.bare.append(self._began.since(began))


def train_in_turns(config: TrainConfig, threads: int) -> Times:
    """Train this process's part of a run, with the bare loop's steps in between."""
    torch.set_num_threads(threads)
    tally = Tally()
    turns = Turns(ShardedDataset(config.shards, "train").manifest, tally)
    with (
        timing(tally),
        patch.object(loop, "train_step", turns),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        loop.train(config)
    return Times(total(turns.ours), total(turns.bare), turns.parts)


# The runs


def run_on(processes: int, config: TrainConfig, threads: int) -> list[Times]:
    """What each of `processes` new processes measured; several are started as by torchrun."""
    if processes == 1:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return [pool.submit(train_in_turns, config, threads).result()]
    launch = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=processes,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        run_id="overhead",
        logs_specs=DefaultLogsSpecs(str(config.out.parent / "logs")),
        max_restarts=0,
    )
    return list(elastic_launch(launch, train_in_turns)(config, threads).values())


class Run(NamedTuple):
    """Wall or processor seconds per step, averaged over processes."""

    ours: float
    bare: float
    parts: dict[str, float]  # of ours, on the first process
    waited: float  # share of wall time spent waiting for data
    stalls: list[float]  # waits for a checkpoint, in steps of wall time


def summarise_run(times: Sequence[Times], out: Path, options: argparse.Namespace) -> Run:
    first = times[0]
    clock = "process" if options.processor_time else "wall"
    ours, bare = (
        statistics.fmean(getattr(each, clock) for each in loops) / options.steps
        for loops in ([each.ours for each in times], [each.bare for each in times])
    )
    alone = "thread" if options.processor_time else "wall"
    parts = {part: getattr(spent, alone) / options.steps for part, spent in first.parts.items()}
    if options.processor_time:
        parts["other threads"] = (first.ours.process - first.ours.thread) / options.steps
    parts["the above together"] = sum(parts.values())
    parts["unexplained overhead"] = ours - bare - parts["the above together"]
    step_on_wall = first.ours.wall / options.steps
    return Run(
        ours=ours,
        bare=bare,
        parts=parts,
        waited=first.parts["data"].wall / first.ours.wall,
        stalls=[seconds / step_on_wall for seconds in checkpoint_stalls(out)],
    )


def checkpoint_stalls(out: Path) -> list[float]:
    events = EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    return [event.value for event in events.Scalars("time/checkpoint_seconds")]


def measure(config: TrainConfig, options: argparse.Namespace) -> dict[str, Any]:
    """Measure one process and several in turn, each run in a folder of its own."""
    shape = ShardedDataset(config.shards, "train").manifest.latent_shape
    counts = sorted({1, options.processes})
    rounds: list[dict[int, Run]] = []
    for number in range(options.rounds):
        runs = {}
        for count in counts:
            out = config.out / f"{number}-{count}"
            each = dataclasses.replace(config, out=out, batch_size=count * config.batch_size)
            runs[count] = summarise_run(run_on(count, each, options.threads), out, options)
        rounds.append(runs)
    found: dict[str, Any] = {
        "clips": config.batch_size,
        "precision": config.precision,
        "latents": shape,
        "checkpoint_every": config.checkpoint_every,
        "runs": {count: summarise_runs([runs[count] for runs in rounds]) for count in counts},
        "parts": summarise_parts([runs[1] for runs in rounds]),
    }
    if options.processes > 1:
        found["efficiency"] = summarise_efficiency(rounds, options.processes)
    if torch.cuda.is_available():
        found["gpu"] = measure_gpu(config, found["runs"][1]["vidfill"][0])
    return found


def summarise_runs(runs: Sequence[Run]) -> dict[str, Any]:
    """Ratios are taken within a run."""
    return {
        "vidfill": summarise([run.ours for run in runs]),
        "bare": summarise([run.bare for run in runs]),
        "overhead": summarise([run.ours / run.bare - 1 for run in runs]),
        "data_wait": summarise([run.waited for run in runs]),
        "checkpoint_stall": summarise([stall for run in runs for stall in run.stalls]),
    }


def summarise_parts(runs: Sequence[Run]) -> dict[str, Any]:
    return {
        part: {
            "seconds": summarise([run.parts[part] for run in runs]),
            "of_bare": summarise([run.parts[part] / run.bare for run in runs]),
        }
        for part in runs[0].parts
    }


def summarise_efficiency(rounds: Sequence[Mapping[int, Run]], count: int) -> dict[str, Any]:
    """A step's time on one process over that on several, with the same clips per process."""
    ours = [runs[1].ours / runs[count].ours for runs in rounds]
    bare = [runs[1].bare / runs[count].bare for runs in rounds]
    ratios = [a / b for a, b in zip(ours, bare, strict=True)]
    return {"vidfill": summarise(ours), "bare": summarise(bare), "ratio": summarise(ratios)}


def measure_gpu(config: TrainConfig, seconds: float) -> dict[str, float]:
    """Share of the peak rate (MFU) at `seconds` per step; measured and planned memory."""
    plan = training_cost(config, ShardedDataset(config.shards, "train").manifest, 1)
    rate = peak_rate(torch.device("cuda"), config.precision)
    return {
        "share_of_peak": plan.operations / seconds / rate,
        "planned_bytes": sum(plan.memory.values()),
        "measured_bytes": in_new_process(peak_of_step, config),
    }


def peak_of_step(config: TrainConfig) -> int:
    dataset = ShardedDataset(config.shards, "train")
    return measure_step(config, dataset, config.batch_size)[1]


# What is printed


def print_tables(found: dict[str, Any], options: argparse.Namespace) -> None:
    print(loops_table(found), parts_table(found), sep="\n\n", end="\n\n")
    if "efficiency" in found:
        print(efficiency_table(found, options.processes), end="\n\n")
    if "gpu" in found:
        gpu = found["gpu"]
        planned, measured = (gpu[f"{name}_bytes"] / 1e9 for name in ("planned", "measured"))
        print(
            f"{gpu['share_of_peak']:.1%} of the peak rate; memory {measured:.2f} GB, planned "
            f"{planned:.2f} GB ({planned / measured - 1:+.0%})\n"
        )
    kind = "processor" if options.processor_time else "wall"
    shape = "×".join(map(str, found["latents"]))
    print(
        f"{kind} seconds, median (least–most) of {options.rounds} run(s) of {options.steps} steps "
        f"of each loop in turn, ratios within a run\n{found['clips']} clip(s) per process, latents "
        f"of {shape}, {found['precision']}, a checkpoint every {found['checkpoint_every']} steps"
    )
    print(found["environment"], found["command"], sep="\n")


def loops_table(found: dict[str, Any]) -> str:
    lines = [
        "| processes | vidfill, s per step | bare loop, s per step | overhead | waited for data "
        "| waited for a checkpoint, steps |",
        "| ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for count, row in found["runs"].items():
        cells = [
            str(count),
            spread(row["vidfill"], "{:.4f}"),
            spread(row["bare"], "{:.4f}"),
            spread(row["overhead"], "{:.1%}"),
            spread(row["data_wait"], "{:.2%}"),
            spread(row["checkpoint_stall"], "{:.2f}"),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def parts_table(found: dict[str, Any]) -> str:
    lines = [
        "| part, on one process | ms per step | share of the bare step |",
        "| --- | ---: | ---: |",
    ]
    for part, row in found["parts"].items():
        milliseconds = [1000 * value for value in row["seconds"]]
        cells = [part, spread(summarise(milliseconds), "{:.2f}"), spread(row["of_bare"], "{:.2%}")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def efficiency_table(found: dict[str, Any], processes: int) -> str:
    cells = [spread(value, "{:.3f}") for value in found["efficiency"].values()]
    return "\n".join(
        [
            f"| efficiency of {processes} processes | vidfill | bare loop, plain DDP | ratio |",
            "| --- | ---: | ---: | ---: |",
            f"| compared with one, same clips per process | {' | '.join(cells)} |",
        ]
    )


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.train_overhead",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    numbers = {
        "rounds": (5, "runs on each number of processes"),
        "steps": (50, f"of each loop in a run, a multiple of {BLOCK}"),
        "processes": (2, "to compare with one; 1 skips the comparison"),
        "threads": (1, "of torch, per process"),
        "latent": (16, "height and width of the latents of synthetic shards"),
    }
    for name, (default, text) in numbers.items():
        parser.add_argument(
            f"--{name}", type=int, default=default, help=f"{text} (default: {default})"
        )
    parser.add_argument("--shards", help="train on these (default: synthetic ones)")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="measure processor seconds instead of wall seconds: they exclude most of the effect "
        "of other work on the machine, but also waiting, and include other threads of the "
        "process; needs no GPU",
    )
    parser.add_argument(
        "--json",
        nargs="?",
        const="-",
        metavar="FILE",
        help="also write the figures to FILE; without FILE, print them instead of the tables",
    )
    parser.add_argument(
        "train",
        nargs="*",
        default=SMALLEST,
        help="after --: options of `vidfill train`; batch_size is per process "
        f"(default: {' '.join(SMALLEST)})",
    )
    options = parser.parse_args(argv)
    for name in numbers:
        if getattr(options, name) < 1:
            parser.error(f"{name} is {getattr(options, name)}: give 1 or more")
    if options.steps % BLOCK:
        parser.error(f"steps is {options.steps}: give a multiple of {BLOCK}")
    return options


def make_config(options: argparse.Namespace, folder: Path) -> TrainConfig:
    """The configuration of a run, with one checkpoint in the middle and one at the end."""
    shards = options.shards or str(make_shards(folder / "shards", options.latent))
    words = find_recipe([shards, str(folder / "runs"), *options.train])
    config = jobs.parse(TrainConfig, words, verb="train", examples="")
    return dataclasses.replace(
        config,
        steps=FIRST + options.steps + 1,
        log_every=BLOCK,
        checkpoint_every=BLOCK * (options.steps // BLOCK // 2 + 1),
        evaluation=EvaluationConfig(every=0),
        preview=PreviewConfig(every=0),
    )


def make_shards(folder: Path, latent: int) -> Path:
    readers.write_dataset(readers.SyntheticShards(folder, EXAMPLES_MADE, SHARDS_MADE, latent))
    return folder


def main(argv: Sequence[str]) -> int:
    options = parse_options(argv)
    torch.set_num_threads(options.threads)
    with tempfile.TemporaryDirectory(prefix="vidfill-benchmark-") as folder:
        try:
            found = measure(make_config(options, Path(folder)), options)
        except BadInput as error:
            print(f"python -m benchmarks.train_overhead: error: {error}", file=sys.stderr)
            return 2
    found["environment"] = describe(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    found["command"] = shlex.join(["python", "-m", "benchmarks.train_overhead", *argv])
    if options.json == "-":
        print(json.dumps(found, indent=1))
        return 0
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1) + "\n")
    print_tables(found, options)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
