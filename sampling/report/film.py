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
from matplotlib.figure import Figure
from matplotlib.text import Text

from ...data.videos import Frames, Masks
from ..figure_style import DPI, FAINT, SMALL, STYLE, render_png

PAGE = 1900  # pixels of the PNG for a row of frames: with its label about 7 inches
WIDEST = 320  # pixels of the PNG for a frame
FRAME_GAP = 10  # pixels of the PNG between frames
OUTLINE = (228, 0, 43)
THICKNESS = 4  # pixels of the PNG, half of them on either side of the hole's border


@dataclass(frozen=True)
class Strip:
    """One row of a film figure."""

    label: str
    """What the row is; may have two lines."""
    note: str
    """Shown small under the label, or empty."""
    frames: Frames


def draw_film(
    strips: Sequence[Strip],
    mask: Masks,
    shown: Sequence[int],
) -> bytes:
    """A PNG of the frames `shown` of every strip, in a grid, the hole outlined on each.

    Frames are magnified by a whole number without smoothing, so that what is printed is what was
    made; only frames wider than a cell are reduced.
    """
    _, high, wide = mask.shape
    cell = height, width = _cell_size(high, wide, columns=len(shown))
    frames = np.stack([strip.frames[list(shown)] for strip in strips])
    holes = np.broadcast_to(mask[list(shown), ..., None], (*frames.shape[:-1], 1))
    canvas = _lay_out(frames, cell, background=255)
    canvas[hole_outline(_lay_out(holes, cell, background=0)[..., 0])] = OUTLINE
    with matplotlib.style.context(["default", STYLE]):
        figure = Figure(dpi=DPI)
        axes = figure.add_axes((0, 0, 1, 1))  # in pixels of the PNG, (0, 0) the canvas's top left
        axes.axis("off")
        names = []
        for row, strip in enumerate(strips):
            names += _name_row(axes, strip, row * (height + FRAME_GAP) + height / 2)
        for column, frame in enumerate(shown):
            text = f"frame {frame}" if column == 0 else str(frame)
            middle = column * (width + FRAME_GAP) + width / 2
            axes.text(middle, -FRAME_GAP, text, ha="center", color=FAINT, fontsize=SMALL)
        left = math.ceil(max(name.get_window_extent().width for name in names)) + 3 * FRAME_GAP
        top = 4 * FRAME_GAP
        high, wide, _ = canvas.shape
        figure.set_size_inches((left + wide) / DPI, (top + high) / DPI)
        axes.imshow(canvas, extent=(0, wide, high, 0), interpolation="nearest", aspect="auto")
        axes.set(xlim=(-left, wide), ylim=(high, -top))
        return render_png(figure)


def _name_row(axes: Axes, strip: Strip, middle: float) -> list[Text]:
    """The label, and the note below it, left of the row's frames."""
    label = axes.text(
        -2 * FRAME_GAP,
        middle,
        strip.label,
        va="bottom" if strip.note else "center",
        ha="right",
        linespacing=1.1,
        parse_math=False,
    )
    note = axes.text(
        -2 * FRAME_GAP, middle, strip.note, va="top", ha="right", fontsize=SMALL, color=FAINT
    )
    return [label, note]


def hole_outline(mask: UInt8[np.ndarray, "high wide"]) -> Bool[np.ndarray, "high wide"]:
    """Where to draw the border of the hole, THICKNESS pixels wide."""
    padded = np.pad(mask, THICKNESS)
    brush = np.ones((THICKNESS + 1, THICKNESS + 1), np.uint8)
    border = cv2.morphologyEx(padded, cv2.MORPH_GRADIENT, brush)
    return border[THICKNESS:-THICKNESS, THICKNESS:-THICKNESS] == 1


def _cell_size(height: int, width: int, columns: int) -> tuple[int, int]:
    """Pixels of the PNG for a frame: a whole multiple of its size, or less than it."""
    room = min(PAGE / columns, WIDEST)
    times = round(room / width)
    scale = times if times >= 1 else room / width
    return round(height * scale), round(width * scale)


def _lay_out(
    frames: UInt8[np.ndarray, "rows columns height width channels"],
    cell: tuple[int, int],
    background: int,
) -> UInt8[np.ndarray, "high wide channels"]:
    """All frames in a grid, each with FRAME_GAP below it and to its right."""
    height, width = cell
    reduced = frames.shape[3] > width and frames.shape[-1] == 3  # a mask stays one of 0 and 1
    method = cv2.INTER_AREA if reduced else cv2.INTER_NEAREST_EXACT
    cells = [
        cv2.resize(frame, (width, height), interpolation=method).reshape(height, width, -1)
        for frame in rearrange(frames, "rows columns h w c -> (rows columns) h w c")
    ]
    spaced = np.pad(
        cells, ((0, 0), (0, FRAME_GAP), (0, FRAME_GAP), (0, 0)), constant_values=background
    )
    return rearrange(spaced, "(row column) h w c -> (row h) (column w) c", row=len(frames))
