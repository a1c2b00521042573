"""`vidfill verify`: whether a data set is what encode wrote, and holds what it says.

Every byte is read from its disk or server once: a few threads look at shards side by side, and each
computes a shard's SHA-256 first, so that its examples then come out of the page cache. Here are the
files, their checksums, and repair; `evidence` judges the numbers, `findings` prints what was found.
"""

from __future__ import annotations

import collections
import contextlib
import functools
import io
import itertools
import json
import os
import re
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np
import torch
import xxhash
from jaxtyping import UInt8, UInt64

from ... import jobs
from ...errors import BadInput
from ...files import PARTIAL, hash_file, in_threads
from ...modeling.autoencoder import Autoencoder, load_autoencoder
from ...processes import choose_device
from ...progress import show_progress
from ...seeding import derive_seed
from ..encode.plan import PLAN, ShardId
from ..encode.run import encode
from ..encode.settings import EncodeConfig
from ..encode.sources import SPLITS
from ..shards.format import DamagedShard, Example, Manifest, Skipped, family_of
from ..shards.reading import ExampleLayout, Shard, has_split
from ..shards.writing import read_index
from ..storage.cache import NodeCache
from ..storage.names import INDEX_SUFFIX, MANIFEST, SKIPPED, index_name, shard_name
from ..storage.store import CacheConfig, LocalStore, open_store
from ..storage.transfer import WrongFile
from ..videos import Fit, FrameSize, UnreadableVideo, clips_of, read_frames, read_header
from . import latents as checks
from .findings import ANEW, ORIGINAL, REPAIR, Look, is_sound, show
from .latents import Frames, Sample, Totals

EXAMPLES = """examples:
  vidfill verify runs/shards
  vidfill verify runs/shards --repair
      what is damaged or missing is encoded again
  vidfill verify s3://bucket/shards --split validation --videos CLEVRER --samples 64
      shards that lie elsewhere, compared with more of their videos
"""

THREADS = 8  # that read shards, at most; hashing and inflating leave Python's lock
AT_ONCE = 64  # shards that are given to them at a time
RECORD = {"source": str, "split": str, "first_frame": int, "family": str, "fill": list}


@dataclass(frozen=True)
class VerifyConfig:
    """Check a data set of shards: its files, checksums and values, and a sample of its clips.

    A few clips of each split are decoded, and compared with their videos where those are at hand.
    Nothing is written without `repair`. The exit status is 0 where all is well, 1 where something
    is wrong and 2 where nothing could be checked.
    """

    dataset: str
    """The folder that `vidfill encode` wrote, or its URL."""
    split: str = ""
    """One split; empty checks all."""
    videos: Path | None = None
    """The folder of videos; null is where they were when they were encoded."""
    samples: int = 8
    """Clips of a split to decode and compare; 0 loads no autoencoder."""
    repair: bool = False
    """Encode again what is damaged or missing, with the same options, and check once more."""
    autoencoder: str = ""
    """Where the autoencoder lies now; empty is where it was."""
    device: str = "auto"
    """Where the autoencoder runs: "cpu", "cuda", "cuda:1"…; "auto" is a GPU if there is one."""


def verify(config: VerifyConfig) -> list[Look]:
    """Check a data set, and say in a table what was found; return it, by split.

    Raises:
        BadInput: there is no such data set, or it cannot be repaired from here.
    """
    jobs.refuse_launcher("verify")
    if config.samples < 0:
        raise BadInput(f"samples is {config.samples}: give 0 or more")
    root = _find_folder(config.dataset)
    if config.repair and root is None:
        raise BadInput(
            f"repair is true, and {config.dataset} is a URL: repair the folder that it was "
            "uploaded from"
        )
    if config.videos and not config.videos.is_dir():
        raise BadInput(f"videos is {config.videos}, which is no folder: name the videos'")
    looks = _look(config, root)
    show(looks)
    if config.repair and root and not is_sound(looks):
        _repair(root, config, looks)
        looks = _look(config, root)
        show(looks)
    return looks


class _Split(NamedTuple):
    """A split that has a manifest."""

    name: str
    root: Path | None  # the data set's folder; None where it is behind a URL
    config: VerifyConfig
    store: LocalStore | NodeCache
    manifest: Manifest


def _look(config: VerifyConfig, root: Path | None) -> list[Look]:
    """Look at every split, one after the other."""
    load = functools.cache(load_autoencoder)
    looks = []
    # Its own, so that what lies behind a URL is read there, not where another job has kept it.
    with tempfile.TemporaryDirectory(prefix="vidfill-verify-") as folder:
        for name in _find_splits(config, root):
            look = Look(name, _choose_remedy(root))
            looks.append(look)
            with contextlib.closing(open_store(config.dataset, name, CacheConfig(folder))) as store:
                look.manifest = _read_manifest(store, look)
                if look.manifest:
                    store.expect(look.manifest.shards)
                    _look_at_split(_Split(name, root, config, store, look.manifest), look, load)
    return looks


def _find_folder(dataset: str) -> Path | None:
    """The folder of a data set; None where it is behind a URL."""
    store = open_store(dataset, "", CacheConfig())
    return store.folder if isinstance(store, LocalStore) else None


def _choose_remedy(root: Path | None) -> str:
    return REPAIR if root else ORIGINAL


def _find_splits(config: VerifyConfig, root: Path | None) -> list[str]:
    """The splits to look at: whatever there is of one counts, and what the plan names."""
    if root:
        names = {*_read_json(root / PLAN).get("shards", {})}
        for pattern in ("shard-*.tar", MANIFEST):
            names |= {path.parent.name for path in root.glob(f"*/{pattern}")}
    elif config.split:
        names = {config.split}
    else:
        names = set(open_store(config.dataset, "", CacheConfig()).splits())
        # A server need not list its folders.
        names = names or {name for name in SPLITS if has_split(config.dataset, name)}
    if not names:
        raise BadInput(f"{config.dataset} holds no encoded split: make one with `vidfill encode`")
    order = [*SPLITS, *sorted(names)]
    found = sorted(names, key=order.index)
    if config.split and config.split not in found:
        raise BadInput(f"split is {config.split!r}; {config.dataset} has {', '.join(found)}")
    return [config.split] if config.split else found


def _read_json(path: Path) -> dict[str, Any]:
    """A file's object; empty where there is no such file, or none in it."""
    try:
        tree = json.loads(path.read_bytes())
    except (FileNotFoundError, ValueError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _read_encoding(root: Path | None) -> dict[str, Any]:
    """The configuration of the `vidfill encode` that wrote `root`; empty where it is not known."""
    job = _read_json(root / "job.json") if root else {}
    config = job.get("config")
    return config if job.get("verb") == "encode" and isinstance(config, dict) else {}


@dataclass
class _Seen:
    """What is remembered of a shard, or of a split, until all of it was looked at."""

    totals: Totals = field(default_factory=Totals)
    hashes: dict[int, UInt64[np.ndarray, " keys"]] = field(default_factory=dict)  # by shard
    skipped: set[str] = field(default_factory=set)  # videos
    samples: list[tuple[int, Example]] = field(default_factory=list)  # with their shards' numbers

    def merge(self, other: _Seen) -> None:
        self.totals.add(other.totals)
        self.hashes |= other.hashes
        self.skipped |= other.skipped
        self.samples += other.samples


def _read_manifest(store: LocalStore | NodeCache, look: Look) -> Manifest | None:
    look.seen["manifest"] += 1
    where = store.describe(MANIFEST)
    try:
        content = store.read(MANIFEST)
    except FileNotFoundError:
        look.find("manifest", MANIFEST, "it is missing, so nothing here can be checked")
        return None
    try:
        return Manifest.from_json(content, where)
    except BadInput as error:
        # The place and the remedy have columns of their own.
        reason = str(error).removeprefix(where).lstrip(": ")
        look.find("manifest", MANIFEST, re.sub("[:;] encode again$", "", reason))
        return None


def _look_at_split(split: _Split, look: Look, load: Callable[..., Autoencoder]) -> None:
    seen = _look_at_shards(split, look)
    _check_manifest(split, look)
    _check_skipped(split, seen.skipped, look)
    if split.root:
        _check_extra(split.root / split.name, split.manifest, look)
    _check_keys(split, seen.hashes, look)
    checks.check_statistics(split.manifest, seen.totals, look)
    checks.check_average(seen.totals, look)
    powers = _check_samples(split, seen.samples, look, load)
    checks.check_scaling(split.manifest, seen.totals, powers, look)


def _look_at_shards(split: _Split, look: Look) -> _Seen:
    seen = _Seen()
    rows = _choose_samples(split.manifest, split.config.samples)
    count = len(split.manifest.shards.examples)
    with show_progress(f"verify {split.name}", count, "shards") as progress:
        for number, (found, of_shard) in enumerate(_each_shard(split, rows)):
            look.merge(found)
            seen.merge(of_shard)
            progress.advance(note=shard_name(number))
    return seen


def _choose_samples(manifest: Manifest, samples: int) -> dict[int, set[int]]:
    """Rows by shard: one example, chosen by a hash, out of each of `samples` equal parts."""
    ends = np.cumsum(manifest.shards.examples)
    count = min(samples, manifest.examples)
    chosen: dict[int, set[int]] = collections.defaultdict(set)
    for part in range(count):
        first = part * manifest.examples // count
        size = (part + 1) * manifest.examples // count - first
        place = first + derive_seed(manifest.split, part, "verify") % size
        number = int(np.searchsorted(ends, place, side="right"))
        chosen[number].add(place - int(ends[number]) + manifest.shards.examples[number])
    return chosen


def _each_shard(split: _Split, rows: Mapping[int, set[int]]) -> Iterator[tuple[Look, _Seen]]:
    """What each shard shows, by number; threads stop when the caller does."""
    look_at = functools.partial(_look_at_shard, split, rows)
    numbers = range(len(split.manifest.shards.examples))
    return in_threads(look_at, numbers, min(THREADS, os.cpu_count() or 1), AT_ONCE)


def _check_manifest(split: _Split, look: Look) -> None:
    """What a manifest says of all shards together."""
    manifest = split.manifest
    if manifest.split != split.name:
        look.find("manifest", MANIFEST, f"it is that of the split {manifest.split!r}")
    if max(manifest.lanes, manifest.block) > manifest.examples:
        reason = f"{manifest.lanes} lanes of blocks of {manifest.block} are more than its examples"
        look.find("manifest", MANIFEST, reason)


def _check_skipped(split: _Split, skipped: set[str], look: Look) -> None:
    """Whether the list of skipped videos, the shards' indexes and the manifest agree."""
    look.seen["manifest"] += 1
    try:
        listed = [json.loads(line) for line in split.store.read(SKIPPED).splitlines()]
        videos = {Skipped(**skip).source for skip in listed}
    except FileNotFoundError:
        look.find("manifest", SKIPPED, "it is missing")
        return
    except (ValueError, TypeError):
        look.find("manifest", SKIPPED, "it is not what was written")
        return
    if not look.bad["shards"] and videos != skipped:
        reason = f"it lists {len(videos)} videos, the indexes {len(skipped)}, or others"
        look.find("manifest", SKIPPED, reason)
    if len(videos) != split.manifest.skipped:
        reason = f"it says that {split.manifest.skipped} videos were skipped, not {len(videos)}"
        look.find("manifest", MANIFEST, reason)


def _check_extra(folder: Path, manifest: Manifest, look: Look) -> None:
    """Whether there are shards or indexes that the manifest does not count."""
    numbers = range(len(manifest.shards.examples))
    known = {name(number) for number in numbers for name in (shard_name, index_name)}
    for name in sorted(set(os.listdir(folder)) - known):
        if name.endswith((".tar", INDEX_SUFFIX)) and not name.startswith(PARTIAL):
            look.find("manifest", name, "no shard of the manifest's", remedy="remove it")


def _check_keys(
    split: _Split, hashes: Mapping[int, UInt64[np.ndarray, " keys"]], look: Look
) -> None:
    """Whether no two examples of a split share a key; a key is kept as 8 bytes."""
    ordered = np.sort(np.concatenate([np.empty(0, np.uint64), *hashes.values()]))
    look.seen["keys"] = len(ordered)
    twice = np.unique(ordered[1:][ordered[1:] == ordered[:-1]])
    found: dict[str, str] = {}
    for number, of_shard in hashes.items():
        rows = np.flatnonzero(np.isin(of_shard, twice)).tolist()
        keys = Shard(split.store.path(number), number, split.manifest).keys if rows else ()
        where = shard_name(number)
        for key in (keys[row] for row in rows):
            if key in found:
                reason = f"{found[key]} has an example of this key too"
                look.find("keys", f"{where} {key}", reason, remedy=ANEW)
            found[key] = where


def _look_at_shard(split: _Split, rows: Mapping[int, set[int]], number: int) -> tuple[Look, _Seen]:
    look, seen = Look(split.name, _choose_remedy(split.root)), _Seen()
    find = functools.partial(look.find_in_shard, number)
    look.seen["shards"] += 1
    try:
        path = split.store.path(number)
        shard = Shard(path, number, split.manifest)
        look.seen["SHA-256"] += 1
        if hash_file(path) != split.manifest.shards.sha256[number]:
            find("SHA-256", "its bytes are not those that were written")
        _check_tar(shard, look)
        _check_examples(shard, split.manifest, rows.get(number, set()), look, seen)
    except DamagedShard as error:
        find("shards", error.reason)
    except WrongFile as error:
        find("shards", f"it, or its index, {error.reason}")
    except OSError as error:
        find("shards", f"it cannot be read: {error.strerror}")
    return look, seen


def _check_tar(shard: Shard, look: Look) -> None:
    """Whether a plain reader of tars finds the members that the index names, and no others."""
    look.seen["tar members"] += 1
    index = shard.index
    places = (
        (f"{key}.{name}", column.offsets[row], column.sizes[row])
        for row, key in enumerate(index.keys)
        for name, column in index.members.items()
    )
    try:
        with tarfile.open(shard.path, "r:") as tar:
            for member, place in itertools.zip_longest(tar, places):
                if member is None:
                    raise tarfile.ReadError(f"it ends before {place[0]}")
                if (member.name, member.offset_data, member.size) != place or not member.isreg():
                    expected = f"where its index has {place[0]}" if place else "behind its end"
                    raise tarfile.ReadError(f"it has {member.name!r} {expected}")
    except tarfile.TarError as error:
        look.find_in_shard(shard.number, "tar members", f"a plain reader sees: {error}")


def _check_examples(
    shard: Shard, manifest: Manifest, samples: set[int], look: Look, seen: _Seen
) -> None:
    """Whether every example can be read, and its numbers are such as encode gives."""
    span = ExampleLayout.of(manifest)
    raw = np.empty(span.bytes, np.uint8)
    latent_mask = span.views(torch.from_numpy(raw)[None])["latent_mask"][0].numpy()
    for row, key in enumerate(shard.keys):
        look.seen["XXH3, shapes"] += 1
        try:
            shard.read_span(row, raw.data)
            example = shard.read(row)
            reason = _find_wrong_header(raw, span) or _find_wrong_record(example, manifest)
        except DamagedShard as error:
            reason = error.reason
        if reason:
            look.find_in_shard(shard.number, "XXH3, shapes", reason, key)
            continue
        seen.totals.add(checks.check_example(shard.number, example, latent_mask, manifest, look))
        if row in samples:
            seen.samples.append((shard.number, example))
    checks.check_sums(shard, seen.totals, look)
    hashes = [xxhash.xxh3_64_intdigest(key.encode()) for key in shard.keys]
    seen.hashes[shard.number] = np.array(hashes, np.uint64)
    seen.skipped = {skip.source for skip in shard.index.skipped}


def _find_wrong_header(raw: UInt8[np.ndarray, " span"], span: ExampleLayout) -> str:
    """Whether other readers find the arrays that training takes, which looks at no header."""
    for name, place in span.arrays.items():
        whole = io.BytesIO()
        np.save(whole, np.empty(place.shape, np.float16))
        header = whole.getvalue()[: place.data - place.offset]
        if raw[place.offset : place.data].tobytes() != header:
            return f"{name} is no array of the manifest's shape {list(place.shape)}"
    return ""


def _find_wrong_record(example: Example, manifest: Manifest) -> str:
    record = example.record if isinstance(example.record, dict) else {}
    for name, kind in RECORD.items():
        if not isinstance(record.get(name), kind):
            return f"its record has no {name}"
    if record["split"] != manifest.split or record["family"] != family_of(example.key):
        return f"its record is of the split {record['split']} and the family {record['family']}"
    levels = record["fill"]
    if len(levels) != 3 or not all(type(level) is int and 0 <= level <= 255 for level in levels):
        return f"its fill is {levels}, which is no colour"
    path = PurePosixPath(record["source"])
    if path.is_absolute() or ".." in path.parts:
        return f"its source {record['source']} would lie outside the folder of videos"
    return ""


def _check_samples(
    split: _Split,
    samples: Sequence[tuple[int, Example]],
    look: Look,
    load: Callable[..., Autoencoder],
) -> list[int]:
    """As `checks.check_samples`, where there are samples, and the split's autoencoder."""

    def leave_out(reason: str) -> list[int]:
        look.notes["decoded"] = look.notes["encoded again"] = reason
        return []

    if not samples:
        return leave_out("no clip could be read" if split.config.samples else "samples is 0")
    try:
        autoencoder = _load(split, load)
    except BadInput as error:
        if split.config.autoencoder:
            raise
        return leave_out(str(error))
    return checks.check_samples(_read_samples(split, samples), autoencoder, split.manifest, look)


def _load(split: _Split, load: Callable[..., Autoencoder]) -> Autoencoder:
    """The autoencoder of a split.

    Raises:
        BadInput: it cannot be loaded, or it is another.
    """
    config, recorded = split.config, split.manifest.autoencoder
    name = config.autoencoder or str(recorded["name"])
    device = choose_device(config.device)
    autoencoder = load(name, device, recorded.get("precision", "float32"))
    identity = autoencoder.identity()
    for part in ("kind", "sha256", "scaling_factor"):
        if identity[part] != recorded[part]:
            raise BadInput(
                f"autoencoder is {name}, whose {part} is {identity[part]}; the split "
                f"{split.name} was encoded with {recorded[part]}: name that one"
            )
    return autoencoder


def _read_samples(split: _Split, samples: Sequence[tuple[int, Example]]) -> Iterator[Sample]:
    encoding = _read_encoding(split.root)
    videos = split.config.videos or (Path(encoding["videos"]) if "videos" in encoding else None)
    fit = encoding.get("fit")
    with show_progress(f"compare {split.name}", len(samples), "clips") as progress:
        for number, example in samples:
            source = _read_source(example, videos, fit, split.manifest.clip) if videos else None
            yield Sample(number, example, source)
            progress.advance(note=example.key)


def _read_source(
    example: Example, videos: Path, fit: Fit | None, clip: dict[str, int]
) -> Frames | None:
    """An example's clip as its video shows it; None where that is not at hand.

    Nor is it where the video has another size and nothing says how it was fitted.
    """
    path, first = videos / example.record["source"], example.record["first_frame"]
    size = FrameSize(clip["width"], clip["height"])
    try:
        if fit is None:
            header = read_header(path)
            if (header.width, header.height) != (size.width, size.height):
                return None
            fit = "crop"
        with contextlib.closing(read_frames(path, size, fit, first)) as frames:
            _, found = next(clips_of(frames, clip["frames"], stride=1, clips=1), (first, None))
    except UnreadableVideo:
        return None
    return found


def _repair(root: Path, config: VerifyConfig, looks: Sequence[Look]) -> None:
    """Encode what is damaged or missing, as it was encoded before.

    Raises:
        BadInput: it is not known how, or the videos are not there.
    """
    findings = [finding for look in looks for finding in look.findings]
    if all(finding.remedy != REPAIR for finding in findings):
        print("vidfill verify: encoding again repairs nothing of this", file=sys.stderr)
        return
    encoding = _read_encoding(root)
    try:
        videos = config.videos or Path(encoding["videos"])
        mask_files = encoding["mask_files"] and Path(encoding["mask_files"])
        places = {"videos": videos, "out": root, "mask_files": mask_files, "device": config.device}
        again = EncodeConfig(**{**encoding, **places})
    except (KeyError, TypeError):
        raise BadInput(
            f"{root / 'job.json'} does not say how this was encoded: encode into another folder"
        ) from None
    if not videos.is_dir():
        raise BadInput(f"cannot repair: the videos are not in {videos}; give --videos")
    encode(again, {ShardId(look.split, number) for look in looks for number in look.damaged})
    for look in looks:
        _say_changed(root / look.split, look)


def _say_changed(folder: Path, look: Look) -> None:
    """Name the shards that did not become what they were."""
    if look.manifest is None:
        return
    for number in sorted(look.damaged):
        index = read_index(folder, number)
        if index and index.sha256 != look.manifest.shards.sha256[number]:
            path = folder / shard_name(number)
            print(
                f"vidfill verify: {path} has another SHA-256 than its manifest said: either the "
                "manifest's was of the damage, or this device or version rounds otherwise",
                file=sys.stderr,
            )


def main(argv: Sequence[str] | None = None) -> int:
    looks: list[Look] = []
    status = jobs.main(
        VerifyConfig,
        lambda config: looks.extend(verify(config)),
        argv,
        verb="verify",
        examples=EXAMPLES,
    )
    return status or int(not is_sound(looks))
