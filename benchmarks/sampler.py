"""The batched sampler beside diffusers' schedulers: the same clips, network and schedules."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DDIMScheduler, DDPMScheduler
from torch import Tensor
from vidfill import jobs, seeding
from vidfill.modeling.diffusion import Denoiser, DiffusionConfig, LatentSpace
from vidfill.modeling.noise import betas
from vidfill.modeling.unet import VideoUNet
from vidfill.sampling.sampler import Request, sample
from vidfill.sampling.schedules import CLEAN, Schedule, compile_schedule, parse

from .machine import clock, describe, spread, summarise

EXAMPLES = """examples:
  python -m benchmarks.sampler
      about a minute on one core
  python -m benchmarks.sampler --frames 4 --latent 4 --rounds 9 --processor-time
      a cheap network, as to a GPU, on a machine that others use too
  python -m benchmarks.sampler --device cuda --clips 20 --capacity 64 --width 64 --latent 16
      a GPU
"""

# Of T = 1000 timesteps each takes a divisor: at other counts diffusers' step, which always goes
# down by T // steps, misses the level that it visits next.
SCHEDULES = ("ddim:10", "ddpm:10", "ddpm:10+resample(n=4)", "ddpm:20")
CHANNELS = 4
LIMIT = "network alone"

Samples = dict[tuple[str, str], Tensor]  # by schedule and clip


@dataclasses.dataclass(frozen=True)
class Work:
    """What every way is given: a network, clips with their conditions, and the batch's size."""

    denoiser: Denoiser
    conditions: dict[str, Tensor]
    capacity: int
    seed: int
    device: torch.device
    processor_time: bool

    @property
    def evaluations(self) -> int:
        nfes = [compile_schedule(parse(text)).nfe for text in SCHEDULES]
        return len(self.conditions) * sum(nfes)

    def stack(self, clips: Sequence[str]) -> Tensor:
        return torch.stack([self.conditions[clip] for clip in clips])

    def noise(self, clips: Sequence[str]) -> Tensor:
        """The initial states, as `sample` draws them."""
        shape = next(iter(self.conditions.values())).shape
        sources = [seeding.generator(self.seed, clip, 0) for clip in clips]
        return torch.stack([torch.randn(shape, generator=each) for each in sources]).to(self.device)


def make_work(options: argparse.Namespace) -> Work:
    torch.manual_seed(options.seed)
    device = jobs.choose_device(options.device)
    network = VideoUNet(
        latent_channels=CHANNELS,
        condition_channels=CHANNELS,
        block_out_channels=(options.width, 2 * options.width),
        head_channels=16,
        norm_groups=8,
    )
    for weight in network.parameters():  # some begin at 0: let every input matter to every output
        weight.data.add_(torch.randn_like(weight), alpha=0.1)
    config = DiffusionConfig(target="v", normalise=False)
    shape = (options.frames, CHANNELS, options.latent, options.latent)
    space = LatentSpace(shape, mean=[0.0] * CHANNELS, std=[1.0] * CHANNELS, autoencoder={})
    denoiser = Denoiser(network.to(device).eval(), config, space)
    clips = [f"clip{index}" for index in range(options.clips)]
    conditions = {clip: torch.randn(shape).to(device) for clip in clips}
    return Work(
        denoiser, conditions, options.capacity, options.seed, device, options.processor_time
    )


# The ways


def batched(work: Work) -> Samples:
    """Ours: all schedules and clips share the slots of one batch."""
    requests = [
        Request(
            clip,
            text,
            compile_schedule(parse(text)),
            functools.partial(work.conditions.__getitem__, clip),
        )
        for text in SCHEDULES
        for clip in work.conditions
    ]
    results = sample(work.denoiser, requests, capacity=work.capacity, seed=work.seed)
    return {(each.request.name, each.request.clip): each.latents for each in results}


def one_after_another(work: Work, capacity: int) -> Samples:
    """The usual way: schedule by schedule, batch by batch, each in a loop of diffusers'."""
    samples: Samples = {}
    clips = list(work.conditions)
    for text in SCHEDULES:
        for start in range(0, len(clips), capacity):
            batch = clips[start : start + capacity]
            latents = diffusers_loop(work, parse(text), batch)
            samples |= {(text, clip): each for clip, each in zip(batch, latents, strict=True)}
    return samples


def diffusers_loop(work: Work, schedule: Schedule, clips: Sequence[str]) -> Tensor:
    """Clips that take the same steps together; noise after the first state is the device's own."""
    config = work.denoiser.config
    peers: dict[str, Any] = {"ddim": DDIMScheduler, "ddpm": DDPMScheduler}
    scheduler = peers[schedule.solver.name](
        num_train_timesteps=config.timesteps,
        trained_betas=betas(config).tolist(),
        prediction_type="v_prediction",
        timestep_spacing="trailing",
        clip_sample=False,
    )
    scheduler.set_timesteps(schedule.steps)
    repeats = sum(int(move["n"]) for move in schedule.moves)
    source = torch.Generator(work.device).manual_seed(work.seed)
    latents, condition = work.noise(clips), work.stack(clips)
    for high, low in itertools.pairwise([*scheduler.timesteps.tolist(), CLEAN]):
        for again in range(1 + repeats):
            if again:
                latents = renoise(latents, scheduler.alphas_cumprod, low, high, source)
            timestep = torch.full((len(clips),), high, device=work.device)
            prediction = work.denoiser.network(latents, timestep, condition)
            latents = scheduler.step(prediction, high, latents, generator=source).prev_sample
    return latents


def renoise(
    latents: Tensor, alpha_bars: Tensor, low: int, high: int, source: torch.Generator
) -> Tensor:
    """The way up, from the scheduler's ᾱ: its own `add_noise` starts from clean latents only."""
    alpha = alpha_bars[high] if low == CLEAN else alpha_bars[high] / alpha_bars[low]
    noise = torch.randn(latents.shape, generator=source, device=latents.device)
    return alpha.sqrt() * latents + (1 - alpha).sqrt() * noise


def network_alone(work: Work) -> Samples:
    """The limit: as many evaluations in full batches, and nothing else."""
    clips = list(itertools.islice(itertools.cycle(work.conditions), work.capacity))
    latents, condition = work.noise(clips), work.stack(clips)
    timestep = torch.arange(work.capacity, device=work.device)
    for done in range(0, work.evaluations, work.capacity):
        rows = slice(min(work.capacity, work.evaluations - done))
        work.denoiser.network(latents[rows], timestep[rows], condition[rows])
    return {}


WAYS: dict[str, Callable[[Work], Samples]] = {
    "vidfill, all schedules in one batch": batched,
    "diffusers, schedule by schedule": lambda work: one_after_another(work, work.capacity),
    "diffusers, clip by clip": lambda work: one_after_another(work, 1),
    LIMIT: network_alone,
}


# What is measured


def count_calls(work: Work) -> tuple[dict[str, int], float]:
    """Network calls of each way, having checked that all ways do the same work.

    Also the largest difference between our results and diffusers' under a deterministic schedule.

    Raises:
        AssertionError: evaluations differ, or those results do beyond float32 rounding.
    """
    sizes: list[int] = []
    hook = work.denoiser.network.register_forward_hook(
        lambda network, given, prediction: sizes.append(len(prediction))
    )
    calls: dict[str, int] = {}
    ours: Samples = {}
    difference = 0.0
    for name, way in WAYS.items():
        sizes.clear()
        samples = {key: each for key, each in way(work).items() if key[0].startswith("ddim")}
        assert sum(sizes) == work.evaluations, f"{name}: {sum(sizes)} evaluations"
        calls[name] = len(sizes)
        ours = ours or samples
        for key, theirs in samples.items():
            torch.testing.assert_close(theirs, ours[key], rtol=1e-4, atol=1e-4)
            difference = max(difference, float((theirs - ours[key]).abs().max()))
    hook.remove()
    return calls, difference


def time_rounds(work: Work, rounds: int) -> list[dict[str, float]]:
    """Seconds of each way in each round; another way begins each round."""
    names, measured = list(WAYS), []
    for index in range(rounds):
        first = index % len(names)
        turns = [*names[first:], *names[:first]]
        measured.append({name: time_way(work, WAYS[name]) for name in turns})
    return measured


def time_way(work: Work, way: Callable[[Work], Samples]) -> float:
    began = clock(work.device, work.processor_time)
    way(work)
    return clock(work.device, work.processor_time) - began


# What is printed


def table(work: Work, calls: dict[str, int], measured: list[dict[str, float]]) -> str:
    lines = [
        "| way | evaluations | network calls | slots in use | seconds | speed, of the limit |",
        "| --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name in WAYS:
        seconds = spread(summarise([each[name] for each in measured]), "{:.2f}")
        ratios = [each[LIMIT] / each[name] for each in measured]
        used = work.evaluations / (calls[name] * work.capacity)
        counts = f"{work.evaluations} | {calls[name]} | {used:.0%}"
        lines.append(f"| {name} | {counts} | {seconds} | {spread(summarise(ratios), '{:.2f}')} |")
    return "\n".join(lines)


def parse_options(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.sampler",
        description=f"{__doc__}\n\nEvery clip is sampled under {', '.join(SCHEDULES)}.\n"
        "The network is small and its weights are random: speed does not depend on them.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    numbers = {
        "clips": (3, "clips, each sampled under every schedule"),
        "capacity": (8, "the most clips in one network call"),
        "rounds": (5, "times that every way is measured, after one untimed round"),
        "seed": (0, "of weights, conditions and noise"),
        "width": (16, "of the network's first level, a multiple of 16; the second is twice it"),
        "frames": (20, "of a clip"),
        "latent": (8, "height and width of a clip's latents"),
    }
    for name, (default, text) in numbers.items():
        parser.add_argument(
            f"--{name}", type=int, default=default, help=f"{text} (default: {default})"
        )
    parser.add_argument("--device", default="cpu", help="cpu, cuda, cuda:1…; auto (default: cpu)")
    parser.add_argument(
        "--processor-time",
        action="store_true",
        help="measure this process's seconds on the processor, which leave out most of what other "
        "work on the machine costs, instead of wall seconds; wants one thread and no GPU",
    )
    options = parser.parse_args(argv)
    for name in numbers:
        if getattr(options, name) < (name != "seed"):
            parser.error(f"{name} is {getattr(options, name)}: give 1 or more")
    return options


def main(argv: Sequence[str]) -> int:
    options = parse_options(argv)
    try:
        work = make_work(options)
    except jobs.BadInput as error:
        print(f"python -m benchmarks.sampler: error: {error}", file=sys.stderr)
        return 2
    with torch.no_grad():
        calls, difference = count_calls(work)
        measured = time_rounds(work, options.rounds)
    print(table(work, calls, measured), end="\n\n")
    kind = "processor" if options.processor_time else "wall"
    print(
        f"{kind} seconds, median (least–most) of {options.rounds} round(s), ratios within a round"
    )
    print(f"ddim: results of diffusers and vidfill differ by at most {difference:.0e}")
    print(describe(work.device))
    print(shlex.join(["python", "-m", "benchmarks.sampler", *argv]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
