"""`vidfill encode`: videos -> clips -> masks -> latents -> shards."""

from __future__ import annotations

import collections
import dataclasses
import functools
import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import torch
from jaxtyping import Float16, UInt8

from .. import jobs
from ..modeling.autoencoder import PAPERS, Autoencoder, Precision, load_autoencoder, to_pixels
from . import masks, shards, videos

EXAMPLES = """examples:
  vidfill encode CLEVRER runs/clevrer --size 128 --protocol both
      CLEVRER with the paper's autoencoder, each clip under both mask protocols
  vidfill encode runs/videos runs/shards --autoencoder shipped
      synthetic videos: the package's own small autoencoder, which needs no download
  vidfill encode runs/videos runs/grey --fill 128,128,128 --max_skipped 10
      a constant colour in the hole; up to ten videos may be unusable
"""

Item = TypeVar("Item")
Result = TypeVar("Result")

READ_AHEAD = 2  # videos decoded while the autoencoder works


@dataclass(frozen=True)
class EncodeConfig:
    """Cut videos into clips, mask them, and write both as shards of autoencoder latents.

    A folder `train` (or `video_train`) beside a folder `validation` (`video_validation`, `val`)
    gives two splits; any other folder is all training videos. The same command continues a job
    that was stopped. A video that cannot be read, or is shorter than a clip, gives no clip: it is
    counted and listed, and more of them than `max_skipped` end the job.
    """

    videos: Path
    """Folder of video files, searched to the bottom."""
    out: Path
    """Folder for the shards: new, empty, or begun by this same command."""
    autoencoder: str = PAPERS
    """A name on the hub, a local folder, or "shipped": the package's own small one, for synthetic
    videos."""
    frames: int = 20
    """Frames of a clip."""
    stride: int | None = None
    """Frames from one clip's start to the next's; null makes clips follow on one another."""
    size: int | None = None
    """Pixels: the middle square of a frame is resized to SIZE x SIZE; null keeps frames whole."""
    protocol: Literal["stationary", "variable", "both"] = "stationary"
    """One mask a clip, one a frame, or each clip once under each."""
    fill: str = "median"
    """Colour of the hole: "median" of the clip's visible pixels, or "R,G,B", each 0 to 255."""
    seed: int = 0
    """Seed of the masks."""
    pixels: Literal["validation", "all", "none"] = "validation"
    """Splits whose shards keep the clips' pixels too, for metrics."""
    shard_size: int = 64
    """Videos of a shard."""
    max_skipped: int = 0
    """Unusable videos to put up with; raising it continues a job that ended for them."""
    precision: Precision = "float32"
    """Of the autoencoder; bfloat16 is several times faster where the hardware has it."""
    device: str = "auto"
    """Where the autoencoder runs: "cpu", "cuda", "cuda:1"…; "auto" is a GPU if there is one."""


class Source(NamedTuple):
    """A video, with the name that its clips' keys begin with (no dots, unique)."""

    path: Path
    name: str
    label: str  # its path below the folder of videos


class Task(NamedTuple):
    """A shard to be: a fixed list of videos, so that a job begun again makes the same bytes."""

    split: str
    shard: Path
    sources: list[Source]


@dataclass(frozen=True)
class Encoding:
    """How videos become examples."""

    config: EncodeConfig
    colour: masks.Colour | None  # None is the median of the visible pixels
    height: int
    width: int
    autoencoder: Autoencoder


def encode(config: EncodeConfig) -> None:
    """Encode every video of `config.videos` into shards under `config.out`.

    Raises:
        jobs.BadInput: a setting is wrong, or the videos cannot be encoded with it.
    """
    colour = _check(config)
    splits = _name_sources(config.videos)
    height, width = _survey([s for sources in splits.values() for s in sources], config)
    autoencoder = load_autoencoder(
        config.autoencoder, jobs.choose_device(config.device), config.precision
    )
    _check_fit(height, width, autoencoder)
    # Raising the limit is the way to go on after a job that ended for it: it is no other job.
    jobs.claim(config.out, "encode", config, may_change=("max_skipped",))
    how = Encoding(config, colour, height, width, autoencoder)
    indexes = _write_shards(_plan(splits, config), how)
    for split in splits:
        _write_manifest(split, indexes[split], how)


def _plan(splits: dict[str, list[Source]], config: EncodeConfig) -> list[Task]:
    return [
        Task(split, config.out / split / shards.shard_name(number), sources[first : first + size])
        for size in [config.shard_size]
        for split, sources in splits.items()
        for number, first in enumerate(range(0, len(sources), size))
    ]


def _write_shards(
    tasks: Sequence[Task], how: Encoding
) -> dict[str, list[tuple[str, shards.ShardIndex]]]:
    """Make the shards that are not there yet; return each split's, by name, in order."""
    finished = {task.shard: index for task in tasks if (index := _find_finished(task))}
    budget = _Budget(how.config.max_skipped)
    for index in finished.values():
        for skip in index.skipped:
            budget.skip(how.config.videos / skip.source, skip.reason)
    budget.settle()
    total = sum(len(task.sources) for task in tasks)
    done = sum(len(index.sources) for index in finished.values())
    indexes = collections.defaultdict(list)
    with jobs.progress("encode", total, "videos", done) as progress:
        for task in tasks:
            index = finished.get(task.shard)
            if index is None:
                labels = [source.label for source in task.sources]
                outcomes = _encode_videos(task, how, budget, progress)
                index = shards.write_shard(task.shard, labels, outcomes)
            indexes[task.split].append((task.shard.name, index))
    return indexes


def _find_finished(task: Task) -> shards.ShardIndex | None:
    index = shards.read_index(task.shard)
    if index and list(index.sources) != [source.label for source in task.sources]:
        raise jobs.BadInput(
            f"{task.shard} was made of other videos than the folder has now: "
            "choose another folder for the shards"
        )
    return index


def _encode_videos(
    task: Task, how: Encoding, budget: _Budget, progress: jobs.Progress
) -> Iterator[shards.Example | shards.Skipped]:
    read = functools.partial(_read, config=how.config)
    for source, outcome in zip(task.sources, _read_ahead(read, task.sources), strict=True):
        if isinstance(outcome, videos.UnreadableVideo):
            budget.skip(source.path, str(outcome))
            budget.settle()
            yield shards.Skipped(source.label, str(outcome))
        else:
            yield from _encode_video(source, task.split, *outcome, how)
        progress.advance(note=source.label)


def _read(
    source: Source, config: EncodeConfig
) -> tuple[UInt8[np.ndarray, "frames height width 3"], Fraction] | videos.UnreadableVideo:
    try:
        frames, fps = videos.read_video(source.path, config.size)
        _check_length(len(frames), config.frames)
    except videos.UnreadableVideo as error:
        return error
    return frames, fps


def _read_ahead(function: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """`map`, a few items ahead in a thread of its own."""
    with ThreadPoolExecutor(1) as thread:
        pending: collections.deque[Future[Result]] = collections.deque()
        for item in items:
            pending.append(thread.submit(function, item))
            if len(pending) > READ_AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()


def _encode_video(
    source: Source,
    split: str,
    frames: UInt8[np.ndarray, "frames height width 3"],
    fps: Fraction,
    how: Encoding,
) -> Iterator[shards.Example]:
    config = how.config
    for first in videos.cut_clips(len(frames), config.frames, config.stride or config.frames):
        clip = frames[first : first + config.frames]
        record = {
            "source": source.label,
            "split": split,
            "first_frame": first,
            "fps": float(fps),
            "seed": config.seed,
        }
        yield from _encode_clip(f"{source.name}_{first:05}", clip, record, how)


def _encode_clip(
    name: str,
    clip: UInt8[np.ndarray, "frames height width 3"],
    record: dict[str, Any],
    how: Encoding,
) -> Iterator[shards.Example]:
    """One example for each mask protocol; the clip itself is encoded once."""
    height, width = clip.shape[1:3]
    drawn = {}
    for protocol in _protocols(how.config):
        key = f"{name}_{protocol}"
        mask = masks.draw_mask(protocol, len(clip), height, width, (how.config.seed, key))
        colour = how.colour or masks.visible_median(clip, mask)
        drawn[key] = (mask, masks.fill_hole(clip, mask, colour), protocol, colour)
    views = np.stack([clip, *(masked for _, masked, _, _ in drawn.values())])
    latents, *masked_latents = _encode_views(views, how.autoencoder)
    if not (np.isfinite(latents).all() and np.isfinite(masked_latents).all()):
        raise jobs.BadInput(
            f"{name}: {how.autoencoder.name} gives latents that float16 cannot hold: "
            "give another --autoencoder"
        )
    keeps = how.config.pixels in ("all", record["split"])
    for (key, (mask, _, protocol, colour)), hidden in zip(
        drawn.items(), masked_latents, strict=True
    ):
        full_record = {**record, "protocol": protocol, "fill": list(colour)}
        yield shards.Example(key, latents, hidden, mask, full_record, clip if keeps else None)


def _encode_views(
    views: UInt8[np.ndarray, "views frames height width 3"], autoencoder: Autoencoder
) -> Float16[np.ndarray, "views frames channels h w"]:
    # Without TF32, so that a GPU's latents are float32's.
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        return autoencoder.encode(to_pixels(views)).half().cpu().numpy()


def _protocols(config: EncodeConfig) -> list[masks.Protocol]:
    return ["stationary", "variable"] if config.protocol == "both" else [config.protocol]


def _write_manifest(
    split: str, made: Sequence[tuple[str, shards.ShardIndex]], how: Encoding
) -> None:
    config, autoencoder = how.config, how.autoencoder
    skipped = [skip for _, index in made for skip in index.skipped]
    filled = [(name, index) for name, index in made if index.examples]
    if not filled:
        raise jobs.BadInput(f"no video of the split {split} gave a clip: {skipped[0].reason}")
    mean, std = shards.latent_moments([index for _, index in filled])
    manifest = shards.Manifest(
        split=split,
        autoencoder=autoencoder.identity(),
        clip={"frames": config.frames, "height": how.height, "width": how.width},
        latent_shape=(
            config.frames,
            autoencoder.channels,
            how.height // autoencoder.downsampling,
            how.width // autoencoder.downsampling,
        ),
        masks={
            "protocols": _protocols(config),
            "grid": masks.GRID,
            "coverage": masks.COVERAGE,
            "seed": config.seed,
        },
        fill="median" if how.colour is None else list(how.colour),
        latents_mean=tuple(mean),
        latents_std=tuple(std),
        examples=sum(len(index.examples) for _, index in filled),
        shards=tuple(
            shards.ShardEntry(name, len(index.examples), index.bytes, index.sha256)
            for name, index in filled
        ),
        skipped=len(skipped),
    )
    folder = config.out / split
    lines = "".join(json.dumps(dataclasses.asdict(skip)) + "\n" for skip in skipped)
    jobs.write_atomically(folder / "skipped.jsonl", lines.encode())
    jobs.write_atomically(folder / shards.MANIFEST, manifest.to_json().encode())


def _check(config: EncodeConfig) -> masks.Colour | None:
    """The constant fill colour, None for the median; every setting is checked on the way."""
    jobs.refuse_launcher("encode")
    for name in ("frames", "stride", "size", "shard_size"):
        value = getattr(config, name)
        if value is not None and value < 1:
            raise jobs.BadInput(f"{name} is {value}: give 1 or more")
    if config.max_skipped < 0:
        raise jobs.BadInput(f"max_skipped is {config.max_skipped}: give 0 or more")
    return _parse_fill(config.fill)


def _parse_fill(fill: str) -> masks.Colour | None:
    if fill == "median":
        return None
    parts = fill.replace(" ", "").split(",")
    if len(parts) != 3 or not all(part.isdecimal() and int(part) <= 255 for part in parts):
        raise jobs.BadInput(f'fill is {fill!r}: give "median" or R,G,B, each 0 to 255')
    red, green, blue = map(int, parts)
    return red, green, blue


def _name_sources(root: Path) -> dict[str, list[Source]]:
    """Every video with its name: its stem, or its whole path where two videos share a stem.

    Names are unique over all splits, since masks and noise are drawn by a clip's key.
    """
    found = videos.find_splits(root)
    if outside := videos.find_outside(root, found):
        print(
            f"vidfill encode: left out {len(outside)} video(s) of {root} that lie outside its "
            f"splits' folders, the first is {outside[0]}",
            file=sys.stderr,
        )
    paths = [path for listed in found.values() for path in listed]
    stems = collections.Counter(_key_part(path.stem) for path in paths)

    def name(path: Path) -> str:
        stem = _key_part(path.stem)
        return stem if stems[stem] == 1 else _key_part(str(path.relative_to(root)))

    named: dict[str, Path] = {}
    for path in paths:
        if (other := named.setdefault(name(path), path)) != path:
            raise jobs.BadInput(f"{other} and {path} would share a key: rename one of them")
    return {
        split: [Source(path, name(path), path.relative_to(root).as_posix()) for path in listed]
        for split, listed in found.items()
    }


def _key_part(name: str) -> str:
    # WebDataset splits names at the first dot and takes slashes for folders.
    return re.sub(r"[^\w-]", "_", name)


def _survey(sources: Sequence[Source], config: EncodeConfig) -> tuple[int, int]:
    """The height and width of the job's frames, off the files' headers, before anything is written.

    Raises:
        jobs.BadInput: too many videos are unusable, or sizes differ and none was asked for.
    """
    budget = _Budget(config.max_skipped)
    sizes: dict[tuple[int, int], Source] = {}
    with jobs.progress("look at", len(sources), "videos") as progress:
        for source in sources:
            try:
                header = videos.read_header(source.path)
                if header.frames is not None:
                    _check_length(header.frames, config.frames)
                sizes.setdefault((header.height, header.width), source)
            except videos.UnreadableVideo as error:
                budget.skip(source.path, str(error))
            progress.advance()
    budget.settle()
    if not sizes:
        raise jobs.BadInput(f"{config.videos} has no usable video: {budget.first}")
    if config.size is not None:
        return config.size, config.size
    if len(sizes) > 1:
        (a, first), (b, second), *_ = sizes.items()
        raise jobs.BadInput(
            f"videos differ in size ({first.label} is {a[1]}x{a[0]}, {second.label} is "
            f"{b[1]}x{b[0]}): give --size"
        )
    return next(iter(sizes))


def _check_length(found: int, needed: int) -> None:
    if found < needed:
        raise videos.UnreadableVideo(f"it has {found} frames, a clip has {needed}")


def _check_fit(height: int, width: int, autoencoder: Autoencoder) -> None:
    step = autoencoder.downsampling
    if height % step or width % step:
        raise jobs.BadInput(
            f"frames are {width}x{height}; {autoencoder.name} takes multiples of {step}: "
            f"give --size {max(min(height, width) // step, 1) * step}"
        )


class _Budget:
    """Counts unusable videos and ends the job when they are too many."""

    def __init__(self, allowed: int) -> None:
        self.allowed = allowed
        self.count = 0
        self.first = ""

    def skip(self, path: Path, reason: str) -> None:
        self.count += 1
        self.first = self.first or f"{path}: {reason}"

    def settle(self) -> None:
        if self.count > self.allowed:
            raise jobs.BadInput(
                f"{self.first} ({self.count} unusable, --max_skipped is {self.allowed}): "
                f"replace it, or give --max_skipped {self.count}"
            )


def main(argv: Sequence[str] | None = None) -> int:
    return jobs.main(EncodeConfig, encode, argv, verb="encode", examples=EXAMPLES)


if __name__ == "__main__":
    sys.exit(main())
