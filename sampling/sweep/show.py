"""A sweep's plan and results, as printed."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence

from rich.console import Console
from rich.table import Table

from ...errors import say
from ..capacity import find_capacity, share_capacity, time_evaluation
from .baselines import BASELINES
from .inputs import SweepInputs, make_requests
from .results import Sweep

TABLE_WIDTH = 200  # characters, where there is no terminal to ask


def show_plan(inputs: SweepInputs, batch_size: int, processes: int = 1) -> None:
    """Print each schedule's evaluations, and the network's time from one measured evaluation.

    The time is t(C) · max(ΣNFE / C, longest), where t(C) is that of one evaluation of a full batch
    of C, of all processes together.
    """
    count = len(inputs.examples) * inputs.completions
    requests = list(make_requests(inputs).values())
    batch = batch_size or find_capacity(inputs.denoiser, requests)
    batch = min(share_capacity(batch, requests, processes), len(requests))
    seconds = time_evaluation(inputs.denoiser, requests[0].condition(), batch)
    slots = batch * processes
    shown = Table("schedule", "NFE", "completions", "evaluations", "network time")
    for name, program in inputs.sampled.items():
        evaluations = program.nfe * count
        spent = f"{evaluations * seconds / slots:,.1f} s"
        shown.add_row(name, f"{program.nfe:,}", f"{count:,}", f"{evaluations:,}", spent)
    nfes = [program.nfe for program in inputs.sampled.values()]
    whole = seconds * max(sum(nfes) * count / slots, max(nfes))
    shown.add_section()
    shown.add_row("all", "", f"{count:,}", f"{sum(nfes) * count:,}", f"{whole:,.1f} s")
    _console().print(shown)
    say(
        f"one evaluation of a batch of {batch} takes {seconds:.3f} s on {inputs.device}; "
        "decoding and metrics come on top",
        file=sys.stdout,
    )


def show_results(rows: Sequence[Mapping[str, str]]) -> None:
    """Print the results as a table, if there are any."""
    if not rows:
        return
    shown = Table(*(column.replace("_", " ") for column in rows[0]))
    shown.columns[0].overflow = "fold"
    for column in shown.columns[1:]:
        column.justify = "right"
    for row in rows:
        name, *numbers = row.values()
        shown.add_row(name, *(f"{float(number):.4g}" for number in numbers))
        if name == [*BASELINES][-1]:
            shown.add_section()
    _console().print(shown)


def _console() -> Console:
    console = Console()
    return console if console.is_terminal else Console(width=TABLE_WIDTH)


WITHOUT_NETWORK = ("fill", "classic", "flow")  # baselines


def describe_gain(swept: Sweep) -> str:
    """The best schedule beside the best baseline without a network."""
    plain = [row for row in swept.baselines if row.name in WITHOUT_NETWORK]
    rival = max(plain, key=lambda row: row["psnr_hole"])
    best = swept.best
    gain = best["psnr_hole"] - rival["psnr_hole"]
    return (
        f"best schedule: {best.name}, {best['psnr_hole']:.2f} dB in the hole, {gain:+.2f} dB "
        f"against {rival.name}, the best without a network"
    )
