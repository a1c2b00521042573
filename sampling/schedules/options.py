"""The options of solvers and moves: what may be written as `key=value`."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from decimal import Decimal

Value = int | str | Decimal


@dataclass(frozen=True)
class Option:
    """One `key=value` of a solver or a move."""

    read: Callable[[str], Value]
    """Converts the text; raises ValueError for a text that is not allowed."""
    wants: str
    """What is allowed, for an error's remedy."""
    default: Value | None = None
    """The value if none is given; None makes the option required."""


Options = Mapping[str, Option]


def whole(least: int) -> Option:
    """A whole number, required."""

    def read(text: str) -> int:
        if not re.fullmatch("[0-9]{1,6}", text) or int(text) < least:
            raise ValueError(text)
        return int(text)

    return Option(read, f"a whole number, {least} or more, of at most six digits")


def share(default: str | None = None) -> Option:
    """A number from 0 to 1."""

    def read(text: str) -> Decimal:
        if not re.fullmatch(r"[0-9]+(\.[0-9]+)?", text) or Decimal(text) > 1:
            raise ValueError(text)
        return Decimal(text)

    return Option(read, "a number from 0 to 1", default and Decimal(default))


def one_of(*choices: str) -> Option:
    """One of several words; the first is the default."""

    def read(text: str) -> str:
        if text not in choices:
            raise ValueError(text)
        return text

    return Option(read, " or ".join(choices), default=choices[0])
