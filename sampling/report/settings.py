"""The configuration of `vidfill report`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

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
