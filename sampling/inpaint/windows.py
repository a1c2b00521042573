"""Frames and masks of any number -> filled frames, window by window, in constant memory.

A window is as long as the clips that the network was trained on. The first frames of each were
finished in the one before and enter as visible ones; the noise of a frame is that of its number, so
that windows do not show in it. The network sees a part of the frames around the holes, brought to
about the size that it was trained on; what it makes is brought back and put into the holes alone.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from jaxtyping import UInt8

from ...data.masks import fill_hole, latent_mask, visible_median
from ...data.videos import FrameSize, fit_frame
from ...errors import BadInput
from ...modeling.autoencoder import Autoencoder, to_frames, to_pixels
from ...modeling.denoiser import INDEX, Denoiser, model_folder
from ..capacity import largest_batch
from ..metrics.pixels import Frames, Mask, composite
from ..sampler import Condition, Known, Request, sample_in_order
from ..schedules.program import Program
from .blending import FEATHER, Seam, feather, match_colour, measure_seam
from .boxes import Box, Hole, Pixels, choose_box, choose_size

GREY = (128, 128, 128)  # in the hole of a window that shows nothing


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
    latents = {result.request.key: result.latents for result in results}
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


SCHEDULE = "ddim:20"


def usual_schedule(model: Path) -> str:
    """The schedule that a model is used with where none is given.

    Args:
        model: As `Denoiser.load` takes it.

    Raises:
        BadInput: It is no model.
    """
    index = model_folder(model) / INDEX
    return json.loads(index.read_text())["schedule"] if index.is_file() else SCHEDULE
