"""Held-out loss by training time: our preset `small` and diffusers' networks of its size.

The same few lines train every network on the same batches with the same noise: v as the target,
the mask as a channel, AdamW without weight decay, a warm-up, the gradient clipped at 1, and an
average of the weights with vidfill's decay (1 + step) / (10 + step), which is what is measured.
The learning rate is the best of a grid after short runs with the first seed. Then each network is
trained for the whole budget, once per seed; a run that diverges is repeated at the next lower rate.
In a round all networks take turns in one process, so that other work on the machine affects them
alike. Time is a network's own training time: evaluation and the other networks' turns are not
counted.

The held-out loss is that of fixed validation clips with fixed noise, each at one fixed timestep,
spread evenly over all timesteps. `benchmarks/peers.py` builds the other networks.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import itertools
import json
import math
import shlex
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, get_args

import matplotlib.style
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import NullLocator, StrMethodFormatter
from torch import Tensor, nn
from vidfill import jobs, seeding
from vidfill.data.shards.reading import ShardedDataset
from vidfill.data.shards.stream import Batch, Stream
from vidfill.errors import BadInput
from vidfill.files import aside, write_atomically
from vidfill.modeling.denoiser import Denoiser
from vidfill.modeling.noise import draw_timesteps, timesteps_at
from vidfill.modeling.precision import autocast
from vidfill.modeling.settings import DiffusionConfig, LossConfig, Precision
from vidfill.modeling.unet import build
from vidfill.processes import choose_device
from vidfill.progress import show_progress
from vidfill.sampling.figure_style import DPI, FAINT, REFERENCE, SMALL, STYLE
from vidfill.train.state import space_of
from vidfill.train.step import diffusion_loss, draw_latents, draw_noise

from .machine import clock, describe
from .peers import PEERS, count_parameters

EXAMPLES = """examples:
  python -m benchmarks.quality_per_compute SHARDS OUT --plan
      say how long it would take here
  OMP_NUM_THREADS=1 python -m benchmarks.quality_per_compute SHARDS OUT --processor-time
      half an hour on one core of a shared machine; the same command continues
  python -m benchmarks.quality_per_compute SHARDS OUT --device cuda --batch 32
      on a GPU
"""

OURS = "vidfill small"
NETWORKS: dict[str, Callable[[int, int], nn.Module]] = {
    OURS: lambda latent, condition: build("small", latent, condition),
    **PEERS,
}
COLOURS = dict(zip(NETWORKS, ("#0072B2", "#D55E00", "#009E73"), strict=True))  # Okabe and Ito's
DIVERGED = 1.25  # a run has diverged if it ends at this times its lowest loss, or above
GOAL = 1 / 3  # the share of the budget in which ours should reach a peer's final loss
DIFFUSION, LOSS = DiffusionConfig(target="v", mask_channel=True), LossConfig()
WARMUP = 30  # optimizer steps
CLIP = 1.0  # the gradient's largest norm
TUNING_POINTS = 2  # measurements in a short run
HELD_OUT_BATCH = 8
HELD_OUT_SEED = 0

Point = tuple[float, int, float]  # seconds of training, steps, held-out loss


@dataclasses.dataclass(frozen=True)
class Settings:
    """What determines the result: a command that continues may only add seeds."""

    shards: Path
    out: Path
    budget: float  # seconds of training per network and seed
    tuning: float  # seconds of each short run
    rates: tuple[float, ...]
    seeds: tuple[int, ...]
    batch: int
    clips: int  # held-out
    points: int  # measurements in a long run
    precision: Precision
    threads: int
    device: str
    processor_time: bool


@dataclasses.dataclass(frozen=True)
class Setup:
    """What is the same for every network."""

    settings: Settings
    device: torch.device
    dataset: ShardedDataset
    held_out: list[Batch]

    def clock(self) -> float:
        return clock(self.device, self.settings.processor_time)


@dataclasses.dataclass(frozen=True)
class Round:
    """Runs of several networks that take turns, each at its own rate."""

    name: str
    seed: int
    rates: dict[str, float]
    seconds: float
    points: int


def prepare(settings: Settings) -> Setup:
    torch.set_num_threads(settings.threads)
    device = choose_device(settings.device)
    held_out = ShardedDataset(settings.shards, "validation")
    clips = min(settings.clips, len(held_out))
    size = math.gcd(clips, HELD_OUT_BATCH)
    stream = Stream(held_out, size, HELD_OUT_SEED)
    batches = [stream.batch(k).to(device) for k in range(clips // size)]
    return Setup(settings, device, ShardedDataset(settings.shards, "train"), batches)


# Training


class Run:
    """One network in training, with its own clock."""

    def __init__(self, name: str, rate: float, seed: int, setup: Setup) -> None:
        self.name, self.rate, self.seed, self.setup = name, rate, seed, setup
        channels = setup.dataset.manifest.latent_shape[1]
        torch.manual_seed(seeding.derive_seed(seed, "weights"))
        self.network = NETWORKS[name](channels, channels + 1).to(setup.device)
        self.average = copy.deepcopy(self.network).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=rate, weight_decay=0.0, fused=True
        )
        self.denoiser = Denoiser(self.network, DIFFUSION, space_of(setup.dataset.manifest))
        self.stream = Stream(setup.dataset, setup.settings.batch, seed)
        self.steps, self.seconds = 0, 0.0
        self.points: list[Point] = []

    def train(self, until: float) -> None:
        """Step until the run's clock shows `until` seconds or more."""
        while self.seconds < until:
            began = self.setup.clock()
            self._step()
            self.seconds += self.setup.clock() - began

    def _step(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * min(1.0, (self.steps + 1) / WARMUP)
        batch = self.stream.batch(self.steps).to(self.setup.device)
        sources = [seeding.generator(self.seed, each, "timestep") for each in batch.positions]
        timestep = draw_timesteps(sources, self.denoiser.timesteps, LOSS)
        loss = self._losses(self.network, batch, timestep, self.seed).mean()
        if not math.isfinite(value := float(loss.detach())):
            raise BadInput(
                f"rates has {self.rate:g}, at which the loss of {self.name} is {value} "
                f"in step {self.steps}: give lower ones, and another folder"
            )
        loss.backward()
        nn.utils.clip_grad_norm_(self.network.parameters(), CLIP)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.steps += 1
        follow(self.average, self.network, self.steps)

    def _losses(self, network: nn.Module, batch: Batch, timestep: Tensor, seed: int) -> Tensor:
        noise = draw_noise(batch.positions, seed, batch.latents.shape[1:]).to(self.setup.device)
        latents = draw_latents(batch, seed)
        with autocast(self.setup.device, self.setup.settings.precision):
            return diffusion_loss(
                network, self.denoiser, batch, latents, timestep.to(self.setup.device), noise, LOSS
            )

    @torch.no_grad()
    def measure(self) -> None:
        """Record the held-out loss of the averaged weights."""
        clips = sum(len(batch.keys) for batch in self.setup.held_out)
        losses = []
        for batch in self.setup.held_out:
            quantile = (torch.tensor(batch.positions) + 0.5) / clips
            timestep = timesteps_at(quantile, self.denoiser.timesteps, LOSS)
            losses.append(self._losses(self.average, batch, timestep, HELD_OUT_SEED))
        self.points.append((self.seconds, self.steps, float(torch.cat(losses).mean())))

    def result(self) -> dict[str, Any]:
        return {
            "network": self.name,
            "parameters": count_parameters(self.network),
            "rate": self.rate,
            "seed": self.seed,
            "points": self.points,
        }


@torch.no_grad()
def follow(average: nn.Module, network: nn.Module, steps: int) -> None:
    """Move the average towards the weights; it spans about a tenth of the steps so far."""
    decay = (1 + steps) / (10 + steps)
    torch._foreach_lerp_(list(average.parameters()), list(network.parameters()), 1 - decay)


def train_round(round_: Round, setup: Setup) -> list[dict[str, Any]]:
    """Train the round's networks in turn, from one measurement to the next."""
    runs = [Run(name, rate, round_.seed, setup) for name, rate in round_.rates.items()]
    for run in runs:
        run.measure()
    turns = len(runs) * round_.points
    with show_progress(round_.name, turns, "turns") as progress:
        for index in range(1, round_.points + 1):
            for run in runs:
                run.train(round_.seconds * index / round_.points)
                run.measure()
                note = f"{run.name}, {run.steps} steps, held-out loss {run.points[-1][2]:.4f}"
                progress.advance(note=note)
    return [run.result() for run in runs]


def run_all(setup: Setup) -> dict[str, list[dict[str, Any]]]:
    """The short runs, the long runs, and the long runs that diverged and were repeated."""
    short = [run for round_ in tuning_rounds(setup.settings) for run in keep(round_, setup)]
    rates = {name: best(short, name)["rate"] for name in NETWORKS}
    long: list[dict[str, Any]] = []
    diverged: list[dict[str, Any]] = []
    for round_ in final_rounds(setup.settings, rates):
        runs = {run["network"]: run for run in keep(round_, setup)}
        while (round_ := lower(round_, runs, setup.settings.rates)).rates:
            diverged += [runs[name] for name in round_.rates]
            runs |= {run["network"]: run for run in keep(round_, setup)}
        long += runs.values()
    return {"tuning_runs": short, "diverged_runs": diverged, "runs": long}


def tuning_rounds(settings: Settings) -> Iterator[Round]:
    for rate in settings.rates:
        rates = dict.fromkeys(NETWORKS, rate)
        yield Round(f"rate-{rate:g}", settings.seeds[0], rates, settings.tuning, TUNING_POINTS)


def final_rounds(settings: Settings, rates: dict[str, float]) -> Iterator[Round]:
    for seed in settings.seeds:
        yield Round(f"seed-{seed}", seed, rates, settings.budget, settings.points)


def lower(round_: Round, runs: dict[str, dict[str, Any]], grid: Sequence[float]) -> Round:
    """A round of the networks that diverged, at the next lower rate of the grid if there is one."""
    rates = {
        name: max(rate for rate in grid if rate < run["rate"])
        for name, run in runs.items()
        if has_diverged(run) and run["rate"] > min(grid)
    }
    return dataclasses.replace(round_, name=f"{round_.name}-lower", rates=rates)


def keep(round_: Round, setup: Setup) -> list[dict[str, Any]]:
    """The runs of a round, read from its file if it exists: nothing is trained twice."""
    file = setup.settings.out / "rounds" / f"{round_.name}.json"
    if not file.is_file():
        runs = train_round(round_, setup)
        write_atomically(file, json.dumps(runs).encode())
    return json.loads(file.read_text())


# What the curves say


def best(runs: Sequence[dict[str, Any]], name: str) -> dict[str, Any]:
    """The run of a network that ends at the lowest held-out loss."""
    return min((run for run in runs if run["network"] == name), key=last_loss)


def last_loss(run: dict[str, Any]) -> float:
    return run["points"][-1][2]


def lowest_loss(run: dict[str, Any]) -> float:
    return min(loss for _, _, loss in run["points"])


def has_diverged(run: dict[str, Any]) -> bool:
    return last_loss(run) >= DIVERGED * lowest_loss(run)


def mean_curve(runs: Sequence[dict[str, Any]]) -> list[Point]:
    """The mean over seeds at each measurement."""
    together = zip(*(run["points"] for run in runs), strict=True)
    return [
        (statistics.fmean(seconds), round(statistics.fmean(steps)), statistics.fmean(losses))
        for seconds, steps, losses in (zip(*points, strict=True) for points in together)
    ]


def time_to_reach(curve: Sequence[Point], loss: float) -> float | None:
    """The seconds after which a curve first reaches `loss`, between points by lines; None if never.

    The time of the first point if that is already as low.
    """
    if curve[0][2] <= loss:
        return curve[0][0]
    for (before, _, high), (after, _, low) in itertools.pairwise(curve):
        if low <= loss:
            return before + (after - before) * (high - loss) / (high - low)
    return None


def compare(curves: dict[str, list[Point]], budget: float) -> dict[str, dict[str, float | None]]:
    """For each peer: its final loss, when ours reaches it, and when it reaches ours.

    Shares are of the budget; None if it does not happen within the budget.
    """
    found = {}
    for peer in PEERS:
        loss = curves[peer][-1][2]
        ours = time_to_reach(curves[OURS], loss)
        theirs = time_to_reach(curves[peer], curves[OURS][-1][2])
        found[peer] = {
            "loss": loss,
            "seconds": ours,
            "share": None if ours is None else ours / budget,
            "share_of_peer": None if theirs is None else theirs / budget,
        }
    return found


def summarise(setup: Setup, done: dict[str, list[dict[str, Any]]], command: str) -> dict[str, Any]:
    """Everything that is kept: settings, figures and every curve."""
    settings = setup.settings
    by_name = {name: [run for run in done["runs"] if run["network"] == name] for name in NETWORKS}
    curves = {name: mean_curve(runs) for name, runs in by_name.items()}
    reached = compare(curves, settings.budget)
    by_seed = [
        compare({name: runs[index]["points"] for name, runs in by_name.items()}, settings.budget)
        for index in range(len(settings.seeds))
    ]
    for peer, found in reached.items():
        found["share_by_seed"] = [each[peer]["share"] for each in by_seed]
    networks = {
        name: {
            "parameters": runs[0]["parameters"],
            "tuned_rate": best(done["tuning_runs"], name)["rate"],
            "rates": [run["rate"] for run in runs],
            "steps": [run["points"][-1][1] for run in runs],
            "losses": [last_loss(run) for run in runs],
        }
        for name, runs in by_name.items()
    }
    return {
        "command": command,
        "environment": describe(setup.device),
        "settings": json.loads(json.dumps(dataclasses.asdict(settings), default=str)),
        "training": {
            "diffusion": dataclasses.asdict(DIFFUSION),
            "loss": dataclasses.asdict(LOSS),
            "warmup": WARMUP,
            "clip": CLIP,
        },
        "goal": GOAL,
        "networks": networks,
        "reached": reached,
        **done,
    }


# What is shown


def network_table(found: dict[str, Any]) -> str:
    grid = found["settings"]["rates"]
    lines = [
        "| network | parameters | learning rate | steps | held-out loss at the end |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, figures in found["networks"].items():
        steps = ", ".join(f"{each:,}" for each in figures["steps"])
        losses = ", ".join(f"{each:.4f}" for each in figures["losses"])
        rates = ", ".join(f"{each:g}" for each in figures["rates"])
        edge = " (edge of the grid)" if figures["tuned_rate"] in (min(grid), max(grid)) else ""
        lines.append(
            f"| {name} | {figures['parameters'] / 1e6:.2f} M | {rates}{edge} | {steps} | {losses} |"
        )
    return "\n".join(lines)


def tuning_table(found: dict[str, Any]) -> str:
    """The held-out loss after each short run."""
    rates = found["settings"]["rates"]
    lines = [
        f"| held-out loss at a rate of | {' | '.join(f'{rate:g}' for rate in rates)} |",
        f"| --- |{' ---: |' * len(rates)}",
    ]
    for name in found["networks"]:
        runs = [run for run in found["tuning_runs"] if run["network"] == name]
        losses = " | ".join(f"{last_loss(run):.4f}" for run in runs)
        lines.append(f"| {name} | {losses} |")
    return "\n".join(lines)


def diverged_lines(found: dict[str, Any]) -> str:
    left = [run for run in found["runs"] if has_diverged(run)]
    return "\n".join(
        f"{run['network']} diverged at the rate {run['rate']:g} with seed {run['seed']} "
        f"(from {lowest_loss(run):.4f} up to {last_loss(run):.4f} at the end), "
        + ("the lowest of the grid" if run in left else "and was repeated at a lower one")
        for run in [*found["diverged_runs"], *left]
    )


def reached_lines(found: dict[str, Any]) -> str:
    lines = []
    for peer, figures in found["reached"].items():
        if figures["share"] is None:
            theirs = f"{figures['share_of_peer']:.2f}"
            lines.append(
                f"{OURS} does not reach {peer}'s final loss ({figures['loss']:.4f}) within the "
                f"budget; {peer} reaches ours after {theirs} of it"
            )
            continue
        seeds = ", ".join(
            "never" if share is None else f"{share:.2f}" for share in figures["share_by_seed"]
        )
        verdict = "reached" if figures["share"] <= found["goal"] else "not reached"
        lines.append(
            f"{OURS} reaches {peer}'s final loss ({figures['loss']:.4f}) after "
            f"{figures['share']:.2f} of the budget (seed by seed {seeds}; "
            f"the goal, at most {found['goal']:.2f}, is {verdict})"
        )
    return "\n".join(lines)


def draw(found: dict[str, Any], file: Path) -> None:
    """Plot the curves: seeds faint, their mean strong, and when ours reaches a peer's final loss.

    A run that diverged and was repeated is dotted, up to its best point.
    """
    with matplotlib.style.context(STYLE):
        figure = Figure(figsize=(7, 3.6), dpi=DPI, layout="constrained")
        axes = figure.subplots()
        ends = {}
        for name, colour in COLOURS.items():
            runs = [run for run in found["runs"] if run["network"] == name]
            for run in runs:
                plot_curve(axes, run["points"], color=colour, lw=0.6, alpha=0.5)
            mean = mean_curve(runs)
            plot_curve(axes, mean, color=colour, lw=1.6)
            ends[name] = mean[-1]
        for run in found["diverged_runs"]:
            until = [loss for _, _, loss in run["points"]].index(lowest_loss(run)) + 1
            look = {"ls": ":", "lw": 0.8, "marker": "x", "ms": 4, "markevery": slice(-1, None)}
            plot_curve(axes, run["points"][:until], color=COLOURS[run["network"]], **look)
        style_axes(axes, found)
        mark_reached(axes, found, ends)
        label_ends(axes, found, ends)
        with aside(file) as partial:
            figure.savefig(partial, format="png")


def plot_curve(axes: Axes, curve: Sequence[Point], **look: Any) -> None:
    """Plot a curve without its start, since a logarithmic axis has no zero."""
    seconds, losses = ([point[index] for point in curve[1:]] for index in (0, 2))
    axes.plot(seconds, losses, solid_capstyle="round", **look)


def style_axes(axes: Axes, found: dict[str, Any]) -> None:
    settings = found["settings"]
    kind = "processor seconds" if settings["processor_time"] else "seconds"
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xlim(settings["budget"] / settings["points"], settings["budget"])
    digits = (1, 1.5, 2, 3, 4, 5, 6, 8)
    for axis in (axes.xaxis, axes.yaxis):
        low, high = axis.get_view_interval()
        steps = [digit * 10.0**power for power in range(-4, 6) for digit in digits]
        axis.set_ticks([step for step in steps if low <= step <= high])
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_locator(NullLocator())
    goal = found["goal"]
    axes.axvline(goal * settings["budget"], color=REFERENCE, lw=0.6, zorder=0)
    axes.annotate(
        f"the goal: {goal:.2f} of the time",
        xy=(goal * settings["budget"], 1),
        xycoords=("data", "axes fraction"),
        xytext=(4, 0),
        textcoords="offset points",
        va="top",
        fontsize=SMALL,
        color=FAINT,
    )
    axes.set_xlabel(f"training time of each network, {kind}")
    axes.set_title("held-out loss", loc="left")


def mark_reached(axes: Axes, found: dict[str, Any], ends: dict[str, Point]) -> None:
    """Draw a line from each peer's end back to where ours was as good."""
    for peer, figures in found["reached"].items():
        if figures["seconds"] is None:
            continue
        look = {"color": COLOURS[peer], "zorder": 3}
        across = [figures["seconds"], ends[peer][0]]
        axes.plot(across, [figures["loss"]] * 2, lw=0.7, ls=(0, (2, 2)), **look)
        axes.plot(across[:1], [figures["loss"]], marker="o", ms=3.5, ls="none", **look)
        axes.annotate(
            f"{figures['share']:.2f} of the time",
            xy=(across[0], figures["loss"]),
            xytext=(-4, -3),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=SMALL,
            color=COLOURS[peer],
        )


def label_ends(axes: Axes, found: dict[str, Any], ends: dict[str, Point]) -> None:
    """Name each curve to the right of its end; names that would collide are pushed apart."""
    low, high = (math.log(limit) for limit in axes.get_ylim())
    lowest = -math.inf
    for name, (_, steps, loss) in sorted(ends.items(), key=lambda item: item[1][2]):
        place = (math.log(loss) - low) / (high - low)
        at = max(place, lowest + 0.13)
        lowest = at
        size = found["networks"][name]["parameters"] / 1e6
        axes.annotate(
            f"{name}\n{size:.1f} M, {steps:,} steps, {loss:.3f}",
            xy=(1.02, at),
            xycoords="axes fraction",
            va="center",
            fontsize=SMALL,
            color=COLOURS[name],
            annotation_clip=False,
        )


def say_plan(setup: Setup) -> None:
    """Measure a step and a held-out loss of each network, and say how long everything will take."""
    settings = setup.settings
    rounds = [*tuning_rounds(settings), *final_rounds(settings, {})]
    total = 0.0
    for name in NETWORKS:
        run = Run(name, settings.rates[0], settings.seeds[0], setup)
        run.train(until=math.ulp(0))  # one step; the first is slower than later ones
        first = run.seconds
        run.train(until=2 * first)
        step = (run.seconds - first) / (run.steps - 1)
        began = setup.clock()
        run.measure()
        held_out = setup.clock() - began
        total += sum(round_.seconds + (1 + round_.points) * held_out for round_ in rounds)
        print(
            f"{name}: {count_parameters(run.network) / 1e6:.2f} M parameters, {step:.2f} s per "
            f"step, {held_out:.1f} s per held-out loss, {settings.budget / step:,.0f} steps per run"
        )
    print(
        f"about {total / 60:.0f} minutes in all, less what is already done, more if a run diverges"
    )


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.quality_per_compute",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "shards", type=Path, help="what `vidfill encode` wrote, with a validation split"
    )
    parser.add_argument("out", type=Path, help="for results.json, curves.png and finished rounds")
    numbers: dict[str, tuple[Any, str]] = {
        "budget": (240.0, "seconds of training per network and seed"),
        "tuning": (60.0, "seconds of training at each learning rate of the grid"),
        "batch": (1, "examples per step"),
        "clips": (16, "held-out clips"),
        "points": (12, "measurements of the held-out loss in a budget"),
        "threads": (1, "of torch"),
    }
    for name, (default, text) in numbers.items():
        parser.add_argument(
            f"--{name}", type=type(default), default=default, help=f"{text} (default: {default})"
        )
    parser.add_argument(
        "--rates",
        type=float,
        nargs="+",
        default=[1e-3, 2e-3, 4e-3],
        help="the grid (default: 0.001 0.002 0.004)",
    )
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1], help="of the long runs (default: 0 1)"
    )
    parser.add_argument("--precision", choices=get_args(Precision)[:2], default="bfloat16")
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1…; auto (default: cpu)")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="measure processor seconds of this process instead of wall seconds: they exclude most "
        "of the effect of other work on the machine; needs one thread and no GPU",
    )
    parser.add_argument("--plan", action="store_true", help="say how long it would take, and stop")
    options = parser.parse_args(argv)
    for name in (*numbers, "rates"):
        values = getattr(options, name)
        if min(values if isinstance(values, list) else [values]) <= 0:
            parser.error(f"{name} is {values}: give more than 0")
    if options.processor_time and (options.threads > 1 or options.device != "cpu"):
        parser.error("processor_time needs threads 1 and device cpu: give those, or leave it out")
    return options


def run(options: argparse.Namespace, command: str) -> None:
    fields = {name: value for name, value in vars(options).items() if name != "plan"}
    fields |= {"rates": tuple(options.rates), "seeds": tuple(options.seeds)}
    settings = Settings(**fields)
    setup = prepare(settings)
    if options.plan:
        say_plan(setup)
        return
    with jobs.claim(settings.out, "quality_per_compute", settings, may_change={"seeds"}):
        found = summarise(setup, run_all(setup), command)
        write_atomically(settings.out / "results.json", json.dumps(found, indent=1).encode())
        draw(found, settings.out / "curves.png")
    shown = (network_table, tuning_table, diverged_lines, reached_lines)
    print(*filter(None, (each(found) for each in shown)), sep="\n\n", end="\n\n")
    print(found["environment"], command, sep="\n")


def main(argv: Sequence[str]) -> int:
    options = parse_options(argv)
    try:
        run(options, shlex.join(["python", "-m", "benchmarks.quality_per_compute", *argv]))
    except BadInput as error:
        print(f"python -m benchmarks.quality_per_compute: error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
