"""`vidfill encode`: videos -> clips -> masks -> latents -> shards.

One process or many, under any launcher: the first one makes the plan, which says of every shard
what it is made of; then each takes the next shard that is missing. A shard's bytes follow from its
part of the plan alone, so neither the number of processes nor an interruption changes them.

    decode ──▶ mask ──▶ encode ──▶ write        each in a thread of its own, a few clips apart
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import itertools
import json
import math
import sys
import tarfile
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple, TypeVar, cast

import numpy as np
import torch
import xxhash
from jaxtyping import Float16, Int, UInt8
from torch import Tensor

from .. import jobs
from ..crew import Crew, choose_device
from ..modeling.autoencoder import PAPERS, Autoencoder, load_autoencoder, to_pixels
from ..modeling.precision import Precision
from . import masks, shards, sources
from .layout import SKIPPED
from .order import choose_lanes
from .sources import Piece, Plan, Source, Surveyed
from .videos import Fit, FrameSize, UnreadableVideo, cut_clips

EXAMPLES = """examples:
  vidfill encode CLEVRER runs/clevrer --size 128 --masks "stationary variable" --masks_per_clip 2
      CLEVRER with the paper's autoencoder, each clip under both of the paper's masks
  accelerate launch --config_file launch/node.yaml --num_processes 8 -m vidfill.data.encode \\
      CLEVRER runs/clevrer --size 128 --precision bfloat16
      the same shards on any number of GPUs
  vidfill encode runs/videos runs/shards --autoencoder shipped
      synthetic videos: the package's own small autoencoder, which needs no download
  vidfill encode DAVIS runs/davis --size 432x240 --masks own
      folders of frames, each with the masks that come with it
  vidfill encode runs/videos runs/mixed --masks "stationary box:2" --held_out_masks strokes
      a mix for training; a family that training never sees for the other splits
  vidfill encode runs/videos runs/moments --posterior moments --max_skipped 10
      for fresh latents in every epoch; up to ten videos may be unusable
"""

PLAN = "plan.json"
AHEAD = 2  # clips that each stage may be ahead of the next
STAGES = ("decode", "masks", "autoencoder", "write")
NPY_HEADER = 128  # bytes
TELL_EVERY = 1.0  # seconds between a process's counts to the others
VISIBLE = 60.0  # seconds in which a file on a shared file system shows on every node

Item = TypeVar("Item")


@dataclass(frozen=True)
class EncodeConfig:
    """Cut videos into clips, mask them, and write both as shards of autoencoder latents.

    Folders of split names (train, validation, test; also CLEVRER's) give splits, anything else is
    all training videos. A video is a file, or a folder of images. The same command continues a job
    that was stopped, on any number of processes. A video that cannot be read, or is shorter than a
    clip, gives no clip: it is counted and listed, and more of them than `max_skipped` end the job.
    """

    videos: Path
    """Folder of videos, searched to the bottom."""
    out: Path
    """Folder for the shards: new, empty, or begun by this same command."""
    autoencoder: str = PAPERS
    """A name on the hub, a local folder, or "shipped": the package's own small one, for synthetic
    videos."""
    frames: int = 20
    """Frames of a clip."""
    stride: int | None = None
    """Frames from one clip's start to the next's; null makes clips follow on one another."""
    size: str = ""
    """Pixels of a frame, "128" for a square or "432x240", width by height; empty keeps them as they
    are."""
    fit: Fit = "crop"
    """How a frame gets to `size`: its middle is resized, or all of it, whatever its proportions."""
    masks: str = "stationary"
    """Families of masks with their weights, as in "stationary:2 box"; "own" are the videos' own."""
    masks_per_clip: int = 1
    """Examples of a clip, each under another mask."""
    held_out_masks: str = ""
    """Families for the splits other than train; empty takes those of `masks`."""
    mask_files: Path | None = None
    """Folder of the videos' own masks, laid out as the videos are; null looks beside them."""
    fill: str = "median"
    """Colour of the hole: "median" of the clip's visible pixels, or "R,G,B", each 0 to 255."""
    seed: int = 0
    """Seed of the masks."""
    posterior: Literal["mean", "moments"] = "mean"
    """What is kept of the autoencoder's posterior: "moments" adds the log-variance, from which
    training draws fresh latents."""
    pixels: Literal["held_out", "all", "none"] = "held_out"
    """Splits whose shards keep the clips' pixels too, for metrics; "held_out" is all but train."""
    shard_megabytes: float = 128.0
    """Size that no shard exceeds, in 10^6 bytes."""
    batch_size: int = 64
    """Frames of one call of the autoencoder."""
    max_skipped: int = 0
    """Unusable videos to put up with; raising it continues a job that ended for them."""
    precision: Precision = "float32"
    """Of the autoencoder; bfloat16 is several times faster where the hardware has it."""
    device: str = "auto"
    """Where the autoencoder runs: "cpu", "cuda", "cuda:1"…; "auto" is each process's own GPU if
    there is one."""
    frame_rate: float = 24.0
    """Frames per second of a video that is a folder of images."""


@dataclass(frozen=True)
class Timings:
    """Where the time of a job went; its stages overlap."""

    processes: int
    clips: int  # encoded now, not found finished
    elapsed: float  # seconds from the first shard's start to the last one's end
    stages: Mapping[str, float]  # seconds in which each was busy, summed over the processes

    def __str__(self) -> str:
        elapsed = max(self.elapsed, 1e-9)
        shares = ", ".join(
            f"{name} {seconds / elapsed / self.processes:.0%}"
            for name, seconds in self.stages.items()
        )
        return (
            f"{self.clips} clips in {self.elapsed:.1f} s, {self.clips / elapsed:.1f} clips/s on "
            f"{self.processes} process(es), which were busy: {shares}"
        )


@dataclass(frozen=True)
class Settings:
    """What a configuration's texts say."""

    stride: int
    size: FrameSize | None
    colour: masks.Colour | None  # None is the median of the visible pixels
    training: masks.Mix
    held_out: masks.Mix

    def mix(self, split: str) -> masks.Mix:
        return self.training if split == "train" else self.held_out


class Task(NamedTuple):
    """A shard to be."""

    split: str
    number: int


@dataclass(frozen=True)
class Encoding:
    """How videos become examples."""

    config: EncodeConfig
    settings: Settings
    plan: Plan
    height: int
    width: int
    autoencoder: Autoencoder

    @property
    def latent_shape(self) -> tuple[int, int, int, int]:
        step = self.autoencoder.downsampling
        channels = self.autoencoder.channels
        return self.config.frames, channels, self.height // step, self.width // step

    def keeps_pixels(self, split: str) -> bool:
        kept = self.config.pixels
        return kept == "all" or (kept == "held_out" and split != "train")

    def tasks(self) -> Iterator[Task]:
        for split, listed in self.plan.shards.items():
            yield from (Task(split, number) for number in range(len(listed)))

    def pieces(self, task: Task) -> Sequence[Piece]:
        return self.plan.shards[task.split][task.number]

    def sources(self, task: Task) -> tuple[str, ...]:
        """What a shard's index says that it is made of."""
        return tuple(str(piece) for piece in self.pieces(task))

    def count_clips(self, piece: Piece) -> int:
        """The clips that a piece should have."""
        header = self.plan.surveyed[piece.source.label].header
        if piece.clips is not None or header is None:
            return piece.clips or 0
        clips = cut_clips(header.frames, self.config.frames, self.settings.stride)
        return len(clips) - piece.first_clip


class Decoded(NamedTuple):
    """A clip of a piece."""

    piece: Piece
    clip: sources.Clip


class View(NamedTuple):
    """One mask of a clip."""

    key: str
    family: str
    mask: UInt8[np.ndarray, "frames height width"]
    colour: masks.Colour


class Masked(NamedTuple):
    """A clip under all of its masks."""

    piece: Piece
    clip: sources.Clip
    views: list[View]
    frames: list[UInt8[np.ndarray, "height width 3"]]  # of the clip and its views, without repeats
    rows: Int[np.ndarray, "views frames"]  # where each frame is in `frames`; row 0 is the clip's


class Ended(NamedTuple):
    """A piece was read to its end, or could not be."""

    piece: Piece
    reason: str = ""  # why its clips are worth nothing
    frames: Sequence[np.ndarray] = ()  # to encode: none


class Result(NamedTuple):
    """What is known of a clip, or of a piece's end, once the autoencoder has passed it."""

    event: Masked | Ended
    latents: list[Float16[np.ndarray, "moments channels h w"]]  # of `event.frames`: the mean, and
    # the log-variance where that is kept


def encode(config: EncodeConfig, again: Collection[Task] = ()) -> Timings | None:
    """Encode every video of `config.videos` into shards under `config.out`.

    Args:
        config: What to encode, and how.
        again: Shards to make anew though they are there.

    Returns:
        Where the time of all processes went; None in a process that is not the first.

    Raises:
        jobs.BadInput: a setting is wrong, or the videos cannot be encoded with it.
    """
    config = _locate_autoencoder(config)
    with contextlib.ExitStack() as stack:
        crew = stack.enter_context(Crew.join("encode"))
        settings = _check(config)
        begun = _begin(config, settings) if crew.rank == 0 else None
        digest = crew.share("plan", lambda: jobs.hash_file(config.out / PLAN))
        if begun:
            stack.enter_context(jobs.hold(config.out))
        how = begun or _load(config, settings, _await_plan(config, digest))
        missing = crew.share("missing", lambda: json.dumps(_find_missing(how, crew, again)))
        timings = _write_shards([Task(*task) for task in json.loads(missing)], how, crew)
        if crew.rank > 0:
            return None
        _finish(how)
        print(f"vidfill encode: {timings}", file=sys.stderr)
    return timings


# What comes before the first shard


def _locate_autoencoder(config: EncodeConfig) -> EncodeConfig:
    """With the autoencoder's whole path where it is a folder: the manifest will name it."""
    if not Path(config.autoencoder).is_dir():
        return config
    return dataclasses.replace(config, autoencoder=jobs.locate(config.autoencoder))


def _check(config: EncodeConfig) -> Settings:
    """Check every setting that can be wrong by itself."""
    for name in ("frames", "stride", "masks_per_clip", "batch_size"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise jobs.BadInput(f"{name} is {value}: give 1 or more")
    for name in ("shard_megabytes", "frame_rate"):
        value = getattr(config, name)
        if not 0 < value < math.inf:
            raise jobs.BadInput(f"{name} is {value}: give more than 0")
    for name in ("videos", "out", "mask_files"):
        if ":/" in str(getattr(config, name)):
            raise jobs.BadInput(f"{name} is a URL: encode reads and writes folders; upload them")
    if config.max_skipped < 0:
        raise jobs.BadInput(f"max_skipped is {config.max_skipped}: give 0 or more")
    return Settings(
        stride=config.stride or config.frames,
        size=FrameSize.parse(config.size),
        colour=_parse_fill(config.fill),
        training=masks.Mix.parse(config.masks),
        held_out=masks.Mix.parse(config.held_out_masks or config.masks),
    )


def _parse_fill(fill: str) -> masks.Colour | None:
    if fill == "median":
        return None
    parts = fill.replace(" ", "").split(",")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) <= 255 for part in parts):
        raise jobs.BadInput(f'fill is {fill!r}: give "median" or R,G,B, each 0 to 255')
    red, green, blue = map(int, parts)
    return red, green, blue


def _begin(config: EncodeConfig, settings: Settings) -> Encoding:
    """Claim the folder and put the plan there, or find both from before."""
    found = sources.find_sources(config.videos, config.mask_files)
    _say_outside(config, found)
    if (config.out / PLAN).is_file():
        _claim(config)
        plan = _read_plan(config)
        if change := plan.differs(found):
            raise jobs.BadInput(
                f"{config.out} was begun with other videos ({change}): choose another folder for "
                "the shards, or put the videos back"
            )
        return _load(config, settings, plan)
    surveyed = _survey(found, config, settings)
    how = _load(config, settings, Plan(surveyed, {}))
    how = dataclasses.replace(how, plan=_plan(how))
    _claim(config)
    jobs.write_atomically(
        config.out / PLAN, how.plan.to_json(config.videos, config.mask_files).encode()
    )
    return how


def _say_outside(config: EncodeConfig, found: Sequence[Source]) -> None:
    if outside := sources.find_outside(config.videos, found, config.mask_files):
        print(
            f"vidfill encode: left out {len(outside)} video(s) of {config.videos} that lie outside "
            f"its splits' folders, the first is {outside[0]}",
            file=sys.stderr,
        )


def _claim(config: EncodeConfig) -> None:
    # Raising the limit is the way to go on after a job that ended for it; that the videos are the
    # same, wherever they lie now, is the plan's to tell.
    may_change = ("max_skipped", "videos", "mask_files", "device")
    jobs.claim(config.out, "encode", config, may_change)


def _survey(
    found: Sequence[Source], config: EncodeConfig, settings: Settings
) -> dict[str, Surveyed]:
    """Look at every source's header; refuse a job that cannot end well.

    Raises:
        jobs.BadInput: too many videos are unusable, or all of a split.
    """
    surveyed: list[Surveyed] = []
    for split in _splits(found):
        own = masks.OWN in settings.mix(split).weights
        of_split = [source for source in found if source.split == split]
        seen = sources.survey(of_split, config.frames, own, config.frame_rate)
        if all(one.reason for one in seen):
            first = f"{config.videos / seen[0].source.label}: {seen[0].reason}"
            raise jobs.BadInput(f"no video of the split {split} is usable, the first is {first}")
        surveyed += seen
    if unusable := [one for one in surveyed if one.reason]:
        _refuse_skipped(len(unusable), unusable[0].source.label, unusable[0].reason, config)
    return {one.source.label: one for one in surveyed}


def _splits(found: Iterable[Source]) -> list[str]:
    return list(dict.fromkeys(source.split for source in found))


def _refuse_skipped(count: int, label: str, reason: str, config: EncodeConfig) -> None:
    if count > config.max_skipped:
        raise jobs.BadInput(
            f"{config.videos / label}: {reason} ({count} unusable, --max_skipped is "
            f"{config.max_skipped}): replace it, or give --max_skipped {count}"
        )


def _load(config: EncodeConfig, settings: Settings, plan: Plan) -> Encoding:
    """With the autoencoder, and all that depends on the frames' size.

    Raises:
        jobs.BadInput: it cannot be loaded, or the frames do not fit it or a family of masks.
    """
    height, width = _choose_size(plan, settings)
    device = choose_device(config.device)
    autoencoder = load_autoencoder(config.autoencoder, device, config.precision)
    step = autoencoder.downsampling
    if height % step or width % step:
        fitting = FrameSize(max(width // step, 1) * step, max(height // step, 1) * step)
        raise jobs.BadInput(
            f"frames are {width}x{height}; {autoencoder.name} takes multiples of {step}: "
            f"give --size {fitting}"
        )
    for family in {**settings.training.weights, **settings.held_out.weights}.keys() - {masks.OWN}:
        masks.draw_mask(family, config.frames, height, width, ("does it fit",))
    how = Encoding(config, settings, plan, height, width, autoencoder)
    if config.posterior == "moments":
        _encode_frames(np.zeros((1, height, width, 3), dtype=np.uint8), how)  # can it?
    return how


def _choose_size(plan: Plan, settings: Settings) -> tuple[int, int]:
    """Height and width of all frames.

    Raises:
        jobs.BadInput: sizes differ and none was asked for.
    """
    if settings.size:
        return settings.size.height, settings.size.width
    sizes = {
        (one.header.height, one.header.width): one.source.label
        for one in reversed(list(plan.surveyed.values()))
        if one.header and not one.reason
    }
    if len(sizes) > 1:
        (a, first), (b, second), *_ = reversed(sizes.items())
        raise jobs.BadInput(
            f"videos differ in size ({first} is {a[1]}x{a[0]}, {second} is {b[1]}x{b[0]}): "
            "give --size"
        )
    return next(iter(sizes))


def _plan(how: Encoding) -> Plan:
    """Cut each split's clips into shards.

    Raises:
        jobs.BadInput: a shard cannot hold one clip.
    """
    config, surveyed = how.config, how.plan.surveyed
    limit = int(config.shard_megabytes * 1e6) - tarfile.RECORDSIZE  # the tar's own end
    cut: dict[str, Sequence[Sequence[Piece]]] = {}
    for split in _splits(one.source for one in surveyed.values()):
        of_split = [one for one in surveyed.values() if one.source.split == split]
        clip_bytes = config.masks_per_clip * _bound_example(how, split)
        if clip_bytes > limit:
            least = math.ceil((clip_bytes + tarfile.RECORDSIZE) / 1e5) / 10
            raise jobs.BadInput(
                f"shard_megabytes is {config.shard_megabytes}, and one clip may take more: "
                f"give --shard_megabytes {least}"
            )
        cut |= sources.plan_shards(
            of_split, config.frames, how.settings.stride, clip_bytes, limit
        ).shards
    return Plan(surveyed, cut)


def _bound_example(how: Encoding, split: str) -> int:
    """Bytes in a tar that no example of a split exceeds."""
    frames, channels, h, w = how.latent_shape
    pixels = frames * how.height * how.width
    labels = [one.source.label for one in how.plan.surveyed.values()]
    arrays = [frames * channels * h * w * 2] * (2 if how.config.posterior == "mean" else 3)
    arrays += [frames * h * w * 2]
    arrays += [pixels * 3] if how.keeps_pixels(split) else []
    mask = 1024 + pixels // 6  # deflate takes 0.16 of a byte for a random value out of two
    record = 512 + max(len(json.dumps(label)) for label in labels)
    members = [*(NPY_HEADER + size for size in arrays), mask, record]
    return sum(members) + len(members) * 2 * tarfile.BLOCKSIZE  # a header each, and padding


def _read_plan(config: EncodeConfig) -> Plan:
    return Plan.from_json((config.out / PLAN).read_bytes(), config.videos, config.mask_files)


def _await_plan(config: EncodeConfig, digest: str) -> Plan:
    """The first process's plan, once this node sees it.

    Raises:
        jobs.BadInput: it never does.
    """
    path = config.out / PLAN
    ends = time.monotonic() + VISIBLE
    while not path.is_file() or jobs.hash_file(path) != digest:
        if time.monotonic() > ends:
            raise jobs.BadInput(
                f"{path} is not what the first process wrote: give a folder that all nodes share"
            )
        time.sleep(0.2)
    return _read_plan(config)


def _find_missing(how: Encoding, crew: Crew, again: Collection[Task]) -> list[Task]:
    """The shards that are not there yet; what was skipped before is counted."""
    for one in how.plan.surveyed.values():
        if one.reason:
            _count_skipped(one.source.label, one.reason, how.config, crew)
    missing = []
    for task in how.tasks():
        index = shards.read_index(how.config.out / task.split, task.number)
        if index is None or index.sources != how.sources(task) or task in again:
            missing.append(task)
            continue
        for skip in index.skipped:
            _count_skipped(skip.source, skip.reason, how.config, crew)
    return missing


def _count_skipped(label: str, reason: str, config: EncodeConfig, crew: Crew) -> None:
    """Count an unusable video, once however many shards it has a part in."""
    if crew.add(f"skipped {json.dumps(label)}") == 1:  # a file's name may be no UTF-8
        _refuse_skipped(crew.add("skipped"), label, reason, config)


# Shards, by any number of processes


def _write_shards(missing: Sequence[Task], how: Encoding, crew: Crew) -> Timings:
    """Take shards and write them until none is left; the first process waits for the others."""
    began = time.monotonic()
    with _show_progress(missing, how, crew) as progress:
        tally = _Tally(crew, progress)
        while (turn := crew.take("shards")) < len(missing):
            watch = _Watch()
            _write_shard(missing[turn], how, crew, watch, tally)
            for stage, seconds in watch.seconds.items():
                crew.add(f"{stage} in ms", round(seconds * 1000))
            tally.tell()
            crew.add("shards")
        if crew.rank == 0:
            crew.wait_for("shards", len(missing), tally.tell)
            tally.tell()
    return Timings(
        crew.size,
        crew.add("clips", 0),
        time.monotonic() - began,
        {stage: crew.add(f"{stage} in ms", 0) / 1000 for stage in STAGES},
    )


def _show_progress(
    missing: Sequence[Task], how: Encoding, crew: Crew
) -> contextlib.AbstractContextManager[jobs.Progress]:
    """The progress of all processes, which the first one shows."""
    if crew.rank > 0 or not missing:
        return contextlib.nullcontext(jobs.Progress())
    left = sum(how.count_clips(piece) for task in missing for piece in how.pieces(task))
    total = sum(how.count_clips(piece) for task in how.tasks() for piece in how.pieces(task))
    return jobs.progress("encode", total, "clips", total - left)


class _Tally:
    """Counts the clips of this process, and now and then those of all."""

    def __init__(self, crew: Crew, progress: jobs.Progress) -> None:
        self._crew, self._progress = crew, progress
        self._untold = {"clips": 0, "lost clips": 0}
        self._began = self._told = time.monotonic()
        self._shown = 0

    def add(self, clips: int = 0, lost: int = 0) -> None:
        """Count clips that were encoded, and clips of the plan that will never be."""
        self._untold["clips"] += clips
        self._untold["lost clips"] += lost
        if time.monotonic() - self._told > TELL_EVERY:
            self.tell()

    def tell(self) -> None:
        """Tell the others; hear of them, and show it."""
        clips, lost = (self._crew.add(name, count) for name, count in self._untold.items())
        self._untold = dict.fromkeys(self._untold, 0)
        self._told = time.monotonic()
        if clips + lost != self._shown:
            rate = clips / (self._told - self._began)
            self._progress.advance(clips + lost - self._shown, f"({rate:.1f} clips/s)")
            self._shown = clips + lost


class _Watch:
    """Seconds in which each stage was busy."""

    def __init__(self) -> None:
        self.seconds = dict.fromkeys(STAGES, 0.0)

    @contextlib.contextmanager
    def busy(self, stage: str, sign: int = 1) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[stage] += sign * (time.perf_counter() - began)

    def drawing(self, stage: str, items: Iterable[Item], sign: int = 1) -> Iterator[Item]:
        """`items`; the time that it takes to make them is the stage's, or is none of its."""
        iterator, end = iter(items), object()
        while True:
            with self.busy(stage, sign):
                item = next(iterator, end)
            if item is end:
                return
            yield cast(Item, item)


def _write_shard(task: Task, how: Encoding, crew: Crew, watch: _Watch, tally: _Tally) -> None:
    decoded = _ahead(watch.drawing("decode", _decode(how.pieces(task), how)))
    masked = _ahead(_mask(decoded, how, watch))
    results = _ahead(_encode(masked, how, watch))
    outcomes = _collect(results, how, crew, tally)
    with watch.busy("write"):
        shards.write_shard(
            how.config.out / task.split,
            task.number,
            how.sources(task),
            watch.drawing("write", outcomes, sign=-1),
        )


def _ahead(items: Iterable[Item]) -> Iterator[Item]:
    """`items`, made by a thread of their own, a few ahead of those that were taken."""
    iterator, end = iter(items), object()
    thread = ThreadPoolExecutor(1)
    try:
        made = collections.deque(thread.submit(next, iterator, end) for _ in range(AHEAD))
        while (item := made.popleft().result()) is not end:
            made.append(thread.submit(next, iterator, end))
            yield cast(Item, item)
    finally:
        thread.shutdown(cancel_futures=True)


def _decode(pieces: Iterable[Piece], how: Encoding) -> Iterator[Decoded | Ended]:
    for piece in pieces:
        reason = how.plan.surveyed[piece.source.label].reason
        if not reason:
            try:
                yield from (Decoded(piece, clip) for clip in _read_clips(piece, how))
            except UnreadableVideo as error:
                reason = str(error)
        yield Ended(piece, reason)


def _read_clips(piece: Piece, how: Encoding) -> Iterator[sources.Clip]:
    config, settings = how.config, how.settings
    own = masks.OWN in settings.mix(piece.source.split).weights
    for clip in sources.read_clips(
        piece, config.frames, settings.stride, settings.size, config.fit, own
    ):
        if settings.colour is None and clip.mask is not None and clip.mask.all():
            raise UnreadableVideo(
                f"its own masks hide all of the clip at frame {clip.first}, which leaves no colour "
                "to fill it with"
            )
        yield clip


def _mask(
    decoded: Iterable[Decoded | Ended], how: Encoding, watch: _Watch
) -> Iterator[Masked | Ended]:
    for event in decoded:
        if isinstance(event, Ended):
            yield event
        else:
            with watch.busy("masks"):
                masked = _mask_clip(event.piece, event.clip, how)
            yield masked


def _mask_clip(piece: Piece, clip: sources.Clip, how: Encoding) -> Masked:
    """The clip under all of its masks; frames that are equal are kept, and encoded, once."""
    seed = how.config.seed
    name = f"{piece.source.name}_{clip.first:05}"
    mix = how.settings.mix(piece.source.split)
    views = []
    count: collections.Counter[str] = collections.Counter()
    for family in mix.choose(how.config.masks_per_clip, (seed, name)):
        count[family] += 1
        key = f"{name}_{family}" + (f"-{count[family]}" if count[family] > 1 else "")
        mask = clip.mask
        if mask is None or family != masks.OWN:
            mask = masks.draw_mask(family, len(clip.frames), how.height, how.width, (seed, key))
        colour = how.settings.colour or masks.visible_median(clip.frames, mask)
        views.append(View(key, family, mask, colour))
    hidden = [masks.fill_hole(clip.frames, view.mask, view.colour) for view in views]
    frames, rows = _without_repeats([clip.frames, *hidden])
    return Masked(piece, clip, views, frames, rows)


def _without_repeats(
    videos: Sequence[UInt8[np.ndarray, "frames height width 3"]],
) -> tuple[list[UInt8[np.ndarray, "height width 3"]], Int[np.ndarray, "videos frames"]]:
    """The frames of all videos, equal ones once, and where each video's frames are among them."""
    frames: list[np.ndarray] = []
    found: dict[bytes, int] = {}
    rows = []
    for frame in itertools.chain(*videos):
        row = found.setdefault(
            xxhash.xxh3_128_digest(np.ascontiguousarray(frame).data), len(frames)
        )
        if row == len(frames):
            frames.append(frame)
        rows.append(row)
    return frames, np.array(rows).reshape(len(videos), -1)


def _encode(masked: Iterable[Masked | Ended], how: Encoding, watch: _Watch) -> Iterator[Result]:
    """Encode frames in batches that are full but for a shard's last, whatever clips they are of."""
    waiting: collections.deque[Masked | Ended] = collections.deque()
    frames: list[np.ndarray] = []  # of what waits, not yet encoded
    latents: list[np.ndarray] = []  # of what waits, frame by frame
    for event in itertools.chain(masked, [None]):
        if event is not None:
            waiting.append(event)
            frames.extend(event.frames)
        while len(frames) >= how.config.batch_size or (event is None and frames):
            with watch.busy("autoencoder"):
                latents.extend(_encode_frames(np.stack(frames[: how.config.batch_size]), how))
            del frames[: how.config.batch_size]
        while waiting and len(waiting[0].frames) <= len(latents):
            first = waiting.popleft()
            yield Result(first, latents[: len(first.frames)])
            del latents[: len(first.frames)]


def _encode_frames(
    frames: UInt8[np.ndarray, "frames height width 3"], how: Encoding
) -> Float16[np.ndarray, "frames moments channels h w"]:
    pixels = to_pixels(frames[None])
    # Without TF32, so that a GPU's latents are float32's.
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        if how.config.posterior == "mean":
            moments: Sequence[Tensor] = [how.autoencoder.encode(pixels, len(frames))]
        else:
            moments = how.autoencoder.encode_moments(pixels, len(frames))
    return torch.stack([values[0] for values in moments], dim=1).half().cpu().numpy()


def _collect(
    results: Iterable[Result], how: Encoding, crew: Crew, tally: _Tally
) -> Iterator[shards.Example | shards.Skipped]:
    """Hold a piece's examples back until it was read to its end: a damaged video gives none."""
    held: list[shards.Example] = []
    clips = 0
    for event, latents in results:
        if isinstance(event, Masked):
            held += _make_examples(event, np.stack(latents), how)
            clips += 1
            tally.add(clips=1)
        else:
            if event.reason:
                label = event.piece.source.label
                _count_skipped(label, event.reason, how.config, crew)
                yield shards.Skipped(label, event.reason)
            else:
                yield from held
            tally.add(lost=how.count_clips(event.piece) - clips)
            held, clips = [], 0


def _make_examples(
    masked: Masked,
    latents: Float16[np.ndarray, "frames moments channels h w"],
    how: Encoding,
) -> list[shards.Example]:
    piece, clip, views, _, rows = masked
    if not np.isfinite(latents).all():
        raise jobs.BadInput(
            f"{piece.source.label}, frame {clip.first}: {how.autoencoder.name} gives latents that "
            "float16 cannot hold: give another --autoencoder"
        )
    split, label = piece.source.split, piece.source.label
    header = how.plan.surveyed[label].header
    assert header is not None  # what has none is not read
    own = latents[rows[0]]
    return [
        shards.Example(
            key=view.key,
            latents=own[:, 0],
            masked_latents=latents[row, 0],
            mask=view.mask,
            record={
                "source": label,
                "split": split,
                "first_frame": clip.first,
                "fps": float(header.fps),
                "family": view.family,
                "seed": how.config.seed,
                "fill": list(view.colour),
            },
            pixels=clip.frames if how.keeps_pixels(split) else None,
            log_variance=own[:, 1] if how.config.posterior == "moments" else None,
        )
        for view, row in zip(views, rows[1:], strict=True)
    ]


# After the last shard


def _finish(how: Encoding) -> None:
    skipped: dict[str, str] = {}
    for split in how.plan.shards:
        skipped |= _write_manifest(split, how)
    if skipped:
        label, reason = next(iter(skipped.items()))
        print(
            f"vidfill encode: {len(skipped)} video(s) gave no clip, as {SKIPPED} tells; the "
            f"first is {label}: {reason}",
            file=sys.stderr,
        )


def _write_manifest(split: str, how: Encoding) -> dict[str, str]:
    """Write what is known once all shards of a split are there; return the skipped videos."""
    config, folder = how.config, how.config.out / split
    indexes = []
    for number in range(len(how.plan.shards[split])):
        index = shards.read_index(folder, number)
        if index is None:
            raise jobs.BadInput(
                f"{folder / shards.shard_name(number)} is gone: the same command makes it again"
            )
        indexes.append(index)
    skipped = {skip.source: skip.reason for index in indexes for skip in index.skipped}
    table = shards.ShardTable.of(indexes)
    if not sum(table.examples):
        label, reason = next(iter(skipped.items()))
        raise jobs.BadInput(f"no video of the split {split} gave a clip: {label}: {reason}")
    mean, std = shards.latent_moments(indexes)
    lanes, block = choose_lanes(table.examples)
    colour = how.settings.colour
    manifest = shards.Manifest(
        split=split,
        autoencoder=how.autoencoder.identity(),
        posterior=config.posterior,
        pixels=how.keeps_pixels(split),
        clip={"frames": config.frames, "height": how.height, "width": how.width},
        latent_shape=how.latent_shape,
        masks={
            "families": how.settings.mix(split).weights,
            "per_clip": config.masks_per_clip,
            "seed": config.seed,
        },
        fill="median" if colour is None else list(colour),
        latents_mean=tuple(mean),
        latents_std=tuple(std),
        examples=sum(table.examples),
        shards=table,
        lanes=lanes,
        block=block,
        skipped=len(skipped),
    )
    lines = "".join(
        json.dumps(dataclasses.asdict(shards.Skipped(*item))) + "\n" for item in skipped.items()
    )
    jobs.write_atomically(folder / SKIPPED, lines.encode())
    jobs.write_atomically(folder / shards.MANIFEST, manifest.to_json().encode())
    return skipped


def main(argv: Sequence[str] | None = None) -> int:
    examples = f"{EXAMPLES}\nfamilies of masks:\n{masks.describe_families()}\n"
    return jobs.main(EncodeConfig, encode, argv, verb="encode", examples=examples)


if __name__ == "__main__":
    sys.exit(main())
