"""Sampling schedules: a text that a person writes, compiled to a finite list of moves.

    SOLVER:STEPS[(key=value,…)][+MOVE(key=value,…)]…      e.g. ddpm:50+resample(n=4)

Solvers
    ddpm    ancestral sampling (Ho et al. 2020); variance=small (the default, the paper's Eq. 3)
            or variance=large (RaMViD's)
    ddim    the deterministic sampler (Song et al. 2021)
Moves
    resample(n=K)    the paper's resampling: after each denoising step, the last one included, K
                     times noise the state again and denoise it again

Spacing: of T timesteps, S steps visit ⌊(S − i)·T/S⌉ − 1 for i = 0 … S − 1 and then the clean state
("trailing"; Lin et al. 2023, "Common Diffusion Noise Schedules and Sample Steps are Flawed", Table
2). So every schedule starts at T − 1, where its state is pure noise, and S = T visits them all.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import itertools
import re
from collections.abc import Callable, Mapping
from enum import StrEnum
from fractions import Fraction

from ..jobs import BadInput

CLEAN = -1  # the timestep of a state without noise

Value = int | str


@dataclasses.dataclass(frozen=True)
class Option:
    """One `key=value` of a solver or a move."""

    read: Callable[[str], Value]
    """The value that a text stands for; ValueError where it is none."""
    wants: str
    """What may be written, for an error's remedy."""
    default: Value | None = None
    """The value where none is given; None makes the option required."""


def _whole(text: str) -> int:
    if not re.fullmatch("[0-9]+", text):
        raise ValueError(text)
    return int(text)


def _one_of(*choices: str) -> Option:
    def read(text: str) -> str:
        if text not in choices:
            raise ValueError(text)
        return text

    return Option(read, " or ".join(choices), default=choices[0])


Options = Mapping[str, Option]

SOLVERS: dict[str, Options] = {
    "ddpm": {"variance": _one_of("small", "large")},
    "ddim": {},
}
MOVES: dict[str, Options] = {
    "resample": {"n": Option(_whole, "a whole number, 0 or more")},
}


@dataclasses.dataclass(frozen=True)
class Term:
    """A solver or a move with all its options, in the order in which they are declared."""

    name: str
    options: tuple[tuple[str, Value], ...] = ()

    def __getitem__(self, key: str) -> Value:
        return dict(self.options)[key]

    def __str__(self) -> str:
        return self.name + self.written_options()

    def written_options(self) -> str:
        """The options that are not at their defaults, in brackets; empty where all are."""
        declared = (SOLVERS | MOVES)[self.name]
        given = [f"{k}={v}" for k, v in self.options if v != declared[k].default]
        return f"({','.join(given)})" if given else ""


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What `parse` reads; `str` writes it in canonical form, without options at their defaults."""

    solver: Term
    steps: int
    moves: tuple[Term, ...] = ()

    def __str__(self) -> str:
        solver = f"{self.solver.name}:{self.steps}{self.solver.written_options()}"
        return "+".join([solver, *map(str, self.moves)])


class Kind(StrEnum):
    """What a move does to the state."""

    DOWN = "down"  # evaluate the network, then a solver's step to a less noisy level
    UP = "up"  # noise again, to a noisier level


@dataclasses.dataclass(frozen=True)
class Move:
    """One transition between two timesteps: T − 1 is the noisiest, −1 is clean."""

    kind: Kind
    source: int
    target: int


@dataclasses.dataclass(frozen=True)
class Program:
    """A schedule compiled for a number of timesteps: all its moves, in order, ending clean."""

    schedule: Schedule
    timesteps: int
    moves: tuple[Move, ...]

    @functools.cached_property
    def nfe(self) -> int:
        """Network evaluations per clip: one for each DOWN."""
        return sum(move.kind is Kind.DOWN for move in self.moves)


def parse(text: str) -> Schedule:
    """Read a schedule.

    Raises:
        BadInput: `text` is no schedule; the message points at the place and gives a remedy.
    """
    first, *rest = text.split("+")
    solver, steps = _read_term(text, 0, first, SOLVERS)
    start, moves = len(first) + 1, list[Term]()
    for piece in rest:
        move, _ = _read_term(text, start, piece, MOVES)
        if move.name in (before.name for before in moves):
            raise _mistake(text, start, len(move.name), f"give {move.name} once")
        moves.append(move)
        start += len(piece) + 1
    return Schedule(solver, steps, tuple(moves))


def compile_schedule(schedule: Schedule, timesteps: int = 1000) -> Program:
    """All moves of a schedule for a process of `timesteps` timesteps.

    Raises:
        BadInput: the schedule has more steps than the process has timesteps.
    """
    if schedule.steps > timesteps:
        text = str(schedule)
        remedy = f"the model was trained with {timesteps} timesteps: give at most {timesteps}"
        raise _mistake(text, text.index(":") + 1, len(str(schedule.steps)), remedy)
    again = {term.name: term for term in schedule.moves}.get("resample")
    repeats = int(again["n"]) if again else 0
    levels = [*spaced_timesteps(schedule.steps, timesteps), CLEAN]
    moves: list[Move] = []
    for high, low in itertools.pairwise(levels):
        down, up = Move(Kind.DOWN, high, low), Move(Kind.UP, low, high)
        moves += [down, *[up, down] * repeats]
    return Program(schedule, timesteps, tuple(moves))


def spaced_timesteps(steps: int, timesteps: int) -> list[int]:
    """The levels that a schedule visits, noisiest first, in trailing spacing.

    In exact arithmetic: in floats the same formula gives diffusers one level too many at some
    counts (62 at 61 steps of 1000, the last of them −1).
    """
    return [round(Fraction((steps - i) * timesteps, steps)) - 1 for i in range(steps)]


_TERM = re.compile(
    r"(?P<name>[A-Za-z_]\w*)(?P<colon>:(?P<steps>\w*))?(?P<open>\((?P<options>[^()]*)\))?"
)


def _read_term(text: str, start: int, piece: str, known: Mapping[str, Options]) -> tuple[Term, int]:
    match = _TERM.match(piece)
    if match is None:
        raise _mistake(text, start, len(piece), _choices(known))
    name = match["name"]
    if name not in known:
        raise _mistake(text, start, len(name), _choices(known, near=name))
    steps = _read_steps(text, start, match, wanted=known is SOLVERS)
    if match.end() < len(piece):
        after = piece[match.end() :]
        remedy = "close the bracket" if after.startswith("(") else "remove this"
        raise _mistake(text, start + match.end(), len(after), remedy)
    return Term(name, _read_options(text, start, match, known[name])), steps


def _read_steps(text: str, start: int, match: re.Match[str], wanted: bool) -> int:
    if not wanted:
        if match["colon"]:
            at, length = start + match.start("colon"), len(match["colon"])
            raise _mistake(text, at, length, f"{match['name']} takes no steps: leave them out")
        return 0
    digits = match["steps"] or ""
    if not re.fullmatch("[0-9]+", digits) or int(digits) < 1:
        at = start + (match.start("steps") if match["colon"] else match.end("name"))
        remedy = f"give the number of steps, 1 or more, as in {match['name']}:50"
        raise _mistake(text, at, len(digits), remedy)
    return int(digits)


def _read_options(
    text: str, start: int, match: re.Match[str], declared: Options
) -> tuple[tuple[str, Value], ...]:
    given: dict[str, Value] = {}
    at = start + match.start("options")
    for entry in match["options"].split(",") if match["open"] else []:
        key, equals, written = entry.partition("=")
        if key not in declared or not equals:
            raise _mistake(text, at, len(entry), _usage(match["name"], declared))
        if key in given:
            raise _mistake(text, at, len(entry), f"give {key} once")
        try:
            given[key] = declared[key].read(written)
        except ValueError:
            remedy = f"{key} must be {declared[key].wants}"
            raise _mistake(text, at + len(key) + 1, len(written), remedy) from None
        at += len(entry) + 1
    defaults = {k: option.default for k, option in declared.items() if option.default is not None}
    values = defaults | given
    if values.keys() != declared.keys():
        raise _mistake(text, start, match.end(), _usage(match["name"], declared))
    return tuple((key, values[key]) for key in declared)


def _usage(name: str, declared: Options) -> str:
    if not declared:
        return f"{name} has no options: leave the brackets out"
    listed = "; ".join(f"{key} is {option.wants}" for key, option in declared.items())
    return f"write {name}({','.join(f'{key}=…' for key in declared)}), where {listed}"


def _choices(known: Mapping[str, Options], near: str = "") -> str:
    guess = difflib.get_close_matches(near, known, n=1)
    if guess:
        return f"did you mean {guess[0]}?"
    if known is SOLVERS:
        return f"begin with SOLVER:STEPS; the solvers are {', '.join(known)}"
    return f"write MOVE(key=value); the moves are {', '.join(known)}"


def _mistake(text: str, at: int, length: int, remedy: str) -> BadInput:
    caret = " " * at + "^" * max(1, length)
    return BadInput(f"cannot read this schedule\n  {text}\n  {caret} {remedy}")
