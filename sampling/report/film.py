"""Film strips: frames side by side, holes outlined."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import cv2
import matplotlib.style
import numpy as np
from einops import rearrange
from jaxtyping import Bool, UInt8
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.text import Text

from ..figure_style import DPI, FAINT, LARGE, SMALL, STYLE, _png

PAGE = 1900  # pixels of the PNG for a row of frames: with its label about 7 inches
WIDEST = 320  # pixels of the PNG for a frame
GAP = 10  # pixels of the PNG between frames
OUTLINE = "#E4002B"


@dataclass(frozen=True)
class Strip:
    """One row of a film figure."""

    label: str
    """What the row is; may have two lines."""
    note: str
    """Shown small under the label, or empty."""
    frames: UInt8[np.ndarray, "frames height width 3"]


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
