"""Sampling schedules: a text that a person writes, compiled to a finite list of transitions.

    SOLVER:STEPS[(key=value,…)][+MOVE[(key=value,…)]]…      e.g. ddpm:50+resample(n=4)

The plain walk goes down STEPS levels to the clean state. Each move adds detours to it: from a level
that the walk has just reached up again and back down. Detours start only from the plain walk, so
the cost of a schedule is the sum of the costs of its moves.

Moves
    resample(n=K)            the paper's resampling: after each step, the last one included, K times
                             noise the state again and denoise it again
    jump(length=L,times=r)   RePaint's: at every L-th level, the last step left out, r − 1 times L
                             levels up, one at a time, and down again (Lugmayr et al. 2022)
    travel(length=L,times=r) DDNM's time travel: as jump, but up at once, with fresh noise on the
                             last clean estimate (Wang et al. 2023, as their code has it)
    restart(low=t,high=u,times=K,steps=N)
                             Restart sampling: from the level nearest to t, K times up to u at once
                             and N steps down (Xu et al. 2023; they count N + 1 levels); may be
                             given more than once
    inject                   RePaint's known region on top of the condition: after every DOWN, and
                             every UP that starts from a clean estimate, what the mask shows is
                             replaced by the known latents, noised to the level
    ablate_clamp             for ablation: clamp every clean estimate to [−1, 1], as code for pixels
                             does, in the units that the process diffuses
below=t, an option of resample, jump and travel, leaves out detours that rise above t.
Presets
    paper(n=K) is resample(n=K); ramvid(R=K) is resample(n=K−1): RaMViD counts denoisings, not
    repetitions; repaint is jump; ddnm is travel.

Levels: t and u, from 0 to 1, name the timestep t·T − 1: 0 is clean, 1 the noisiest, and in between
they are a flow's time.
Spacing: of T timesteps, S steps visit ⌊(S − i)·T/S⌉ − 1 for i = 0 … S − 1 and then the clean state
(spacing=trailing, the default), so that every schedule starts at T − 1, where its state is pure
noise; or ⌊T/S⌋·(S − 1 − i), as RePaint has them (spacing=leading), which start lower (Lin et al.
2024, "Common Diffusion Noise Schedules and Sample Steps are Flawed", Table 2). Either way S = T
visits them all.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import defaultdict
from collections.abc import Iterator, Sequence
from decimal import Decimal
from enum import StrEnum
from fractions import Fraction
from typing import NamedTuple

from ...errors import BadInput
from .language import Schedule, Term, impossible
from .solvers import SOLVERS

CLEAN = -1  # the timestep of a state without noise
LONGEST = 1_000_000  # transitions of a program


class Kind(StrEnum):
    """What a transition does to the state."""

    DOWN = "down"  # evaluate the network, then a solver's step to a less noisy level
    UP = "up"  # noise again, to a noisier level
    INJECT = "inject"  # put the known latents, noised to the level, where the mask shows them


@dataclasses.dataclass(frozen=True, slots=True)
class Transition:
    """A transition between two timesteps: T − 1 is the noisiest, −1 is clean."""

    kind: Kind
    source: int
    target: int
    order: int = 0
    """Of the solver's step, for DOWN: 1 or 2."""
    evaluations: int = 0
    """Network evaluations that it takes."""
    afresh: bool = False
    """For UP: noise the last clean estimate, not the state."""


@dataclasses.dataclass(frozen=True)
class Program:
    """A schedule compiled for a number of timesteps: its transitions in order, ending clean."""

    schedule: Schedule
    timesteps: int
    transitions: tuple[Transition, ...]

    @functools.cached_property
    def nfe(self) -> int:
        """Network evaluations of one trajectory."""
        return sum(transition.evaluations for transition in self.transitions)

    def count(self, kind: Kind) -> int:
        """How many transitions are of this kind."""
        return sum(transition.kind is kind for transition in self.transitions)

    @property
    def levels(self) -> list[int]:
        """The levels that the state passes, in order; INJECT does not change the level."""
        changes = (each.target for each in self.transitions if each.kind is not Kind.INJECT)
        return [self.transitions[0].source, *changes]


class _Leg(NamedTuple):
    """A stretch of the walk, down or up."""

    source: int
    target: int
    afresh: bool = False


_Detour = tuple[int, list[_Leg]]  # the index of the level that it starts from, and its legs


def compile_schedule(schedule: Schedule, timesteps: int = 1000) -> Program:
    """All transitions of a schedule for a process of `timesteps` timesteps.

    Raises:
        BadInput: the schedule does not fit so few timesteps, or has over `LONGEST` transitions.
    """
    if schedule.steps > timesteps:
        remedy = f"the model was trained with {timesteps} timesteps: give at most {timesteps}"
        raise impossible(schedule, schedule.solver, "steps", remedy)
    spacing = schedule.solver.get("spacing", str)
    levels = [*spaced_timesteps(schedule.steps, timesteps, spacing), CLEAN]
    starting = defaultdict[int, list[_Leg]](list)
    legs_in_all = 0
    for term in schedule.moves:
        for index, legs in _detours(schedule, term, levels, timesteps):
            starting[index] += legs
            legs_in_all += len(legs)
            if legs_in_all > LONGEST:
                raise BadInput(f"{schedule} has over {LONGEST:,} moves: go up less often")
    walk: list[_Leg] = []
    for index, (high, low) in enumerate(itertools.pairwise(levels), start=1):
        walk += [_Leg(high, low), *starting[index]]
    return Program(schedule, timesteps, tuple(_transitions(schedule, walk)))


def spaced_timesteps(steps: int, timesteps: int, spacing: str = "trailing") -> list[int]:
    """The levels that a schedule visits, noisiest first.

    In exact arithmetic: in floats the trailing formula gives diffusers one level too many at some
    counts (62 at 61 steps of 1000, the last of them −1).
    """
    if spacing == "leading":
        return [(steps - 1 - i) * (timesteps // steps) for i in range(steps)]
    return [round(Fraction((steps - i) * timesteps, steps)) - 1 for i in range(steps)]


def _detours(
    schedule: Schedule, term: Term, levels: Sequence[int], timesteps: int
) -> Iterator[_Detour]:
    match term.name:
        case "resample":
            yield from _resampling(term, levels, timesteps)
        case "jump" | "travel":
            yield from _jumps(schedule, term, levels, timesteps)
        case "restart":
            yield _restart(schedule, term, levels, timesteps)


def _resampling(term: Term, levels: Sequence[int], timesteps: int) -> Iterator[_Detour]:
    for index, (high, low) in enumerate(itertools.pairwise(levels), start=1):
        if high <= _timestep(term, "below", timesteps):
            yield index, [_Leg(low, high), _Leg(high, low)] * term.get("n", int)


def _jumps(
    schedule: Schedule, term: Term, levels: Sequence[int], timesteps: int
) -> Iterator[_Detour]:
    steps, length = schedule.steps, term.get("length", int)
    if length >= steps:
        remedy = f"no jump is that long in {steps} steps: give less than {steps}"
        raise impossible(schedule, term, "length", remedy)
    for above_last in range(0, steps - length, length):
        index = steps - 1 - above_last
        path = levels[index - length : index + 1]
        if path[0] <= _timestep(term, "below", timesteps):
            ups = [_Leg(low, high) for high, low in reversed(list(itertools.pairwise(path)))]
            if term.name == "travel":
                ups = [_Leg(path[-1], path[0], afresh=True)]
            yield index, (ups + _way_down(path)) * (term.get("times", int) - 1)


def _restart(schedule: Schedule, term: Term, levels: Sequence[int], timesteps: int) -> _Detour:
    wanted = _timestep(term, "low", timesteps)
    index = min(range(1, len(levels)), key=lambda i: abs(levels[i] - wanted))
    low = levels[index]
    high = round(_timestep(term, "high", timesteps))
    steps = term.get("steps", int)
    if high <= low:
        remedy = f"its restarts begin at {(low + 1) / timesteps:.4g}: give more than that"
        raise impossible(schedule, term, "high", remedy)
    if steps > high - low:
        remedy = f"from the timestep {high} to {low} there are fewer: give at most {high - low}"
        raise impossible(schedule, term, "steps", remedy)
    path = [low + round(Fraction((high - low) * left, steps)) for left in range(steps, -1, -1)]
    return index, [_Leg(low, high), *_way_down(path)] * term.get("times", int)


def _way_down(path: Sequence[int]) -> list[_Leg]:
    return [_Leg(high, low) for high, low in itertools.pairwise(path)]


def _timestep(term: Term, key: str, timesteps: int) -> Decimal:
    return term.get(key, Decimal) * timesteps - 1


def _transitions(schedule: Schedule, walk: Sequence[_Leg]) -> Iterator[Transition]:
    solver, injects = SOLVERS[schedule.solver.name], schedule.has("inject")
    after_down = False
    for source, target, afresh in walk:
        rises = target > source
        if rises:
            yield Transition(Kind.UP, source, target, afresh=afresh)
        else:
            order = solver.order_of_step(target == CLEAN, after_down)
            evaluations = solver.evaluations if order == 2 else 1
            yield Transition(Kind.DOWN, source, target, order, evaluations)
        if injects and (afresh or not rises):
            yield Transition(Kind.INJECT, target, target)
        after_down = not rises
