"""The sampler: many clips under many schedules in one batch, each at its own timestep.

A trajectory is one clip under one program. It takes a slot, runs its program and leaves the slot to
the next, so that the network always sees a batch as full as the work allows (continuous batching,
as language models are served). Nothing is clamped, but by a schedule that asks for it as an
ablation.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from decimal import Decimal

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from .. import seeding
from ..errors import BadInput
from ..modeling.denoiser import Denoiser
from ..modeling.diffusion import (
    Variance,
    add_noise,
    ddim_step,
    ddpm_step,
    dpmpp_step,
    expand,
    heun_step,
    renoise,
)
from .schedules.language import Term
from .schedules.program import CLEAN, Kind, Move, Program

Latents = Float[Tensor, "frames channels h w"]
Condition = Float[Tensor, "frames condition h w"]
LatentMask = Float[Tensor, "frames 1 h w"]
Batch = Float[Tensor, "batch frames channels h w"]


@dataclasses.dataclass(frozen=True)
class Known:
    """What a program that injects puts where the mask shows it."""

    latents: Latents
    """Normalised; what lies in the hole is not used."""
    mask: LatentMask
    """The hole's share of each latent: where it is 0 the latents are known."""


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
    known: Callable[[], Known] | None = None
    """As `condition`, for programs that inject."""
    frames: Sequence[int] | None = None
    """Its frames' numbers in a video of which it is a window: then each frame's noise depends on
    its number, and not on where it stands in the window."""


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
    padded: bool = False,
    on_evaluations: Callable[[int], object] = lambda count: None,
) -> Iterator[Result]:
    """Run every request, the longest program first, and yield each result as it is finished.

    The noise of a clip is `torch.randn` on the CPU from `seeding.generator(seed, clip, draw)`: draw
    0 is the initial state, and each later noise tensor that the program uses takes the next. So a
    result is the same, to float32 rounding, whatever the capacity, the order of the requests, and
    what else runs beside it; and all schedules start a clip from the same state. Where a request
    numbers its frames, each frame's noise is from `seeding.generator(seed, clip, number, draw)`.

    Args:
        capacity: Slots: the most trajectories in one network call, 1 or more.
        padded: Evaluate the empty slots too. Then a result is the same bit for bit at the same
            slot, capacity, number of threads and device, whatever the other slots hold; it costs
            time when fewer trajectories are left than slots.
        on_evaluations: Told after each network call how many evaluations it held.

    Raises:
        BadInput: a result is not finite.
    """
    yield from sample_in_order(
        denoiser,
        sorted(requests, key=lambda request: -request.program.nfe),
        capacity=capacity,
        seed=seed,
        padded=padded,
        on_evaluations=on_evaluations,
    )


def sample_in_order(
    denoiser: Denoiser,
    requests: Iterable[Request],
    *,
    capacity: int,
    seed: int,
    padded: bool = False,
    on_evaluations: Callable[[int], object] = lambda count: None,
) -> Iterator[Result]:
    """As `sample`, but each request is drawn, in the order given, when a slot is free."""
    waiting = iter(requests)
    slots = _Slots(denoiser, capacity, seed, padded)
    while True:
        for request in itertools.islice(waiting, len(slots.free)):
            slots.start(request)
        if not slots.running:
            return
        evaluations = len(slots.running)
        results = slots.advance()
        on_evaluations(evaluations)
        yield from results


@dataclasses.dataclass
class _Trajectory:
    request: Request
    moves: deque[Move]
    known: Known | None
    draws: int = 0
    seconds: float = 0.0
    midway: bool = False
    """Heun's first-order step is taken; its second evaluation comes."""
    before: int = CLEAN
    """The level of the clean estimate before the last."""

    @property
    def level(self) -> int:
        """Where the network sees the state next."""
        return self.moves[0].target if self.midway else self.moves[0].source


class _Slots:
    """The states of the running trajectories, one a slot, in one tensor of normalised latents."""

    def __init__(self, denoiser: Denoiser, capacity: int, seed: int, padded: bool) -> None:
        self.denoiser = denoiser
        self.seed = seed
        self.padded = padded
        self.free = list(reversed(range(capacity)))
        self.running: dict[int, _Trajectory] = {}
        self._without_network = {Kind.UP: self._up, Kind.INJECT: self._inject}
        self.latents: Tensor = torch.empty(0)
        self.conditions: Tensor = torch.empty(0)
        self.clean: Tensor = torch.empty(0)  # the last clean estimates
        self.begun: Tensor = torch.empty(0)  # the states from which Heun's steps began

    @torch.no_grad()
    def start(self, request: Request) -> None:
        condition = request.condition()
        if not self.conditions.numel():
            self._allocate(condition)
        program = request.program
        slot = self.free.pop()
        known = request.known() if request.known and program.count(Kind.INJECT) else None
        self.running[slot] = _Trajectory(request, deque(program.moves), known)
        self.conditions[slot] = condition
        self.latents[slot] = self._draw([slot])[0]

    def _allocate(self, condition: Condition) -> None:
        frames, _, height, width = condition.shape
        capacity, channels = len(self.free), len(self.denoiser.space.mean)
        self.conditions = condition.new_zeros(capacity, *condition.shape)
        self.latents = condition.new_zeros(capacity, frames, channels, height, width)
        self.clean, self.begun = self.latents.clone(), self.latents.clone()

    @torch.no_grad()
    def advance(self) -> list[Result]:
        """Evaluate the network once for all, step with each, and take what needs no network."""
        slots = sorted(self.running)
        before = self.clean.clone()
        self.clean[slots] = self._evaluate(slots)
        for alike in self._alike(slots, self._step_of):
            self._down(alike, before[alike])
        while unevaluated := [slot for slot in slots if self._needs_no_network(slot)]:
            for alike in self._alike(unevaluated, lambda slot: self._next(slot).kind):
                self._without_network[self._next(alike[0]).kind](alike)
        return [self._finish(slot) for slot in slots if not self.running[slot].moves]

    def _alike(self, slots: list[int], key: Callable[[int], Hashable]) -> list[list[int]]:
        groups: dict[Hashable, list[int]] = {}
        for slot in slots:
            groups.setdefault(key(slot), []).append(slot)
        return list(groups.values())

    def _next(self, slot: int) -> Move:
        return self.running[slot].moves[0]

    def _needs_no_network(self, slot: int) -> bool:
        return bool(self.running[slot].moves) and self._next(slot).kind is not Kind.DOWN

    def _step_of(self, slot: int) -> tuple[Term, int, bool]:
        """Slots that have it in common take their step together."""
        trajectory = self.running[slot]
        solver = trajectory.request.program.schedule.solver
        return solver, self._next(slot).order, trajectory.midway

    def _evaluate(self, slots: list[int]) -> Batch:
        """The clean estimates of these slots."""
        rows = range(len(self.latents)) if self.padded else slots
        levels = [self.running[slot].level if slot in self.running else 0 for slot in rows]
        timestep = torch.tensor(levels, device=self.latents.device)
        began = self._clock()
        given = slice(None) if self.padded else slots
        clean = self.denoiser.denoise(self.latents[given], timestep, self.conditions[given])
        share = (self._clock() - began) / len(slots)
        if self.padded:
            clean = clean[slots]
        for row, slot in enumerate(slots):
            trajectory = self.running[slot]
            trajectory.seconds += share
            if trajectory.request.program.schedule.has("ablate_clamp"):
                clean[row].clamp_(-1, 1)
        return clean

    def _clock(self) -> float:
        if self.latents.device.type == "cuda":
            torch.cuda.synchronize(self.latents.device)
        return time.perf_counter()

    def _down(self, slots: list[int], before: Batch) -> None:
        """One step of one solver; `before` holds the clean estimates before the last."""
        solver, order, midway = self._step_of(slots[0])
        if solver.name == "heun" and order == 2 and not midway:
            self._begin_heun(slots)
            return
        ab_before = self._alpha_bars([self.running[slot].before for slot in slots])
        moves, ab_from, ab_to = self._take(slots)
        noisy, clean = self.latents[slots], self.clean[slots]
        match solver.name, order:
            case "ddpm", _:
                large = solver["variance"] == "large"
                variance: Variance = "fixed_large" if large else "fixed_small"
                noise = self._draw_above_clean(slots, moves)
                lower = ddpm_step(noisy, clean, ab_from, ab_to, noise, variance)
            case "ddim", _ if eta := float(solver.get("eta", Decimal)):
                noise = self._draw_above_clean(slots, moves)
                lower = ddim_step(noisy, clean, ab_from, ab_to, noise, eta)
            case "dpmpp", 2:
                lower = dpmpp_step(noisy, clean, before, ab_from, ab_to, ab_before)
            case "heun", 2:
                lower = heun_step(self.begun[slots], before, noisy, clean, ab_from, ab_to)
            case _:
                lower = ddim_step(noisy, clean, ab_from, ab_to)
        self._put(slots, lower)
        for slot, move in zip(slots, moves, strict=True):
            self.running[slot].before, self.running[slot].midway = move.source, False

    def _begin_heun(self, slots: list[int]) -> None:
        moves = [self._next(slot) for slot in slots]
        ab_from = self._alpha_bars([move.source for move in moves])
        ab_to = self._alpha_bars([move.target for move in moves])
        self.begun[slots] = self.latents[slots]
        self._put(slots, ddim_step(self.latents[slots], self.clean[slots], ab_from, ab_to))
        for slot in slots:
            self.running[slot].midway = True

    def _up(self, slots: list[int]) -> None:
        moves, ab_from, ab_to = self._take(slots)
        noise = self._draw(slots)
        afresh = torch.tensor([move.afresh for move in moves], device=noise.device)
        of_state = renoise(self.latents[slots], ab_from, ab_to, noise)
        of_clean = add_noise(self.clean[slots], noise, ab_to)
        self._put(slots, torch.where(rearrange(afresh, "b -> b 1 1 1 1"), of_clean, of_state))

    def _inject(self, slots: list[int]) -> None:
        moves, _, ab = self._take(slots)
        noise = self._draw_above_clean(slots, moves)
        latents, hole = [], []
        for slot in slots:
            request, known = self.running[slot].request, self.running[slot].known
            assert known is not None, f"{request.name} injects: its request must say what is known"
            latents.append(known.latents)
            hole.append(known.mask)
        noised = add_noise(torch.stack(latents).to(noise), noise, ab)
        shown = torch.stack(hole).to(noise) == 0
        self._put(slots, torch.where(shown, noised, self.latents[slots]))

    def _put(self, slots: list[int], states: Batch) -> None:
        self.latents[slots] = states.to(self.latents.dtype)

    def _take(self, slots: list[int]) -> tuple[list[Move], Tensor, Tensor]:
        """The next move of each slot, and ᾱ where it starts and ends."""
        moves = [self.running[slot].moves.popleft() for slot in slots]
        ab_from = self._alpha_bars([move.source for move in moves])
        return moves, ab_from, self._alpha_bars([move.target for move in moves])

    def _alpha_bars(self, levels: list[int]) -> Float[Tensor, "batch 1 1 1 1"]:
        """In float64: 1 − ᾱ is 1e-4 at the lowest level, of which float32 keeps three digits."""
        return expand(self.denoiser.alpha_bar(torch.tensor(levels, device=self.latents.device)))

    def _draw_above_clean(self, slots: list[int], moves: list[Move]) -> Batch:
        """Noise for the slots whose moves end above the clean level, zeros for the others."""
        noise = torch.zeros_like(self.latents[slots])
        noised = [row for row, move in enumerate(moves) if move.target != CLEAN]
        if noised:
            noise[noised] = self._draw([slots[row] for row in noised])
        return noise

    def _draw(self, slots: list[int]) -> Batch:
        noise = []
        for slot in slots:
            trajectory = self.running[slot]
            noise.append(self._noise(trajectory.request, trajectory.draws))
            trajectory.draws += 1
        return torch.stack(noise).to(self.latents)

    def _noise(self, request: Request, draw: int) -> Latents:
        shape, clip = self.latents.shape[1:], (self.seed, request.clip)
        if request.frames is None:
            return torch.randn(shape, generator=seeding.generator(*clip, draw))
        sources = [seeding.generator(*clip, number, draw) for number in request.frames]
        return torch.stack([torch.randn(shape[1:], generator=source) for source in sources])

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
