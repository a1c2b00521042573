"""`vidfill synth`: collision videos to try everything on."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from fractions import Fraction
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import Interval, MultipleOf

from ... import jobs, options
from ...progress import Progress, show_progress
from ...seeding import derive_seed
from ..videos import write_video
from .raycast import render
from .scene import Scene, draw_scene

FPS = Fraction(25, 2)  # CLEVRER's
FIRST_VALIDATION, END = 10_000, 15_000  # CLEVRER's numbers of videos: training's come first
FOLDER_HOLDS = 1_000

EXAMPLES = """examples:
  vidfill synth videos
  vidfill synth videos --clips 1000 --validation 100 --size 128 --seed 7
"""


@dataclass(frozen=True)
class SynthConfig:
    """Make collision videos in CLEVRER's layout, so that there is something to train on at once.

    Shaded spheres, cubes and cylinders collide elastically on a grey floor under a fixed camera;
    some come in from outside the view. Video k depends only on the seed, k and the number of
    frames. Videos are H.264 at 12.5 frames a second.
    """

    out: Path
    """Folder to write: video_train/ and video_validation/ within it."""
    clips: Annotated[int, Interval(ge=1, le=FIRST_VALIDATION)] = 120
    """Training videos, 1 to 10000."""
    validation: Annotated[int, Interval(ge=0, le=END - FIRST_VALIDATION)] = 16
    """Validation videos, 0 to 5000."""
    size: Annotated[int, Interval(ge=16), MultipleOf(2)] = 64
    """Width and height in pixels; even, at least 16."""
    frames: Annotated[int, Interval(ge=2)] = 24
    """Frames of each video, at least 2."""
    seed: int = 0
    """Other seeds make other videos."""


def synth(config: SynthConfig) -> list[Path]:
    """Write the videos that are not there yet; return the paths of all of them.

    Raises:
        BadInput: a value is out of range, or the folder holds something else.
    """
    options.check(config)
    validation = range(FIRST_VALIDATION, FIRST_VALIDATION + config.validation)
    numbers = [*range(config.clips), *validation]
    paths = {number: video_path(config.out, number) for number in numbers}
    with jobs.claim(config.out, "synth", config):
        missing = [number for number, path in paths.items() if not path.exists()]
        done = len(paths) - len(missing)
        with show_progress("rendering", len(paths), "videos", done) as progress:
            _render_all(config, missing, progress)
    return list(paths.values())


def video_path(out: Path, number: int) -> Path:
    """Where CLEVRER keeps video `number`: a folder of each split holds a thousand."""
    split = "validation" if number >= FIRST_VALIDATION else "train"
    first = number // FOLDER_HOLDS * FOLDER_HOLDS
    folder = f"video_{first:05}-{first + FOLDER_HOLDS:05}"
    return out / f"video_{split}" / folder / f"video_{number:05}.mp4"


def _render_all(config: SynthConfig, numbers: Sequence[int], progress: Progress) -> None:
    if not numbers:
        return
    # Forking a process that has threads (torch's, OpenCV's) can hang it.
    workers = min(os.cpu_count() or 1, len(numbers))
    pool = ProcessPoolExecutor(workers, get_context("spawn"), initializer=_end_with_parent)
    try:
        # The workers begin with the first video, and inherit what is blocked: only the parent
        # answers Ctrl-C. It finishes the videos in work and starts no more.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        rendered = [pool.submit(render_video, config, number) for number in numbers]
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        for future in as_completed(rendered):
            progress.advance(note=future.result())
    finally:
        pool.shutdown(cancel_futures=True)


def _end_with_parent() -> None:
    """A worker whose parent was killed ends too."""

    def wait(parent: Any) -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=wait, args=[parent_process()], daemon=True).start()


def render_video(config: SynthConfig, number: int) -> str:
    """Draw, render and write one video; return its name."""
    path = video_path(config.out, number)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_video(path, render(scene_of(config, number), config.size), FPS)
    return path.name


def scene_of(config: SynthConfig, number: int) -> Scene:
    """The scene of video `number`, the same at every size."""
    rng = np.random.default_rng(derive_seed(config.seed, number, "scene"))
    return draw_scene(rng, config.frames, float(FPS))


def main(argv: Sequence[str] | None = None) -> int:
    return jobs.main(SynthConfig, synth, argv, verb="synth", examples=EXAMPLES)
