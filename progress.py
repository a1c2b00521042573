"""How far a job is, and the time left."""

from __future__ import annotations

import contextlib
import datetime
import functools
import time
from collections.abc import Iterator
from typing import Any

from .errors import printable, say

LOG_EVERY = 10.0  # seconds between progress lines where there is no terminal


@functools.cache
def say_once(message: str) -> None:
    """Print a line on stderr, the first time only."""
    say(f"vidfill: {message}")


@contextlib.contextmanager
def show_progress(description: str, total: int, unit: str, done: int = 0) -> Iterator[Progress]:
    """Show how far a job is and the time left: a bar on a terminal, else a line now and then."""
    from rich import progress
    from rich.console import Console

    console = Console(stderr=True)
    if not console.is_terminal:
        yield _Lines(description, total, unit, done)
        return
    with progress.Progress(
        progress.TextColumn("{task.description}", markup=False),
        progress.BarColumn(),
        progress.MofNCompleteColumn(),
        progress.TextColumn("{task.fields[unit]}"),
        progress.TimeElapsedColumn(),
        progress.TextColumn("left"),
        progress.TimeRemainingColumn(),
        progress.TextColumn("{task.fields[note]}", markup=False),
        console=console,
    ) as bars:
        yield _Bar(
            bars, bars.add_task(description, total=total, completed=done, unit=unit, note="")
        )


class Progress:
    """What a job calls while it works; this one is silent."""

    def advance(self, count: int = 1, note: str = "") -> None:
        """Count `count` more units as done; `note` is shown beside them (a loss, a file)."""


class _Bar(Progress):
    def __init__(self, bars: Any, task: Any) -> None:
        self._bars, self._task = bars, task

    def advance(self, count: int = 1, note: str = "") -> None:
        self._bars.update(self._task, advance=count, note=printable(note))


class _Lines(Progress):
    def __init__(self, description: str, total: int, unit: str, done: int) -> None:
        self._description, self._total, self._unit = description, total, unit
        self._first = self._done = done
        self._began = time.monotonic()
        self._printed = -LOG_EVERY

    def advance(self, count: int = 1, note: str = "") -> None:
        self._done += count
        now = time.monotonic()
        if now - self._printed < LOG_EVERY and self._done < self._total:
            return
        self._printed = now
        elapsed = now - self._began
        rate = (self._done - self._first) / max(elapsed, 1e-9)
        left = (self._total - self._done) / max(rate, 1e-6)
        say(
            f"{self._description}: {self._done}/{self._total} {self._unit}, "
            f"{_clock(elapsed)} elapsed, {_clock(left)} left {note}".rstrip()
        )


def _clock(seconds: float) -> str:
    return str(datetime.timedelta(seconds=round(seconds)))
