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
import tarfile
import time
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ... import jobs
from ...errors import BadInput, say
from ...files import hash_file, locate, write_atomically
from ...modeling.autoencoder import Autoencoder, load_autoencoder, refuse_another
from ...processes import Crew, Tally, choose_device, wait_until_visible
from ...records import read_small
from ..masks import OWN, draw_mask
from ..shards.format import Example, Skipped
from ..shards.writing import read_index, write_shard
from ..storage.names import SKIPPED
from ..videos import FrameSize
from .manifest import bound_example, latent_shape, read_manifest, write_manifest
from .plan import PLAN, ShardId, ShardPlan, SurveyedVideo, plan_shards, survey
from .settings import EXAMPLES, EncodeConfig
from .sources import Source, find_outside, find_sources
from .stages import (
    STAGES,
    EncodedClip,
    RangeEnd,
    StageClock,
    decode_clips,
    encode_clips,
    encode_frames,
    make_examples,
    mask_clip,
)

CHANGEABLE = ("max_skipped", "videos", "mask_files", "device")  # when a job is continued


@dataclass(frozen=True)
class Timings:
    """Where the time of a job went; its stages overlap."""

    processes: int
    clips: int  # encoded now, not found finished
    elapsed: float  # seconds from the first shard's start to the last one's end
    stages: Mapping[str, float]  # seconds in which each was busy, summed over the processes

    def __str__(self) -> str:
        busy = ", ".join(
            f"{name} {seconds / self.elapsed / self.processes:.0%}"
            for name, seconds in self.stages.items()
        )
        return (
            f"{self.clips} clips in {self.elapsed:.1f} s, {self.clips / self.elapsed:.1f} clips/s "
            f"on {self.processes} process(es), which were busy: {busy}"
        )


def encode(config: EncodeConfig, again: Collection[ShardId] = ()) -> Timings | None:
    """Encode every video of `config.videos` into shards under `config.out`.

    Shards that are there already stay, unless they are to be made `again`.

    Returns:
        Where the time of all processes went; None in a process that is not the first.

    Raises:
        BadInput: a setting is wrong, or the videos cannot be encoded with it.
    """
    if Path(config.autoencoder).is_dir():  # the manifest names it by its whole path
        config = dataclasses.replace(config, autoencoder=locate(config.autoencoder))
    with contextlib.ExitStack() as stack:
        crew = stack.enter_context(Crew.join("encode"))
        config.check()
        begun = _begin(config, stack) if crew.rank == 0 else None
        digest = crew.share("plan", lambda: hash_file(config.out / PLAN))
        plan, autoencoder = begun or _join(config, digest)
        if crew.share("autoencoder", autoencoder.identity) != autoencoder.identity():
            raise BadInput(
                f"process {crew.rank} found another autoencoder in {config.autoencoder} than the "
                "first one: give all the same"
            )
        missing = crew.share("missing", lambda: _find_missing(config, plan, crew, again))
        shards = [ShardId(*shard) for shard in missing]
        timings = _write_shards(shards, config, plan, autoencoder, crew)
        if crew.rank > 0:
            return None
        _refuse_rewritten(config, plan)
        _write_manifests(config, plan, autoencoder)
        if whole := crew.add("without a hole", 0):
            say(f"vidfill encode: {whole} example(s) made now have a mask that hides nothing")
        say(f"vidfill encode: {timings}")
    return timings


def _begin(config: EncodeConfig, stack: contextlib.ExitStack) -> tuple[ShardPlan, Autoencoder]:
    """Claim the folder and put the plan there, or find both from before."""
    found = find_sources(config.videos, config.mask_files)
    if outside := find_outside(config.videos, found, config.mask_files):
        say(
            f"vidfill encode: left out {len(outside)} video(s) of {config.videos} that lie outside "
            f"its splits' folders, the first is {outside[0]}"
        )
    begun: tuple[ShardPlan, Autoencoder] | None = None
    if not (config.out / PLAN).is_file():
        videos = _survey(found, config)
        autoencoder = _load_autoencoder(config, videos)
        begun = _plan(videos, config, autoencoder), autoencoder

    def identify(_: object) -> dict[str, Any]:
        nonlocal begun
        if (config.out / PLAN).is_file():
            begun = _continue(found, config)
        assert begun is not None
        return {"autoencoder": begun[1].fingerprint()}

    claim = jobs.claim(config.out, "encode", config, stands_on=identify, may_change=CHANGEABLE)
    stack.enter_context(claim)
    assert begun is not None
    if not (config.out / PLAN).is_file():
        text = begun[0].to_json(config.videos, config.mask_files)
        write_atomically(config.out / PLAN, text.encode())
    return begun


def _continue(found: Sequence[Source], config: EncodeConfig) -> tuple[ShardPlan, Autoencoder]:
    """The plan that is there already; refuse other videos, and another autoencoder."""
    plan = _read_plan(config)
    if change := plan.differs(found):
        raise BadInput(
            f"{config.out} was begun with other videos ({change}): choose another folder for "
            "the shards, or put the videos back"
        )
    autoencoder = _load_autoencoder(config, plan.videos.values())
    for split in {shard.split for shard in plan.shards}:
        if recorded := read_manifest(config.out / split):
            refuse_another(
                *(autoencoder.identity(), recorded.autoencoder),
                *("autoencoder is", f"the split {split} was encoded with", "put that one back"),
            )
    return plan, autoencoder


def _join(config: EncodeConfig, digest: str) -> tuple[ShardPlan, Autoencoder]:
    """The first process's plan, once this node sees it."""
    path = config.out / PLAN
    differs = f"{path} is not what the first process wrote"
    wait_until_visible(lambda: "" if path.is_file() and hash_file(path) == digest else differs)
    plan = _read_plan(config)
    return plan, _load_autoencoder(config, plan.videos.values())


def _read_plan(config: EncodeConfig) -> ShardPlan:
    places = config.videos, config.mask_files
    try:
        text = read_small(config.out / PLAN)
        return ShardPlan.from_json(text, *places, config.frames, config.clip_stride)
    except ValueError as error:
        raise BadInput(
            f"{config.out / PLAN} is damaged: {error}: encode into another folder"
        ) from None


def _survey(found: Sequence[Source], config: EncodeConfig) -> list[SurveyedVideo]:
    """Look at every video's header; refuse too many unusable ones, and a split of them alone."""
    videos: list[SurveyedVideo] = []
    for split in dict.fromkeys(source.split for source in found):
        own = OWN in config.mix(split).weights
        of_split = [source for source in found if source.split == split]
        seen = survey(of_split, config.frames, own, config.frame_rate)
        if all(video.reason for video in seen):
            first = f"{config.videos / seen[0].source.label}: {seen[0].reason}"
            raise BadInput(f"no video of the split {split} is usable, the first is {first}")
        videos += seen
    if unusable := [video for video in videos if video.reason]:
        _refuse_skipped(len(unusable), unusable[0].source.label, unusable[0].reason, config)
    return videos


def _refuse_skipped(count: int, label: str, reason: str, config: EncodeConfig) -> None:
    if count > config.max_skipped:
        raise BadInput(
            f"{config.videos / label}: {reason} ({count} unusable, --max_skipped is "
            f"{config.max_skipped}): replace it, or give --max_skipped {count}"
        )


def _load_autoencoder(config: EncodeConfig, videos: Iterable[SurveyedVideo]) -> Autoencoder:
    """Load the autoencoder.

    Raises:
        BadInput: it cannot be loaded, or the frames do not fit it or a family of masks.
    """
    size = _choose_size(config, videos)
    autoencoder = load_autoencoder(
        config.autoencoder, choose_device(config.device), config.precision
    )
    step = autoencoder.downsampling
    if size.height % step or size.width % step:
        width, height = (max(side // step, 1) * step for side in (size.width, size.height))
        raise BadInput(
            f"frames are {size}; {autoencoder.name} takes multiples of {step}: "
            f"give --size {FrameSize(width, height)}"
        )
    families = {*config.mix("train").weights, *config.mix("validation").weights}
    for family in families - {OWN}:
        draw_mask(family, config.frames, size.height, size.width, ("does it fit",))
    if config.posterior == "moments":
        blank = np.zeros((1, size.height, size.width, 3), dtype=np.uint8)
        encode_frames(blank, autoencoder, config.posterior)  # refuses one without a posterior
    return autoencoder


def _choose_size(config: EncodeConfig, videos: Iterable[SurveyedVideo]) -> FrameSize:
    """The size of all frames; refuse videos that differ where none was asked for."""
    if config.frame_size:
        return config.frame_size
    usable = ((video.source.label, video.header) for video in videos if video.header)
    sizes = [(FrameSize(header.width, header.height), label) for label, header in usable]
    size, label = sizes[0]
    for other_size, other in sizes:
        if other_size != size:
            raise BadInput(
                f"videos differ in size ({label} is {size}, {other} is {other_size}): give --size"
            )
    return size


def _plan(
    videos: Sequence[SurveyedVideo], config: EncodeConfig, autoencoder: Autoencoder
) -> ShardPlan:
    """Cut each split's clips into shards; refuse shards that cannot hold one clip."""
    limit = int(config.shard_megabytes * 1e6) - tarfile.RECORDSIZE  # the tar's own end
    size = _choose_size(config, videos)
    shape = latent_shape(config.frames, size, autoencoder)
    moments = config.posterior == "moments"
    label = max(len(json.dumps(video.source.label)) for video in videos)
    clip_bytes = {
        split: config.masks_per_clip
        * bound_example(shape, size, moments, config.keeps_pixels(split), label)
        for split in {video.source.split for video in videos}
    }
    most = max(clip_bytes.values())
    if most > limit:
        least = math.ceil((most + tarfile.RECORDSIZE) / 1e5) / 10
        raise BadInput(
            f"shard_megabytes is {config.shard_megabytes}, and one clip may take more: "
            f"give --shard_megabytes {least}"
        )
    return plan_shards(videos, config.frames, config.clip_stride, clip_bytes, limit)


def _find_missing(
    config: EncodeConfig, plan: ShardPlan, crew: Crew, again: Collection[ShardId]
) -> list[ShardId]:
    """The shards that are not there yet; what was skipped before is counted."""
    for label, video in plan.videos.items():
        if video.reason:
            _count_skipped(label, video.reason, config, crew)
    missing = []
    for shard in plan.shards:
        index = read_index(config.out / shard.split, shard.number)
        if index is None or index.sources != plan.names(shard) or shard in again:
            missing.append(shard)
            continue
        for skip in index.skipped:
            _count_skipped(skip.source, skip.reason, config, crew)
    return missing


def _count_skipped(label: str, reason: str, config: EncodeConfig, crew: Crew) -> None:
    """Count an unusable video, once however many shards it has a part in."""
    if crew.add(f"skipped {json.dumps(label)}") == 1:  # a file's name may be no UTF-8
        _refuse_skipped(crew.add("skipped"), label, reason, config)


def _write_shards(
    missing: Sequence[ShardId],
    config: EncodeConfig,
    plan: ShardPlan,
    autoencoder: Autoencoder,
    crew: Crew,
) -> Timings:
    """Take shards and write them until none is left; the first process waits for the others."""
    began = time.monotonic()
    total, left = plan.count_clips(plan.shards), plan.count_clips(missing)
    with crew.tally("encode", total, "clips", total - left) as tally:
        for shard in crew.take("shards", missing):
            clock = StageClock()
            decoded = decode_clips(plan.shards[shard], plan.videos, config)
            masked = (
                clip if isinstance(clip, RangeEnd) else mask_clip(clip, config)
                for clip in clock.run_ahead(decoded, "decode", "masks")
            )
            encoded = encode_clips(
                clock.run_ahead(masked, "masks", "autoencoder"),
                *(autoencoder, config.posterior, config.batch_size),
            )
            results = clock.run_ahead(encoded, "autoencoder", "write")
            examples = _collect(results, config, plan, autoencoder, crew, tally)
            with clock.busy("write"):
                folder = config.out / shard.split
                write_shard(folder, shard.number, plan.names(shard), examples)
            for stage, seconds in clock.seconds.items():
                crew.add(f"{stage} in ms", round(seconds * 1000))
            tally.tell()
        crew.finish(tally.tell)
    return Timings(
        crew.size,
        crew.add("clips", 0),
        max(time.monotonic() - began, 1e-9),
        {stage: crew.add(f"{stage} in ms", 0) / 1000 for stage in STAGES},
    )


def _collect(
    results: Iterable[EncodedClip | RangeEnd],
    config: EncodeConfig,
    plan: ShardPlan,
    autoencoder: Autoencoder,
    crew: Crew,
    tally: Tally,
) -> Iterator[Example | Skipped]:
    """Hold a range's examples back until it was read to its end: a damaged video gives none."""
    held: list[Example] = []
    clips = 0
    for result in results:
        if isinstance(result, EncodedClip):
            held += make_examples(result, plan.fps(result.masked.clip.source), autoencoder, config)
            clips += 1
            tally.add()
            continue
        label = result.part.source.label
        if result.reason:
            _count_skipped(label, result.reason, config, crew)
            yield Skipped(label, result.reason)
        else:
            crew.add("without a hole", sum(not example.mask.any() for example in held))
            yield from held
        crew.add("clips", clips)
        tally.add(plan.count_range(result.part) - clips)  # those that there will never be
        held, clips = [], 0


def _refuse_rewritten(config: EncodeConfig, plan: ShardPlan) -> None:
    """Refuse shards of videos that were not the same from the first to the last."""
    if labels := plan.find_rewritten([video.source for video in plan.videos.values()]):
        raise BadInput(
            f"{len(labels)} video(s) were written anew while this job ran, the first is "
            f"{config.videos / labels[0]}: encode into another folder than {config.out}"
        )


def _write_manifests(config: EncodeConfig, plan: ShardPlan, autoencoder: Autoencoder) -> None:
    """Write what is known once all shards are there; say which videos were skipped."""
    size = _choose_size(config, plan.videos.values())
    skipped: dict[str, str] = {}
    for split, shards in Counter(shard.split for shard in plan.shards).items():
        skipped |= write_manifest(config, split, shards, size, autoencoder)
    if skipped:
        label, reason = next(iter(skipped.items()))
        say(
            f"vidfill encode: {len(skipped)} video(s) gave no clip, as {SKIPPED} tells; the "
            f"first is {label}: {reason}"
        )


def main(argv: Sequence[str] | None = None) -> int:
    return jobs.main(EncodeConfig, encode, argv, verb="encode", examples=EXAMPLES)
