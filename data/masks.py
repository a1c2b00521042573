"""Holes: drawn, filled, and brought to the latents' size. A mask is 1 in the hole, 0 elsewhere."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from .. import jobs
from ..seeding import derive_seed

Protocol = Literal["stationary", "variable"]
Colour = tuple[int, int, int]

GRID = 4  # cells on a side
HIDDEN_CELLS = 4  # of GRID * GRID
COVERAGE = HIDDEN_CELLS / GRID**2


def draw_mask(
    protocol: Protocol, frames: int, height: int, width: int, seed_parts: tuple[str | int, ...]
) -> UInt8[np.ndarray, "frames height width"]:
    """A union of 4 cells of a 4x4 grid: the paper's masks, 25 % of the frame.

    "stationary" draws once a clip, "variable" once a frame. The draw is a pure function of
    `seed_parts` (the job's seed and the clip's key) and the protocol: cells are ranked by a hash.
    Where 4 does not divide the frame's sides, the grid's lines are rounded to whole pixels and the
    coverage is 25 % as nearly as that allows.

    Source: Teshome, "Video Inpainting Using Diffusion Model", the section on masks.
    """
    if protocol == "stationary":
        hidden = np.repeat(_hidden_cells(*seed_parts, protocol)[None], frames, axis=0)
    else:
        hidden = np.stack([_hidden_cells(*seed_parts, protocol, i) for i in range(frames)])
    return hidden[:, _cell_of(height)[:, None], _cell_of(width)[None, :]]


def _hidden_cells(*seed_parts: str | int) -> UInt8[np.ndarray, "grid grid"]:
    ranked = sorted(range(GRID**2), key=lambda cell: derive_seed(*seed_parts, "mask cell", cell))
    hidden = np.zeros(GRID**2, dtype=np.uint8)
    hidden[ranked[:HIDDEN_CELLS]] = 1
    return hidden.reshape(GRID, GRID)


def _cell_of(length: int) -> np.ndarray:
    """The cell, 0 to GRID - 1, in which each of `length` pixels lies."""
    lines = [(line * length + GRID // 2) // GRID for line in range(1, GRID)]
    return np.searchsorted(lines, np.arange(length), side="right")


def latent_mask(
    mask: UInt8[np.ndarray, "frames height width"], latent_height: int, latent_width: int
) -> Float[Tensor, "frames 1 latent_height latent_width"]:
    """The hidden share of each latent's pixels, 0 to 1: the mask averaged over areas.

    The latents' sides divide the frame's.
    """
    hidden = torch.from_numpy(np.ascontiguousarray(mask)).float().unsqueeze(1)
    return torch.nn.functional.interpolate(hidden, (latent_height, latent_width), mode="area")


def visible_median(
    frames: UInt8[np.ndarray, "frames height width 3"],
    mask: UInt8[np.ndarray, "frames height width"],
) -> Colour:
    """Each channel's median over every visible pixel of the clip, in whole 8-bit units.

    Where the camera stands still and the background fills most of the frame, this is its colour.

    Raises:
        jobs.BadInput: no pixel is visible.
    """
    visible = frames[mask == 0]
    if not len(visible):
        raise jobs.BadInput("the mask hides every pixel of the clip: give a fill colour")
    red, green, blue = (round(middle) for middle in np.median(visible, axis=0).tolist())
    return red, green, blue


def fill_hole(
    frames: UInt8[np.ndarray, "frames height width 3"],
    mask: UInt8[np.ndarray, "frames height width"],
    colour: Colour | None = None,
) -> UInt8[np.ndarray, "frames height width 3"]:
    """The masked video: `colour` (0 to 255), or `visible_median`, in the hole."""
    filling = np.array(visible_median(frames, mask) if colour is None else colour, dtype=np.uint8)
    return np.where(mask[..., None] == 1, filling, frames)
