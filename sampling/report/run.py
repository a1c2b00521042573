"""`vidfill report`: a finished sweep -> a page that needs nothing else, and figures for print."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ... import jobs
from ...files import write_atomically
from ...progress import show_progress
from ..sweep.results import Sweep, read_sweep
from .drawings import OPTIONAL, plan_drawings
from .page import render_page
from .settings import EXAMPLES, ReportConfig


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
