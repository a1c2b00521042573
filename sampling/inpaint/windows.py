"""Frames and masks of any number -> filled frames, window by window, in constant memory.

A window is as long as the clips that the network was trained on. The first frames of each were
finished in the window before and enter as visible frames. A frame's noise depends on its number, so
that windows do not show in it. The network sees a part of the frames around the holes, scaled to
about the size of its training clips; the result is scaled back and put into the holes alone.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jaxtyping import UInt8

from ...data.masks import fill_hole, visible_median
from ...data.videos import Frames, FrameSize, Mask, Masks, Pixels, fit_frame
from ...errors import BadInput
from ...modeling.autoencoder import Autoencoder, latent_mask, to_frames, to_pixels
from ...modeling.denoiser import INDEX, Denoiser, model_folder, read_record
from ..capacity import largest_batch
from ..metrics.pixels import composite
from ..sampler import Known, Request, sample
from ..schedules.program import Program
from .blending import BorderSteps, feather, match_colour, measure_border
from .boxes import Box, choose_box, choose_size
from .settings import FEATHER, SCHEDULE

GREY = (128, 128, 128)  # fills the hole of a window in which nothing is visible


@dataclass(frozen=True)
class FillSettings:
    """How holes are filled, and by which networks; for the options see `InpaintConfig`.

    Raises:
        BadInput: A setting is out of range.
    """

    denoiser: Denoiser
    autoencoder: Autoencoder
    program: Program
    seed: int = 0
    samples: Sequence[int] = (0,)
    """The numbers of the completions: each has its own noise, whatever the others are."""
    size: FrameSize | None = None
    overlap: int | None = None
    feather: int = FEATHER
    colour_match: bool = True
    on_evaluations: Callable[[int], object] = lambda count: None
    """Called after each network call with the number of evaluations in it."""

    def __post_init__(self) -> None:
        most = self.window_length // 2
        if not 0 <= self.overlap_frames <= most:
            raise BadInput(
                f"overlap is {self.overlap}; the model's windows have {self.window_length} frames: "
                f"give 0 to {most}"
            )
        if self.feather < 0:
            raise BadInput(f"feather is {self.feather}: give 0 or more pixels")
        unit = self.autoencoder.downsampling
        if self.size and (self.size.width % unit or self.size.height % unit):
            raise BadInput(f"size is {self.size}: give multiples of {unit}, as the model needs")

    @property
    def window_length(self) -> int:
        """Frames of a window."""
        return self.denoiser.space.shape[0]

    @property
    def overlap_frames(self) -> int:
        """Frames that a window takes over from the one before."""
        return self.window_length // 4 if self.overlap is None else self.overlap

    @property
    def evaluations(self) -> int:
        """Network evaluations for a window that has a hole."""
        return self.program.nfe * len(self.samples)

    def new_frames(self, finished: int) -> int:
        """The most frames that the next window adds to `finished` ones."""
        return self.window_length - (self.overlap_frames if finished else 0)

    @property
    def area(self) -> FrameSize:
        """The size of the network's input, in its usual proportions."""
        height, width = self.denoiser.space.shape[2:]
        unit = self.autoencoder.downsampling
        return self.size or FrameSize(width * unit, height * unit)


@dataclass(frozen=True)
class FilledWindow:
    """The frames that a window adds to the video."""

    first: int
    """The number of the first one."""
    frames: Sequence[Sequence[Pixels]]
    """The filled frames of each sample."""
    masks: Sequence[Mask]
    border_steps: Sequence[BorderSteps]
    """Of each sample."""
    box: Box | None
    """What the network saw last; None if it has seen nothing yet."""

    @property
    def end(self) -> int:
        """The number of the frame that comes next."""
        return self.first + len(self.masks)


@dataclass
class _Frame:
    mask: Mask
    versions: list[Pixels]
    """Of each sample: the original frame, later the filled one."""


def fill_windows(
    frames: Iterable[tuple[Pixels, Mask]],
    settings: FillSettings,
    before: FilledWindow | None = None,
) -> Iterator[FilledWindow]:
    """Fill the holes of a video, window by window; fewer than two windows are in memory.

    If a video ends within a window, the last window begins earlier. A video shorter than a window
    is continued backwards from its end, and that part of the result is dropped. Frames without a
    hole stay as they are, and windows without a hole run no network. Put the network into
    evaluation mode first.

    Work that continues gets what comes `before` the frames: the last finished ones, as many as a
    window has or all there are, and the last box.
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
            _Frame(mask, [pixels] * len(settings.samples))
            for pixels, mask in itertools.islice(source, settings.new_frames(finished))
        ]
        if not new:
            return
        held = [*held, *new][-settings.window_length :]
        border_steps, box = _fill_new(held, len(new), finished, settings, box)
        versions = zip(*(frame.versions for frame in new), strict=True)
        masks = [frame.mask for frame in new]
        yield FilledWindow(finished, [list(v) for v in versions], masks, border_steps, box)
        finished += len(new)


def plan_boxes(masks: Iterable[Mask], settings: FillSettings) -> Iterator[Box | None]:
    """What the network sees in each window of `fill_windows`; None if a window has no hole."""
    source = iter(masks)
    finished, box = 0, None
    while new := list(itertools.islice(source, settings.new_frames(finished))):
        found = _find_box(new, settings, box)
        yield found
        finished, box = finished + len(new), found or box


def _find_box(masks: Sequence[Mask], settings: FillSettings, before: Box | None) -> Box | None:
    together = functools.reduce(np.bitwise_or, masks)
    return choose_box(together, settings.area, before) if together.any() else None


def _fill_new(
    window: Sequence[_Frame],
    added: int,
    finished: int,
    settings: FillSettings,
    before: Box | None,
) -> tuple[list[BorderSteps], Box | None]:
    """Fill the last `added` frames of a window in place; return each sample's steps and the box."""
    seen, new = len(window) - added, window[-added:]
    box = _find_box([frame.mask for frame in new], settings, before)
    if not box:
        return [BorderSteps(0.0, 0)] * len(settings.samples), before
    first, samples = finished - seen, range(len(settings.samples))
    requests = [_make_request(window, seen, first, k, box, settings) for k in samples]
    results = sample(
        settings.denoiser,
        requests,
        capacity=_capacity(settings.denoiser, requests),
        seed=settings.seed,
        on_evaluations=settings.on_evaluations,
    )
    latents = {result.request.key: result.latents[seen : len(window)] for result in results}
    made = [settings.autoencoder.decode(latents[request.key][None])[0] for request in requests]
    return [_put(new, k, box, to_frames(made[k]), settings) for k in samples], box


def _capacity(denoiser: Denoiser, requests: Sequence[Request]) -> int:
    """One on the CPU: then a sample is the same to the bit, whatever the others are."""
    condition = requests[0].condition()
    if condition.device.type == "cpu" or len(requests) == 1:
        return 1
    return largest_batch(denoiser, condition, len(requests))


@torch.no_grad()
def _make_request(
    window: Sequence[_Frame], seen: int, first: int, k: int, box: Box, settings: FillSettings
) -> Request:
    """The trajectory of the k-th sample of a window; its first `seen` frames are visible."""
    denoiser, autoencoder = settings.denoiser, settings.autoencoder
    # A window that is too short goes on backwards, then forwards again.
    there_and_back = [*range(len(window)), *range(len(window) - 2, 0, -1)]
    order = list(itertools.islice(itertools.cycle(there_and_back), settings.window_length))
    frames = np.stack([box.crop(window[t].versions[k]) for t in order])
    mask = np.stack([box.crop(window[t].mask) * np.uint8(t >= seen) for t in order])
    size = choose_size(box, settings.area, autoencoder.downsampling)
    masked, hidden = hide(frames, mask, size)
    device = next(denoiser.network.parameters()).device
    masked_latents = autoencoder.encode(to_pixels(masked)[None]).to(device)
    hole = latent_mask(hidden, *masked_latents.shape[-2:])[None].to(masked_latents)
    condition = denoiser.condition(masked_latents, hole)[0]
    known = Known(denoiser.normalise(masked_latents)[0], hole[0])
    return Request(
        str(settings.samples[k]),
        str(settings.program.schedule),
        settings.program,
        lambda: condition,
        known=lambda: known,
        frames=range(first, first + settings.window_length),
    )


def hide(
    frames: Frames, mask: Masks, size: FrameSize
) -> tuple[
    UInt8[np.ndarray, "frames {size.height} {size.width} 3"],
    UInt8[np.ndarray, "frames {size.height} {size.width}"],
]:
    """The masked video and its mask, scaled to `size`; hidden pixels influence nothing visible.

    A pixel of the scaled mask is 1 if any hidden pixel contributes to it.
    """
    colour = GREY if mask.all() else visible_median(frames, mask)
    filled = fill_hole(frames, mask, colour)
    scaled = np.stack([fit_frame(frame, size, "resize") for frame in filled])
    white = np.repeat(mask[..., None] * np.uint8(255), 3, axis=-1)
    covered = np.stack([fit_frame(frame, size, "resize")[..., 0] > 0 for frame in white])
    hidden = covered.astype(np.uint8)
    return fill_hole(scaled, hidden, colour), hidden


def _put(
    new: Sequence[_Frame], k: int, box: Box, made: Frames, settings: FillSettings
) -> BorderSteps:
    """Put a sample's result into the holes of its frames; return the steps at their borders."""
    size = FrameSize(box.width, box.height)
    results = np.stack([fit_frame(frame, size, "resize") for frame in made])
    sources = np.stack([box.crop(frame.versions[k]) for frame in new])
    masks = np.stack([box.crop(frame.mask) for frame in new])
    border_steps = measure_border(composite(sources, results, masks), masks)
    shift = match_colour(results, sources, masks) if settings.colour_match else np.zeros(3)
    for frame, result, source, mask in zip(new, results, sources, masks, strict=True):
        if mask.any():
            smooth = result + shift
            if settings.feather:
                smooth = feather(smooth, source, mask, settings.feather)
            filled = frame.versions[k].copy()
            inside = mask == 1
            box.crop(filled)[inside] = np.rint(smooth).clip(0, 255).astype(np.uint8)[inside]
            frame.versions[k] = filled
    return border_steps


def usual_schedule(model: Path) -> str:
    """The schedule to use with a model, as `Denoiser.load` takes it, if no other is given.

    Raises:
        BadInput: It is no model.
    """
    folder = model_folder(model)
    return (read_record(folder).schedule if (folder / INDEX).is_file() else "") or SCHEDULE
