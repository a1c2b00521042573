"""`vidfill encode`: videos -> clips -> masks -> latents -> shards.

One process or many, under any launcher: the first one makes the plan, which says of every shard
what it is made of; then each takes the next shard that is missing. A shard's bytes follow from its
part of the plan alone, so neither the number of processes nor an interruption changes them.

    decode ──▶ mask ──▶ encode ──▶ write        each in a thread of its own, a few clips apart
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import sys
import tarfile
import time
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from ... import jobs
from ...errors import BadInput
from ...files import hash_file, hold, write_atomically
from ...modeling.autoencoder import load_autoencoder
from ...processes import Crew, Tally, choose_device, wait_until_visible
from .. import masks
from ..shards.format import Example, Manifest, ShardTable, Skipped
from ..shards.order import choose_lanes
from ..shards.writing import latent_moments, read_index, write_shard
from ..storage.names import MANIFEST, SKIPPED, shard_name
from ..videos import FrameSize
from .plan import Piece, Plan, Surveyed, plan_shards, survey
from .settings import EncodeConfig, Encoding, Settings, Task, _check, _locate_autoencoder
from .sources import Source, find_outside, find_sources
from .stages import (
    STAGES,
    Masked,
    Result,
    _ahead,
    _decode,
    _encode,
    _encode_frames,
    _make_examples,
    _mask,
    _Watch,
)

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

NPY_HEADER = 128  # bytes


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


def encode(config: EncodeConfig, again: Collection[Task] = ()) -> Timings | None:
    """Encode every video of `config.videos` into shards under `config.out`.

    Args:
        config: What to encode, and how.
        again: Shards to make anew though they are there.

    Returns:
        Where the time of all processes went; None in a process that is not the first.

    Raises:
        BadInput: a setting is wrong, or the videos cannot be encoded with it.
    """
    config = _locate_autoencoder(config)
    with contextlib.ExitStack() as stack:
        crew = stack.enter_context(Crew.join("encode"))
        settings = _check(config)
        begun = _begin(config, settings) if crew.rank == 0 else None
        digest = crew.share("plan", lambda: hash_file(config.out / PLAN))
        if begun:
            stack.enter_context(hold(config.out))
        how = begun or _load(config, settings, _await_plan(config, digest))
        missing = crew.share("missing", lambda: _find_missing(how, crew, again))
        timings = _write_shards([Task(*task) for task in missing], how, crew)
        if crew.rank > 0:
            return None
        _finish(how)
        print(f"vidfill encode: {timings}", file=sys.stderr)
    return timings


def _begin(config: EncodeConfig, settings: Settings) -> Encoding:
    """Claim the folder and put the plan there, or find both from before."""
    found = find_sources(config.videos, config.mask_files)
    _say_outside(config, found)
    if (config.out / PLAN).is_file():
        _claim(config)
        plan = _read_plan(config)
        if change := plan.differs(found):
            raise BadInput(
                f"{config.out} was begun with other videos ({change}): choose another folder for "
                "the shards, or put the videos back"
            )
        return _load(config, settings, plan)
    surveyed = _survey(found, config, settings)
    how = _load(config, settings, Plan(surveyed, {}))
    how = dataclasses.replace(how, plan=_plan(how))
    _claim(config)
    write_atomically(config.out / PLAN, how.plan.to_json(config.videos, config.mask_files).encode())
    return how


def _say_outside(config: EncodeConfig, found: Sequence[Source]) -> None:
    if outside := find_outside(config.videos, found, config.mask_files):
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
        BadInput: too many videos are unusable, or all of a split.
    """
    surveyed: list[Surveyed] = []
    for split in _splits(found):
        own = masks.OWN in settings.mix(split).weights
        of_split = [source for source in found if source.split == split]
        seen = survey(of_split, config.frames, own, config.frame_rate)
        if all(one.reason for one in seen):
            first = f"{config.videos / seen[0].source.label}: {seen[0].reason}"
            raise BadInput(f"no video of the split {split} is usable, the first is {first}")
        surveyed += seen
    if unusable := [one for one in surveyed if one.reason]:
        _refuse_skipped(len(unusable), unusable[0].source.label, unusable[0].reason, config)
    return {one.source.label: one for one in surveyed}


def _splits(found: Iterable[Source]) -> list[str]:
    return list(dict.fromkeys(source.split for source in found))


def _refuse_skipped(count: int, label: str, reason: str, config: EncodeConfig) -> None:
    if count > config.max_skipped:
        raise BadInput(
            f"{config.videos / label}: {reason} ({count} unusable, --max_skipped is "
            f"{config.max_skipped}): replace it, or give --max_skipped {count}"
        )


def _load(config: EncodeConfig, settings: Settings, plan: Plan) -> Encoding:
    """With the autoencoder, and all that depends on the frames' size.

    Raises:
        BadInput: it cannot be loaded, or the frames do not fit it or a family of masks.
    """
    height, width = _choose_size(plan, settings)
    device = choose_device(config.device)
    autoencoder = load_autoencoder(config.autoencoder, device, config.precision)
    step = autoencoder.downsampling
    if height % step or width % step:
        fitting = FrameSize(max(width // step, 1) * step, max(height // step, 1) * step)
        raise BadInput(
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
        BadInput: sizes differ and none was asked for.
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
        raise BadInput(
            f"videos differ in size ({first} is {a[1]}x{a[0]}, {second} is {b[1]}x{b[0]}): "
            "give --size"
        )
    return next(iter(sizes))


def _plan(how: Encoding) -> Plan:
    """Cut each split's clips into shards.

    Raises:
        BadInput: a shard cannot hold one clip.
    """
    config, surveyed = how.config, how.plan.surveyed
    limit = int(config.shard_megabytes * 1e6) - tarfile.RECORDSIZE  # the tar's own end
    cut: dict[str, Sequence[Sequence[Piece]]] = {}
    for split in _splits(one.source for one in surveyed.values()):
        of_split = [one for one in surveyed.values() if one.source.split == split]
        clip_bytes = config.masks_per_clip * _bound_example(how, split)
        if clip_bytes > limit:
            least = math.ceil((clip_bytes + tarfile.RECORDSIZE) / 1e5) / 10
            raise BadInput(
                f"shard_megabytes is {config.shard_megabytes}, and one clip may take more: "
                f"give --shard_megabytes {least}"
            )
        cut |= plan_shards(of_split, config.frames, how.settings.stride, clip_bytes, limit).shards
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
    """The first process's plan, once this node sees it."""
    path = config.out / PLAN

    def find_missing() -> str:
        is_there = path.is_file() and hash_file(path) == digest
        return "" if is_there else f"{path} is not what the first process wrote"

    wait_until_visible(find_missing)
    return _read_plan(config)


def _find_missing(how: Encoding, crew: Crew, again: Collection[Task]) -> list[Task]:
    """The shards that are not there yet; what was skipped before is counted."""
    for one in how.plan.surveyed.values():
        if one.reason:
            _count_skipped(one.source.label, one.reason, how.config, crew)
    missing = []
    for task in how.tasks():
        index = read_index(how.config.out / task.split, task.number)
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


def _write_shards(missing: Sequence[Task], how: Encoding, crew: Crew) -> Timings:
    """Take shards and write them until none is left; the first process waits for the others."""
    began = time.monotonic()
    total, left = (_count_clips(tasks, how) for tasks in (how.tasks(), missing))
    with crew.tally("encode", total, "clips", total - left) as tally:
        for task in crew.take("shards", missing):
            watch = _Watch()
            _write_shard(task, how, crew, watch, tally)
            for stage, seconds in watch.seconds.items():
                crew.add(f"{stage} in ms", round(seconds * 1000))
            tally.tell()
        crew.finish(tally.tell)
    return Timings(
        crew.size,
        crew.add("clips", 0),
        time.monotonic() - began,
        {stage: crew.add(f"{stage} in ms", 0) / 1000 for stage in STAGES},
    )


def _count_clips(tasks: Iterable[Task], how: Encoding) -> int:
    return sum(how.count_clips(piece) for task in tasks for piece in how.pieces(task))


def _write_shard(task: Task, how: Encoding, crew: Crew, watch: _Watch, tally: Tally) -> None:
    decoded = _ahead(watch.drawing("decode", _decode(how.pieces(task), how)))
    masked = _ahead(_mask(decoded, how, watch))
    results = _ahead(_encode(masked, how, watch))
    outcomes = _collect(results, how, crew, tally)
    with watch.busy("write"):
        write_shard(
            how.config.out / task.split,
            task.number,
            how.sources(task),
            watch.drawing("write", outcomes, sign=-1),
        )


def _collect(
    results: Iterable[Result], how: Encoding, crew: Crew, tally: Tally
) -> Iterator[Example | Skipped]:
    """Hold a piece's examples back until it was read to its end: a damaged video gives none."""
    held: list[Example] = []
    clips = 0
    for event, latents in results:
        if isinstance(event, Masked):
            held += _make_examples(event, np.stack(latents), how)
            clips += 1
            tally.add()
        else:
            if event.reason:
                label = event.piece.source.label
                _count_skipped(label, event.reason, how.config, crew)
                yield Skipped(label, event.reason)
            else:
                yield from held
            crew.add("clips", clips)
            tally.add(how.count_clips(event.piece) - clips)  # those that there will never be
            held, clips = [], 0


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
        index = read_index(folder, number)
        if index is None:
            raise BadInput(
                f"{folder / shard_name(number)} is gone: the same command makes it again"
            )
        indexes.append(index)
    skipped = {skip.source: skip.reason for index in indexes for skip in index.skipped}
    table = ShardTable.of(indexes)
    if not sum(table.examples):
        label, reason = next(iter(skipped.items()))
        raise BadInput(f"no video of the split {split} gave a clip: {label}: {reason}")
    mean, std = latent_moments(indexes)
    lanes, block = choose_lanes(table.examples)
    colour = how.settings.colour
    manifest = Manifest(
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
        json.dumps(dataclasses.asdict(Skipped(*item))) + "\n" for item in skipped.items()
    )
    write_atomically(folder / SKIPPED, lines.encode())
    write_atomically(folder / MANIFEST, manifest.to_json().encode())
    return skipped


def main(argv: Sequence[str] | None = None) -> int:
    examples = f"{EXAMPLES}\nfamilies of masks:\n{masks.describe_families()}\n"
    return jobs.main(EncodeConfig, encode, argv, verb="encode", examples=examples)
