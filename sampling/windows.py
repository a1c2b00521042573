"""Frames and masks of any number -> filled frames, window by window, in constant memory.

A window is as long as the clips that the network was trained on. The first frames of each were
finished in the one before and enter as visible ones; the noise of a frame is that of its number, so
that windows do not show in it. The network sees a part of the frames around the holes, brought to
about the size that it was trained on; what it makes is brought back and put into the holes alone.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import cv2
import numpy as np
import torch
from jaxtyping import Float, UInt8

from ..data.masks import fill_hole, latent_mask, visible_median
from ..data.videos import FrameSize, fit_frame
from ..jobs import BadInput
from ..modeling.autoencoder import Autoencoder, to_frames, to_pixels
from ..modeling.diffusion import Denoiser
from .metrics import Frames, Mask, composite
from .sampler import Condition, Known, Request, largest_batch, sample_in_order
from .schedules import Program

Pixels = UInt8[np.ndarray, "height width 3"]
Hole = UInt8[np.ndarray, "height width"]

CONTEXT = 2  # the network sees so many times the sides of what the holes take up
ROOMY = 2  # the box before is kept while it is at most so many times as large as a new one
GREY = (128, 128, 128)  # in the hole of a window that shows nothing
RING = 16  # pixels around the hole from which its colour is matched
FEATHER = 4  # pixels


@dataclass(frozen=True)
class Filler:
    """How holes are filled.

    Raises:
        BadInput: a setting is out of range.
    """

    denoiser: Denoiser
    autoencoder: Autoencoder
    program: Program
    seed: int = 0
    samples: Sequence[int] = (0,)
    """Numbers of the completions: each has its own noise, whatever the others."""
    size: FrameSize | None = None
    """What the network sees is brought to about so many pixels; None is what it was trained on."""
    overlap: int | None = None
    """Frames that a window takes over from the one before; None is a quarter of its length."""
    feather: int = FEATHER
    """Pixels, from the hole's border inwards, in which the result goes over into what is around."""
    colour_match: bool = True
    """Whether the result is shifted in colour by what its surroundings are off."""
    on_evaluations: Callable[[int], object] = lambda count: None
    """Told after each network call how many evaluations it held."""

    def __post_init__(self) -> None:
        most = self.length // 2
        if not 0 <= self.taken_over <= most:
            raise BadInput(
                f"overlap is {self.overlap}; the model's windows have {self.length} frames: "
                f"give 0 to {most}"
            )
        if self.feather < 0:
            raise BadInput(f"feather is {self.feather}: give 0 or more pixels")
        unit = self.autoencoder.downsampling
        if self.size and (self.size.width % unit or self.size.height % unit):
            raise BadInput(f"size is {self.size}: give multiples of {unit}, as the model asks for")

    @property
    def length(self) -> int:
        """Frames of a window."""
        return self.denoiser.space.shape[0]

    @property
    def taken_over(self) -> int:
        """Frames that a window takes over from the one before."""
        return self.length // 4 if self.overlap is None else self.overlap

    def new_frames(self, finished: int) -> int:
        """Frames that the next window adds, where so many are finished and more than that come."""
        return self.length - (self.taken_over if finished else 0)

    @property
    def area(self) -> FrameSize:
        """What the network is shown at its usual proportions."""
        height, width = self.denoiser.space.shape[2:]
        unit = self.autoencoder.downsampling
        return self.size or FrameSize(width * unit, height * unit)


class Box(NamedTuple):
    """A part of the frame, in pixels."""

    top: int
    left: int
    height: int
    width: int

    def of(self, frame: np.ndarray) -> np.ndarray:
        """This part of a frame or a mask: a view."""
        return frame[self.top : self.top + self.height, self.left : self.left + self.width]

    def holds(self, other: Box) -> bool:
        """Whether the other lies within this one."""
        return (
            self.top <= other.top
            and self.left <= other.left
            and other.top + other.height <= self.top + self.height
            and other.left + other.width <= self.left + self.width
        )


class Seam(NamedTuple):
    """The steps across the holes' border, before anything is matched there."""

    total: float
    """Of |inside − outside| of pixels side by side, over RGB, in 8-bit units."""
    steps: int


@dataclass(frozen=True)
class Stretch:
    """What a window adds to the video."""

    first: int
    """The number of its first frame."""
    frames: Sequence[Sequence[Pixels]]
    """Of each sample, filled."""
    masks: Sequence[Hole]
    seams: Sequence[Seam]
    """Of each sample."""
    box: Box | None
    """What the network saw last; None where it saw nothing yet."""

    @property
    def end(self) -> int:
        """The number of the frame that comes next."""
        return self.first + len(self.masks)


@dataclass
class _Frame:
    mask: Hole
    versions: list[Pixels]
    """Of each sample: the frame as it was, until it is filled."""


def fill_stretches(
    frames: Iterable[tuple[Pixels, Hole]], filler: Filler, before: Stretch | None = None
) -> Iterator[Stretch]:
    """Fill the holes of a video, window by window; less than two windows are held.

    A video that ends within a window has the last one begin earlier; one that is shorter than a
    window is continued backwards from its end, and what that makes is dropped. Frames without a
    hole stay as they are, and windows that have no hole to fill run no network. The network is used
    as it stands: put it into evaluation mode first.

    Args:
        frames: Each with its mask, all of one size.
        filler: How.
        before: What is finished, where this continues: the last frames of it, as many as a window
            has or all there are, and the box of the last stretch. `frames` begin after them.
    """
    source = iter(frames)
    held: list[_Frame] = []
    finished, box = 0, None
    if before:
        finished, box = before.end, before.box
        versions = zip(*before.frames, strict=True)
        held = [_Frame(m, list(v)) for m, v in zip(before.masks, versions, strict=True)]
    while True:
        new = [
            _Frame(mask, [pixels] * len(filler.samples))
            for pixels, mask in itertools.islice(source, filler.new_frames(finished))
        ]
        if not new:
            return
        held = [*held, *new][-filler.length :]
        window = _Window(finished + len(new) - len(held), held, new)
        seams, box = _fill_window(window, filler, box)
        versions = zip(*(frame.versions for frame in new), strict=True)
        masks = [frame.mask for frame in new]
        yield Stretch(finished, [list(sample) for sample in versions], masks, seams, box)
        finished += len(new)


def plan_boxes(masks: Iterable[Hole], filler: Filler) -> Iterator[Box | None]:
    """What the network sees in each window that `fill_stretches` makes; None where it runs not."""
    source = iter(masks)
    finished, box = 0, None
    while new := list(itertools.islice(source, filler.new_frames(finished))):
        found = _find_box(new, filler, box)
        yield found
        finished, box = finished + len(new), found or box


# One window


@dataclass(frozen=True)
class _Window:
    number: int
    """Of its first frame."""
    frames: Sequence[_Frame]
    new: Sequence[_Frame]
    """The last ones of them; those before are finished."""

    @property
    def finished(self) -> int:
        return len(self.frames) - len(self.new)


def _fill_window(
    window: _Window, filler: Filler, before: Box | None
) -> tuple[list[Seam], Box | None]:
    """Fill the new frames, and say how well each sample joins on and which box was taken."""
    box = _find_box([frame.mask for frame in window.new], filler, before)
    if not box:
        return [Seam(0.0, 0)] * len(filler.samples), before
    seen = [_see(window, k, box, filler) for k in range(len(filler.samples))]
    requests = [
        Request(
            *(str(number), str(filler.program.schedule), filler.program, view.condition),
            known=view.known,
            frames=range(window.number, window.number + filler.length),
        )
        for number, view in zip(filler.samples, seen, strict=True)
    ]
    results = sample_in_order(
        filler.denoiser,
        requests,
        capacity=_capacity(filler.denoiser, requests),
        seed=filler.seed,
        on_evaluations=filler.on_evaluations,
    )
    latents = {result.request.clip: result.latents for result in results}
    seams = []
    for k, number in enumerate(filler.samples):
        added = latents[str(number)][window.finished : len(window.frames)]
        made = to_frames(filler.autoencoder.decode(added[None])[0])
        seams.append(_put(window.new, k, box, made, filler))
    return seams, box


def _find_box(masks: Sequence[Hole], filler: Filler, before: Box | None) -> Box | None:
    """What the network sees of a window that adds frames with these masks; None without a hole."""
    holes = functools.reduce(np.bitwise_or, masks)
    return choose_box(holes, filler.area, before) if holes.any() else None


def _capacity(denoiser: Denoiser, requests: Sequence[Request]) -> int:
    """On the CPU one at a time: then a sample is the same to the bit, whatever the others."""
    condition = requests[0].condition()
    if condition.device.type == "cpu" or len(requests) == 1:
        return 1
    return largest_batch(denoiser, condition, len(requests))


# What the network sees


def choose_box(holes: Hole, area: FrameSize, before: Box | None = None) -> Box:
    """The part of a frame that the network sees of a window whose holes lie in `holes`.

    In the proportions of `area`, no smaller than that, and `CONTEXT` times as high and as wide as
    what the holes take up, as far as the frame reaches. The box before is kept, so that the picture
    does not jump, while it shows half of that context and is not much too large.
    """
    frame = Box(0, 0, *holes.shape)
    tight = _bounds(holes)
    height, width = (
        max(a, CONTEXT * b) for a, b in zip((area.height, area.width), tight[2:], strict=True)
    )
    height, width = (
        max(height, math.ceil(width * area.height / area.width)),
        max(width, math.ceil(height * area.width / area.height)),
    )
    box = _around(tight, height, width, frame)
    half = [(1 + CONTEXT) * side // 2 for side in tight[2:]]
    least = _around(tight, half[0], half[1], frame)
    if before and before.holds(least) and _pixels(before) <= ROOMY * _pixels(box):
        return before
    return box


def _bounds(holes: Hole) -> Box:
    """The smallest box around all that is hidden."""
    (top, bottom), (left, right) = (
        np.flatnonzero(holes.any(axis=axis))[[0, -1]].tolist() for axis in (1, 0)
    )
    return Box(top, left, bottom - top + 1, right - left + 1)


def _around(inner: Box, height: int, width: int, frame: Box) -> Box:
    """A box of these sides with `inner` in its middle, moved and cut to lie within the frame."""
    height, width = min(height, frame.height), min(width, frame.width)
    top = inner.top + (inner.height - height) // 2
    left = inner.left + (inner.width - width) // 2
    return Box(
        min(max(top, 0), frame.height - height),
        min(max(left, 0), frame.width - width),
        height,
        width,
    )


def _pixels(box: Box) -> int:
    return box.height * box.width


def choose_size(box: Box, area: FrameSize, unit: int) -> FrameSize:
    """What a box is brought to: its proportions, about `area`'s pixels, in multiples of `unit`."""
    scale = math.sqrt(area.height * area.width / _pixels(box))
    height, width = (max(1, round(side * scale / unit)) * unit for side in (box.height, box.width))
    return FrameSize(width, height)


class _View(NamedTuple):
    """A window as the network is told of it."""

    told: Condition
    shown: Known

    def condition(self) -> Condition:
        return self.told

    def known(self) -> Known:
        return self.shown


@torch.no_grad()
def _see(window: _Window, k: int, box: Box, filler: Filler) -> _View:
    """What the network is told of a window whose finished frames are those of the k-th sample."""
    denoiser, autoencoder = filler.denoiser, filler.autoencoder
    order = _pad(len(window.frames), filler.length)
    frames = np.stack([box.of(window.frames[t].versions[k]) for t in order])
    mask = np.stack([box.of(window.frames[t].mask) * (t >= window.finished) for t in order])
    size = choose_size(box, filler.area, autoencoder.downsampling)
    masked, hidden = hide(frames, mask.astype(np.uint8), size)
    device = next(denoiser.network.parameters()).device
    masked_latents = autoencoder.encode(to_pixels(masked)[None]).to(device)
    hole = latent_mask(hidden, *masked_latents.shape[-2:])[None].to(masked_latents)
    told = denoiser.condition(masked_latents, hole)[0]
    return _View(told, Known(denoiser.normalise(masked_latents)[0], hole[0]))


def _pad(frames: int, length: int) -> list[int]:
    """Of each place of a window the frame that stands there: forwards, backwards, forwards…"""
    there_and_back = [*range(frames), *range(frames - 2, 0, -1)]
    return list(itertools.islice(itertools.cycle(there_and_back), length))


def hide(
    frames: Frames, mask: Mask, size: FrameSize
) -> tuple[
    UInt8[np.ndarray, "frames {size.height} {size.width} 3"],
    UInt8[np.ndarray, "frames {size.height} {size.width}"],
]:
    """The masked video and its mask, brought to `size`; nothing hidden has a share in it."""
    colour = GREY if mask.all() else visible_median(frames, mask)
    filled = fill_hole(frames, mask, colour)
    brought = np.stack([fit_frame(frame, size, "resize") for frame in filled])
    hidden = np.stack([_cover(hole, size) for hole in mask])
    return fill_hole(brought, hidden, colour), hidden


def _cover(hole: Hole, size: FrameSize) -> UInt8[np.ndarray, "{size.height} {size.width}"]:
    """A mask brought to `size`: 1 wherever a hidden pixel has a share of what `fit_frame` makes."""
    picture = np.repeat(hole[..., None] * np.uint8(255), 3, axis=-1)
    return (fit_frame(picture, size, "resize")[..., 0] > 0).astype(np.uint8)


# What the result becomes


def _put(new: Sequence[_Frame], k: int, box: Box, made: Frames, filler: Filler) -> Seam:
    """Put what was made for a sample into the holes of its frames; say how well it joins on."""
    size = FrameSize(box.width, box.height)
    results = np.stack([fit_frame(frame, size, "resize") for frame in made])
    sources = np.stack([box.of(frame.versions[k]) for frame in new])
    mask = np.stack([box.of(frame.mask) for frame in new])
    seam = measure_seam(composite(sources, results, mask), mask)
    shift = match_colour(results, sources, mask) if filler.colour_match else np.zeros(3)
    for frame, result, source, hole in zip(new, results, sources, mask, strict=True):
        if hole.any():
            shifted = result + shift
            smooth = feather(shifted, source, hole, filler.feather) if filler.feather else shifted
            filled = frame.versions[k].copy()
            inside = hole == 1
            box.of(filled)[inside] = np.rint(smooth).clip(0, 255).astype(np.uint8)[inside]
            frame.versions[k] = filled
    return seam


def measure_seam(frames: Frames, mask: Mask) -> Seam:
    """The steps across the holes' border: of pixels side by side of which one is in a hole."""
    total, steps = 0.0, 0
    for axis in (1, 2):
        crossing = np.diff(mask, axis=axis) != 0
        found = np.abs(np.diff(frames.astype(np.int16), axis=axis))[crossing]
        total, steps = total + float(found.sum()), steps + found.size
    return Seam(total, steps)


def match_colour(results: Frames, sources: Frames, mask: Mask) -> Float[np.ndarray, " rgb"]:
    """What the results lack in colour: the mean of source − result near the holes, over a window.

    What is visible within `RING` pixels of a hole counts. One shift for all frames of a window:
    shifts of their own would make the hole flicker.
    """
    near = np.stack([_distance(1 - hole) <= RING for hole in mask]) & (mask == 0)
    if not near.any():
        return np.zeros(3)
    return (sources[near].astype(np.float64) - results[near]).mean(axis=0)


def feather(
    result: Float[np.ndarray, "height width 3"], source: Pixels, hole: Hole, reach: int
) -> Float[np.ndarray, "height width 3"]:
    """The result, led over into its surroundings within `reach` pixels of the hole's border.

    What it is off outside the hole, averaged around each place, is taken off inside, the less the
    farther from the border. Of the source only what is visible is used.
    """
    visible = (hole == 0).astype(np.float64)
    weight = cv2.GaussianBlur(visible, (0, 0), reach)
    off = cv2.GaussianBlur((source - result) * visible[..., None], (0, 0), reach)
    off /= np.maximum(weight, np.finfo(np.float64).tiny)[..., None]
    fading = np.clip(1 - (_distance(hole) - 1) / reach, 0, 1)
    return result + off * (fading * hole)[..., None]


def _distance(inside: Hole) -> Float[np.ndarray, "height width"]:
    """Pixels from each pixel that is 1 to the nearest that is 0."""
    return cv2.distanceTransform(inside, cv2.DIST_L2, cv2.DIST_MASK_PRECISE)
