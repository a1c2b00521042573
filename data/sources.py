"""What there is to encode: found in the layouts that data sets come in, and cut into shards."""

from __future__ import annotations

import collections
import contextlib
import functools
import hashlib
import itertools
import json
import os
import re
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import UInt8

from .. import jobs
from .videos import (
    IMAGE_SUFFIXES,
    SUFFIXES,
    Fit,
    FrameSize,
    Header,
    UnreadableVideo,
    clips_of,
    cut_clips,
    fit_mask,
    list_frames,
    list_images,
    open_image,
    read_frames,
    read_header,
)

SPLITS = {
    "train": ("video_train", "train"),
    "validation": ("video_validation", "validation", "valid", "val"),
    "test": ("video_test", "test"),
}
CLEVRER = {
    "train": range(10_000),
    "validation": range(10_000, 15_000),
    "test": range(15_000, 20_000),
}
DAVIS_LISTS = {"train": "train.txt", "validation": "val.txt"}
DAVIS_RESOLUTION = "480p"  # of two or more, the one that everybody uses
FRAMES, ANNOTATIONS, LISTS = "JPEGImages", "Annotations", "ImageSets"

LONGEST_NAME = 48  # so that a member of a shard, KEY.masked_latents.npy, fits a tar's 100 bytes
THREADS = 16  # that look at videos; on a network's disk they mostly wait
AT_ONCE = 4096  # videos handed to the threads, so that a million do not wait in memory
HOLE_ABOVE = 127  # of 255; compression blurs a mask

Hole = UInt8[np.ndarray, "height width"]


@dataclass(frozen=True)
class Source:
    """One video to encode."""

    label: str  # its path below the folder of videos, with slashes
    name: str  # begins its examples' keys: ASCII letters, digits, _ and -
    split: str
    path: Path  # a video file, or a folder of frames
    masks: Path | None = None  # its own masks: a video, one image for all frames, or a folder
    annotated: bool = False  # its masks are annotations, where all but 0 is hole


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


class Clip(NamedTuple):
    """One clip of a piece."""

    first: int  # the number of its first frame in the video
    frames: UInt8[np.ndarray, "frames height width 3"]
    mask: UInt8[np.ndarray, "frames height width"] | None  # its own, where that was asked for


class _Found(NamedTuple):
    split: str
    path: Path
    masks: Path | None = None


def find_sources(root: Path, mask_files: Path | None = None) -> list[Source]:
    """The videos under `root`, by split, then by path, in one of these layouts.

    - DAVIS: `JPEGImages/480p/VIDEO/00000.jpg`, `Annotations/480p/VIDEO/00000.png`, and the splits
      in `ImageSets/YEAR/train.txt` and `val.txt` of the newest year.
    - Folders of splits: `train` or `video_train`, `validation`, `valid`, `val` or
      `video_validation`, `test` or `video_test`. Each is searched to the bottom for video files
      and for folders of frames, which hold images and no video. A split may also be as in
      YouTube-VOS: `train/JPEGImages/VIDEO/00000.jpg` and `train/Annotations/VIDEO/00000.png`.
    - No such folder: all is searched in the same way. Videos that are all named as CLEVRER's,
      `video_00000` to `video_19999`, get its official splits (10,000, 5,000 and 5,000); others are
      all "train".

    Hidden files and folders are left out. An annotated frame's hole is all that is not 0; a frame
    without an annotation takes that of the nearest before it, else of the nearest after.

    Args:
        root: the folder of videos.
        mask_files: a folder of masks that mirrors `root`, used instead of annotations: for
            `a/b.mp4` a video `a/b.mkv`, an image `a/b.png` for all frames, or a folder `a/b` of
            images, one a frame or with the frames' names. The hole is above 127 of 255, and
            everything but 0 in an image with a palette.

    Raises:
        jobs.BadInput: a folder is missing or holds no video, a split has two folders, two videos
            would share a key, or `mask_files` fits no video.
    """
    if not root.is_dir():
        raise jobs.BadInput(f"videos is {root}, which is no folder: name a folder of videos")
    if mask_files is not None and not (mask_files.is_dir() and not mask_files.samefile(root)):
        raise jobs.BadInput(
            f"mask_files is {mask_files}: name a folder of masks beside or below {root}"
        )
    found = _find(root, mask_files)
    if mask_files is not None:
        found = _mirror(found, root, mask_files)
    names = _name(root, [video.path for video in found])
    return [
        Source(
            label=video.path.relative_to(root).as_posix(),
            name=name,
            split=video.split,
            path=video.path,
            masks=video.masks,
            annotated=video.masks is not None and mask_files is None,
        )
        for video, name in zip(found, names, strict=True)
    ]


def find_outside(root: Path, sources: Sequence[Source], mask_files: Path | None) -> list[Path]:
    """The videos under `root` that are none of its `sources`, sorted."""
    inside = {source.path for source in sources}
    return [path for path in _search(root, mask_files) if path not in inside]


def _find(root: Path, mask_files: Path | None) -> list[_Found]:
    if (root / FRAMES).is_dir() and (root / LISTS).is_dir():
        return _find_davis(root)
    if folders := _split_folders(root):
        return [
            _Found(split, path, masks)
            for split, folder in folders.items()
            for path, masks in _list_videos(folder, mask_files)
        ]
    listed = _list_videos(root, mask_files)
    splits = _clevrer_splits([path for path, _ in listed]) or ["train"] * len(listed)
    found = [_Found(split, *pair) for split, pair in zip(splits, listed, strict=True)]
    return sorted(found, key=lambda video: list(SPLITS).index(video.split))


def _split_folders(root: Path) -> dict[str, Path]:
    folders = {}
    for split, names in SPLITS.items():
        present = [name for name in names if (root / name).is_dir()]
        if len(present) > 1:
            raise jobs.BadInput(
                f"{root} has both {' and '.join(present)} for the split {split}: keep one of them"
            )
        if present:
            folders[split] = root / present[0]
    return folders


def _find_davis(root: Path) -> list[_Found]:
    resolution = _davis_resolution(root / FRAMES)
    frames, annotations = root / FRAMES / resolution, root / ANNOTATIONS / resolution
    years = sorted(path for path in (root / LISTS).iterdir() if path.name.isdecimal())
    for year in reversed(years):
        lists = {split: year / name for split, name in DAVIS_LISTS.items()}
        found = [
            _Found(split, frames / name, _annotations(annotations / name))
            for split, file in lists.items()
            if file.is_file()
            for name in sorted(set(file.read_text().split()))
        ]
        if found:
            return found
    raise jobs.BadInput(
        f"{root / LISTS} has no YEAR/train.txt or YEAR/val.txt that names a video: "
        "DAVIS comes with them"
    )


def _davis_resolution(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir() if path.is_dir())
    if DAVIS_RESOLUTION in names:
        return DAVIS_RESOLUTION
    if len(names) != 1:
        raise jobs.BadInput(
            f"{folder} has the resolutions {', '.join(names) or 'none'}: "
            f"keep one of them, or add {DAVIS_RESOLUTION}"
        )
    return names[0]


def _clevrer_splits(paths: Sequence[Path]) -> list[str]:
    """Each video's official split; none at all unless every video is named as CLEVRER's."""
    splits = []
    for path in paths:
        match = re.fullmatch(r"video_(\d{5})", path.stem, re.ASCII)
        number = int(match[1]) if match else -1
        splits += [split for split, numbers in CLEVRER.items() if number in numbers]
    return splits if len(splits) == len(paths) else []


def _list_videos(folder: Path, mask_files: Path | None) -> list[tuple[Path, Path | None]]:
    """The videos of one split, sorted, each with its annotations."""
    found: list[tuple[Path, Path | None]]
    if (folder / FRAMES).is_dir():
        videos = sorted(path for path in (folder / FRAMES).iterdir() if _is_open_folder(path))
        found = [(path, _annotations(folder / ANNOTATIONS / path.name)) for path in videos]
    else:
        found = [(path, None) for path in _search(folder, mask_files)]
    if not found:
        raise jobs.BadInput(
            f"{folder} holds no video (looked for {', '.join(sorted(SUFFIXES))}, and for folders "
            f"of {', '.join(sorted(IMAGE_SUFFIXES))}): name a folder that does"
        )
    return found


def _is_open_folder(path: Path) -> bool:
    return path.is_dir() and not path.name.startswith(".")


def _annotations(folder: Path) -> Path | None:
    return folder if folder.is_dir() and list_images(folder) else None


def _search(top: Path, mask_files: Path | None) -> list[Path]:
    """The video files and folders of frames below `top`, sorted.

    `top` itself is a folder of frames only where there is nothing else in it: a picture beside
    videos is no video.
    """
    found = []
    for parent, folders, names in os.walk(top, onerror=_raise, followlinks=True):
        here = Path(parent)
        if FRAMES in folders and ANNOTATIONS in folders:
            folders.remove(ANNOTATIONS)
        folders[:] = [
            name
            for name in folders
            if not name.startswith(".")
            and not (mask_files is not None and mask_files.samefile(here / name))
        ]
        files = [here / name for name in names if not name.startswith(".")]
        videos = [path for path in files if path.suffix.lower() in SUFFIXES]
        has_images = any(path.suffix.lower() in IMAGE_SUFFIXES for path in files)
        found += videos or ([here] if has_images else [])
    return sorted(path for path in found if path != top) or found


def _raise(error: OSError) -> None:
    raise error


def _mirror(found: Sequence[_Found], root: Path, mask_files: Path) -> list[_Found]:
    """The same videos with their masks out of `mask_files`."""
    list_masks = functools.cache(_list_masks)
    mirrored = []
    for video in found:
        place = mask_files / video.path.relative_to(root)
        present = list_masks(place.parent).get(_stem(place), [])
        if len(present) > 1:
            listed = " and ".join(path.name for path in present)
            raise jobs.BadInput(
                f"{place.parent} has {listed} for one video, {video.path.name}: keep one of them"
            )
        mirrored.append(video._replace(masks=present[0] if present else None))
    if not any(video.masks for video in mirrored):
        expected = mask_files / found[0].path.relative_to(root).with_suffix("")
        raise jobs.BadInput(
            f"mask_files is {mask_files}, which has no mask for any of {len(found)} videos: "
            f"name a folder that mirrors {root}, with {expected}.png or the like"
        )
    return mirrored


def _list_masks(folder: Path) -> dict[str, list[Path]]:
    listed: dict[str, list[Path]] = collections.defaultdict(list)
    for path in sorted(folder.iterdir()) if folder.is_dir() else []:
        if path.suffix.lower() in SUFFIXES | IMAGE_SUFFIXES or path.is_dir():
            listed[_stem(path)].append(path)
    return listed


def _stem(path: Path) -> str:
    """A name without a suffix that tells a file's kind; a folder's name may have any dots."""
    return path.stem if path.suffix.lower() in SUFFIXES | IMAGE_SUFFIXES else path.name


def _name(root: Path, paths: Sequence[Path]) -> list[str]:
    """Each video's stem, or its whole path where two videos share a stem.

    Names are unique over all splits, since masks and noise are drawn by a clip's key.
    """
    stems = [_key_part(_stem(path.resolve() if path == root else path)) for path in paths]
    count = collections.Counter(stems)
    names = [
        stem if count[stem] == 1 else _key_part(path.relative_to(root).as_posix())
        for path, stem in zip(paths, stems, strict=True)
    ]
    named: dict[str, Path] = {}
    for path, name in zip(paths, names, strict=True):
        if name in named:
            raise jobs.BadInput(f"{named[name]} and {path} would share a key: rename one of them")
        named[name] = path
    return names


def _key_part(name: str) -> str:
    """A name of ASCII letters, digits, _ and -, as WebDataset's keys and plain tars can hold it.

    Letters outside ASCII become their code points, so that names in another script stay apart.
    """
    plain = re.sub(
        r"[^\w-]",
        lambda found: "_" if found[0].isascii() else f"u{ord(found[0]):04x}",
        name,
        flags=re.ASCII,
    )
    if len(plain) <= LONGEST_NAME:
        return plain
    digest = hashlib.blake2b(os.fsencode(name), digest_size=5).hexdigest()
    return f"{plain[: LONGEST_NAME - len(digest) - 1]}-{digest}"


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
    with jobs.progress("look at", len(sources), "videos") as progress:
        surveyed = []
        for seen in jobs.in_threads(look, sources, THREADS, AT_ONCE):
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
            _check_masks(source, header)
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
        sizes = jobs.in_threads(_measure, sources, THREADS, AT_ONCE)
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


def read_clips(
    piece: Piece,
    length: int,
    stride: int,
    size: FrameSize | None = None,
    fit: Fit = "crop",
    own_masks: bool = False,
) -> Generator[Clip, None, None]:
    """The clips of a piece, in memory one at a time; nothing after the last is decoded.

    What comes before the piece is decoded and dropped, so that its frames are those that reading
    the video from its start gives, to the bit.

    Args:
        piece: what to read.
        length: frames of a clip.
        stride: frames from one clip's start to the next's.
        size: what each frame becomes; None keeps the frames as they are.
        fit: see `videos.read_frames`; masks are cropped alike, and take the nearest value.
        own_masks: whether the clips come with the source's own masks.

    Raises:
        UnreadableVideo: the video, or its own masks, cannot be read, are damaged, or end before
            the piece does. This may come after some of the clips.
    """
    source, start = piece.source, piece.first_clip * stride
    with contextlib.ExitStack() as opened:
        pixels = opened.enter_context(
            contextlib.closing(read_frames(source.path, size, fit, start))
        )
        holes = None
        if own_masks:
            masks = opened.enter_context(contextlib.closing(_read_masks(source, start, size, fit)))
            holes = clips_of(masks, length, stride, piece.clips)
        made = 0
        for first, frames in clips_of(pixels, length, stride, piece.clips):
            mask = None
            if holes is not None:
                _, mask = next(holes, (first, None))
                if mask is None:
                    raise UnreadableVideo(f"its masks end before frame {start + first + length}")
            yield Clip(start + first, frames, mask)
            made += 1
    if made < (piece.clips or 1):
        raise UnreadableVideo(f"it ends before frame {start + made * stride + length}")


def _read_masks(
    source: Source, first: int, size: FrameSize | None, fit: Fit
) -> Generator[Hole, None, None]:
    """A source's own masks from frame `first` on, 1 in the hole, as large as its frames become."""
    header = read_header(source.path)
    masks = _check_masks(source, header)
    size = size or FrameSize(header.width, header.height)
    if isinstance(masks, list):
        for image, used in itertools.groupby(masks[first:]):
            hole = _load_hole(image, source.annotated)
            _check_shape(hole.shape[1], hole.shape[0], header)
            yield from itertools.repeat(fit_mask(hole, size, fit), len(list(used)))
    else:
        with _naming(masks), contextlib.closing(read_frames(masks, first=first)) as frames:
            for pixels in frames:
                yield fit_mask((pixels.max(axis=-1) > HOLE_ABOVE).astype(np.uint8), size, fit)


def _check_masks(source: Source, header: Header) -> Path | list[Path]:
    """The source's mask video, or one image for each of its frames; all that fits is checked.

    Raises:
        UnreadableVideo: there are none, or they are not of as many frames or of another shape.
    """
    masks = source.masks
    if masks is None:
        raise UnreadableVideo("it has no masks of its own")
    if not masks.is_dir() and masks.suffix.lower() in SUFFIXES:
        with _naming(masks):
            found = read_header(masks)
        _check_count(found.frames, header)
        _check_shape(found.width, found.height, header)
        return masks
    images = _images_by_frame(source, header) if masks.is_dir() else [masks] * header.frames
    with open_image(images[0]) as image:
        _check_shape(image.width, image.height, header)
    return images


@contextlib.contextmanager
def _naming(masks: Path) -> Iterator[None]:
    try:
        yield
    except UnreadableVideo as error:
        raise UnreadableVideo(f"of its masks {masks.name}: {error}") from error


def _images_by_frame(source: Source, header: Header) -> list[Path]:
    """One image for each frame out of a folder of masks: by the frames' names, or by order."""
    assert source.masks is not None
    with _naming(source.masks):
        images = {image.stem: image for image in list_frames(source.masks)}
    frames = [image.stem for image in list_frames(source.path)] if source.path.is_dir() else []
    if images.keys().isdisjoint(frames):
        _check_count(len(images), header)
        return list(images.values())
    if stray := images.keys() - set(frames):
        raise UnreadableVideo(f"its mask {min(stray)} has no frame of that name")
    nearest = next(images[name] for name in frames if name in images)
    return [nearest := images.get(name, nearest) for name in frames]


def _check_count(found: int, header: Header) -> None:
    if found != header.frames:
        raise UnreadableVideo(f"it has {header.frames} frames, its masks have {found}")


def _check_shape(width: int, height: int, header: Header) -> None:
    # A smaller copy has its sides rounded to whole pixels.
    if abs(width * header.height - height * header.width) > max(
        header.width, header.height, width, height
    ):
        raise UnreadableVideo(
            f"it is {header.width}x{header.height}, its mask {width}x{height}, another shape"
        )


def _load_hole(path: Path, annotated: bool) -> Hole:
    with open_image(path) as image:
        indexed = image.mode == "P"
        values = np.asarray(image if indexed else image.convert("RGB"))
    highest = values if indexed else values.max(axis=-1)
    return (highest > (0 if indexed or annotated else HOLE_ABOVE)).astype(np.uint8)
