"""Which clips go into which shard, settled before the first is decoded."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, NamedTuple

from annotated_types import Len
from pydantic import BaseModel, StrictBool, StrictStr, StringConstraints, model_validator

from ...files import INSIDE, PLAIN, Fingerprint, in_threads, is_same
from ...progress import show_progress
from ...records import parse_json, read_small
from ..fingerprints import fingerprint_videos
from ..shards.format import Count, Key, Name, PositiveCount
from ..videos import Header, UnreadableVideo, cut_clips, read_header
from .sources import Source

PLAN = "plan.json"

SURVEY_THREADS = 16  # on a network's disk they mostly wait
AT_ONCE = 4096  # videos handed to the threads, so that a million do not wait in memory


class SurveyedVideo(NamedTuple):
    """What was seen of a video before anything is encoded."""

    source: Source
    seen: Fingerprint  # of its file or images, and of its masks
    header: Header | None  # None where it is unusable
    reason: str = ""  # why it is unusable


class ClipRange(NamedTuple):
    """Consecutive clips of one video: what shards are made of."""

    source: Source
    first_clip: int = 0
    clips: int | None = None  # None is all that follow

    def __str__(self) -> str:
        """The video's label, with the range of clips where it is not all of them."""
        if self.first_clip == 0 and self.clips is None:
            return self.source.label
        end = "" if self.clips is None else self.first_clip + self.clips
        return f"{self.source.label}[{self.first_clip}:{end}]"


class ShardId(NamedTuple):
    """Which shard of a data set."""

    split: str
    number: int


def survey(
    sources: Sequence[Source], length: int, own_masks: bool = False, frame_rate: float = 24.0
) -> list[SurveyedVideo]:
    """Look at every video's header, in parallel; the answer is in their order.

    Unusable are those that cannot be read, are shorter than a clip, or lack masks that fit.

    `length` is that of a clip, `frame_rate` that of folders of images.
    """

    def look(source: Source) -> SurveyedVideo:
        seen = _fingerprint(source)
        try:
            header = read_header(source.path, frame_rate, exact=own_masks)
            if header.frames < length:
                raise UnreadableVideo(f"it has {header.frames} frames, a clip has {length}")
            if own_masks:
                source.own_masks(header).check()
        except UnreadableVideo as error:
            return SurveyedVideo(source, seen, None, str(error))
        return SurveyedVideo(source, seen, header)

    surveyed = []
    with show_progress("look at", len(sources), "videos") as progress:
        for video in in_threads(look, sources, SURVEY_THREADS, AT_ONCE):
            surveyed.append(video)
            progress.advance(note=video.source.label)
    return surveyed


def _fingerprint(source: Source, known: Any = None) -> Fingerprint:
    """Of a video and its masks; of a large file some pieces are read, as there may be millions."""
    paths = [path for path in (source.path, source.masks) if path]
    return fingerprint_videos(*paths, known=known, whole=False)


_Split = Annotated[StrictStr, PLAIN]
_FrameRate = Annotated[StrictStr, StringConstraints(pattern=r"^\d{1,18}(/[1-9]\d{0,17})?$")]
_HeaderFields = tuple[PositiveCount, PositiveCount, PositiveCount, _FrameRate]
_Label = Annotated[Name, INSIDE]
_Ranges = Annotated[list[tuple[Count, Count, Count | None]], Len(1)]  # of a shard
_Seen = Count | tuple[Count, StrictStr, StrictStr]


class _PlanRecord(BaseModel):
    """plan.json: of each video what `ShardPlan.to_json` lists, of each split its shards' ranges."""

    sources: list[
        tuple[
            _Label, Key, _Split, _Label | None, StrictBool, _Seen, _HeaderFields | None, StrictStr
        ]
    ]
    shards: dict[_Split, Annotated[list[_Ranges], Len(1)]]

    @model_validator(mode="after")
    def _check(self) -> _PlanRecord:
        used = (video for listed in self.shards.values() for rows in listed for video, *_ in rows)
        if max(used, default=-1) >= len(self.sources):
            raise ValueError(f"a shard names a video beyond the {len(self.sources)} in sources")
        return self


@dataclass(frozen=True)
class ShardPlan:
    """What each shard of a job is made of: written once, read by all who work on it."""

    videos: Mapping[str, SurveyedVideo]  # by label, in order
    shards: Mapping[ShardId, Sequence[ClipRange]]
    length: int  # frames of a clip
    stride: int  # frames from one clip's start to the next's

    def names(self, shard: ShardId) -> tuple[str, ...]:
        """What a shard's index says that it is made of."""
        return tuple(str(part) for part in self.shards[shard])

    def fps(self, source: Source) -> float:
        """Frames per second of a video that is usable."""
        header = self.videos[source.label].header
        assert header is not None
        return float(header.fps)

    def count_range(self, part: ClipRange) -> int:
        """The clips that a range should have."""
        header = self.videos[part.source.label].header
        if part.clips is not None or header is None:
            return part.clips or 0
        return len(cut_clips(header.frames, self.length, self.stride)) - part.first_clip

    def count_clips(self, shards: Iterable[ShardId]) -> int:
        """The clips that shards should have."""
        return sum(self.count_range(part) for shard in shards for part in self.shards[shard])

    def to_json(self, root: Path, mask_files: Path | None) -> str:
        """The plan without its folders, which may lie elsewhere when it is read."""
        numbers = {label: number for number, label in enumerate(self.videos)}
        shards = defaultdict(list)
        for shard, parts in self.shards.items():
            listed = [[numbers[p.source.label], p.first_clip, p.clips] for p in parts]
            shards[shard.split].append(listed)
        rows = []
        for source, seen, header, reason in self.videos.values():
            masks = source.masks and source.masks.relative_to(mask_files or root)
            own = [source.label, source.name, source.split, masks, source.annotated]
            rows.append([*own, seen, header, reason])
        return json.dumps({"sources": rows, "shards": shards}, default=str)

    @classmethod
    def from_json(
        cls, text: str | bytes, root: Path, mask_files: Path | None, length: int, stride: int
    ) -> ShardPlan:
        """Read what `to_json` wrote; `root` and `mask_files` are where the videos lie now.

        ValueError names the field that is missing or wrong, in one line.
        """
        plan = parse_json(_PlanRecord, text)
        videos = []
        for label, name, split, masks, annotated, seen, fields, reason in plan.sources:
            own = Path(mask_files or root) / masks if masks else None
            source = Source(label, name, split, root / label, own, annotated)
            header = Header(*fields[:3], Fraction(fields[3])) if fields else None
            # Version 0.1 recorded the size alone.
            then = Fingerprint(seen, "", "") if isinstance(seen, int) else Fingerprint(*seen)
            videos.append(SurveyedVideo(source, then, header, reason))
        shards = {
            ShardId(split, number): [
                ClipRange(videos[video].source, first_clip, clips)
                for video, first_clip, clips in rows
            ]
            for split, listed in plan.shards.items()
            for number, rows in enumerate(listed)
        }
        return cls({video.source.label: video for video in videos}, shards, length, stride)

    def find_rewritten(self, sources: Sequence[Source]) -> list[str]:
        """The labels of those of the plan's videos that have been written anew since."""
        known = [source for source in sources if source.label in self.videos]

        def is_other(source: Source) -> bool:
            was = self.videos[source.label].seen
            return not is_same(was, _fingerprint(source, was))

        others = in_threads(is_other, known, SURVEY_THREADS, AT_ONCE)
        return [source.label for source, other in zip(known, others, strict=True) if other]

    def differs(self, sources: Sequence[Source]) -> str:
        """What is other in `sources` than in the plan, in one line; "" where nothing is."""
        before = {(video.source.split, label) for label, video in self.videos.items()}
        now = {(source.split, source.label) for source in sources}
        changes = {
            "added": [label for _, label in now - before],
            "removed": [label for _, label in before - now],
            "written anew": self.find_rewritten(sources),
        }
        return ", ".join(
            f"{len(labels)} {change} (the first is {min(labels)})"
            for change, labels in changes.items()
            if labels
        )


def read_splits(plan: Path) -> list[str]:
    """The splits that a plan.json names, if it is there; ValueError where it is no plan."""
    return list(parse_json(_PlanRecord, read_small(plan)).shards) if plan.is_file() else []


def plan_shards(
    videos: Sequence[SurveyedVideo],
    length: int,
    stride: int,
    clip_bytes: Mapping[str, int],
    shard_bytes: int,
) -> ShardPlan:
    """Lay the videos of each split end to end into shards, in their order, each as full as may be.

    A video stays whole unless it has more clips than a shard may hold: then each range but the
    last fills a shard of its own. An unusable video is in a shard too, which lists it.

    All examples of one clip take at most `clip_bytes` of its split, and a shard `shard_bytes`,
    which one clip's examples may exceed.
    """
    shards: dict[str, list[list[ClipRange]]] = {}
    room: dict[str, int] = {}
    for video in videos:
        split = video.source.split
        most = max(1, shard_bytes // clip_bytes[split])
        clips = len(cut_clips(video.header.frames, length, stride)) if video.header else 0
        parts = [ClipRange(video.source, first, most) for first in range(0, clips - most, most)]
        last = ClipRange(video.source, most * len(parts))
        listed = shards.setdefault(split, [[]])
        for part in [*parts, last]:
            count = part.clips or clips - part.first_clip
            if count > room.setdefault(split, most):
                listed.append([])
                room[split] = most
            listed[-1].append(part)
            room[split] -= count
    numbered = {
        ShardId(split, number): parts
        for split, listed in shards.items()
        for number, parts in enumerate(listed)
    }
    return ShardPlan({video.source.label: video for video in videos}, numbered, length, stride)
