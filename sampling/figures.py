"""Draws a report's figures for print: film strips with the hole outlined, quality against cost."""

from __future__ import annotations

import dataclasses
import io
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import cv2
import matplotlib.style
import numpy as np
from einops import rearrange
from jaxtyping import Bool, Float, UInt8
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.text import Text
from matplotlib.ticker import NullLocator, StrMethodFormatter
from matplotlib.transforms import Bbox

DPI = 300
LARGE, SMALL = 7.5, 6.5  # points, of names and of numbers
PAGE = 1900  # pixels of the PNG for a row of frames: with its label about 7 inches
WIDEST = 320  # pixels of the PNG for a frame
GAP = 10  # pixels of the PNG between frames
OUTLINE = "#E4002B"
INK, FAINT, REFERENCE = "#1A1A1A", "#6B6B6B", "#B0B0B0"
# Okabe and Ito's colours, told apart by colour-blind readers; the marker says the same again.
FAMILY_LOOKS = (
    ("#0072B2", "o"),
    ("#D55E00", "s"),
    ("#009E73", "^"),
    ("#CC79A7", "D"),
    ("#56B4E9", "v"),
)
LEADER = {"arrowstyle": "-", "lw": 0.5, "shrinkA": 0, "shrinkB": 1.5}
FAR = 20  # pixels of the PNG from where on a label needs a leader to its point
STYLE = {
    "font.family": "DejaVu Sans",  # comes with matplotlib: the same on every machine
    "font.size": LARGE,
    "text.color": INK,
    "axes.edgecolor": FAINT,
    "axes.labelcolor": INK,
    "axes.linewidth": 0.6,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "xtick.labelsize": SMALL,
    "ytick.labelsize": SMALL,
    "xtick.major.width": 0.6,
    "ytick.major.width": 0.6,
    "xtick.major.size": 2.5,
    "ytick.major.size": 2.5,
}


@dataclass(frozen=True)
class Strip:
    """One row of a film figure."""

    label: str
    """What the row is; may have two lines."""
    note: str
    """Shown small under the label, or empty."""
    frames: UInt8[np.ndarray, "frames height width 3"]


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


def draw_film(
    strips: Sequence[Strip],
    mask: UInt8[np.ndarray, "frames height width"],
    shown: Sequence[int],
) -> bytes:
    """A PNG of the frames `shown` of every strip, in a grid, the hole outlined on each.

    Frames are magnified by a whole number without smoothing, so that what is printed is what was
    made; only frames wider than a cell are reduced.
    """
    _, height, width = mask.shape
    cell = _cell_size(height, width, columns=len(shown))
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(dpi=DPI)
        labels = [_row_label(figure, strip) for strip in strips]
        left = max(text.get_window_extent().width for row in labels for text in row) + 3 * GAP
        axes = _film_axes(figure, _film_canvas(strips, shown, cell), math.ceil(left), top=4 * GAP)
        _number_frames(axes, shown, cell)
        for row, texts in enumerate(labels):
            _place_row_label(axes, texts, row, cell)
            _outline_holes(axes, mask[list(shown)], row, cell)
        return _png(figure)


def hole_outline(mask: Bool[np.ndarray, "height width"]) -> list[np.ndarray]:
    """The border of the hole as segments [[x, y], [x, y]] along the edges of pixels.

    Coordinates are pixels' corners: (0, 0) to (width, height).
    """
    padded = np.pad(mask, 1).astype(np.int8)
    horizontal = np.diff(padded, axis=0)[:, 1:-1] != 0
    vertical = np.diff(padded, axis=1)[1:-1] != 0
    return [np.array([[start, y], [stop, y]]) for y, start, stop in _runs(horizontal)] + [
        np.array([[x, start], [x, stop]]) for x, start, stop in _runs(vertical.T)
    ]


def _png(figure: Figure, **options: Any) -> bytes:
    content = io.BytesIO()
    figure.savefig(content, format="png", **options)
    return content.getvalue()


def _cell_size(height: int, width: int, columns: int) -> tuple[int, int]:
    """Pixels of the PNG for a frame: a whole multiple of its size, or less than it."""
    room = min(PAGE / columns, WIDEST)
    times = round(room / width)
    scale = times if times >= 1 else room / width
    return round(height * scale), round(width * scale)


def _film_canvas(
    strips: Sequence[Strip], shown: Sequence[int], cell: tuple[int, int]
) -> UInt8[np.ndarray, "high wide 3"]:
    """All frames on white, each with GAP below it and to its right."""
    height, width = cell
    reduced = strips[0].frames.shape[2] > width
    method = cv2.INTER_AREA if reduced else cv2.INTER_NEAREST_EXACT
    frames = [strip.frames[frame] for strip in strips for frame in shown]
    cells = np.stack([cv2.resize(frame, (width, height), interpolation=method) for frame in frames])
    spaced = np.pad(cells, ((0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=255)
    return rearrange(spaced, "(row column) h w rgb -> (row h) (column w) rgb", column=len(shown))


def _film_axes(
    figure: Figure, canvas: UInt8[np.ndarray, "high wide 3"], left: int, top: int
) -> Axes:
    """Axes over the whole figure in pixels of the PNG, (0, 0) being the canvas's top left."""
    high, wide, _ = canvas.shape
    figure.set_size_inches((left + wide) / DPI, (top + high) / DPI)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.axis("off")
    axes.imshow(canvas, extent=(0, wide, high, 0), interpolation="nearest", aspect="auto")
    axes.set(xlim=(-left, wide), ylim=(high, -top))
    return axes


def _number_frames(axes: Axes, shown: Sequence[int], cell: tuple[int, int]) -> None:
    _, width = cell
    for column, frame in enumerate(shown):
        axes.text(
            column * (width + GAP) + width / 2,
            -GAP,
            f"frame {frame}" if column == 0 else str(frame),
            ha="center",
            color=FAINT,
            fontsize=SMALL,
        )


def _outline_holes(
    axes: Axes, masks: UInt8[np.ndarray, "columns height width"], row: int, cell: tuple[int, int]
) -> None:
    height, width = cell
    scale = np.array([width / masks.shape[2], height / masks.shape[1]])
    corners = [(column * (width + GAP), row * (height + GAP)) for column in range(len(masks))]
    segments = [
        segment * scale + corner
        for corner, mask in zip(corners, masks, strict=True)
        for segment in hole_outline(mask == 1)
    ]
    axes.add_collection(
        LineCollection(segments, colors=OUTLINE, linewidths=0.7, capstyle="projecting")
    )


def _row_label(figure: Figure, strip: Strip) -> list[Text]:
    texts = [figure.text(0, 0, strip.label, fontsize=LARGE, ha="right", linespacing=1.1)]
    if strip.note:
        texts.append(figure.text(0, 0, strip.note, fontsize=SMALL, ha="right", color=FAINT))
    return texts


def _place_row_label(axes: Axes, texts: Sequence[Text], row: int, cell: tuple[int, int]) -> None:
    """The label, and the note below it, left of the row's frames and around their middle."""
    height, _ = cell
    heights = [text.get_window_extent().height for text in texts]
    lead = GAP / 2
    top = row * (height + GAP) + (height - sum(heights) - lead * (len(texts) - 1)) / 2
    for text, own in zip(texts, heights, strict=True):
        text.set(transform=axes.transData, x=-2 * GAP, y=top, va="top")
        top += own + lead


def _runs(marks: Bool[np.ndarray, "line place"]) -> list[tuple[int, int, int]]:
    """The stretches of marks of every line, as (line, start, stop)."""
    turns = np.diff(np.pad(marks, ((0, 0), (1, 1))).astype(np.int8), axis=1)
    starts, stops = np.argwhere(turns == 1), np.argwhere(turns == -1)
    return [
        (int(line), int(start), int(stop))
        for (line, start), (_, stop) in zip(starts, stops, strict=True)
    ]


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
