"""The sampler: many clips under many schedules in one batch, each at its own timestep.

A trajectory is one clip under one program. It takes a slot, runs its program and leaves the slot to
the next, so that the network always sees a batch as full as the work allows (continuous batching,
as language models are served). Nothing is ever clamped.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from .. import seeding
from ..data.masks import latent_mask
from ..data.shards import Example
from ..jobs import BadInput
from ..modeling.autoencoder import Autoencoder, to_frames
from ..modeling.diffusion import Denoiser, Variance, ddim_step, ddpm_step, expand, renoise
from .metrics import Frames, composite
from .schedules import CLEAN, Kind, Move, Program, Term, compile_schedule, parse

Latents = Float[Tensor, "frames channels h w"]
Condition = Float[Tensor, "frames condition h w"]
Batch = Float[Tensor, "batch frames channels h w"]


@dataclasses.dataclass(frozen=True)
class Request:
    """One clip to sample under one program."""

    clip: str
    """The clip's key: its noise depends on it, on the seed, and on nothing else."""
    name: str
    """What its result is reported under."""
    program: Program
    condition: Callable[[], Condition]
    """Gives what the network is told of the clip, when its turn comes; its device and dtype are
    those of the state."""


@dataclasses.dataclass(frozen=True)
class Result:
    """A trajectory at its end."""

    request: Request
    latents: Latents
    """As the autoencoder scales them."""
    seconds: float
    """Its share of the network's wall time: each call's time split evenly over the slots in it."""


def sample(
    denoiser: Denoiser,
    requests: Iterable[Request],
    *,
    capacity: int,
    seed: int,
    on_evaluations: Callable[[int], object] = lambda count: None,
) -> Iterator[Result]:
    """Run every request, the longest program first, and yield each result as it is finished.

    The noise of a clip is `torch.randn` on the CPU from `seeding.generator(seed, clip, draw)`: draw
    0 is the initial state, and each later noise tensor that the program uses takes the next. So a
    result is the same, to float32 rounding, whatever the capacity, the order of the requests, and
    what else runs beside it; and all schedules start a clip from the same state.

    Args:
        capacity: Slots: the most trajectories in one network call, 1 or more.
        on_evaluations: Told after each network call how many evaluations it held.

    Raises:
        BadInput: a result is not finite.
    """
    waiting = deque(sorted(requests, key=lambda request: -request.program.nfe))
    slots = _Slots(denoiser, capacity, seed)
    while waiting or slots.running:
        while waiting and slots.free:
            slots.start(waiting.popleft())
        evaluations = len(slots.running)
        results = slots.advance()
        on_evaluations(evaluations)
        yield from results


@dataclasses.dataclass
class _Trajectory:
    request: Request
    moves: deque[Move]
    draws: int = 0
    seconds: float = 0.0


class _Slots:
    """The states of the running trajectories, one a slot, in one tensor of normalised latents."""

    def __init__(self, denoiser: Denoiser, capacity: int, seed: int) -> None:
        self.denoiser = denoiser
        self.seed = seed
        self.free = list(reversed(range(capacity)))
        self.running: dict[int, _Trajectory] = {}
        self.latents: Tensor = torch.empty(0)
        self.conditions: Tensor = torch.empty(0)

    @torch.no_grad()
    def start(self, request: Request) -> None:
        condition = request.condition()
        if not self.conditions.numel():
            self._allocate(condition)
        slot = self.free.pop()
        self.running[slot] = _Trajectory(request, deque(request.program.moves))
        self.conditions[slot] = condition
        self.latents[slot] = self._draw([slot])[0]

    def _allocate(self, condition: Condition) -> None:
        frames, _, height, width = condition.shape
        capacity, channels = len(self.free), len(self.denoiser.space.mean)
        self.conditions = condition.new_empty(capacity, *condition.shape)
        self.latents = condition.new_empty(capacity, frames, channels, height, width)

    @torch.no_grad()
    def advance(self) -> list[Result]:
        """Evaluate the network once for all, take each program's DOWN and the UPs after it."""
        slots = sorted(self.running)
        clean = torch.empty_like(self.latents)
        clean[slots] = self._evaluate(slots)
        for solver in dict.fromkeys(map(self._solver, slots)):
            alike = [slot for slot in slots if self._solver(slot) == solver]
            self._down(solver, alike, clean[alike])
        while rising := [slot for slot in slots if self._next_kind(slot) is Kind.UP]:
            self._up(rising)
        return [self._finish(slot) for slot in slots if not self.running[slot].moves]

    def _solver(self, slot: int) -> Term:
        return self.running[slot].request.program.schedule.solver

    def _next_kind(self, slot: int) -> Kind | None:
        moves = self.running[slot].moves
        return moves[0].kind if moves else None

    def _evaluate(self, slots: list[int]) -> Batch:
        levels = [self.running[slot].moves[0].source for slot in slots]
        timestep = torch.tensor(levels, device=self.latents.device)
        began = self._clock()
        clean = self.denoiser.denoise(self.latents[slots], timestep, self.conditions[slots])
        share = (self._clock() - began) / len(slots)
        for slot in slots:
            self.running[slot].seconds += share
        return clean

    def _clock(self) -> float:
        if self.latents.device.type == "cuda":
            torch.cuda.synchronize(self.latents.device)
        return time.perf_counter()

    def _down(self, solver: Term, slots: list[int], clean: Batch) -> None:
        moves, ab_from, ab_to = self._take(slots)
        noisy = self.latents[slots]
        if solver.name == "ddim":
            lower = ddim_step(noisy, clean, ab_from, ab_to)
        else:
            noise = torch.zeros_like(noisy)
            noised = [row for row, move in enumerate(moves) if move.target != CLEAN]
            if noised:
                noise[noised] = self._draw([slots[row] for row in noised])
            variance: Variance = "fixed_large" if solver["variance"] == "large" else "fixed_small"
            lower = ddpm_step(noisy, clean, ab_from, ab_to, noise, variance)
        self.latents[slots] = lower.to(noisy.dtype)

    def _up(self, slots: list[int]) -> None:
        _, ab_from, ab_to = self._take(slots)
        latents = self.latents[slots]
        higher = renoise(latents, ab_from, ab_to, self._draw(slots))
        self.latents[slots] = higher.to(latents.dtype)

    def _take(self, slots: list[int]) -> tuple[list[Move], Tensor, Tensor]:
        """The next move of each slot, and ᾱ where it starts and ends.

        In float64: 1 − ᾱ is 1e-4 at the lowest level, of which float32 keeps three digits.
        """
        moves = [self.running[slot].moves.popleft() for slot in slots]
        levels = torch.tensor([[m.source for m in moves], [m.target for m in moves]])
        ab_from, ab_to = (
            expand(self.denoiser.alpha_bar(level.to(self.latents.device))) for level in levels
        )
        return moves, ab_from, ab_to

    def _draw(self, slots: list[int]) -> Batch:
        noise = []
        for slot in slots:
            trajectory = self.running[slot]
            source = seeding.generator(self.seed, trajectory.request.clip, trajectory.draws)
            noise.append(torch.randn(self.latents.shape[1:], generator=source))
            trajectory.draws += 1
        return torch.stack(noise).to(self.latents)

    def _finish(self, slot: int) -> Result:
        trajectory = self.running.pop(slot)
        self.free.append(slot)
        request = trajectory.request
        latents = self.denoiser.denormalise(self.latents[[slot]])[0]
        if not latents.isfinite().all():
            raise BadInput(
                f"sampling {request.clip} with {request.name} gave values that are not "
                "finite: the model has diverged; use an earlier checkpoint"
            )
        return Result(request, latents, trajectory.seconds)


def inpaint(
    denoiser: Denoiser,
    autoencoder: Autoencoder,
    examples: Sequence[Example],
    schedule: str,
    *,
    seed: int,
    capacity: int,
) -> Iterator[tuple[Example, Frames]]:
    """Fill the holes of a few examples under one schedule; yields each as it is finished.

    The network is used as it stands: put it into evaluation mode first.

    Raises:
        BadInput: the schedule cannot be read, or an example's shard keeps no pixels.
    """
    program = compile_schedule(parse(schedule), denoiser.timesteps)
    by_key = {example.key: example for example in examples}
    requests = [
        Request(key, schedule, program, functools.partial(condition_of, denoiser, example))
        for key, example in by_key.items()
    ]
    for result in sample(denoiser, requests, capacity=capacity, seed=seed):
        example = by_key[result.request.clip]
        yield example, decode_result(autoencoder, example, result.latents)


def condition_of(denoiser: Denoiser, example: Example) -> Condition:
    """What the network is told of an example, on the network's device."""
    device = next(denoiser.network.parameters()).device
    masked_latents = torch.from_numpy(example.masked_latents).float()
    hole = latent_mask(example.mask, *masked_latents.shape[-2:])
    return denoiser.condition(masked_latents[None].to(device), hole[None].to(device))[0]


def decode_result(autoencoder: Autoencoder, example: Example, latents: Latents) -> Frames:
    """Latents, as the autoencoder scales them, to frames: the example's own outside its hole.

    Raises:
        BadInput: the example's shard keeps no pixels.
    """
    frames = to_frames(autoencoder.decode(latents[None])[0])
    return composite(pixels_of(example), frames, example.mask)


def pixels_of(example: Example) -> Frames:
    """The pixels of an example.

    Raises:
        BadInput: its shard keeps none.
    """
    if example.pixels is None:
        raise BadInput(
            f"{example.key} is in a shard without pixels: encode again with --pixels all, "
            "or name the validation split, which keeps them"
        )
    return example.pixels
