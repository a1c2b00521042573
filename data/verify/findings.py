"""What `vidfill verify` finds in a split, and the table that says it."""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from ..shards.format import Manifest
from ..storage.names import shard_name

SHOWN = 20  # findings, at most; of each check a split remembers as many
TABLE_WIDTH = 120  # characters, where there is no terminal to ask

# What is checked, in the table's order, and what is counted.
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
    "scaling": "examples",
    "masked latents": "examples",
    "decoded": "clips",
    "encoded again": "clips",
}

# Remedies
REPAIR = "--repair"
ORIGINAL = "repair the original, then upload it"  # of what is behind a URL
ANEW = "encode into another folder"


class Finding(NamedTuple):
    """One thing that is wrong."""

    check: str
    where: str
    reason: str
    remedy: str


@dataclass
class Look:
    """What was looked at in a split, or in one of its shards, and what was found."""

    split: str
    remedy: str = REPAIR  # of what encoding again makes good
    manifest: Manifest | None = None
    seen: collections.Counter[str] = field(default_factory=collections.Counter)  # by check
    bad: collections.Counter[str] = field(default_factory=collections.Counter)  # by check
    notes: dict[str, str] = field(default_factory=dict)  # by check
    findings: list[Finding] = field(default_factory=list)  # the first of each check
    damaged: set[int] = field(default_factory=set)  # numbers of shards to encode again

    def find(self, check: str, where: str, reason: str, remedy: str = "") -> None:
        """Something is wrong."""
        if self.bad[check] < SHOWN:
            place = f"{self.split}/{where}".rstrip("/")
            self.findings.append(Finding(check, place, reason, remedy or self.remedy))
        self.bad[check] += 1

    def find_in_shard(self, number: int, check: str, reason: str, key: str = "") -> None:
        """A shard, or its example `key`, is wrong in what encoding it again makes good."""
        self.find(check, f"{shard_name(number)} {key}".rstrip(), reason)
        self.damaged.add(number)

    def merge(self, other: Look) -> None:
        """Add what was seen of one more shard."""
        self.findings += [finding for finding in other.findings if self.bad[finding.check] < SHOWN]
        self.seen += other.seen
        self.bad += other.bad
        self.damaged |= other.damaged


def is_sound(looks: Iterable[Look]) -> bool:
    """Whether nothing was found."""
    return not any(look.findings for look in looks)


def show(looks: Sequence[Look]) -> None:
    """Print the table of checks, then what is wrong."""
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=TABLE_WIDTH)
    table = Table("split", "check", "looked at", "bad", "verdict")
    for column in table.columns[2:4]:
        column.justify = "right"
    for look in looks:
        for row, check in enumerate(CHECKS):
            table.add_row("" if row else escape(look.split), check, *_summarise(look, check))
        table.add_section()
    console.print(table)
    shown = _choose_shown(looks)
    if shown:
        listed = Table("where", "what is wrong", "remedy", box=box.SIMPLE_HEAD)
        listed.columns[0].overflow = "fold"  # a key that is cut short names no example
        for finding in shown:
            listed.add_row(*(escape(text) for text in finding[1:]))
        console.print(listed)
    count = sum(look.bad.total() for look in looks)
    if count > len(shown):
        console.print(f"and {count - len(shown):,} more")


def _summarise(look: Look, check: str) -> tuple[str, str, str]:
    seen, bad, note = look.seen[check], look.bad[check], escape(look.notes.get(check, ""))
    looked = f"{seen:,} {CHECKS[check]}"
    if bad:
        return looked, f"{bad:,}", "[bold red]BAD[/]"
    if not seen:
        return "", "", f"not checked{': ' if note else ''}{note}"
    return looked, "0", f"[green]ok[/]{', ' if note else ''}{note}"


def _choose_shown(looks: Sequence[Look]) -> list[Finding]:
    """At most SHOWN findings, the first of every check and split before the second of any."""
    findings: list[Finding] = []
    ranks: list[int] = []
    for look in looks:
        count: collections.Counter[str] = collections.Counter()
        for finding in look.findings:
            findings.append(finding)
            ranks.append(count[finding.check])
            count[finding.check] += 1
    chosen = sorted(range(len(findings)), key=ranks.__getitem__)[:SHOWN]
    return [findings[place] for place in sorted(chosen)]
