"""Which clips go into which shard, settled before the first is decoded."""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

from ...files import in_threads
from ...progress import show_progress
from ..videos import (
    Header,
    UnreadableVideo,
    cut_clips,
    list_images,
    read_header,
)
from .sources import AT_ONCE, THREADS, Source


class Surveyed(NamedTuple):
    """What was seen of a source before anything is encoded."""

    source: Source
    bytes: int  # of its file or images, and of its masks
    header: Header | None  # None where it is unusable
    reason: str = ""  # why it is unusable


class Piece(NamedTuple):
    """Consecutive clips of one source: what shards are made of."""

    source: Source
    first_clip: int = 0
    clips: int | None = None  # None is all that follow

    def __str__(self) -> str:
        """The source's label, with the range of clips where the piece is a part."""
        if self.first_clip == 0 and self.clips is None:
            return self.source.label
        end = "" if self.clips is None else self.first_clip + self.clips
        return f"{self.source.label}[{self.first_clip}:{end}]"


def survey(
    sources: Sequence[Source], length: int, own_masks: bool = False, frame_rate: float = 24.0
) -> list[Surveyed]:
    """Look at every source, in parallel, and tell in their order what each is.

    Unusable are those that cannot be read, are shorter than a clip, or lack masks that fit.

    Args:
        sources: what `find_sources` found.
        length: frames of a clip.
        own_masks: the sources' own masks are needed.
        frame_rate: frames per second of folders of frames.
    """
    look = functools.partial(_look, length=length, own_masks=own_masks, frame_rate=frame_rate)
    with show_progress("look at", len(sources), "videos") as progress:
        surveyed = []
        for seen in in_threads(look, sources, THREADS, AT_ONCE):
            surveyed.append(seen)
            progress.advance(note=seen.source.label)
    return surveyed


def _look(source: Source, length: int, own_masks: bool, frame_rate: float) -> Surveyed:
    size = _measure(source)
    try:
        header = read_header(source.path, frame_rate)
        if header.frames < length:
            raise UnreadableVideo(f"it has {header.frames} frames, a clip has {length}")
        if own_masks:
            source.own_masks(header).check()
    except UnreadableVideo as error:
        return Surveyed(source, size, None, str(error))
    return Surveyed(source, size, header)


def _measure(source: Source) -> int:
    """Bytes of a source's frames and masks, as files."""
    return sum(_file_bytes(path) for path in (source.path, source.masks) if path)


def _file_bytes(path: Path) -> int:
    files = list_images(path) if path.is_dir() else [path]
    return sum(file.stat().st_size for file in files if file.exists())


@dataclass(frozen=True)
class Plan:
    """What each shard of a job is made of: written once, read by all who work on it."""

    surveyed: Mapping[str, Surveyed]  # by label, in order
    shards: Mapping[str, Sequence[Sequence[Piece]]]  # by split and number

    def to_json(self, root: Path, mask_files: Path | None) -> str:
        """The plan without its folders, which may lie elsewhere when it is read."""
        numbers = {label: number for number, label in enumerate(self.surveyed)}
        shards = {
            split: [
                [[numbers[piece.source.label], *piece[1:]] for piece in shard] for shard in listed
            ]
            for split, listed in self.shards.items()
        }
        sources = [_to_row(seen, mask_files or root) for seen in self.surveyed.values()]
        return json.dumps({"sources": sources, "shards": shards})

    @classmethod
    def from_json(cls, text: str | bytes, root: Path, mask_files: Path | None) -> Plan:
        """Read what `to_json` wrote; `root` and `mask_files` are where the videos lie now."""
        tree = json.loads(text)
        surveyed = [_from_row(row, root, mask_files or root) for row in tree["sources"]]
        shards = {
            split: [[Piece(surveyed[row[0]].source, *row[1:]) for row in shard] for shard in listed]
            for split, listed in tree["shards"].items()
        }
        return cls({seen.source.label: seen for seen in surveyed}, shards)

    def differs(self, sources: Sequence[Source]) -> str:
        """What is other in `sources` than in the plan, in one line; "" where nothing is."""
        before = {(seen.source.split, label): seen.bytes for label, seen in self.surveyed.items()}
        sizes = in_threads(_measure, sources, THREADS, AT_ONCE)
        now = {
            (source.split, source.label): size for source, size in zip(sources, sizes, strict=True)
        }
        changes = {
            "added": [label for label in now if label not in before],
            "removed": [label for label in before if label not in now],
            "of another size": [
                label for label in now if now[label] != before.get(label, now[label])
            ],
        }
        return ", ".join(
            f"{len(labels)} {change} (the first is {labels[0][1]})"
            for change, labels in changes.items()
            if labels
        )


def _to_row(seen: Surveyed, masks_root: Path) -> list[Any]:
    source, header = seen.source, seen.header
    masks = source.masks and source.masks.relative_to(masks_root).as_posix()
    fields = header and [header.frames, header.height, header.width, str(header.fps)]
    own = [source.label, source.name, source.split, masks, source.annotated]
    return [*own, seen.bytes, fields, seen.reason]


def _from_row(row: list[Any], root: Path, masks_root: Path) -> Surveyed:
    label, name, split, masks, annotated, size, fields, reason = row
    source = Source(label, name, split, root / label, masks and masks_root / masks, annotated)
    if fields is None:
        return Surveyed(source, size, None, reason)
    frames, height, width, fps = fields
    return Surveyed(source, size, Header(frames, height, width, Fraction(fps)))


def plan_shards(
    surveyed: Sequence[Surveyed], length: int, stride: int, clip_bytes: int, shard_bytes: int
) -> Plan:
    """Lay the sources end to end into shards, in their order, each as full as its maximum allows.

    A source stays whole unless it has more clips than a shard may hold: then each piece but the
    last fills a shard of its own. An unusable source is in a shard too, which lists it.

    Args:
        surveyed: what `survey` returned.
        length: frames of a clip.
        stride: frames from one clip's start to the next's.
        clip_bytes: at most what all examples of one clip take in a shard.
        shard_bytes: maximum of a shard; one clip's examples may exceed it.
    """
    most = max(1, shard_bytes // clip_bytes)
    shards: dict[str, list[list[Piece]]] = {}
    room: dict[str, int] = {}
    for seen in surveyed:
        split = seen.source.split
        listed = shards.setdefault(split, [[]])
        for piece, clips in _cut(seen, length, stride, most):
            if clips > room.setdefault(split, most):
                listed.append([])
                room[split] = most
            listed[-1].append(piece)
            room[split] -= clips
    return Plan({seen.source.label: seen for seen in surveyed}, shards)


def _cut(seen: Surveyed, length: int, stride: int, most: int) -> Iterator[tuple[Piece, int]]:
    """The pieces of a source, each with its number of clips."""
    clips = len(cut_clips(seen.header.frames, length, stride)) if seen.header else 0
    first = 0
    while clips - first > most:
        yield Piece(seen.source, first, most), most
        first += most
    yield Piece(seen.source, first), clips - first
