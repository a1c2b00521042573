"""What `vidfill verify` finds wrong in a split, and the tables that show it."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ...errors import printable
from ..shards.format import Manifest
from ..storage.names import shard_name

MOST_LISTED = 5  # defects that are listed of each check and split, at most
LOG_WIDTH = 120  # characters, where there is no terminal to ask

# The checks in the table's order, and the unit in which each counts.
CHECKS = {
    "manifest": "files",
    "shards": "shards",
    "SHA-256": "shards",
    "tar members": "shards",
    "XXH3, shapes": "examples",
    "keys": "examples",
    "finite values": "examples",
    "masks": "examples",
    "statistics": "shards",
    "encoded again": "clips",
}

# Remedies
REPAIR = "--repair"
ORIGINAL = "repair the original, then upload it"  # for what lies behind a URL
ANEW = "encode into another folder"


class Defect(NamedTuple):
    """One thing that is wrong."""

    check: str
    where: str
    reason: str
    remedy: str


@dataclass
class Inspection:
    """What was checked in a split, or in one of its shards, and what is wrong there."""

    split: str
    remedy: str = REPAIR  # for what encoding again mends
    manifest: Manifest | None = None
    checked: collections.Counter[str] = field(default_factory=collections.Counter)  # by check
    bad: collections.Counter[str] = field(default_factory=collections.Counter)  # by check
    notes: dict[str, str] = field(default_factory=dict)  # by check
    defects: list[Defect] = field(default_factory=list)  # the first MOST_LISTED of each check
    damaged: set[int] = field(default_factory=set)  # numbers of the shards to encode again

    def add(self, check: str, where: str, reason: str, remedy: str = "") -> None:
        """Record a defect."""
        if self.bad[check] < MOST_LISTED:
            place = f"{self.split}/{where}"
            self.defects.append(Defect(check, place, reason, remedy or self.remedy))
        self.bad[check] += 1

    def add_damage(self, number: int, check: str, reason: str, key: str = "") -> None:
        """Record a defect of a shard, or of its example `key`, that encoding it again mends."""
        self.add(check, f"{shard_name(number)} {key}".rstrip(), reason)
        self.damaged.add(number)

    def merge(self, other: Inspection) -> None:
        """Add the inspection of one more shard."""
        for check in other.bad:
            defects = [defect for defect in other.defects if defect.check == check]
            self.defects += defects[: max(MOST_LISTED - self.bad[check], 0)]
        self.checked += other.checked
        self.bad += other.bad
        self.damaged |= other.damaged


def is_sound(inspections: Iterable[Inspection]) -> bool:
    """Whether nothing is wrong."""
    return not any(inspection.defects for inspection in inspections)


def show(inspections: Sequence[Inspection]) -> None:
    """Print a table of the checks, then a list of the defects."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=LOG_WIDTH)
    table = Table("split", "check", "checked", "bad", "verdict")
    for column in table.columns[2:4]:
        column.justify = "right"
    for inspection in inspections:
        for row, check in enumerate(CHECKS):
            split = "" if row else _cell(inspection.split)
            table.add_row(split, check, *_summarise(inspection, check))
        table.add_section()
    console.print(table)
    defects = [defect for inspection in inspections for defect in inspection.defects]
    if defects:
        listed = Table("where", "what is wrong", "remedy", box=box.SIMPLE_HEAD)
        listed.columns[0].overflow = "fold"  # a key that is cut short names no example
        for defect in defects:
            listed.add_row(*(_cell(text) for text in defect[1:]))
        console.print(listed)
    count = sum(inspection.bad.total() for inspection in inspections)
    if count > len(defects):
        console.print(f"and {count - len(defects):,} more")


def _cell(text: str) -> str:
    return escape(printable(text))


def _summarise(inspection: Inspection, check: str) -> tuple[str, str, str]:
    checked, bad = inspection.checked[check], inspection.bad[check]
    note = _cell(inspection.notes.get(check, ""))
    counted = f"{checked:,} {CHECKS[check]}"
    if bad:
        return counted, f"{bad:,}", "[bold red]BAD[/]"
    if not checked:
        return "", "", f"not checked{': ' if note else ''}{note}"
    return counted, "0", f"[green]ok[/]{', ' if note else ''}{note}"
