"""Draws a report's figures for print: film strips with the hole outlined, quality against cost."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import matplotlib.style
import numpy as np
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import NullLocator, StrMethodFormatter
from matplotlib.transforms import Bbox

from ..figure_style import DPI, FAINT, FAMILY_LOOKS, INK, LARGE, REFERENCE, SMALL, STYLE, _png

LEADER = {"arrowstyle": "-", "lw": 0.5, "shrinkA": 0, "shrinkB": 1.5}
FAR = 20  # pixels of the PNG from where on a label needs a leader to its point


@dataclass(frozen=True)
class Point:
    """One schedule in the plot of quality against cost."""

    family: str
    """The solver: its points share a colour and a marker."""
    label: str
    cost: float
    """Network evaluations, or seconds."""
    values: tuple[float, ...]
    """One for each panel."""


@dataclass(frozen=True)
class Panel:
    """One measure in the plot of quality against cost."""

    title: str
    references: tuple[tuple[str, float], ...]
    """The baselines' names and values: horizontal lines."""


Fronts = Sequence[tuple[Sequence[Point], str]]
"""Of each panel the points on its front, the cheapest first, and what they cost."""


def draw_quality(
    points: Sequence[Point], lines: Sequence[Sequence[Point]], panels: Sequence[Panel]
) -> bytes:
    """A PNG of every measure against the network evaluations a clip costs, side by side.

    `lines` are the points that are joined.
    """
    with matplotlib.style.context(["default", STYLE]):
        figure = quality_figure(points, lines, panels)
        return _png(figure, bbox_inches="tight", pad_inches=0.02)


def quality_figure(
    points: Sequence[Point], lines: Sequence[Sequence[Point]], panels: Sequence[Panel]
) -> Figure:
    """What `draw_quality` draws."""
    families = list(dict.fromkeys(point.family for point in points))
    looks = {
        family: FAMILY_LOOKS[index % len(FAMILY_LOOKS)] for index, family in enumerate(families)
    }
    figure = Figure(figsize=(7.2, 2.7), dpi=DPI)
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    figure.subplots_adjust(left=0.04, right=0.93, top=0.86, bottom=0.15, wspace=0.68)
    for index, (axes, panel) in enumerate(zip(grid, panels, strict=True)):
        _draw_lines(axes, index, points, lines, looks)
        _style_panel(axes, panel, points)
        _draw_references(axes, panel)
        _label_points(axes, index, points, lines, panel, looks, named=points)
    _draw_legend(figure, grid[0], len(families))
    return figure


def _draw_lines(
    axes: Axes,
    index: int,
    points: Sequence[Point],
    lines: Sequence[Sequence[Point]],
    looks: dict[str, tuple[str, str]],
) -> None:
    for line in lines:
        colour, _ = looks[line[0].family]
        axes.plot([p.cost for p in line], [p.values[index] for p in line], color=colour, lw=1.0)
    _draw_dots(axes, index, points, looks)


def _draw_dots(
    axes: Axes, index: int, points: Sequence[Point], looks: dict[str, tuple[str, str]]
) -> None:
    for rank, (family, (colour, marker)) in enumerate(looks.items()):
        own = [point for point in points if point.family == family]
        axes.plot(
            [p.cost for p in own],
            [p.values[index] for p in own],
            color=colour,
            marker=marker,
            linestyle="none",
            markersize=max(
                4.8 - 0.6 * rank, 3.6
            ),  # one that lies upon another leaves its rim to see
            markeredgecolor="white",
            markeredgewidth=0.4,
            label=family,
            zorder=3,
        )


def draw_front(points: Sequence[Sequence[Point]], panels: Sequence[Panel], fronts: Fronts) -> bytes:
    """A PNG of one measure against several costs, side by side, with the front of each.

    `points` are each panel's; only those on its front are named.
    """
    with matplotlib.style.context(["default", STYLE]):
        return _png(front_figure(points, panels, fronts), bbox_inches="tight", pad_inches=0.02)


def front_figure(
    points: Sequence[Sequence[Point]], panels: Sequence[Panel], fronts: Fronts
) -> Figure:
    """What `draw_front` draws."""
    families = list(dict.fromkeys(point.family for point in points[0]))
    looks = {f: FAMILY_LOOKS[index % len(FAMILY_LOOKS)] for index, f in enumerate(families)}
    figure = Figure(figsize=(7.2, 2.9), dpi=DPI)
    grid = figure.subplots(1, len(panels), squeeze=False)[0]
    figure.subplots_adjust(left=0.05, right=0.9, top=0.86, bottom=0.15, wspace=0.45)
    for axes, panel, own, (front, name) in zip(grid, panels, points, fronts, strict=True):
        line = _stairs(front)
        axes.plot([p.cost for p in line], [p.values[0] for p in line], color=INK, lw=0.8, zorder=1)
        _draw_dots(axes, 0, own, looks)
        _style_panel(axes, panel, own)
        axes.set_xlabel(name)
        _draw_references(axes, panel)
        _label_points(axes, 0, own, [line], panel, looks, named=front)
    _draw_legend(figure, grid[0], len(families))
    return figure


def _stairs(front: Sequence[Point]) -> list[Point]:
    """The border of what the front's points are better than."""
    corners = [
        (before, dataclasses.replace(before, cost=after.cost))
        for before, after in itertools.pairwise(front)
    ]
    return [point for pair in corners for point in pair] + list(front[-1:])


def _draw_legend(figure: Figure, axes: Axes, families: int) -> None:
    figure.legend(
        *axes.get_legend_handles_labels(),
        loc="upper left",
        bbox_to_anchor=(0.03, 1.0),
        ncols=families,
        frameon=False,
        handlelength=1.2,
        borderaxespad=0,
    )


def _style_panel(axes: Axes, panel: Panel, points: Sequence[Point]) -> None:
    costs = [point.cost for point in points]
    axes.set_xscale("log")
    axes.set_xlim(min(costs) / 1.6, max(costs) * 3)  # room for a name beside the last point
    first, last = axes.get_xlim()
    decades = math.log10(last / first)
    round_numbers = (1, 2, 5) if decades < 1.7 else (1, 3) if decades < 2.7 else (1,)
    ticks = [digit * 10.0**power for power in range(-4, 8) for digit in round_numbers]
    axes.set_xticks([tick for tick in ticks if first <= tick <= last], minor=False)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.margins(y=0.12)
    axes.set_xlabel("network evaluations")
    axes.set_title(panel.title, loc="left", fontsize=LARGE)


def _draw_references(axes: Axes, panel: Panel) -> None:
    """Horizontal lines, named beyond the right edge, the names pushed apart where they collide."""
    for _, value in panel.references:
        axes.axhline(value, color=REFERENCE, lw=0.5, zorder=0)
    axes.autoscale_view(scalex=False)
    low, high = axes.get_ylim()
    axes.set_ylim(low, high)
    height = axes.get_window_extent().height
    spacing = 1.25 * SMALL * DPI / 72 / height
    wanted = sorted(((value - low) / (high - low), name) for name, value in panel.references)
    placed = _spread([place for place, _ in wanted], spacing)
    for (place, name), at in zip(wanted, placed, strict=True):
        axes.annotate(
            name,
            xy=(1.0, place),
            xytext=(1.07, at),
            xycoords="axes fraction",
            textcoords="axes fraction",
            va="center",
            fontsize=SMALL,
            color=FAINT,
            annotation_clip=False,
            arrowprops=LEADER | {"color": REFERENCE, "shrinkB": 0},
        )


def _spread(places: Sequence[float], spacing: float) -> list[float]:
    """Ascending places moved as little as need be to lie `spacing` apart."""
    blocks: list[list[float]] = []
    for place in places:
        blocks.append([place])
        while len(blocks) > 1 and _first(blocks[-1], spacing) < _last(blocks[-2], spacing):
            blocks[-2:] = [blocks[-2] + blocks[-1]]
    return [
        _first(block, spacing) + step * spacing for block in blocks for step in range(len(block))
    ]


def _first(block: Sequence[float], spacing: float) -> float:
    return float(np.mean(block)) - spacing * (len(block) - 1) / 2


def _last(block: Sequence[float], spacing: float) -> float:
    return _first(block, spacing) + spacing * len(block)


def _label_points(
    axes: Axes,
    index: int,
    points: Sequence[Point],
    lines: Sequence[Sequence[Point]],
    panel: Panel,
    looks: dict[str, tuple[str, str]],
    named: Sequence[Point],
) -> None:
    """Name points where its name covers no other point or name, and few lines."""
    dots = {point: _pixel(axes, point.cost, point.values[index]) for point in points}
    taken = [Bbox.from_extents(x - 8, y - 8, x + 8, y + 8) for x, y in dots.values()]
    drawn = _along_lines(axes, index, lines, panel)
    for point in sorted(named, key=lambda point: dots[point]):
        dot, (colour, _) = dots[point], looks[point.family]
        away, box = _free_place(axes, point.label, dot, taken, drawn)
        taken.append(box)
        axes.annotate(
            point.label,
            xy=(point.cost, point.values[index]),
            xytext=((box.x0 + box.x1) / 2 - dot[0], (box.y0 + box.y1) / 2 - dot[1]),
            textcoords="offset pixels",
            ha="center",
            va="center",
            fontsize=SMALL,
            color=colour,
            path_effects=[withStroke(linewidth=1.2, foreground="white")],
            arrowprops=LEADER | {"color": colour} if away > FAR else None,
        )


def _free_place(
    axes: Axes,
    label: str,
    dot: tuple[float, float],
    taken: Sequence[Bbox],
    drawn: Float[np.ndarray, "vertices 2"],
) -> tuple[int, Bbox]:
    """The place around its point where a label is the least in the way, and how far away it is."""
    text = axes.text(0, 0, label, fontsize=SMALL)
    size = text.get_window_extent()
    text.remove()
    panel = axes.get_window_extent()

    def cost(candidate: tuple[int, Bbox]) -> int:
        away, box = candidate
        overlaps = box.count_overlaps(taken)
        outside = box.x0 < panel.x0 or box.x1 > panel.x1 or box.y0 < panel.y0
        return 100 * (overlaps + int(outside)) + 2 * int(box.count_contains(drawn)) + away

    candidates = []
    for away in (10, FAR, 36, 52):  # pixels between the point and the label
        for angle in np.radians(range(0, 360, 30)):
            x = dot[0] + math.cos(angle) * (away + size.width / 2)
            y = dot[1] + math.sin(angle) * (away + size.height / 2)
            box = Bbox.from_bounds(x - size.width / 2, y - size.height / 2, size.width, size.height)
            candidates.append((away, box))
    return min(candidates, key=cost)


def _along_lines(
    axes: Axes, index: int, lines: Sequence[Sequence[Point]], panel: Panel
) -> Float[np.ndarray, "vertices 2"]:
    """Places all along the drawn lines, in figure pixels."""
    ends = [
        (_pixel(axes, a.cost, a.values[index]), _pixel(axes, b.cost, b.values[index]))
        for line in lines
        for a, b in itertools.pairwise(line)
    ]
    first, last = axes.get_xlim()
    ends += [(_pixel(axes, first, v), _pixel(axes, last, v)) for _, v in panel.references]
    return np.concatenate([np.linspace(a, b, 100) for a, b in ends] or [np.empty((0, 2))])


def _pixel(axes: Axes, cost: float, value: float) -> tuple[float, float]:
    x, y = axes.transData.transform((cost, value))
    return float(x), float(y)
