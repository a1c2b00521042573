"""The text of a schedule: reads it, points at mistakes, and writes it in one canonical form.

    SOLVER:STEPS[(key=value,…)][+MOVE[(key=value,…)]]…      e.g. ddpm:50+resample(n=4)

What the solvers do is in `solvers`, what the moves do in `program`.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any, TypeVar

from ...errors import BadInput
from .options import Options, Value, share, whole
from .solvers import SOLVERS

T = TypeVar("T", bound=Value)

_JUMP: Options = {"length": whole(1), "times": whole(1), "below": share("1")}

MOVES: dict[str, Options] = {
    "resample": {"n": whole(0), "below": share("1")},
    "jump": _JUMP,
    "travel": _JUMP,
    "restart": {"low": share(), "high": share(), "times": whole(1), "steps": whole(1)},
    "inject": {},
    "ablate_clamp": {},
}
SWITCHES = ("inject", "ablate_clamp")  # apply to the whole schedule, wherever they are written
REPEATABLE = ("restart",)


@dataclasses.dataclass(frozen=True)
class Term:
    """A solver or a move with all its options, in the order in which they are declared."""

    name: str
    options: tuple[tuple[str, Value], ...] = ()

    def __getitem__(self, key: str) -> Value:
        return dict(self.options)[key]

    def get(self, key: str, kind: type[T]) -> T:
        """The value of an option that is of this kind."""
        value = self[key]
        assert isinstance(value, kind), (self.name, key, value)
        return value

    def __str__(self) -> str:
        return self.name + self.written_options()

    def written_options(self) -> str:
        """The options that differ from their defaults, in brackets; "" if none does."""
        declared = _OPTIONS[self.name]
        given = [f"{k}={_written(v)}" for k, v in self.options if v != declared[k].default]
        return f"({','.join(given)})" if given else ""


def _written(value: Value) -> str:
    """The text of a value: no trailing zeros, no exponent."""
    return f"{value.normalize():f}" if isinstance(value, Decimal) else str(value)


@dataclasses.dataclass(frozen=True)
class MovePreset:
    """A name under which a move is known elsewhere."""

    move: str
    options: Options
    means: Callable[[Term], tuple[tuple[str, Value], ...]] = lambda term: term.options
    """The options of the move."""


def _fewer_by_one(term: Term) -> tuple[tuple[str, Value], ...]:
    return ("n", term.get("R", int) - 1), ("below", term["below"])


MOVE_PRESETS: dict[str, MovePreset] = {
    "paper": MovePreset("resample", MOVES["resample"]),
    "ramvid": MovePreset("resample", {"R": whole(1), "below": share("1")}, _fewer_by_one),
    "repaint": MovePreset("jump", MOVES["jump"]),
    "ddnm": MovePreset("travel", MOVES["travel"]),
}
_SOLVER_OPTIONS = {name: solver.options for name, solver in SOLVERS.items()}
_OPTIONS = _SOLVER_OPTIONS | MOVES
_MOVE_OPTIONS = MOVES | {name: preset.options for name, preset in MOVE_PRESETS.items()}


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A schedule as `parse` reads it; `str` gives its canonical form, without default options."""

    solver: Term
    steps: int
    moves: tuple[Term, ...] = ()
    """In the order written, the switches last."""

    def __str__(self) -> str:
        solver = f"{self.solver.name}:{self.steps}{self.solver.written_options()}"
        return "+".join([solver, *map(str, self.moves)])

    def has(self, move: str) -> bool:
        """Whether it has a move of this name."""
        return any(term.name == move for term in self.moves)


def parse(text: str) -> Schedule:
    """Read a schedule.

    Raises:
        BadInput: `text` is no schedule; the message points at the place and gives a remedy.
    """
    first, *rest = text.split("+")
    solver, steps = _read_term(text, 0, first, _SOLVER_OPTIONS)
    start, moves = len(first) + 1, list[Term]()
    for piece in rest:
        move, _ = _read_term(text, start, piece, _MOVE_OPTIONS)
        name = move.name
        if preset := MOVE_PRESETS.get(name):
            move = Term(preset.move, preset.means(move))
        once = move.name not in REPEATABLE
        if once and move.name in (before.name for before in moves):
            raise mistake(text, start, len(name), f"give {move.name} once")
        moves.append(move)
        start += len(piece) + 1
    moves.sort(key=lambda move: SWITCHES.index(move.name) if move.name in SWITCHES else -1)
    return Schedule(solver, steps, tuple(moves))


def impossible(schedule: Schedule, term: Term, key: str, remedy: str) -> BadInput:
    """An error that points at an option, or at the solver's "steps", that no program can have."""
    text = str(schedule)
    pieces = text.split("+")
    index = 0 if term is schedule.solver else 1 + schedule.moves.index(term)
    start = sum(len(piece) + 1 for piece in pieces[:index])
    entry = ":" if index == 0 else f"{key}="
    at = pieces[index].index(entry) + len(entry)
    length = len(re.split("[,()]", pieces[index][at:])[0])
    return mistake(text, start + at, length, remedy)


def mistake(text: str, at: int, length: int, remedy: str) -> BadInput:
    """An error that underlines a place in a schedule's text and gives the remedy."""
    caret = " " * at + "^" * max(1, length)
    return BadInput(f"cannot read this schedule\n  {text}\n  {caret} {remedy}")


_TERM = re.compile(
    r"(?P<name>[A-Za-z_]\w*)(?P<colon>:(?P<steps>\w*))?(?P<open>\((?P<options>[^()]*)\))?"
)


def _read_term(text: str, start: int, piece: str, known: Mapping[str, Options]) -> tuple[Term, int]:
    match = _TERM.match(piece)
    if match is None:
        raise mistake(text, start, len(piece), _choices(known))
    name = match["name"]
    if name not in known:
        raise mistake(text, start, len(name), _choices(known, near=name))
    steps = _read_steps(text, start, match, wanted=known is _SOLVER_OPTIONS)
    if match.end() < len(piece):
        after = piece[match.end() :]
        remedy = "close the bracket" if after.startswith("(") else "remove this"
        raise mistake(text, start + match.end(), len(after), remedy)
    return Term(name, _read_options(text, start, match, known[name])), steps


def _read_steps(text: str, start: int, match: re.Match[str], wanted: bool) -> int:
    if not wanted:
        if match["colon"]:
            at, length = start + match.start("colon"), len(match["colon"])
            raise mistake(text, at, length, f"{match['name']} takes no steps: leave them out")
        return 0
    digits = match["steps"] or ""
    if not re.fullmatch("[0-9]{1,6}", digits) or int(digits) < 1:
        at = start + (match.start("steps") if match["colon"] else match.end("name"))
        remedy = f"give the number of steps, 1 or more, as in {match['name']}:50"
        raise mistake(text, at, len(digits), remedy)
    return int(digits)


def _read_options(
    text: str, start: int, match: re.Match[str], declared: Options
) -> tuple[tuple[str, Value], ...]:
    given: dict[str, Value] = {}
    at = start + match.start("options")
    for entry in match["options"].split(",") if match["open"] else []:
        key, equals, written = entry.partition("=")
        if key not in declared or not equals:
            raise mistake(text, at, len(entry), _usage(match, declared))
        if key in given:
            raise mistake(text, at, len(entry), f"give {key} once")
        try:
            given[key] = declared[key].read(written)
        except ValueError:
            remedy = f"{key} must be {declared[key].wants}"
            raise mistake(text, at + len(key) + 1, len(written), remedy) from None
        at += len(entry) + 1
    defaults = {k: option.default for k, option in declared.items() if option.default is not None}
    values = defaults | given
    if values.keys() != declared.keys():
        raise mistake(text, start, match.end(), _usage(match, declared))
    return tuple((key, values[key]) for key in declared)


def _usage(match: re.Match[str], declared: Options) -> str:
    name = match["name"]
    if not declared:
        return f"{name} has no options: leave the brackets out"
    written = f"{name}{match['colon'] or ''}({','.join(f'{key}=…' for key in declared)})"
    described = [
        f"{key} is {option.wants}"
        + ("" if option.default is None else f" ({_written(option.default)} if left out)")
        for key, option in declared.items()
    ]
    return f"write {written}, where {'; '.join(described)}"


def _choices(known: Mapping[str, Any], near: str = "") -> str:
    guess = difflib.get_close_matches(near, known, n=1)
    if guess:
        return f"did you mean {guess[0]}?"
    if known is _SOLVER_OPTIONS:
        return f"begin with SOLVER:STEPS; the solvers are {', '.join(known)}"
    return f"write MOVE(key=value); the moves are {', '.join(known)}"
