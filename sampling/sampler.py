"""The sampler: many examples under many schedules in one batch, each at its own timestep.

A trajectory is one sampling of an example under a program. It takes a slot, runs its program and
leaves the slot to the next, so the batch stays as full as the work allows (continuous batching, as
language models are served). Nothing is clamped unless the schedule asks for it as an ablation.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence

import torch
from einops import rearrange
from jaxtyping import Float
from torch import Tensor

from .. import seeding
from ..errors import BadInput
from ..modeling.denoiser import Denoiser
from ..modeling.diffusion import Latents, add_noise, expand, renoise
from .schedules.language import Term
from .schedules.program import CLEAN, Kind, Program, Transition
from .schedules.solvers import SOLVERS, StepInputs

ClipLatents = Float[Tensor, "frames channels h w"]
Condition = Float[Tensor, "frames condition h w"]


@dataclasses.dataclass(frozen=True)
class Known:
    """What a program that injects puts where the mask shows it."""

    latents: ClipLatents
    """Normalised; those in the hole are not used."""
    mask: Float[Tensor, "frames 1 h w"]
    """The hole's share of each latent: 0 where the latents are known."""


@dataclasses.dataclass(frozen=True)
class Request:
    """A trajectory to sample."""

    key: str
    """Usually the example's: the noise depends on it and on the seed alone."""
    name: str
    """Names the schedule in messages and results."""
    program: Program
    condition: Callable[[], Condition]
    """Makes the network's condition when the trajectory starts; its device and dtype are those of
    the state."""
    known: Callable[[], Known] | None = None
    """As `condition`, for programs that inject."""
    frames: Sequence[int] | None = None
    """For a window of a video, its frames' numbers in that video: each frame's noise then depends
    on its number, not on its place in the window."""


@dataclasses.dataclass(frozen=True)
class Completion:
    """What a trajectory gives."""

    request: Request
    latents: ClipLatents
    """As the autoencoder scales them."""
    seconds: float
    """Its share of the network's wall time: each call's time is split evenly over its slots."""


def sample(
    denoiser: Denoiser,
    requests: Iterable[Request],
    *,
    capacity: int,
    seed: int,
    on_evaluations: Callable[[int], object] = lambda count: None,
) -> Iterator[Completion]:
    """Run the requests in this order, each when a slot is free; yield what is done.

    The longest first keep the slots full to the end. `on_evaluations` is called after each network
    call, with its number of evaluations.

    The noise of a request is `torch.randn` on the CPU from `seeding.generator(seed, key, draw)`:
    draw 0 is the initial state, and each later noise tensor takes the next number. A completion is
    therefore the same, to float32 rounding, whatever the capacity, the order of the requests, and
    what else runs beside it; and all schedules start an example from the same state. If a request
    numbers its frames, each frame's noise is from `seeding.generator(seed, key, number, draw)`.

    Raises:
        BadInput: a completion is not finite.
    """
    waiting = iter(requests)
    slots = _Slots(denoiser, capacity, seed)
    while True:
        for request in itertools.islice(waiting, len(slots.free)):
            slots.start(request)
        if not slots.running:
            return
        evaluations = len(slots.running)
        completions = slots.advance()
        on_evaluations(evaluations)
        yield from completions


@dataclasses.dataclass
class _Trajectory:
    request: Request
    transitions: deque[Transition]
    """Those to come."""
    known: Known | None
    draws: int = 0
    seconds: float = 0.0
    midway: bool = False
    """Whether the first of a step's two evaluations is done."""
    before: int = CLEAN
    """The level of the clean estimate before the last."""

    @property
    def level(self) -> int:
        """Where the network sees the state next."""
        return self.transitions[0].target if self.midway else self.transitions[0].source


class _Slots:
    """The states of the running trajectories: one tensor of normalised latents, a row a slot."""

    def __init__(self, denoiser: Denoiser, capacity: int, seed: int) -> None:
        self.denoiser = denoiser
        self.seed = seed
        self.free = list(reversed(range(capacity)))
        self.running: dict[int, _Trajectory] = {}
        self.latents: Tensor = torch.empty(0)
        self.conditions: Tensor = torch.empty(0)
        self.clean: Tensor = torch.empty(0)  # the last clean estimates
        self.begun: Tensor = torch.empty(0)  # the states where steps of two evaluations began

    @torch.no_grad()
    def start(self, request: Request) -> None:
        condition, program = request.condition(), request.program
        if not self.conditions.numel():
            self._allocate(condition)
        slot = self.free.pop()
        known = request.known() if request.known and program.count(Kind.INJECT) else None
        self.running[slot] = _Trajectory(request, deque(program.transitions), known)
        self.conditions[slot] = condition
        self.latents[slot] = self._draw([slot])[0]

    def _allocate(self, condition: Condition) -> None:
        frames, _, height, width = condition.shape
        capacity, channels = len(self.free), len(self.denoiser.space.mean)
        self.conditions = condition.new_zeros(capacity, *condition.shape)
        self.latents = condition.new_zeros(capacity, frames, channels, height, width)
        self.clean, self.begun = self.latents.clone(), self.latents.clone()

    @torch.no_grad()
    def advance(self) -> list[Completion]:
        """Evaluate the network once for all, step down with each, and go up or inject until each
        needs the network again."""
        slots = sorted(self.running)
        before = self.clean.clone()
        self.clean[slots] = self._evaluate(slots)
        for alike in _grouped(slots, self._step_of):
            self._down(alike, before[alike])
        while kinds := {slot: kind for slot in slots if (kind := self._kind_without_network(slot))}:
            for alike in _grouped(list(kinds), kinds.__getitem__):
                (self._up if kinds[alike[0]] is Kind.UP else self._inject)(alike)
        return [self._finish(slot) for slot in slots if not self.running[slot].transitions]

    def _kind_without_network(self, slot: int) -> Kind | None:
        """UP or INJECT if that comes next."""
        transitions = self.running[slot].transitions
        return transitions[0].kind if transitions and transitions[0].kind is not Kind.DOWN else None

    def _step_of(self, slot: int) -> tuple[Term, int, bool]:
        """Solver, order, and whether the step is midway: what slots that step together share."""
        trajectory = self.running[slot]
        solver = trajectory.request.program.schedule.solver
        return solver, trajectory.transitions[0].order, trajectory.midway

    def _evaluate(self, slots: list[int]) -> Latents:
        """The clean estimates of these slots."""
        timestep = torch.tensor([self.running[slot].level for slot in slots])
        began = self._clock()
        clean = self.denoiser.denoise(
            self.latents[slots], timestep.to(self.latents.device), self.conditions[slots]
        )
        share = (self._clock() - began) / len(slots)
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

    def _down(self, slots: list[int], clean_before: Latents) -> None:
        """Take one step of one solver, or, of a step with two evaluations, the half of it."""
        term, order, midway = self._step_of(slots[0])
        solver, options = SOLVERS[term.name], dict(term.options)
        trajectories = [self.running[slot] for slot in slots]
        transitions = [trajectory.transitions[0] for trajectory in trajectories]
        noisy = self.latents[slots]
        half = order == 2 and solver.evaluations == 2 and not midway
        if half:
            self.begun[slots] = noisy
        inputs = StepInputs(
            noisy=noisy,
            clean=self.clean[slots],
            noisy_before=self.begun[slots],
            clean_before=clean_before,
            ab_from=self._alpha_bars([transition.source for transition in transitions]),
            ab_to=self._alpha_bars([transition.target for transition in transitions]),
            ab_before=self._alpha_bars([trajectory.before for trajectory in trajectories]),
            draw_noise=lambda: self._draw_above_clean(slots, transitions),
        )
        second = solver.second_order_step if order == 2 and not half else None
        self._put(slots, (second or solver.step)(inputs, options))
        for trajectory in trajectories:
            trajectory.midway = half
            if not half:
                trajectory.before = trajectory.transitions.popleft().source

    def _up(self, slots: list[int]) -> None:
        transitions = [self.running[slot].transitions.popleft() for slot in slots]
        ab_from = self._alpha_bars([transition.source for transition in transitions])
        ab_to = self._alpha_bars([transition.target for transition in transitions])
        noise = self._draw(slots)
        afresh = torch.tensor([each.afresh for each in transitions], device=noise.device)
        of_state = renoise(self.latents[slots], ab_from, ab_to, noise)
        of_clean = add_noise(self.clean[slots], noise, ab_to)
        self._put(slots, torch.where(rearrange(afresh, "b -> b 1 1 1 1"), of_clean, of_state))

    def _inject(self, slots: list[int]) -> None:
        transitions = [self.running[slot].transitions.popleft() for slot in slots]
        noise = self._draw_above_clean(slots, transitions)
        latents, hole = [], []
        for slot in slots:
            request, known = self.running[slot].request, self.running[slot].known
            assert known is not None, f"{request.name} injects: its request must say what is known"
            latents.append(known.latents)
            hole.append(known.mask)
        ab = self._alpha_bars([transition.target for transition in transitions])
        noised = add_noise(torch.stack(latents).to(noise), noise, ab)
        shown = torch.stack(hole).to(noise) == 0
        self._put(slots, torch.where(shown, noised, self.latents[slots]))

    def _put(self, slots: list[int], states: Latents) -> None:
        self.latents[slots] = states.to(self.latents.dtype)

    def _alpha_bars(self, levels: list[int]) -> Float[Tensor, "batch 1 1 1 1"]:
        """In float64: 1 − ᾱ is 1e-4 at the lowest level, of which float32 keeps three digits."""
        return expand(self.denoiser.alpha_bar(torch.tensor(levels, device=self.latents.device)))

    def _draw_above_clean(self, slots: list[int], transitions: list[Transition]) -> Latents:
        """Noise for the slots whose transitions end above the clean level, zeros for the others."""
        noise = torch.zeros_like(self.latents[slots])
        noised = [row for row, each in enumerate(transitions) if each.target != CLEAN]
        if noised:
            noise[noised] = self._draw([slots[row] for row in noised])
        return noise

    def _draw(self, slots: list[int]) -> Latents:
        noise = []
        for slot in slots:
            trajectory = self.running[slot]
            noise.append(self._noise(trajectory.request, trajectory.draws))
            trajectory.draws += 1
        return torch.stack(noise).to(self.latents)

    def _noise(self, request: Request, draw: int) -> ClipLatents:
        shape = self.latents.shape[1:]
        if request.frames is None:
            return torch.randn(shape, generator=seeding.generator(self.seed, request.key, draw))
        sources = [
            seeding.generator(self.seed, request.key, number, draw) for number in request.frames
        ]
        return torch.stack([torch.randn(shape[1:], generator=source) for source in sources])

    def _finish(self, slot: int) -> Completion:
        trajectory = self.running.pop(slot)
        self.free.append(slot)
        request = trajectory.request
        latents = self.denoiser.denormalise(self.latents[[slot]])[0]
        if not latents.isfinite().all():
            raise BadInput(
                f"sampling {request.key} with {request.name} gave values that are not "
                "finite: the model has diverged; use an earlier checkpoint"
            )
        return Completion(request, latents, trajectory.seconds)


def _grouped(slots: list[int], key: Callable[[int], Hashable]) -> list[list[int]]:
    """The slots with equal keys, together."""
    groups: dict[Hashable, list[int]] = {}
    for slot in slots:
        groups.setdefault(key(slot), []).append(slot)
    return list(groups.values())
