"""Propagation along optical flow beside `classic`: PSNR, what the confidence promises, time.

Every video is masked in each of the families, and its holes are filled by every way in turn.
"""

from __future__ import annotations

import argparse
import itertools
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from vidfill.data.masks import FAMILIES, draw_mask, fill_hole
from vidfill.data.motion.flow import estimate_flow
from vidfill.data.motion.propagation import propagate_clip
from vidfill.data.videos import Frames, FrameSize, Masks, UnreadableVideo, read_frames
from vidfill.sampling.metrics.pixels import psnr_hole, seam_error
from vidfill.sampling.sweep.baselines import INPAINT_RADIUS, classic, flow

from .machine import processor

EXAMPLES = """examples:
  python -m benchmarks.motion VIDEOS --frames 24
      the tables of docs/motion.md; VIDEOS is a folder of videos of real cameras
  python -m benchmarks.motion VIDEOS --frames 12 --size 864x480 --masks box
      frames of another size
"""
BINS = (0, 0.2, 0.4, 0.6, 0.8, 0.9, 1)  # of the confidence
WAYS: dict[str, Callable[[Frames, Masks], Frames]] = {
    "fill": fill_hole,
    "classic": classic,
    "flow": flow,
}


class ScoredClip(NamedTuple):
    """What was measured of a clip under one family of masks."""

    video: str
    family: str
    psnr: dict[str, float]
    seam: dict[str, float]
    seconds: dict[str, float]
    """Of the processor, for a frame."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.motion",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("videos", type=Path, help="folder of videos")
    parser.add_argument("--frames", type=int, default=24, help="of each video, from its start")
    parser.add_argument("--size", default="", help='as in "432x240"; frames stay as they are')
    families = ("box", "strokes", "variable", "stationary")
    parser.add_argument("--masks", nargs="+", choices=FAMILIES, default=families)
    given = parser.parse_args(argv)
    cv2.setNumThreads(1)
    scored, trusted = [], []
    for video in sorted(given.videos.iterdir()):
        try:
            read = read_frames(video, FrameSize.parse(given.size))
            clip = np.stack(list(itertools.islice(read, given.frames)))
        except UnreadableVideo as error:
            print(f"{video}: {error}", file=sys.stderr)
            continue
        for family in given.masks:
            print(f"{video.name}, {family} …", file=sys.stderr)
            masks = draw_mask(family, *clip.shape[:3], (0,))
            scored.append(score(video.stem, family, clip, masks))
            trusted.append(compare_with_confidence(clip, masks))
    if not scored:
        parser.error(f"videos is {given.videos}, which holds no video that can be read")
    print(quality_table(scored), time_table(scored), calibration_table(trusted), sep="\n\n")
    command = shlex.join(["python", "-m", "benchmarks.motion", *(argv or sys.argv[1:])])
    print(f"\n{command}\nOpenCV {cv2.__version__}; {processor()}, 1 thread")
    return 0


def score(video: str, family: str, clip: Frames, masks: Masks) -> ScoredClip:
    """Fill a clip's holes by every way, and measure the results."""
    psnr, seam, seconds = {}, {}, {}
    for name, way in WAYS.items():
        began = time.process_time()
        result = way(clip, masks)
        seconds[name] = (time.process_time() - began) / len(clip)
        psnr[name], seam[name] = psnr_hole(result, clip, masks), seam_error(result, clip, masks)
    grey = [cv2.cvtColor(frame, cv2.COLOR_RGB2GRAY) for frame in clip]
    began = time.process_time()
    for here, there in itertools.pairwise(grey):
        estimate_flow(here, there), estimate_flow(there, here)
    seconds["flow, of which DIS"] = (time.process_time() - began) / len(clip)
    began = time.process_time()
    for frame, mask in zip(clip, masks, strict=True):
        cv2.inpaint(frame, mask, INPAINT_RADIUS, cv2.INPAINT_TELEA)
    seconds["OpenCV's inpainting"] = (time.process_time() - began) / len(clip)
    return ScoredClip(video, family, psnr, seam, seconds)


def compare_with_confidence(clip: Frames, masks: Masks) -> np.ndarray:
    """The confidence and the squared error of each hidden pixel that was found."""
    pixels, confidence = propagate_clip(clip, masks)
    found = (masks == 1) & (confidence > 0)
    errors = ((pixels.astype(np.float32) - clip)[found] ** 2).mean(axis=-1)
    return np.stack([confidence[found], errors])


def quality_table(scored: Sequence[ScoredClip]) -> str:
    """PSNR of the hole, and the seam error, by video and family, then the means."""
    lines = [
        "| video | masks | fill | classic | flow | seam: classic | flow |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in scored:
        lines.append(_quality_line(one.video, one.family, [one]))
    for family in dict.fromkeys(one.family for one in scored):
        of_family = [one for one in scored if one.family == family]
        lines.append(_quality_line("mean", family, of_family))
    return "\n".join(lines)


def _quality_line(video: str, family: str, scored: Sequence[ScoredClip]) -> str:
    psnr = [np.mean([one.psnr[name] for one in scored]) for name in WAYS]
    seam = [np.mean([one.seam[name] for one in scored]) for name in ("classic", "flow")]
    cells = [f"{value:.1f}" for value in (*psnr, *seam)]
    return f"| {video} | {family} | {' | '.join(cells)} |"


def time_table(scored: Sequence[ScoredClip]) -> str:
    """Processor seconds a frame: the median over the clips, the least and the most."""
    lines = ["| way | processor seconds a frame |", "| --- | ---: |"]
    for name in scored[0].seconds:
        values = [one.seconds[name] for one in scored]
        spread = f"{np.median(values):.3f} ({min(values):.3f}–{max(values):.3f})"
        lines.append(f"| {name} | {spread} |")
    return "\n".join(lines)


def calibration_table(trusted: Sequence[np.ndarray]) -> str:
    """The error of what was found, by confidence."""
    confidence, errors = np.concatenate(trusted, axis=1)
    lines = ["| confidence | share of what was found | error, RMS |", "| --- | ---: | ---: |"]
    for low, high in itertools.pairwise(BINS):
        inside = (confidence > low) & (confidence <= high)
        error = f"{np.sqrt(errors[inside].mean()):.1f}" if inside.any() else "–"
        lines.append(f"| {low}–{high} | {inside.mean():.1%} | {error} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
