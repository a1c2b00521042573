"""`vidfill report`: a finished sweep -> a page that needs nothing else, and figures for print."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ... import jobs
from ...files import write_atomically
from ...progress import show_progress
from ..sweep.results import Sweep, read_sweep
from .drawings import OPTIONAL, plan_drawings
from .page import render_page

EXAMPLES = """examples:
  vidfill report runs/sweep
  vidfill report runs/sweep --out paper/figures --clip video_10003_00000_stationary
"""


@dataclass(frozen=True)
class ReportConfig:
    """Write a page and figures for print from a finished sweep.

    OUT/index.html is self-contained: it can be mailed or opened on a phone, a reader can sort and
    filter its tables, and the kept examples play in it. The figures are PNGs at 300 dpi: front (the
    Pareto front of quality against cost), figure2 and figure3 (masked, true and generated frames,
    for stationary and for variable masks), figure4 (a row for each number of resamplings) and
    quality-nfe.
    """

    sweep: Path
    """The output folder of `vidfill sweep`; nothing else is read."""
    out: Path | None = None
    """Where to write; by default, the folder `report` inside the sweep's."""
    clip: str = ""
    """The kept example to show in the figures of its mask family; by default, of each family the
    one whose hole hides the most, whatever the results on it."""


def report(config: ReportConfig) -> Path:
    """Write the page and the figures; return the page's path.

    Raises:
        BadInput: the folder is not a finished sweep, or the output folder holds something else.
    """
    sweep = cheapest_first(read_sweep(config.sweep))
    drawings = plan_drawings(sweep, config.clip)
    out = config.out or config.sweep / "report"
    with (
        jobs.claim(out, "report", config, may_change=("clip", "sweep")),
        show_progress("drawing", len(drawings), "figures") as shown,
    ):
        pictures = []
        for drawing in drawings:
            pictures.append(drawing.draw())
            write_atomically(out / drawing.file, pictures[-1])
            shown.advance(note=drawing.file)
        for stale in OPTIONAL - {drawing.file for drawing in drawings}:  # of another sweep or clip
            (out / stale).unlink(missing_ok=True)
        page = out / "index.html"
        write_atomically(page, render_page(sweep, drawings, pictures).encode())
    return page


def cheapest_first(sweep: Sweep) -> Sweep:
    """The sweep with its schedules, and what compares them, in the order that a report has."""
    schedules = sorted(sweep.schedules, key=lambda row: row["nfe"])
    ranks = {row.name: rank for rank, row in enumerate(schedules)}
    masks = (*sweep.about.masks, *(line["masks"] for line in sweep.comparison))
    families = list(dict.fromkeys(masks))
    comparison = sorted(
        sweep.comparison,
        key=lambda line: (families.index(line["masks"]), ranks.get(line["schedule"], len(ranks))),
    )
    return dataclasses.replace(sweep, schedules=schedules, comparison=comparison)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of `vidfill report`."""
    return jobs.main(ReportConfig, report, argv, verb="report", examples=EXAMPLES)
