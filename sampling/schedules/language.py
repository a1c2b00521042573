"""The text of a schedule: read with its mistakes pointed at, written in one canonical form.

    SOLVER:STEPS[(key=value,…)][+MOVE[(key=value,…)]]…      e.g. ddpm:50+resample(n=4)

What the solvers and moves do, and what they cost, `schedules` says.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Callable, Mapping
from decimal import Decimal
from typing import Any, TypeVar

from ...errors import BadInput

Value = int | str | Decimal
T = TypeVar("T", bound=Value)


@dataclasses.dataclass(frozen=True)
class Option:
    """One `key=value` of a solver or a move."""

    read: Callable[[str], Value]
    """The value that a text stands for; ValueError where it is none."""
    wants: str
    """What may be written, for an error's remedy."""
    default: Value | None = None
    """The value where none is given; None makes the option required."""


def _whole(least: int) -> Option:
    def read(text: str) -> int:
        if not re.fullmatch("[0-9]{1,6}", text) or int(text) < least:
            raise ValueError(text)
        return int(text)

    return Option(read, f"a whole number, {least} or more, of at most six digits")


def _share(default: str | None = None) -> Option:
    def read(text: str) -> Decimal:
        if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", text) or Decimal(text) > 1:
            raise ValueError(text)
        return Decimal(text)

    return Option(read, "a number from 0 to 1", default and Decimal(default))


def _one_of(*choices: str) -> Option:
    def read(text: str) -> str:
        if text not in choices:
            raise ValueError(text)
        return text

    return Option(read, " or ".join(choices), default=choices[0])


Options = Mapping[str, Option]

_SPACING: Options = {"spacing": _one_of("trailing", "leading")}
_JUMP: Options = {"length": _whole(1), "times": _whole(1), "below": _share("1")}
_RESAMPLE: Options = {"n": _whole(0), "below": _share("1")}

SOLVERS: dict[str, Options] = {
    "ddpm": {"variance": _one_of("small", "large"), **_SPACING},
    "ddim": {"eta": _share("0"), **_SPACING},
    "dpmpp": _SPACING,
    "heun": _SPACING,
    "euler": _SPACING,
}
MOVES: dict[str, Options] = {
    "resample": _RESAMPLE,
    "jump": _JUMP,
    "travel": _JUMP,
    "restart": {"low": _share(), "high": _share(), "times": _whole(1), "steps": _whole(1)},
    "inject": {},
    "ablate_clamp": {},
}
SWITCHES = ("inject", "ablate_clamp")  # hold for the whole schedule, wherever they are written
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
        """The options that are not at their defaults, in brackets; empty where all are."""
        declared = (SOLVERS | MOVES)[self.name]
        given = [f"{k}={_written(v)}" for k, v in self.options if v != declared[k].default]
        return f"({','.join(given)})" if given else ""


def _written(value: Value) -> str:
    """A number without zeros that say nothing, and never with an exponent."""
    return f"{value.normalize():f}" if isinstance(value, Decimal) else str(value)


@dataclasses.dataclass(frozen=True)
class Preset:
    """A name under which a move is known elsewhere."""

    options: Options
    means: Callable[[Term], Term]


def _also(move: str) -> Preset:
    return Preset(MOVES[move], lambda term: Term(move, term.options))


def _fewer_by_one(term: Term) -> Term:
    return Term("resample", (("n", term.get("R", int) - 1), ("below", term["below"])))


PRESETS: dict[str, Preset] = {
    "paper": _also("resample"),
    "ramvid": Preset({"R": _whole(1), "below": _share("1")}, _fewer_by_one),
    "repaint": _also("jump"),
    "ddnm": _also("travel"),
}
_WRITABLE = MOVES | {name: preset.options for name, preset in PRESETS.items()}


@dataclasses.dataclass(frozen=True)
class Schedule:
    """What `parse` reads; `str` writes it in canonical form, without options at their defaults."""

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
    solver, steps = _read_term(text, 0, first, SOLVERS)
    start, moves = len(first) + 1, list[Term]()
    for piece in rest:
        move, _ = _read_term(text, start, piece, _WRITABLE)
        name = move.name
        if name in PRESETS:
            move = PRESETS[name].means(move)
        once = move.name not in REPEATABLE
        if once and move.name in (before.name for before in moves):
            raise mistake(text, start, len(name), f"give {move.name} once")
        moves.append(move)
        start += len(piece) + 1
    moves.sort(key=lambda move: SWITCHES.index(move.name) if move.name in SWITCHES else -1)
    return Schedule(solver, steps, tuple(moves))


def impossible(schedule: Schedule, term: Term, key: str, remedy: str) -> BadInput:
    """An option, or "steps" of the solver, that no program can have: pointed at where it stands."""
    text = str(schedule)
    pieces = text.split("+")
    index = 0 if term is schedule.solver else 1 + schedule.moves.index(term)
    start = sum(len(piece) + 1 for piece in pieces[:index])
    entry = ":" if index == 0 else f"{key}="
    at = pieces[index].index(entry) + len(entry)
    length = len(re.split("[,()]", pieces[index][at:])[0])
    return mistake(text, start + at, length, remedy)


def mistake(text: str, at: int, length: int, remedy: str) -> BadInput:
    """What is wrong with a schedule's text: the place underlined, with what to do about it."""
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
    steps = _read_steps(text, start, match, wanted=known is SOLVERS)
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
    return f"write {written}, where {describe_options(declared)}"


def describe_options(declared: Options) -> str:
    """What each option may be, and what it is where it is left out."""

    def describe(key: str, option: Option) -> str:
        unless = "" if option.default is None else f" ({_written(option.default)} if left out)"
        return f"{key} is {option.wants}{unless}"

    return "; ".join(describe(key, option) for key, option in declared.items())


def _choices(known: Mapping[str, Any], near: str = "") -> str:
    guess = difflib.get_close_matches(near, known, n=1)
    if guess:
        return f"did you mean {guess[0]}?"
    if known is SOLVERS:
        return f"begin with SOLVER:STEPS; the solvers are {', '.join(known)}"
    return f"write MOVE(key=value); the moves are {', '.join(known)}"
