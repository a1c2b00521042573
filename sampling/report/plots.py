"""Plots of a sweep: quality against cost, side by side."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullLocator, StrMethodFormatter
from matplotlib.transforms import offset_copy

from ..figure_style import DPI, FAINT, FAMILY_LOOKS, INK, LARGE, REFERENCE, SMALL, STYLE, render_png
from ..schedules.language import parse
from ..sweep.measures import Measure, ResultRow, front_of

COSTS = {"nfe": "network evaluations", "seconds_per_clip": "network seconds"}
LINE = 1.25 * SMALL  # points from one name to the next
LEADER = {"arrowstyle": "-", "lw": 0.5, "color": REFERENCE}
LEGEND = 125  # characters across a figure

Lines = Mapping[
    str, Sequence[ResultRow]
]  # schedules that belong together, by the name of their line


@dataclass(frozen=True)
class Panel:
    """A measure against a cost."""

    measure: Measure
    cost: str
    """A column: a key of `COSTS`."""
    front: bool = False
    """Draw the Pareto front, and name its points, instead of joining each line's points."""


def draw_plots(panels: Sequence[Panel], lines: Lines, baselines: Sequence[ResultRow]) -> bytes:
    """A PNG of the panels side by side, the names of the lines below."""
    with matplotlib.style.context(["default", STYLE]):
        figure = plot_figure(panels, lines, baselines)
        return render_png(figure, bbox_inches="tight", pad_inches=0.02)


def plot_figure(panels: Sequence[Panel], lines: Lines, baselines: Sequence[ResultRow]) -> Figure:
    """What `draw_plots` draws."""
    columns = max(1, min(4, LEGEND // (max(map(len, lines)) + 6)))
    height = 2.7 + 0.15 * math.ceil(len(lines) / columns)
    figure = Figure(figsize=(7.2, height), dpi=DPI, layout="constrained")
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, panel in zip(grid, panels, strict=True):
        drawn = _draw_lines(axes, panel, lines)
        _style_panel(axes, panel, [row for rows in lines.values() for row in rows])
        _draw_baselines(axes, panel, lines, baselines)
    figure.legend(
        handles=drawn,
        labels=list(lines),
        loc="outside lower left",
        ncols=columns,
        fontsize=SMALL,
        frameon=False,
        handlelength=1.2,
    )
    figure.draw_without_rendering()  # names are placed by pixels: the layout has to be final
    figure.set_layout_engine("none")
    for axes, panel in zip(grid, panels, strict=True):
        if panel.front:
            _draw_front(figure, axes, panel, lines)
    return figure


def _looks(lines: Lines) -> dict[str, tuple[str, str, bool]]:
    """Each line's colour, which is its solver's, its marker, and whether that is filled."""
    ranks: dict[str, int] = {}
    looks = {}
    for name, rows in lines.items():
        solver = parse(rows[0].name).solver.name
        rank = ranks[solver] = ranks.get(solver, -1) + 1
        colour, _ = FAMILY_LOOKS[list(ranks).index(solver) % len(FAMILY_LOOKS)]
        again, marker = divmod(rank, len(FAMILY_LOOKS))
        looks[name] = colour, FAMILY_LOOKS[marker][1], again == 0
    return looks


def _draw_lines(axes: Axes, panel: Panel, lines: Lines) -> list[Line2D]:
    drawn = []
    for rank, (name, (colour, marker, filled)) in enumerate(_looks(lines).items()):
        drawn += axes.plot(
            [row[panel.cost] for row in lines[name]],
            [row[panel.measure.column] for row in lines[name]],
            color=colour,
            marker=marker,
            markersize=max(3.4, 5 - 0.25 * rank),  # one behind another shows its rim
            markerfacecolor=colour if filled else "white",
            markeredgecolor="white" if filled else colour,
            markeredgewidth=0.4,
            linestyle="none" if panel.front else "-",
            linewidth=0.9,
            zorder=3,
        )
    return drawn


def _style_panel(axes: Axes, panel: Panel, rows: Sequence[ResultRow]) -> None:
    costs = [row[panel.cost] for row in rows]
    decades = math.log10(max(costs) / min(costs))
    before = 0.3 * decades + 0.15 if panel.front else 0.15  # names stand left of their points
    axes.set_xscale("log")
    axes.set_xlim(min(costs) / 10**before, max(costs) * 10**0.15)
    shown = (1, 2, 5) if decades + before < 1.4 else (1, 3) if decades + before < 2.4 else (1,)
    axes.xaxis.set_major_locator(LogLocator(subs=shown))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(y=0.12)
    axes.set_xlabel(COSTS[panel.cost])
    title = f"{panel.measure.title} ({panel.measure.unit}) {panel.measure.arrow}"
    axes.set_title(title, loc="left", fontsize=LARGE)


def _draw_baselines(axes: Axes, panel: Panel, lines: Lines, baselines: Sequence[ResultRow]) -> None:
    """Horizontal lines, named beyond the right edge, where they lie near the schedules' values."""
    column, better = panel.measure.column, panel.measure.better
    values = [row[column] for rows in lines.values() for row in rows]
    low, high = np.nanmin(values), np.nanmax(values)
    reach = (high - low) / 2 or math.inf
    near = [row for row in baselines if low - reach <= row[column] <= high + reach]
    for row in near:
        axes.axhline(row[column], color=REFERENCE, lw=0.5, zorder=0)
    bottom, top = axes.get_ylim()
    room = 0.15 * (top - bottom) * panel.front  # for names, on the better side
    bottom, top = axes.set_ylim(bottom - room * (better < 0), top + room * (better > 0))
    free = -math.inf
    for row in sorted(near, key=lambda row: row[column]):
        place = (row[column] - bottom) / (top - bottom)
        free = max(place, free)
        axes.annotate(
            row.name,
            xy=(1.0, place),
            xytext=(1.05, free),
            xycoords="axes fraction",
            va="center",
            fontsize=SMALL,
            color=FAINT,
            annotation_clip=False,
            parse_math=False,
            arrowprops=LEADER | {"shrinkA": 0, "shrinkB": 0},
        )
        free += LINE / 72 / 2.0  # a panel is a little higher than 2 inches


def _draw_front(figure: Figure, axes: Axes, panel: Panel, lines: Lines) -> None:
    """The front as stairs, its points named in the corner that no point lies in.

    What lies there would be cheaper and better than a point of the front. So a name whose corner is
    at its point covers no other, wherever in that corner it has to move out of the way of the names
    before.
    """
    column, better = panel.measure.column, panel.measure.better
    looks = _looks(lines)
    line_of = {row.name: name for name, rows in lines.items() for row in rows}
    front = front_of([row for rows in lines.values() for row in rows], panel.cost, panel.measure)
    costs, values = [row[panel.cost] for row in front], [row[column] for row in front]
    axes.step(costs, values, where="post", color=INK, lw=0.8, zorder=1)
    away = offset_copy(axes.transData, figure, -4, 4 * better, "points")
    free = -math.inf
    for row, cost, value in zip(front, costs, values, strict=True):
        x, y = away.transform((cost, value))
        free = max(better * y, free)
        axes.annotate(
            short_name(row.name),
            xy=(cost, value),
            xytext=(x, better * free),
            textcoords="figure pixels",
            ha="right",
            va="top" if better < 0 else "bottom",
            fontsize=SMALL,
            color=looks[line_of[row.name]][0],
            arrowprops=LEADER | {"relpos": (1, better < 0), "shrinkB": 3},
        )
        free += LINE * DPI / 72


def short_name(name: str) -> str:
    """A schedule as a plot names it: of its moves, only resampling says how."""
    schedule = parse(name)
    solver = f"{schedule.solver.name}:{schedule.steps}"
    moves = (m.written_options()[1:-1] if m.name == "resample" else m.name for m in schedule.moves)
    return ", ".join([solver, *moves])
