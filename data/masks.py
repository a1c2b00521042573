"""Masks: drawn, mixed, filled, brought to the latents' size. A mask is 1 in the hole, 0 elsewhere.

A drawn mask is a pure function of its family, its shape and its seed parts (the job's seed and the
clip's key): every choice is a hash and pixels are decided in integers, so that it is the same on
every machine. It hides something and never the whole clip.
"""

from __future__ import annotations

import difflib
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np
from jaxtyping import Int64, UInt8

from ..errors import BadInput
from ..seeding import derive_seed
from .videos import Frames, Mask, Masks

# (frames, height, width, *seed_parts) -> mask; the docstring's first line is its help.
Draw = Callable[..., Masks]
Colour = tuple[int, int, int]

LEAVE_FRAMES = ("prediction", "infilling", "continuation")  # families that show whole frames
OWN = "own"  # the family of a user's own masks, which are read from files
GRID = 4  # cells on a side of the paper's masks; no frame may have a smaller side
HIDDEN_CELLS = 4  # of GRID * GRID
SUBPIXELS = 64  # positions within a pixel of what moves: a side / 64 a frame is one whole speed


def draw_mask(
    family: str, frames: int, height: int, width: int, seed_parts: tuple[str | int, ...]
) -> Masks:
    """The mask that `family`, one of FAMILIES, draws for `seed_parts`.

    Raises:
        BadInput: the clip has no frame, or one with a side under 4 pixels; or it has one frame
            and the family leaves whole frames visible.
    """
    if family not in FAMILIES:
        raise ValueError(f"{family!r} is not drawn: {', '.join(FAMILIES)} are")
    if frames < 1 or min(height, width) < GRID:
        raise BadInput(
            f"a clip of {frames} frames of {width}x{height} pixels is too small for a mask: "
            f"choose at least 1 frame of {GRID}x{GRID}"
        )
    if frames == 1 and family in LEAVE_FRAMES:
        raise BadInput(
            f"frames is 1; {family} leaves some frames visible and hides in others: "
            f"choose at least 2, or leave {family} out of the masks"
        )
    return FAMILIES[family](frames, height, width, *seed_parts)


def _stationary(frames: int, height: int, width: int, *seed_parts: str | int) -> Masks:
    """4 cells of a 4x4 grid, the same in every frame: 25 % of the frame.

    Where 4 does not divide the frame's sides, the grid's lines are rounded to whole pixels and the
    coverage is 25 % as nearly as that allows.

    Source: Teshome, "Video Inpainting Using Diffusion Model", the section on masks.
    """
    hidden = _hide_cells(height, width, [(*seed_parts, "stationary")])
    return np.repeat(hidden, frames, axis=0)


def _variable(frames: int, height: int, width: int, *seed_parts: str | int) -> Masks:
    """4 cells of a 4x4 grid, new ones in each frame: 25 % of the frame.

    Source: as "stationary".
    """
    return _hide_cells(height, width, [(*seed_parts, "variable", i) for i in range(frames)])


def _hide_cells(height: int, width: int, seed_parts: Sequence[tuple[str | int, ...]]) -> Masks:
    """The cells drawn for each frame's seed parts."""
    hidden = np.zeros((len(seed_parts), GRID**2), dtype=np.uint8)
    for frame, parts in zip(hidden, seed_parts, strict=True):
        ranked = sorted(range(GRID**2), key=lambda cell: derive_seed(*parts, "mask cell", cell))
        frame[ranked[:HIDDEN_CELLS]] = 1
    cells = []
    for length in (height, width):
        lines = [(line * length + GRID // 2) // GRID for line in range(1, GRID)]
        cells.append(np.searchsorted(lines, np.arange(length), side="right"))
    rows, columns = cells
    return hidden[:, GRID * rows[:, None] + columns]


def _box(frames: int, height: int, width: int, *seed_parts: str | int) -> Masks:
    """A rectangle, 1/4 to 1/2 of each side, that moves steadily and bounces off borders.

    Along each axis it moves by 1/64 to 1/16 of the side a frame.
    """
    rows = _slide(frames, height, *seed_parts, "box", "rows")
    columns = _slide(frames, width, *seed_parts, "box", "columns")
    return rows[:, :, None] & columns[:, None, :]


def _slide(frames: int, length: int, *seed_parts: str | int) -> UInt8[np.ndarray, "frames length"]:
    """A moving interval of a side: 1 inside."""
    size = _draw(-(-length // 4), length // 2, *seed_parts, "size")
    room = (length - size) * SUBPIXELS
    # There and back is one turn of 2 * room: where it begins says the direction too.
    begin = _draw(0, 2 * room - 1, *seed_parts, "begin")
    speed = _draw(length, 4 * length, *seed_parts, "speed")
    turn = (begin + speed * np.arange(frames)) % (2 * room)
    first = _whole_pixels(np.minimum(turn, 2 * room - turn))[:, None]
    pixel = np.arange(length)
    return ((first <= pixel) & (pixel < first + size)).astype(np.uint8)


def _strokes(frames: int, height: int, width: int, *seed_parts: str | int) -> Masks:
    """Free-form brush strokes that drift slowly, 1/8 to 1/2 of the frame.

    What leaves the frame at one border comes in at the opposite one, so that every frame hides
    equally much. Along each axis they drift by at most 1/64 of the frame's size (the root of
    its area) a frame.

    Source: Yu et al. 2019, "Free-Form Image Inpainting with Gated Convolution", Algorithm 1, with
    about its authors' ranges, scaled to the frame; headings are drawn in place of flips.
    """
    parts = (*seed_parts, "strokes")
    painted = _paint(height, width, *parts)
    size = math.isqrt(height * width)
    speeds = [_draw(-size, size, *parts, "drift", axis) for axis in ("rows", "columns")]
    down, right = (_whole_pixels(speed * np.arange(frames)).tolist() for speed in speeds)
    return np.stack([np.roll(painted, shift, (0, 1)) for shift in zip(down, right, strict=True)])


def _paint(height: int, width: int, *seed_parts: str | int) -> Mask:
    """Strokes, line by line, until a drawn share of the frame, 1/8 to 3/8, is hidden.

    The last line may cover up to 1/8 more.
    """
    painted = np.zeros((height, width), dtype=np.uint8)
    wanted = _draw(-(-height * width // 8), 3 * height * width // 8, *seed_parts, "coverage")
    strokes = (_stroke(height, width, *seed_parts, number) for number in itertools.count())
    lines = itertools.chain.from_iterable(strokes)
    while np.count_nonzero(painted) < wanted:
        row, column, down, right, brush = next(lines)
        rows, columns = _line(down, right, brush)
        painted[(row + rows) % height, (column + columns) % width] = 1
    return painted


def _stroke(
    height: int, width: int, *seed_parts: str | int
) -> Iterator[tuple[int, int, int, int, int]]:
    """The lines of a zigzag: row and column, pixels down and to the right, the brush's width."""
    size = math.isqrt(height * width)
    row = _draw(0, height - 1, *seed_parts, "row")
    column = _draw(0, width - 1, *seed_parts, "column")
    heading = _draw(0, 359, *seed_parts, "heading")
    brush = _draw(max(1, size // 20), max(1, size // 6), *seed_parts, "brush")
    for line in range(_draw(4, 12, *seed_parts, "lines")):
        bend = _draw(48, 95, *seed_parts, line, "bend") * (-1) ** line
        # At half degrees a whole length times the sine or cosine is never near a half, so that it
        # rounds alike with every mathematical library.
        angle = math.radians(heading + bend + 0.5)
        length = _draw(max(1, size // 12), max(1, size // 3), *seed_parts, line, "length")
        down, right = round(length * math.sin(angle)), round(length * math.cos(angle))
        yield row, column, down, right, brush
        row, column = row + down, column + right


def _line(
    down: int, right: int, brush: int
) -> tuple[Int64[np.ndarray, " pixels"], Int64[np.ndarray, " pixels"]]:
    """Rows and columns of the pixels within half a `brush` of the line from (0, 0)."""
    rows = np.arange(min(down, 0) - brush, max(down, 0) + brush + 1)[:, None]
    columns = np.arange(min(right, 0) - brush, max(right, 0) + brush + 1)[None, :]
    squared_length = down**2 + right**2
    along, across = rows * down + columns * right, rows * right - columns * down
    beside = (along >= 0) & (along <= squared_length)
    near = beside & (4 * across**2 < brush**2 * squared_length)
    near |= 4 * (rows**2 + columns**2) < brush**2
    near |= 4 * ((rows - down) ** 2 + (columns - right) ** 2) < brush**2
    chosen_rows, chosen_columns = np.nonzero(near)
    return chosen_rows + rows[0, 0], chosen_columns + columns[0, 0]


def _border(frames: int, height: int, width: int, *seed_parts: str | int) -> Masks:
    """Outpainting: all but a still window near the middle, 1/2 to 3/4 of each side."""
    rows = _window(height, *seed_parts, "border", "rows")
    columns = _window(width, *seed_parts, "border", "columns")
    return np.repeat(1 - (rows[:, None] & columns)[None], frames, axis=0)


def _window(length: int, *seed_parts: str | int) -> UInt8[np.ndarray, " length"]:
    """A part of a side: 1 inside. Each end has about 1/4 or more of what remains."""
    size = _draw(-(-length // 2), 3 * length // 4, *seed_parts, "size")
    room = length - size
    first = _draw(room // 4, room - room // 4, *seed_parts, "first")
    pixel = np.arange(length)
    return ((first <= pixel) & (pixel < first + size)).astype(np.uint8)


def _prediction(frames: int, height: int, width: int, *seed_parts: str | int) -> Masks:
    """Whole frames: the first 1 to a quarter of the clip visible, all later ones hidden.

    Source: Höppe et al. 2022, "Diffusion Models for Video Prediction and Infilling" (RaMViD).
    """
    first = _draw(1, max(1, frames // 4), *seed_parts, "prediction")
    mask = np.ones((frames, height, width), dtype=np.uint8)
    mask[:first] = 0
    return mask


def _infilling(frames: int, height: int, width: int, *seed_parts: str | int) -> Masks:
    """Whole frames: 1 to a quarter of the clip at each end visible, the middle hidden.

    Of two frames the second is hidden.

    Source: as "prediction".
    """
    most = max(1, frames // 4)
    first = _draw(1, most, *seed_parts, "infilling", "first")
    last = _draw(1, most, *seed_parts, "infilling", "last")
    mask = np.zeros((frames, height, width), dtype=np.uint8)
    mask[first : max(frames - last, first + 1)] = 1
    return mask


def _continuation(frames: int, height: int, width: int, *seed_parts: str | int) -> Masks:
    """As stationary, but the first 1 to half of the frames are visible.

    So a window of a long video finds its first frames, which the window before it has filled.
    """
    mask = _stationary(frames, height, width, *seed_parts)
    mask[: _draw(1, frames // 2, *seed_parts, "continuation")] = 0
    return mask


def _draw(low: int, high: int, *seed_parts: str | int) -> int:
    """A whole number from `low` to `high`, all equally likely: a pure function of the arguments."""
    return low + derive_seed(*seed_parts) % (high - low + 1)


def _whole_pixels(subpixels: Int64[np.ndarray, " frames"]) -> Int64[np.ndarray, " frames"]:
    return (subpixels + SUBPIXELS // 2) // SUBPIXELS


FAMILIES: Mapping[str, Draw] = {
    "stationary": _stationary,
    "variable": _variable,
    "box": _box,
    "strokes": _strokes,
    "border": _border,
    "prediction": _prediction,
    "infilling": _infilling,
    "continuation": _continuation,
}


def describe_families() -> str:
    """A line for each family that a mix may name: what it hides."""
    lines = {name: (draw.__doc__ or "").partition("\n")[0] for name, draw in FAMILIES.items()}
    lines[OWN] = "A video's own masks, read from files."
    return "\n".join(f"  {name:<13}{line}" for name, line in lines.items())


@dataclass(frozen=True)
class Mix:
    """Families of masks with their relative weights.

    Raises:
        BadInput: there is no family, an unknown one, or a weight that is not finite and above 0.
    """

    weights: dict[str, float]

    def __post_init__(self) -> None:
        known = (*FAMILIES, OWN)
        if not self.weights:
            raise BadInput(f"the mix of masks is empty: choose among {', '.join(known)}")
        for name, weight in self.weights.items():
            if name not in known:
                [nearest] = difflib.get_close_matches(name, known, n=1, cutoff=0)
                raise BadInput(
                    f"{name!r} is no family of masks (the nearest is {nearest}): "
                    f"choose among {', '.join(known)}"
                )
            if not 0 < weight < math.inf:
                raise BadInput(
                    f"the weight of {name} in the mix of masks is {weight}: choose a finite one "
                    "above 0, or leave the family out"
                )

    @classmethod
    def parse(cls, text: str) -> Mix:
        """Read "stationary:2 variable box:0.5"; commas may separate too, and 1 is the usual weight.

        Raises:
            BadInput: `text` is not a mix.
        """
        weights: dict[str, float] = {}
        for part in text.replace(",", " ").split():
            name, colon, weight = part.partition(":")
            if name in weights:
                raise BadInput(f"the mix of masks {text!r} names {name} twice: name it once")
            try:
                weights[name] = float(weight) if colon else 1.0
            except ValueError:
                raise BadInput(
                    f"the mix of masks has {part!r}: give FAMILY or FAMILY:WEIGHT, as box:0.5"
                ) from None
        return cls(weights)

    def __str__(self) -> str:
        """What `parse` reads; the same for equal mixes."""
        return " ".join(
            name if weight == 1 else f"{name}:{str(float(weight)).removesuffix('.0')}"
            for name in (*FAMILIES, OWN)
            if (weight := self.weights.get(name))
        )

    def choose(self, count: int, seed_parts: tuple[str | int, ...]) -> list[str]:
        """The families of `count` masks of one clip, drawn for `seed_parts`.

        Each family's expected number is its share of `count`, and its number is less than one away
        from that: systematic sampling, with a hashed order and offset, exact in fractions.
        """
        names = sorted(self.weights, key=lambda name: derive_seed(*seed_parts, "mix order", name))
        sums = list(itertools.accumulate(Fraction(self.weights[name]) for name in names))
        offset = Fraction(derive_seed(*seed_parts, "mix offset"), 2**63)
        ends = [math.ceil(count * end / sums[-1] - offset) for end in sums]
        numbers = [end - begin for begin, end in itertools.pairwise([0, *ends])]
        return [name for name, number in zip(names, numbers, strict=True) for _ in range(number)]


def visible_median(frames: Frames, mask: Masks) -> Colour:
    """Each channel's median over every visible pixel of the clip, in whole 8-bit units.

    Where the camera stands still and the background fills most of the frame, this is its colour.

    Raises:
        BadInput: no pixel is visible.
    """
    visible = np.compress((mask == 0).reshape(-1), frames.reshape(-1, 3), axis=0)
    if not len(visible):
        raise BadInput("the mask hides every pixel of the clip: give a fill colour")
    # As np.median rounds, but five times as fast: counts the 256 possible values.
    middles = [(len(visible) - 1) // 2, len(visible) // 2]
    below = [np.cumsum(np.bincount(visible[:, channel], minlength=256)) for channel in range(3)]
    red, green, blue = (
        round(int(np.searchsorted(counts, middles, side="right").sum()) / 2) for counts in below
    )
    return red, green, blue


def fill_hole(frames: Frames, mask: Masks, colour: Colour | None = None) -> Frames:
    """The masked video: `colour` (0 to 255), or `visible_median`, in the hole."""
    filling = np.array(visible_median(frames, mask) if colour is None else colour, dtype=np.uint8)
    return np.where(mask[..., None] == 1, filling, frames)
