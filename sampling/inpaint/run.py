"""`vidfill inpaint`: a video + a mask + a model -> the video with its holes filled."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import shutil
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from ... import jobs
from ...data.videos import FrameSize
from ...errors import BadInput
from ...files import hold
from ...modeling.autoencoder import hash_weights, load_trained_autoencoder
from ...modeling.denoiser import SHIPPED, Denoiser
from ...modeling.precision import Precision
from ...processes import choose_device
from ...progress import show_progress
from ..capacity import time_evaluation
from ..schedules.language import parse
from ..schedules.program import compile_schedule
from .blending import FEATHER
from .boxes import Hole, choose_size
from .output import Codec, Writer, check_output
from .unfinished import Span, Work
from .video import Footage, Picture, check_masks, open_footage, read_masked, read_masks
from .windows import Filler, Stretch, fill_stretches, plan_boxes, usual_schedule

EXAMPLES = """examples:
  vidfill inpaint street.mp4 --mask 40,60,120,80 -o filled.mkv
      a rectangle (x, y, width, height), the package's own small model, lossless outside the hole
  vidfill inpaint street.mp4 --mask masks/ --model runs/train -o filled.mp4 --dilate 4 \\
      --schedule "ddim:50+resample(n=4)"
      a mask for every frame, a model of one's own, and a schedule
  vidfill inpaint street.mp4 --mask logo.png --invert -o filled.mkv --plan
      how many windows have a hole, and how long they would take; nothing is written
  vidfill inpaint street.mp4 --mask mask.mp4 -o filled.mkv --samples 4 --choose
      of four completions the one that joins best on to what is around
"""

WORK = ".work"  # ends the name of the folder where unfinished work lies, beside OUT


@dataclass(frozen=True)
class InpaintConfig:
    """Fill the holes of a video of any length, in constant memory.

    Outside the holes the result is the input, to the bit where its codec is lossless; sound, rate
    and time stamps are kept. Windows as long as the model's clips follow one another, and each sees
    the frames that the one before has filled. What is filled is kept beside OUT until all is done:
    the same command continues where it was stopped.
    """

    video: Path
    """The video: a file that FFmpeg reads, or a folder of images."""
    mask: str = ""
    """What to fill: a video, an image, a folder of images, or x,y,width,height; white is the
    hole."""
    out: Path | None = None
    """The result, which must not exist; -o for short. Its suffix chooses the container (.mkv is
    lossless); without one it is a folder of images."""
    model: Path = SHIPPED
    """Folder of a model or of a training run (its newest model is taken); "shipped" is the
    package's own."""
    schedule: str = ""
    """The schedule, SOLVER:STEPS[(key=value)][+MOVE(key=value)], as `vidfill schedule --help` has
    them; empty takes the model's usual one."""
    samples: int = 1
    """Completions; with several, each is written with its number, as OUT-1."""
    choose: bool = False
    """Write only the completion whose steps across the holes' borders are the smallest."""
    seed: int = 0
    """Seed of the noise."""
    trim: str = ""
    """Take only this part of the video, BEGIN-END in seconds or h:mm:ss; either may be left out."""
    frame_rate: float = 24.0
    """Frames per second of a folder of images."""
    invert: bool = False
    """Black is the hole."""
    dilate: int = 0
    """Pixels by which the holes are grown."""
    size: str = ""
    """What the network sees is brought to about this size: "256" or "432x240", width by height;
    empty is what it was trained on."""
    overlap: int | None = None
    """Frames that a window takes over from the one before; without it, a quarter of a window."""
    feather: int = FEATHER
    """Pixels, from the holes' borders inwards, in which the result goes over into what is
    around."""
    colour_match: bool = True
    """Shift the result by what the colours around the holes are off."""
    codec: Codec = ""
    """Codec of the result; empty is the container's usual one: ffv1, lossless, in .mkv."""
    autoencoder: str = ""
    """Where the autoencoder is now, if not where the model's record says: a name or a folder."""
    precision: Precision = "float32"
    """Of the networks; bfloat16 is several times faster where the hardware has it."""
    device: str = "auto"
    """Where the networks run: "cpu", "cuda", "cuda:1"…; "auto" is a GPU if there is one."""
    plan: bool = False
    """Say what the work would cost, from one measured evaluation, and write nothing."""


@dataclass(frozen=True)
class Inputs:
    """What the work begins with, found to fit together."""

    footage: Footage
    filler: Filler

    @property
    def evaluations(self) -> int:
        """Of a window that has a hole."""
        return self.filler.program.nfe * len(self.filler.samples)


def inpaint(config: InpaintConfig) -> list[Path]:
    """Fill the holes, and return the files that were written.

    Raises:
        BadInput: a setting is wrong, or video, mask and model do not fit together.
    """
    jobs.refuse_launcher("inpaint")
    if config.plan:
        show_plan(config, open_inputs(config))
        return []
    out = _check_out(config)
    inputs = open_inputs(config)
    for sentence in check_output(inputs.footage, out, config.codec):
        print(f"vidfill inpaint: {sentence}", file=sys.stderr)
    work = Work(out.with_name(out.name + WORK))
    jobs.claim(work.folder, "inpaint", _record(config, inputs), may_change=MAY_CHANGE)
    with hold(work.folder):
        fill_all(config, inputs, work)
        chosen = choose(config, work)
        outs = _name_outs(out, chosen, config)
        write_all(config, inputs.footage, work, outs)
        shutil.rmtree(work.folder)
    return list(outs.values())


def open_inputs(config: InpaintConfig) -> Inputs:
    """Load and check everything; nothing is written.

    Raises:
        BadInput: naming what does not fit.
    """
    if not config.mask:
        raise BadInput("mask is empty: give a video, an image, a folder, or x,y,width,height")
    for field, least in {"samples": 1, "dilate": 0}.items():
        if getattr(config, field) < least:
            raise BadInput(f"{field} is {getattr(config, field)}: give {least} or more")
    schedule = parse(config.schedule or usual_schedule(config.model))
    device = choose_device(config.device)
    footage = open_footage(config.video, config.trim, config.frame_rate)
    check_masks(config.mask, footage)
    denoiser = Denoiser.load(config.model, str(device), config.precision)
    program = compile_schedule(schedule, denoiser.timesteps)
    autoencoder = load_trained_autoencoder(
        denoiser.autoencoder, config.autoencoder, device, config.precision
    )
    filler = Filler(
        *(denoiser, autoencoder, program, config.seed, range(config.samples)),
        *(FrameSize.parse(config.size), config.overlap, config.feather, config.colour_match),
    )
    return Inputs(footage, filler)


def _check_out(config: InpaintConfig) -> Path:
    if config.out is None:
        raise BadInput("out is missing: name the file to write with -o")
    begun = config.out.with_name(config.out.name + WORK).is_dir()
    for out in _name_outs(config.out, range(config.samples), config).values():
        if out.exists() and not begun:
            raise BadInput(f"out is {out}, which exists: choose another name or remove it")
    return config.out


def _name_outs(out: Path, samples: Iterable[int], config: InpaintConfig) -> dict[int, Path]:
    """Where each sample goes that is written."""
    if config.samples == 1 or config.choose:
        return dict.fromkeys(samples, out)
    return {k: out.with_name(f"{out.stem}-{k + 1}{out.suffix}") for k in samples}


@dataclass(frozen=True)
class _Record:
    """What must not change until the work is done."""

    config: InpaintConfig
    model: str
    autoencoder: str
    video: Sequence[int]
    mask: Sequence[int]


MAY_CHANGE = tuple(
    f"config.{name}" for name in ("out", "model", "autoencoder", "device", "choose", "codec")
)


def _record(config: InpaintConfig, inputs: Inputs) -> _Record:
    filler = inputs.filler
    return _Record(
        dataclasses.replace(config, schedule=str(filler.program.schedule)),
        hash_weights(filler.denoiser.network),
        filler.autoencoder.sha256,
        _stamp(config.video),
        _stamp(Path(config.mask)),
    )


def _stamp(path: Path) -> list[int]:
    """What tells whether a file is the one that it was; of a rectangle nothing."""
    if not path.exists():
        return []
    told = path.stat()
    return [told.st_size, told.st_mtime_ns]


def show_plan(config: InpaintConfig, inputs: Inputs) -> None:
    """Print how many windows there are, what the network sees and how long it takes."""
    footage, filler = inputs.footage, inputs.filler
    masks = read_masks(config.mask, footage, invert=config.invert, dilate=config.dilate)
    boxes = list(plan_boxes(masks, filler))
    holed = [box for box in boxes if box]
    print(
        f"{len(boxes)} windows of {filler.length} frames, {filler.taken_over} of them taken over "
        f"from the one before; {len(holed)} have a hole to fill"
    )
    if not holed:
        return
    unit = filler.autoencoder.downsampling
    sizes = [choose_size(box, filler.area, unit) for box in holed]
    shown = collections.Counter(zip(holed, sizes, strict=True)).most_common(3)
    for (box, size), count in shown:
        print(f"  {count}: {box.width}x{box.height} pixels of the frame, seen at {size}")
    if len(set(holed)) > len(shown):
        print("  …")
    largest = max(sizes, key=lambda size: size.width * size.height)
    seconds = _time_evaluation(filler, largest)
    evaluations = len(holed) * inputs.evaluations
    print(
        f"{filler.program.schedule}: {filler.program.nfe:,} evaluations a window and completion, "
        f"{evaluations:,} in all\nnetwork time: {evaluations * seconds:,.1f} s, at "
        f"{seconds:.3f} s an evaluation; reading, autoencoder and writing come on top"
    )


def _time_evaluation(filler: Filler, size: FrameSize) -> float:
    """Wall seconds of one evaluation of one window, brought to this size."""
    network, unit = filler.denoiser.network, filler.autoencoder.downsampling
    channels, device = network.config["condition_channels"], next(network.parameters()).device
    shape = (filler.length, channels, size.height // unit, size.width // unit)
    return time_evaluation(filler.denoiser, torch.zeros(shape, device=device), 1)


def fill_all(config: InpaintConfig, inputs: Inputs, work: Work) -> None:
    """Fill every window that is not kept yet."""
    spans, each = work.spans(), inputs.evaluations
    pairs, before = _resume(config, inputs, work, spans)
    spent = 0

    def count(evaluations: int) -> None:
        nonlocal spent
        spent += evaluations
        shown.advance(evaluations)

    filler = dataclasses.replace(inputs.filler, on_evaluations=count)
    total = count_windows(inputs.footage.frames, filler) * each
    with show_progress("inpaint", total, "evaluations", len(spans) * each) as shown:
        frames = ((picture.rgb, mask) for picture, mask in pairs)
        try:
            for stretch in fill_stretches(frames, filler, before):
                work.add(stretch)
                if spent < each:  # it had no hole
                    shown.advance(each - spent)
                spent = 0
        except torch.OutOfMemoryError:
            raise BadInput(
                f"a window does not fit into the memory of device {config.device}: give a smaller "
                "--size, --precision bfloat16, or --device cpu; the same --out may be used again "
                f"once {work.folder} is removed"
            ) from None


def count_windows(frames: int, filler: Filler) -> int:
    """Windows of a video."""
    further = max(0, frames - filler.length)
    return 1 + -(-further // (filler.length - filler.taken_over))


def _resume(
    config: InpaintConfig, inputs: Inputs, work: Work, spans: Sequence[Span]
) -> tuple[Iterator[tuple[Picture, Hole]], Stretch | None]:
    """The pictures that are not filled yet, and the last ones before them that are."""
    if not spans:
        return _read(config, inputs.footage), None
    end, length = spans[-1].end, inputs.filler.length
    latest = [span for span in spans if span.end > end - length]
    pairs = _read(config, inputs.footage, latest[0].first)
    filled = collections.deque(work.restore(pairs, latest), length)
    frames = zip(*(versions for _, _, versions in filled), strict=True)
    masks = [mask for _, mask, _ in filled]
    box = work.read(latest[-1]).box
    return pairs, Stretch(end - len(masks), [list(sample) for sample in frames], masks, [], box)


def _read(
    config: InpaintConfig, footage: Footage, start: int = 0
) -> Iterator[tuple[Picture, Hole]]:
    return read_masked(
        footage, config.mask, invert=config.invert, dilate=config.dilate, start=start
    )


def choose(config: InpaintConfig, work: Work) -> Sequence[int]:
    """The samples to write: all, or the one with the smallest steps across the holes' borders."""
    if not config.choose:
        return range(config.samples)
    totals, steps = np.sum([work.read(span).seams for span in work.spans()], axis=0).T
    means = totals / np.maximum(steps, 1)
    best = int(means.argmin())
    listed = ", ".join(f"{mean:.2f}" for mean in means)
    print(f"steps across the holes' borders: {listed}; completion {best + 1} is taken")
    return [best]


def write_all(config: InpaintConfig, footage: Footage, work: Work, outs: dict[int, Path]) -> None:
    """Write the samples' videos."""
    with contextlib.ExitStack() as stack:
        writers = {
            k: stack.enter_context(Writer(footage, out, config.codec)) for k, out in outs.items()
        }
        shown = stack.enter_context(show_progress("writing", footage.frames, "frames"))
        for picture, mask, filled in work.restore(_read(config, footage), work.spans()):
            for k, writer in writers.items():
                writer.write(picture, filled[k], mask)
            shown.advance()


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of `vidfill inpaint`."""

    def job(config: InpaintConfig) -> None:
        for out in inpaint(config):
            print(out)

    words = sys.argv[1:] if argv is None else argv
    named = ["--out" if word == "-o" else word for word in words]
    return jobs.main(InpaintConfig, job, named, verb="inpaint", examples=EXAMPLES)
