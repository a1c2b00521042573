"""The batched sampler compared with its limit, and with diffusers' schedulers run one by one."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import re
import shlex
import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler
from torch import Tensor
from vidfill import seeding
from vidfill.errors import BadInput
from vidfill.modeling.denoiser import Denoiser, LatentSpace
from vidfill.modeling.noise import betas
from vidfill.modeling.settings import PRESETS, DiffusionConfig
from vidfill.modeling.unet import build
from vidfill.processes import choose_device
from vidfill.sampling.capacity import find_capacity
from vidfill.sampling.sampler import Request, sample
from vidfill.sampling.schedules.language import Schedule, parse
from vidfill.sampling.schedules.program import CLEAN, compile_schedule
from vidfill.sampling.sweep.inputs import read_schedules

from .machine import clock, describe, spread, summarise

EXAMPLES = """examples:
  python -m benchmarks.sampler --processor-time
      minutes on one core of a shared machine
  python -m benchmarks.sampler --batch 1 --rounds 1
      diffusers' loops clip by clip
  python -m benchmarks.sampler --device cuda --preset small --latent 16 --clips 64
      on a GPU
"""

# The paper's n at 50 steps, then faster ones. The number of steps must divide T = 1000: otherwise
# diffusers' step, which always goes down by T // steps, misses the level it visits next.
SCHEDULES = (
    "ddpm:50 ddpm:50+resample(n=4) ddpm:50+resample(n=6) ddpm:50+resample(n=10) "
    "ddpm:20 ddim:20 dpmpp:20 ddim:10"
)
IN_PEERS = r"(ddpm|ddim):\d+(\+resample\(n=\d+\))?|dpmpp:\d+"
CHANNELS = 4
BETWEEN = 8  # network calls of a way, after which one bare call is timed
OURS, THEIRS = "vidfill, all schedules in one batch", "diffusers, schedule by schedule"

Samples = dict[tuple[str, str], Tensor]  # by schedule and clip


@dataclasses.dataclass(frozen=True)
class Workload:
    """What both ways get: a network, clips with their conditions, and the sizes of batches."""

    denoiser: Denoiser
    conditions: dict[str, Tensor]
    schedules: list[Schedule]
    capacity: int
    """The most clips in one of our calls."""
    batch: int
    """The most clips in one of diffusers' calls."""
    seed: int
    device: torch.device
    processor_time: bool

    @property
    def nfes(self) -> list[int]:
        """The network evaluations of each trajectory."""
        return [request.program.nfe for request in make_requests(self.schedules, self.conditions)]

    @property
    def calls_at_least(self) -> float:
        """The least number of full calls, one after another, that can make all evaluations."""
        return max(sum(self.nfes) / self.capacity, max(self.nfes))

    def now(self) -> float:
        return clock(self.device, self.processor_time)

    def states(self, clips: Sequence[str]) -> Tensor:
        """The initial states, as `sample` draws them."""
        shape = next(iter(self.conditions.values())).shape
        sources = [seeding.generator(self.seed, clip, 0) for clip in clips]
        return torch.stack([torch.randn(shape, generator=each) for each in sources]).to(self.device)

    def given(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """The network's input for `count` clips."""
        clips = list(itertools.islice(itertools.cycle(self.conditions), count))
        condition = torch.stack([self.conditions[clip] for clip in clips])
        return self.states(clips), torch.arange(count, device=self.device), condition


def make_workload(options: argparse.Namespace) -> Workload:
    """The workload that the options ask for.

    Raises:
        BadInput: there is no such device or preset, or diffusers has no such schedule.
    """
    torch.manual_seed(options.seed)
    schedules = choose_schedules(options.schedules)
    device = choose_device(options.device)
    network = build(options.preset, CHANNELS, CHANNELS)
    for weight in network.parameters():  # some start at 0: make every input matter
        weight.data.add_(torch.randn_like(weight), alpha=0.02)
    config = DiffusionConfig(target="v", normalise=False)
    shape = (options.frames, CHANNELS, options.latent, options.latent)
    space = LatentSpace(shape, mean=[0.0] * CHANNELS, std=[1.0] * CHANNELS, autoencoder={})
    denoiser = Denoiser(network.to(device).eval(), config, space)
    conditions = {f"clip{index}": torch.randn(shape).to(device) for index in range(options.clips)}
    requests = make_requests(schedules, conditions)
    capacity = options.capacity or find_capacity(denoiser, requests)
    return Workload(
        denoiser,
        conditions,
        schedules,
        capacity,
        options.batch or min(capacity, options.clips),
        options.seed,
        device,
        options.processor_time,
    )


def choose_schedules(text: str) -> list[Schedule]:
    """Parse schedules that diffusers' schedulers can follow.

    Raises:
        BadInput: one cannot be parsed, or followed.
    """
    names = read_schedules(text)
    for name in names:
        if not re.fullmatch(IN_PEERS, name) or 1000 % parse(name).steps:
            raise BadInput(
                f"schedules has {name}; diffusers' loops here follow ddpm and ddim, with or "
                "without resample, and dpmpp, each at a divisor of 1000 steps: choose among these"
            )
    return [parse(name) for name in names]


def make_requests(schedules: Sequence[Schedule], conditions: dict[str, Tensor]) -> list[Request]:
    return [
        Request(
            clip,
            str(schedule),
            compile_schedule(schedule),
            functools.partial(conditions.__getitem__, clip),
        )
        for schedule in schedules
        for clip in conditions
    ]


# The ways


def batched(work: Workload) -> Samples:
    """Ours: all schedules and clips share the slots of one batch."""
    requests = make_requests(work.schedules, work.conditions)
    requests.sort(key=lambda request: -request.program.nfe)
    results = sample(work.denoiser, requests, capacity=work.capacity, seed=work.seed)
    return {(each.request.name, each.request.key): each.latents for each in results}


def one_after_another(work: Workload) -> Samples:
    """The usual way: schedule by schedule, batch by batch, each in a loop around diffusers."""
    samples: Samples = {}
    clips = list(work.conditions)
    for schedule in work.schedules:
        for start in range(0, len(clips), work.batch):
            batch = clips[start : start + work.batch]
            latents = diffusers_loop(work, schedule, batch)
            samples |= {
                (str(schedule), clip): each for clip, each in zip(batch, latents, strict=True)
            }
    return samples


def diffusers_loop(work: Workload, schedule: Schedule, clips: Sequence[str]) -> Tensor:
    """Sample a batch of clips that take the same steps; later noise is drawn on the device."""
    scheduler = make_scheduler(work.denoiser.config, schedule.solver.name)
    scheduler.set_timesteps(schedule.steps)
    repeats = sum(int(move["n"]) for move in schedule.moves)
    source = torch.Generator(work.device).manual_seed(work.seed)
    latents = work.states(clips)
    condition = torch.stack([work.conditions[clip] for clip in clips])
    for high, low in itertools.pairwise([*scheduler.timesteps.tolist(), CLEAN]):
        for again in range(1 + repeats):
            if again:
                latents = renoise(latents, scheduler.alphas_cumprod, low, high, source)
            timestep = torch.full((len(clips),), high, device=work.device)
            prediction = work.denoiser.network(latents, timestep, condition)
            latents = scheduler.step(prediction, high, latents, generator=source).prev_sample
    return latents


def make_scheduler(config: DiffusionConfig, solver: str) -> Any:
    given: dict[str, Any] = {
        "num_train_timesteps": config.timesteps,
        "trained_betas": betas(config).tolist(),
        "prediction_type": "v_prediction",
        "timestep_spacing": "trailing",
    }
    if solver == "dpmpp":
        return DPMSolverMultistepScheduler(**given)
    return {"ddim": DDIMScheduler, "ddpm": DDPMScheduler}[solver](**given, clip_sample=False)


def renoise(
    latents: Tensor, alpha_bars: Tensor, low: int, high: int, source: torch.Generator
) -> Tensor:
    """The way up, from the scheduler's ᾱ: its own `add_noise` only starts from clean latents."""
    alpha = alpha_bars[high] if low == CLEAN else alpha_bars[high] / alpha_bars[low]
    noise = torch.randn(latents.shape, generator=source, device=latents.device)
    return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise


WAYS: dict[str, Callable[[Workload], Samples]] = {OURS: batched, THEIRS: one_after_another}


# What is measured


@dataclasses.dataclass(frozen=True)
class Measured:
    """One run of a way."""

    seconds: float
    in_network: float
    """The part of `seconds` spent in network calls."""
    calls: int
    limit: float
    """The least seconds that full calls would take, as timed during this run."""


def measure(work: Workload, way: Callable[[Workload], Samples]) -> tuple[Samples, Measured]:
    """Run a way, timing its network calls, and bare calls of a full batch in between.

    A bare call follows every few calls of the way, whose clock is stopped meanwhile, so that both
    see the same load on the machine. On a GPU each call is waited for, which keeps diffusers' loops
    from preparing the next one in the meantime.

    Raises:
        AssertionError: it does not make as many evaluations as its schedules take.
    """
    network, given = work.denoiser.network, work.given(work.capacity)
    began: list[float] = []
    calls: list[float] = []
    bare: list[float] = []
    evaluations = 0

    def leave(module: object, inputs: object, prediction: Tensor) -> None:
        nonlocal evaluations
        ended = work.now()
        calls.append(ended - began[-1])
        evaluations += len(prediction)
        if len(calls) % BETWEEN == 1:
            network.forward(*given)
            bare.append(work.now() - ended)

    hooks = [
        network.register_forward_pre_hook(lambda module, inputs: began.append(work.now())),
        network.register_forward_hook(leave),
    ]
    start = work.now()
    samples = way(work)
    seconds = work.now() - start - sum(bare)
    for hook in hooks:
        hook.remove()
    assert evaluations == sum(work.nfes), f"{evaluations} evaluations"
    limit = statistics.mean(bare) * work.calls_at_least
    return samples, Measured(seconds, sum(calls), len(calls), limit)


def measure_round(work: Workload, names: Sequence[str]) -> tuple[dict[str, Measured], float]:
    """Measure each way, in this order; also the largest difference of deterministic results.

    Raises:
        AssertionError: they differ by more than float32 rounding.
    """
    runs = {name: measure(work, WAYS[name]) for name in names}
    ours, theirs = runs[OURS][0], runs[THEIRS][0]
    fixed = [key for key in ours if re.fullmatch(r"(ddim|dpmpp):\d+", key[0])]
    for key in fixed:
        torch.testing.assert_close(theirs[key], ours[key], rtol=1e-4, atol=1e-4)
    difference = max((float((theirs[key] - ours[key]).abs().max()) for key in fixed), default=0.0)
    return {name: measured for name, (_, measured) in runs.items()}, difference


def time_calls(work: Workload) -> dict[int, float]:
    """Seconds per clip in one call of 1, 2, 4 … clips, and of as many as there are slots."""
    sizes = {2**power for power in range(work.capacity.bit_length())} | {work.capacity}
    seconds: dict[int, float] = {}
    for size in sorted(sizes):
        given = work.given(size)
        work.denoiser.network(*given)
        began = work.now()
        work.denoiser.network(*given)
        seconds[size] = (work.now() - began) / size
    return seconds


# What is printed


def way_table(work: Workload, rounds: Sequence[dict[str, Measured]]) -> str:
    lines = [
        "| way | evaluations | calls | clips per call | seconds | time / limit | calls / limit | "
        "outside calls |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    evaluations = sum(work.nfes)
    for name in WAYS:
        runs = [each[name] for each in rounds]
        calls = runs[0].calls
        seconds = spread(summarise([run.seconds for run in runs]), "{:.1f}")
        whole = spread(summarise([run.seconds / run.limit for run in runs]), "{:.3f}")
        network = spread(summarise([run.in_network / run.limit for run in runs]), "{:.3f}")
        beside = spread(summarise([run.seconds / run.in_network - 1 for run in runs]), "{:.1%}")
        counts = f"{evaluations:,} | {calls:,} | {evaluations / calls:.1f}"
        lines.append(f"| {name} | {counts} | {seconds} | {whole} | {network} | {beside} |")
    return "\n".join(lines)


def ratio_table(rounds: Sequence[dict[str, Measured]]) -> str:
    """Their time over ours, each relative to the machine's speed during that run."""
    packing, overhead, whole = [], [], []
    for each in rounds:
        ours, theirs = each[OURS], each[THEIRS]
        packing.append(theirs.in_network / theirs.limit / (ours.in_network / ours.limit))
        overhead.append(theirs.seconds / theirs.in_network / (ours.seconds / ours.in_network))
        whole.append(packing[-1] * overhead[-1])
    cells = (spread(summarise(ratios), "{:.3f}") for ratios in (whole, packing, overhead))
    return (
        "| diffusers' time / ours | in calls | outside calls |\n"
        f"| ---: | ---: | ---: |\n| {' | '.join(cells)} |"
    )


def call_table(work: Workload, calls: Sequence[dict[int, float]]) -> str:
    sizes = list(calls[0])
    ratios = [[each[size] / each[work.capacity] for each in calls] for size in sizes]
    return (
        f"| clips per call | {' | '.join(map(str, sizes))} |\n"
        f"| --- |{' ---: |' * len(sizes)}\n"
        "| time per clip / in a full call | "
        f"{' | '.join(spread(summarise(each), '{:.2f}') for each in ratios)} |"
    )


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sampler",
        description=f"{__doc__}\n\nWeights are random: speed does not depend on them.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    numbers = {
        "clips": (8, "clips, each sampled under every schedule"),
        "capacity": (0, "the most clips in one of our calls; 0 finds it, as a sweep does"),
        "batch": (0, "the most clips in one of diffusers' calls; 0: all, up to the capacity"),
        "rounds": (3, "times that both ways are measured"),
        "seed": (0, "of weights, conditions and noise"),
        "frames": (20, "per clip"),
        "latent": (8, "height and width of the latents"),
    }
    for name, (default, text) in numbers.items():
        parser.add_argument(
            f"--{name}", type=int, default=default, help=f"{text} (default: {default})"
        )
    parser.add_argument(
        "--schedules", default=SCHEDULES, help=f'separated by spaces (default: "{SCHEDULES}")'
    )
    parser.add_argument(
        "--preset", default="tiny", help=f"of the network: {', '.join(PRESETS)} (default: tiny)"
    )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1…; auto (default: cpu)")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="measure processor seconds of this process instead of wall seconds: they exclude most "
        "of the effect of other work on the machine; needs one thread and no GPU",
    )
    options = parser.parse_args(argv)
    for name in numbers:
        if getattr(options, name) < (name not in ("seed", "capacity", "batch")):
            parser.error(f"{name} is {getattr(options, name)}: give 1 or more")
    return options


def main(argv: Sequence[str]) -> int:
    options = parse_options(argv)
    try:
        work = make_workload(options)
    except BadInput as error:
        print(f"python -m benchmarks.sampler: error: {error}", file=sys.stderr)
        return 2
    rounds, calls, differences = [], [], []
    with torch.no_grad():
        for index in range(options.rounds):
            calls.append(time_calls(work))
            names = list(WAYS) if index % 2 == 0 else list(reversed(WAYS))
            measured, difference = measure_round(work, names)
            rounds.append(measured)
            differences.append(difference)
    print(way_table(work, rounds), ratio_table(rounds), call_table(work, calls), sep="\n\n")
    kind = "processor" if options.processor_time else "wall"
    print(
        f"\n{options.preset}, at most {work.capacity} clips per call, {work.batch} in diffusers'; "
        f"the limit is {work.calls_at_least:.1f} full calls, the longest trajectory "
        f"{max(work.nfes)}\n"
        f"{kind} seconds, median (least–most) of {options.rounds} round(s), ratios within a run\n"
        f"ddim and dpmpp: results differ by at most {max(differences):.0e}"
    )
    print(describe(work.device))
    print(shlex.join(["python", "-m", "benchmarks.sampler", *argv]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
