"""`vidfill schedule`: shows what a schedule does and costs, without running it."""

from __future__ import annotations

import dataclasses
import itertools
import json
import textwrap
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ... import jobs
from ...errors import BadInput
from . import program as programs
from .language import parse
from .program import CLEAN, Kind, Program, compile_schedule
from .solvers import SOLVERS


def _describe_solvers() -> str:
    """The solvers' part of the help."""
    lines = ["Solvers, one network evaluation a step unless it says so"]
    for name, solver in SOLVERS.items():
        lines += textwrap.wrap(
            solver.description, 100, initial_indent=f"    {name:8}", subsequent_indent=" " * 12
        )
    return "\n".join(lines)


EXAMPLES = f"""examples:
  vidfill schedule 'ddpm:1000+resample(n=4)'
  vidfill schedule 'ddim:250(spacing=leading)+jump(length=10,times=10)+inject'
  vidfill schedule 'dpmpp:20+restart(low=0.2,high=0.4,times=2,steps=5)' --json

{programs.__doc__}
{_describe_solvers()}
"""

COLUMNS, ROWS = 72, 14  # characters of the plot in the terminal
DOTS = np.array([[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]])  # of a Braille character


@dataclass(frozen=True)
class ScheduleConfig:
    """Show what a sampling schedule does: its transitions, its network evaluations, and a plot."""

    schedule: str
    """The schedule, in quotes: SOLVER:STEPS[(key=value,…)][+MOVE[(key=value,…)]]…, as below."""
    timesteps: int = 1000
    """Diffusion steps T of the model."""
    json: bool = False
    """Print one line of JSON instead of the table and the plot."""


def describe(config: ScheduleConfig) -> Program:
    """Print the schedule, and return the program.

    Raises:
        BadInput: the schedule cannot be read, or cannot be walked on so many timesteps.
    """
    if config.timesteps < 1:
        raise BadInput(f"timesteps is {config.timesteps}: give 1 or more")
    program = compile_schedule(parse(config.schedule), config.timesteps)
    if config.json:
        counts = {f"{kind.value}_moves": program.count(kind) for kind in Kind}
        about = {"schedule": str(program.schedule), "timesteps": program.timesteps}
        print(json.dumps({**about, "nfe": program.nfe, **counts}))
    else:
        show(program)
    return program


def cost_by_part(program: Program) -> list[tuple[str, tuple[int, ...]]]:
    """What each part of the schedule adds: network evaluations, and DOWN, UP and INJECT."""
    schedule = program.schedule
    costs: list[tuple[str, tuple[int, ...]]] = []
    before: tuple[int, ...] = (0, 0, 0, 0)
    for length in range(len(schedule.moves) + 1):
        shorter = dataclasses.replace(schedule, moves=schedule.moves[:length])
        part = f"+{shorter.moves[-1]}" if length else str(shorter)
        walked = compile_schedule(shorter, program.timesteps)
        after = (walked.nfe, *map(walked.count, Kind))
        costs.append((part, tuple(b - a for a, b in zip(before, after, strict=True))))
        before = after
    return [*costs, ("all", before)]


def show(program: Program) -> None:
    """Print what each part of a schedule costs, the plain walk's levels, and the plot."""
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False, markup=False)
    table = Table("", "evaluations", "DOWN", "UP", "INJECT", box=None, pad_edge=False)
    for column in table.columns[1:]:
        column.justify = "right"
    for part, counts in cost_by_part(program):
        table.add_row(part, *(f"{count:,}" for count in counts))
    console.print(table)
    console.print(f"\nplain walk, of {program.timesteps:,} timesteps: {_plain_walk(program)}\n")
    console.print(plot(program), soft_wrap=True)


def _plain_walk(program: Program) -> str:
    schedule = program.schedule
    spacing = schedule.solver.get("spacing", str)
    levels = programs.spaced_timesteps(schedule.steps, program.timesteps, spacing)
    texts = [*map(str, levels), "clean"]
    return " → ".join(texts if len(texts) <= 7 else [*texts[:3], "…", *texts[-3:]])


def plot(program: Program) -> str:
    """The level after each transition, in Braille characters; pure noise is at the top."""
    levels = np.array(program.levels, dtype=float)
    across, down = 2 * COLUMNS, 4 * ROWS
    heights = (levels - CLEAN) / (program.timesteps - 1 - CLEAN) * (down - 1)
    edges = np.linspace(0, len(levels) - 1, across + 1)
    canvas = np.zeros((down, across), dtype=bool)
    for column, (begin, end) in enumerate(itertools.pairwise(edges)):
        inside = heights[int(np.ceil(begin)) : int(end) + 1]
        ends = np.interp([begin, end], np.arange(len(heights)), heights)
        low, high = (round(float(f([*inside, *ends]))) for f in (min, max))
        canvas[down - 1 - high : down - low, column] = True
    characters = 0x2800 + (canvas.reshape(ROWS, 4, COLUMNS, 2) * DOTS[:, None]).sum(axis=(1, 3))
    lines = ["".join(map(chr, row)) for row in characters]
    names = {0: f"{program.timesteps - 1:,}", ROWS - 1: "clean"}
    margin = max(map(len, names.values()))
    body = [f"{names.get(row, ''):>{margin}} ┤{line}" for row, line in enumerate(lines)]
    moves = f"{len(levels) - 1:,} moves"
    axis = f"{'':{margin}} └{'─' * COLUMNS}"
    return "\n".join([*body, axis, f"{'':{margin}}  0{moves:>{COLUMNS - 1}}"])


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of `vidfill schedule`."""
    return jobs.main(ScheduleConfig, describe, argv, verb="schedule", examples=EXAMPLES)
