"""`vidfill inpaint`: a video + a mask + a model -> the video with its holes filled."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ... import jobs, options
from ...data.fingerprints import fingerprint_videos
from ...data.videos import FrameSize, Mask
from ...errors import BadInput, say
from ...files import Fingerprint, is_same, refuse_existing, seen_as
from ...modeling.autoencoder import load_trained_autoencoder
from ...modeling.denoiser import Denoiser
from ...processes import choose_device
from ...progress import show_progress
from ..capacity import time_evaluation
from ..schedules.language import parse
from ..schedules.program import compile_schedule
from .boxes import choose_size
from .output import open_output
from .settings import EXAMPLES, InpaintConfig
from .trial import check_output
from .unfinished import UnfinishedWork
from .video import Footage, Picture, check_masks, open_footage, read_masked, read_masks
from .windows import FilledWindow, FillSettings, fill_windows, plan_boxes, usual_schedule

Pairs = Iterator[tuple[Picture, Mask]]

WORK_SUFFIX = ".work"  # ends the name of the folder of unfinished work, beside OUT
# Options that may differ when work continues; of the networks the weights are compared.
MAY_DIFFER = ("out", "model", "autoencoder", "device", "choose", "codec")


def inpaint(config: InpaintConfig) -> list[Path]:
    """Fill the holes, and return the files that were written.

    Raises:
        BadInput: A setting is wrong, or video, mask and model do not fit together.
    """
    jobs.refuse_launcher("inpaint")
    options.check(config)
    if config.plan:
        show_plan(config, *open_inputs(config))
        return []
    if config.out is None:
        raise BadInput("out is missing: name the file to write with -o")
    work = UnfinishedWork(_work_folder(config.out), config.samples)
    _refuse_outs(config.out, config, work)  # before the work, and again once nobody else may write
    footage, settings = open_inputs(config)
    lacks = [] if work.made(config.out) else check_output(footage, config.out, config.codec)
    for sentence in lacks:
        say(f"vidfill inpaint: {sentence}")
    located = dataclasses.replace(config, schedule=str(settings.program.schedule))
    claim = jobs.claim(
        *(work.folder, "inpaint", located),
        stands_on=functools.partial(_identify, config, settings),
        may_change=MAY_DIFFER,
        temporary=True,
        renew=_renew,
    )
    with claim as confirm:
        _refuse_outs(config.out, config, work)
        fill_all(config, footage, settings, work, confirm)
        confirm()
        outs = _name_outs(config.out, choose(config, footage, work), config)
        if left := {k: out for k, out in outs.items() if not work.made(out)}:
            write_all(config, footage, work, left)
    return list(outs.values())


def _refuse_outs(out: Path, config: InpaintConfig, work: UnfinishedWork) -> None:
    """Refuse outputs that are there already, but for those that this work has made."""
    for named in _name_outs(out, range(config.samples), config).values():
        if not work.made(named):
            refuse_existing(named)


def _work_folder(out: Path) -> Path:
    return out.with_name(out.name + WORK_SUFFIX)


def _name_outs(out: Path, samples: Iterable[int], config: InpaintConfig) -> dict[int, Path]:
    """The file or folder of each sample that is written."""
    if config.samples == 1 or config.choose:
        return dict.fromkeys(samples, out)
    return {k: out.with_name(f"{out.stem}-{k + 1}{out.suffix}") for k in samples}


def open_inputs(config: InpaintConfig) -> tuple[Footage, FillSettings]:
    """Load and check everything; nothing is written.

    Raises:
        BadInput: It names what does not fit.
    """
    if not config.mask:
        raise BadInput("mask is empty: give a video, an image, a folder, or x,y,width,height")
    schedule = parse(config.schedule or usual_schedule(config.model))
    device = choose_device(config.device)
    footage = open_footage(config.video, config.trim, config.frame_rate)
    check_masks(config.mask, footage)
    denoiser = Denoiser.load(config.model, str(device), config.precision)
    settings = FillSettings(
        denoiser,
        load_trained_autoencoder(
            denoiser.autoencoder, config.autoencoder, device, config.precision
        ),
        compile_schedule(schedule, denoiser.timesteps),
        seed=config.seed,
        samples=range(config.samples),
        size=FrameSize.parse(config.size),
        overlap=config.overlap,
        feather=config.feather,
        colour_match=config.colour_match,
    )
    return footage, settings


def _identify(
    config: InpaintConfig, settings: FillSettings, before: Mapping[str, Any]
) -> dict[str, Any]:
    """What must not change until the work is done; `before` is what was recorded."""
    return {
        "model": settings.denoiser.fingerprint(),
        "autoencoder": settings.autoencoder.fingerprint(),
    } | _fingerprint_sources(config, before)


def _fingerprint_sources(config: InpaintConfig, known: Mapping[str, Any]) -> dict[str, Fingerprint]:
    paths = {"video": config.video, "mask": Path(config.mask)}  # a rectangle is no file
    return {name: fingerprint_videos(p, known=known.get(name)) for name, p in paths.items()}


def _refuse_rewritten(config: InpaintConfig, work: UnfinishedWork) -> None:
    """Refuse to write a video or masks other than those by which windows were filled."""
    job = jobs.read_job(work.folder)
    before = (job.stands_on if job else None) or {}
    for name, now in _fingerprint_sources(config, before).items():
        if name in before and not is_same(Fingerprint(*before[name]), now):
            raise BadInput(
                f"the {name} was written anew while this job ran: remove {work.folder} to begin "
                "again"
            )


def _renew(before: jobs.JobRecord) -> jobs.JobRecord:
    """Version 0.1 had its hashes beside the configuration."""
    parts = before.config
    stands_on = {f"{name}.weights": parts[name] for name in ("model", "autoencoder")}
    for name in ("video", "mask"):
        path = Path(parts["config"][name])
        if path.is_file():
            stands_on[name] = seen_as([(f"0/{path.suffix}", *parts[name])])
    return before.model_copy(update={"config": parts["config"], "stands_on": stands_on})


def show_plan(config: InpaintConfig, footage: Footage, settings: FillSettings) -> None:
    """Print how many windows there are, what the network sees and how long it takes."""
    masks = read_masks(config.mask, footage, invert=config.invert, dilate=config.dilate)
    boxes = list(plan_boxes(masks, settings))
    with_hole = [box for box in boxes if box]
    say(
        f"{len(boxes)} windows of {settings.window_length} frames, {settings.overlap_frames} of "
        f"them taken over from the one before; {len(with_hole)} have a hole to fill",
        file=sys.stdout,
    )
    if not with_hole:
        return
    unit = settings.autoencoder.downsampling
    sizes = [choose_size(box, settings.area, unit) for box in with_hole]
    shown = collections.Counter(zip(with_hole, sizes, strict=True)).most_common(3)
    for (box, size), count in shown:
        say(
            f"  {count}: {box.width}x{box.height} pixels of the frame, seen at {size}",
            file=sys.stdout,
        )
    if len(set(with_hole)) > len(shown):
        say("  …", file=sys.stdout)
    largest = max(sizes, key=lambda size: size.width * size.height)
    network = settings.denoiser.network
    channels, height, width = network.config["condition_channels"], largest.height, largest.width
    shape = (settings.window_length, channels, height // unit, width // unit)
    seconds = time_evaluation(settings.denoiser, torch.zeros(shape, device=network.device), 1)
    evaluations = len(with_hole) * settings.evaluations
    say(
        f"{settings.program.schedule}: {settings.program.nfe:,} evaluations a window and "
        f"completion, {evaluations:,} in all",
        f"network time: {evaluations * seconds:,.1f} s, at "
        f"{seconds:.3f} s an evaluation; reading, autoencoder and writing come on top",
        file=sys.stdout,
    )


def fill_all(
    config: InpaintConfig,
    footage: Footage,
    settings: FillSettings,
    work: UnfinishedWork,
    confirm: Callable[[], None] = lambda: None,
) -> None:
    """Fill every window that is not stored yet; `confirm` says whether the folder is still ours."""
    each, spent = settings.evaluations, 0
    work.drop_rest()
    pairs, before = _resume(config, footage, settings.window_length, work)

    def count(evaluations: int) -> None:
        nonlocal spent
        spent += evaluations
        shown.advance(evaluations)

    settings = dataclasses.replace(settings, on_evaluations=count)
    total = count_windows(footage.frames, settings) * each
    with show_progress("inpaint", total, "evaluations", len(work.files()) * each) as shown:
        frames = ((picture.rgb, mask) for picture, mask in pairs)
        try:
            for window in fill_windows(frames, settings, before):
                confirm()
                work.add(window)
                if spent < each:  # it had no hole
                    shown.advance(each - spent)
                spent = 0
        except torch.OutOfMemoryError:
            raise BadInput(
                f"a window does not fit into the memory of device {config.device}: give a smaller "
                "--size, --precision bfloat16, or --device cpu; the same --out may be used again "
                f"once {work.folder} is removed"
            ) from None


def count_windows(frames: int, settings: FillSettings) -> int:
    """Windows of a video."""
    further = max(0, frames - settings.window_length)
    return 1 + -(-further // (settings.window_length - settings.overlap_frames))


def _read_pairs(config: InpaintConfig, footage: Footage, start: int = 0) -> Pairs:
    return read_masked(
        footage, config.mask, invert=config.invert, dilate=config.dilate, start=start
    )


def _resume(
    config: InpaintConfig, footage: Footage, window_length: int, work: UnfinishedWork
) -> tuple[Pairs, FilledWindow | None]:
    """The pictures that are not filled yet, and the last filled ones before them."""
    files = work.files()
    if not files:
        return _read_pairs(config, footage), None
    end = files[-1].end
    latest = [file for file in files if file.end > end - window_length]
    pairs = _read_pairs(config, footage, latest[0].first)
    filled = collections.deque(work.restore(pairs, latest), window_length)
    frames = zip(*(versions for _, _, versions in filled), strict=True)
    masks = [mask for _, mask, _ in filled]
    box = work.read_box(latest[-1])
    return pairs, FilledWindow(
        end - len(masks), [list(sample) for sample in frames], masks, [], box
    )


def choose(config: InpaintConfig, footage: Footage, work: UnfinishedWork) -> Sequence[int]:
    """The samples to write: all, or the one with the smallest steps across the holes' borders."""
    if not config.choose:
        return range(config.samples)
    files = work.list_whole(footage.frames)
    totals, counts = np.sum([work.read_steps(file) for file in files], axis=0).T
    means = totals / np.maximum(counts, 1)
    best = int(means.argmin())
    listed = ", ".join(f"{mean:.2f}" for mean in means)
    say(
        f"steps across the holes' borders: {listed}; completion {best + 1} is taken",
        file=sys.stdout,
    )
    return [best]


def write_all(
    config: InpaintConfig, footage: Footage, work: UnfinishedWork, outs: dict[int, Path]
) -> None:
    """Write the videos of the chosen samples; say where there was nothing to fill."""
    hides = False
    with contextlib.ExitStack() as stack:
        writers = {
            k: stack.enter_context(open_output(footage, out, config.codec))
            for k, out in outs.items()
        }
        shown = stack.enter_context(show_progress("writing", footage.frames, "frames"))
        files = work.list_whole(footage.frames)
        for picture, mask, filled in work.restore(_read_pairs(config, footage), files):
            for k, write in writers.items():
                write(picture, filled[k], mask)
            hides = hides or bool(mask.any())
            shown.advance()
        _refuse_rewritten(config, work)
        work.promise(outs.values())
    if not hides:
        say(
            f"vidfill inpaint: mask is {config.mask}, which hides nothing in any frame, so nothing "
            "was filled: white is the hole, --invert takes black for it"
        )


def main(argv: Sequence[str] | None = None) -> int:
    """The command line of `vidfill inpaint`."""

    def job(config: InpaintConfig) -> None:
        for out in inpaint(config):
            say(str(out), file=sys.stdout)

    words = sys.argv[1:] if argv is None else argv
    named = [re.sub(r"^-o(.+)", r"--out=\1", "--out" if word == "-o" else word) for word in words]
    return jobs.main(InpaintConfig, job, named, verb="inpaint", examples=EXAMPLES)
