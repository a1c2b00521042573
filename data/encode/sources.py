"""The videos to encode, found in the layouts that data sets come in."""

from __future__ import annotations

import collections
import functools
import hashlib
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ...errors import BadInput
from ...files import be_plain
from ...records import read_small
from ..own_masks import OwnMasks
from ..videos import IMAGE_SUFFIXES, SUFFIXES, Header, UnreadableVideo, list_frames, list_images

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


@dataclass(frozen=True)
class Source:
    """One video to encode."""

    label: str  # its path below the folder of videos, with slashes
    name: str  # begins its examples' keys: ASCII letters, digits, _ and -
    split: str
    path: Path  # a video file, or a folder of frames
    masks: Path | None = None  # its own masks: a video, one image for all frames, or a folder
    annotated: bool = False  # its masks are annotations, where all but 0 is hole

    def own_masks(self, header: Header) -> OwnMasks:
        """The masks that came with the video.

        Raises:
            UnreadableVideo: none did.
        """
        if self.masks is None:
            raise UnreadableVideo("it has no masks of its own")
        names = [image.stem for image in list_frames(self.path)] if self.path.is_dir() else ()
        return OwnMasks(self.masks, header, names, all_but_zero=self.annotated)


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

    Hidden files and folders are left out. `mask_files` is a folder of masks that mirrors `root`,
    used instead of annotations: for `a/b.mp4` a video `a/b.mkv`, an image `a/b.png` for all frames,
    or a folder `a/b` of images. `data.own_masks` says how they are read.

    Raises:
        BadInput: a folder is missing or holds no video, a split has two folders, two videos
            would share a key, or `mask_files` fits no video.
    """
    if not root.is_dir():
        raise BadInput(f"videos is {root}, which is no folder: name a folder of videos")
    if mask_files is not None and not (mask_files.is_dir() and not mask_files.samefile(root)):
        raise BadInput(f"mask_files is {mask_files}: name a folder of masks beside or below {root}")
    found = _find(root, mask_files)
    paths = [path for _, path, _ in found]
    masks = [own for *_, own in found]
    if mask_files is not None:
        masks = _mirror(paths, root, mask_files)
    return [
        Source(
            label=path.relative_to(root).as_posix(),
            name=name,
            split=split,
            path=path,
            masks=own,
            annotated=own is not None and mask_files is None,
        )
        for (split, path, _), name, own in zip(found, _name(root, paths), masks, strict=True)
    ]


def find_outside(root: Path, sources: Sequence[Source], mask_files: Path | None) -> list[Path]:
    """The videos under `root` that are none of its `sources`, sorted."""
    inside = {source.path for source in sources}
    return [path for path in _search(root, mask_files) if path not in inside]


def _find(root: Path, mask_files: Path | None) -> list[tuple[str, Path, Path | None]]:
    """The split, path and annotations of each video."""
    if (root / FRAMES).is_dir() and (root / LISTS).is_dir():
        return _find_davis(root)
    folders = {}
    for split, names in SPLITS.items():
        present = [name for name in names if (root / name).is_dir()]
        if len(present) > 1:
            raise BadInput(
                f"{root} has both {' and '.join(present)} for the split {split}: keep one of them"
            )
        if present:
            folders[split] = root / present[0]
    if folders:
        return [
            (split, *video)
            for split, folder in folders.items()
            for video in _list_videos(folder, mask_files)
        ]
    videos = _list_videos(root, mask_files)
    matches = (re.fullmatch(r"video_([01]\d{4})", path.stem, re.ASCII) for path, _ in videos)
    numbers = [int(match[1]) for match in matches if match]
    if len(numbers) < len(videos):
        return [("train", *video) for video in videos]
    return [
        (split, *video)
        for split, official in CLEVRER.items()
        for number, video in zip(numbers, videos, strict=True)
        if number in official
    ]


def _find_davis(root: Path) -> list[tuple[str, Path, Path | None]]:
    resolutions = sorted(path.name for path in (root / FRAMES).iterdir() if path.is_dir())
    if DAVIS_RESOLUTION in resolutions:
        resolutions = [DAVIS_RESOLUTION]
    if len(resolutions) != 1:
        raise BadInput(
            f"{root / FRAMES} has the resolutions {', '.join(resolutions) or 'none'}: "
            f"keep one of them, or add {DAVIS_RESOLUTION}"
        )
    frames, annotations = (root / kind / resolutions[0] for kind in (FRAMES, ANNOTATIONS))
    years = sorted(path for path in (root / LISTS).iterdir() if path.name.isdecimal())
    for year in reversed(years):
        found = [
            (split, frames / name, _annotations(annotations / name))
            for split, listed in DAVIS_LISTS.items()
            if (year / listed).is_file()
            for name in _read_names(year / listed)
        ]
        if found:
            return found
    raise BadInput(
        f"{root / LISTS} has no YEAR/train.txt or YEAR/val.txt that names a video: "
        "DAVIS comes with them"
    )


def _read_names(listed: Path) -> list[str]:
    try:
        return sorted({be_plain(name) for name in read_small(listed).decode().split()})
    except ValueError as error:
        raise BadInput(f"{listed} names no video of its folder: {error}") from None


def _list_videos(folder: Path, mask_files: Path | None) -> list[tuple[Path, Path | None]]:
    """The videos of one split, sorted, each with its annotations."""
    found: list[tuple[Path, Path | None]]
    if (folder / FRAMES).is_dir():
        paths = (folder / FRAMES).iterdir()
        videos = sorted(path for path in paths if path.is_dir() and not path.name.startswith("."))
        found = [(path, _annotations(folder / ANNOTATIONS / path.name)) for path in videos]
    else:
        found = [(path, None) for path in _search(folder, mask_files)]
    if not found:
        raise BadInput(
            f"{folder} holds no video (looked for {', '.join(sorted(SUFFIXES))}, and for folders "
            f"of {', '.join(sorted(IMAGE_SUFFIXES))}): name a folder that does"
        )
    return found


def _annotations(folder: Path) -> Path | None:
    return folder if folder.is_dir() and list_images(folder) else None


def _search(top: Path, mask_files: Path | None) -> list[Path]:
    """The video files and folders of frames below `top`, sorted.

    `top` itself is a folder of frames only where there is nothing else in it: a picture beside
    videos is no video. A link to what is found anyway, as to a folder around it, is left out.
    """
    found, root = [], top.resolve()
    visited = {root}

    def leads_back(path: Path) -> bool:
        return path.is_symlink() and path.resolve().is_relative_to(root)

    def is_new(folder: Path) -> bool:
        """Whether a folder is not found anyway; from now on it is."""
        if leads_back(folder) or (place := folder.resolve()) in visited:
            return False
        visited.add(place)
        return True

    for parent, folders, names in os.walk(top, onerror=_raise, followlinks=True):
        here = Path(parent)
        if FRAMES in folders and ANNOTATIONS in folders:
            folders.remove(ANNOTATIONS)
        folders[:] = [
            name
            for name in sorted(folders)
            if not name.startswith(".")
            and not (mask_files is not None and mask_files.samefile(here / name))
            and is_new(here / name)
        ]
        files = [here / name for name in names if not name.startswith(".")]
        files = [path for path in files if not leads_back(path)]
        videos = [path for path in files if path.suffix.lower() in SUFFIXES]
        has_images = any(path.suffix.lower() in IMAGE_SUFFIXES for path in files)
        found += videos or ([here] if has_images else [])
    return sorted(path for path in found if path != top) or found


def _raise(error: OSError) -> None:
    raise error


def _mirror(paths: Sequence[Path], root: Path, mask_files: Path) -> list[Path | None]:
    """The masks of each video in `mask_files`."""

    @functools.cache
    def list_by_stem(folder: Path) -> dict[str, list[Path]]:
        listed: dict[str, list[Path]] = collections.defaultdict(list)
        for path in sorted(folder.glob("*")):
            if path.suffix.lower() in SUFFIXES | IMAGE_SUFFIXES or path.is_dir():
                listed[_stem(path)].append(path)
        return listed

    mirrored = []
    for path in paths:
        place = mask_files / path.relative_to(root)
        present = list_by_stem(place.parent).get(_stem(place), [])
        if len(present) > 1:
            listed = " and ".join(masks.name for masks in present)
            raise BadInput(
                f"{place.parent} has {listed} for one video, {path.name}: keep one of them"
            )
        mirrored.append(present[0] if present else None)
    if not any(mirrored):
        expected = mask_files / paths[0].relative_to(root).with_suffix("")
        raise BadInput(
            f"mask_files is {mask_files}, which has no mask for any of {len(paths)} videos: "
            f"name a folder that mirrors {root}, with {expected}.png or the like"
        )
    return mirrored


def _stem(path: Path) -> str:
    """A name without a suffix that tells a file's kind; a folder's name may have any dots."""
    return path.stem if path.suffix.lower() in SUFFIXES | IMAGE_SUFFIXES else path.name


def _name(root: Path, paths: Sequence[Path]) -> list[str]:
    """Each video's stem, or its whole path where two videos share a stem.

    Names are unique over all splits, since masks and noise are drawn by a clip's key.
    """
    stems = [make_key_part(_stem(path.resolve() if path == root else path)) for path in paths]
    count = collections.Counter(stems)
    named: dict[str, Path] = {}
    for path, stem in zip(paths, stems, strict=True):
        name = stem if count[stem] == 1 else make_key_part(path.relative_to(root).as_posix())
        if name in named:
            raise BadInput(f"{named[name]} and {path} would share a key: rename one of them")
        named[name] = path
    return list(named)


def make_key_part(name: str) -> str:
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
